"""The command on stand-ins of LLaMA-Factory's modules; `make trainers` runs it in LLaMA-Factory itself."""

import importlib
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from tests.integrations import standins


@dataclass
class FinetuningArguments:
    stage: str = "dpo"
    pref_beta: float = 0.1
    pref_loss: str = "sigmoid"
    pref_ftx: float = 0.0
    ld_alpha: float | None = None
    use_mca: bool = False
    use_ref_model: bool = field(default=True, init=False)


class Trainer:
    pass


@pytest.fixture
def factory(monkeypatch):
    """Modules that parse a configuration and build a trainer, as LLaMA-Factory's do."""
    built = []
    paths = (
        "launcher",
        "extras.constants",
        "train.tuner",
        "train.dpo.trainer",
        "train.kto.trainer",
        "train.kto.workflow",
    )
    modules = standins.install(monkeypatch, [f"llamafactory.{path}" for path in paths])
    tuner, launcher = modules["llamafactory.train.tuner"], modules["llamafactory.launcher"]
    dpo, kto = modules["llamafactory.train.dpo.trainer"], modules["llamafactory.train.kto.workflow"]
    dpo.CustomDPOTrainer = type("CustomDPOTrainer", (Trainer,), {})
    kto.CustomKTOTrainer = type("CustomKTOTrainer", (Trainer,), {})
    modules["llamafactory.train.kto.trainer"].CustomKTOTrainer = kto.CustomKTOTrainer
    modules["llamafactory.extras.constants"].IGNORE_INDEX = -100

    def get_train_args(args):
        settings = {
            name: value for name, value in args.items() if name in FinetuningArguments.__dataclass_fields__
        }
        unknown = args.keys() - settings.keys() - {"use_ray"}
        if unknown:
            raise ValueError(f"Some keys are not used: {sorted(unknown)}")
        return None, None, None, FinetuningArguments(**settings), None

    def run_exp(args=None, callbacks=None):
        arguments = tuner.get_train_args(tuner.read_args(args))[3]
        kind = dpo.CustomDPOTrainer if arguments.stage == "dpo" else kto.CustomKTOTrainer
        built.append(SimpleNamespace(trainer=kind.__new__(kind), arguments=arguments, callbacks=callbacks))

    def launch():
        built.append(SimpleNamespace(command=sys.argv.pop(1), file=launcher.__file__))
        if built[-1].command == "train":
            tuner.run_exp({"stage": "dpo", "prefloss": sys.argv[1]})

    tuner.read_args = lambda args: sys.argv[1:] if args is None else args
    tuner.get_ray_args = lambda args: SimpleNamespace(use_ray=args.get("use_ray", False))
    tuner.get_train_args, tuner.run_exp, launcher.launch, launcher.__file__ = (
        get_train_args,
        run_exp,
        launch,
        "its own",
    )
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    # The command adds the working directory.
    monkeypatch.setattr(sys, "path", [*sys.path])
    with standins.imported("prefloss.integrations.llamafactory") as ours:
        yield SimpleNamespace(
            run_exp=ours.run_exp, main=ours.main, built=built, tuner=tuner, launcher=launcher
        )


@pytest.mark.parametrize(("stage", "loss"), [("dpo", "ipo"), ("kto", "kto")])
def test_builds_our_trainer_with_the_configured_loss(factory, stage, loss):
    factory.run_exp({"stage": stage, "pref_beta": 0.3, "prefloss": loss})
    (run,) = factory.built
    assert type(run.trainer).__module__ == "prefloss.integrations.llamafactory.trainers"
    assert run.callbacks[-1].loss.beta == 0.3
    assert run.arguments.use_ref_model


def test_a_loss_without_a_reference_loads_none(factory):
    factory.run_exp({"stage": "dpo", "prefloss": "simpo(beta=2.0)"})
    assert (factory.built[0].arguments.use_ref_model, factory.built[0].arguments.pref_loss) == (
        False,
        "simpo",
    )


def test_a_configuration_without_prefloss_is_left_alone(factory):
    own = factory.tuner.get_train_args
    factory.run_exp({"stage": "dpo", "pref_loss": "ipo"}, ["one"])
    (run,) = factory.built
    assert type(run.trainer).__module__ == __name__
    assert run.callbacks == ["one"]
    factory.run_exp({"stage": "dpo", "prefloss": "ipo"}, ["one"])
    factory.run_exp({"stage": "dpo"})
    assert type(factory.built[-1].trainer).__module__ == __name__
    assert factory.tuner.get_train_args is own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefloss": "simmpo"}, "prefloss: unknown loss 'simmpo'"),
        ({"prefloss": 3}, "prefloss: got 3, expected a loss as text"),
        ({"prefloss": "dpo(beta=-1)"}, "prefloss: dpo: beta: got -1"),
        ({"pref_loss": "ipo"}, "pref_loss: got 'ipo' beside a prefloss loss"),
        ({"ld_alpha": 0.5}, "ld_alpha: got 0.5 beside a prefloss loss"),
        ({"stage": "sft"}, "stage: got 'sft' beside prefloss, expected one of 'dpo', 'kto'"),
        ({"stage": "kto"}, "loss: got 'dpo', which takes Pairs"),
        ({"use_ray": True}, "use_ray: got True"),
        ({"use_mca": True}, "use_mca: got True"),
    ],
)
def test_refuses_what_it_cannot_train(factory, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        factory.run_exp({"stage": "dpo", "prefloss": "dpo", **options})
    assert not factory.built


def test_command_line_words(factory):
    factory.tuner.get_ray_args = lambda args: SimpleNamespace(use_ray=False)
    seen = []
    factory.tuner.get_train_args = lambda args: (
        seen.append(args) or (None, None, None, FinetuningArguments(), None)
    )
    factory.run_exp(["--stage", "dpo", "--prefloss", "dpo(beta=0.2)", "--pref_ftx", "0.5"])
    assert seen == [["--stage", "dpo", "--pref_ftx", "0.5"]]
    assert repr(factory.built[0].callbacks[-1].loss) == "dpo(beta=0.2)"


def test_processes_that_the_launcher_starts_run_our_command(factory, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "train", "ipo"])
    factory.main()
    assert factory.built[0].file == "-m prefloss.integrations.llamafactory train"
    assert factory.built[1].callbacks[-1].loss.name == "ipo"
    assert factory.launcher.__file__ == "its own"


def test_a_process_of_torchrun_trains_at_once(factory, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(sys, "argv", ["prog", "train", "--prefloss", "ipo"])
    factory.tuner.get_ray_args = lambda args: SimpleNamespace(use_ray=False)
    factory.tuner.get_train_args = lambda args: (None, None, None, FinetuningArguments(), None)
    factory.main()
    (run,) = factory.built
    assert run.callbacks[-1].loss.name == "ipo"


def test_the_command_line_shows_a_mistake_in_one_line(factory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prog", "train", "simmpo"])
    with pytest.raises(SystemExit) as stopped:
        factory.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: prefloss: unknown loss 'simmpo'")


def test_other_commands_are_llamafactorys(factory, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "export", "config.yaml"])
    factory.main()
    assert [run.command for run in factory.built] == ["export"]


def test_without_llamafactory_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(ModuleNotFoundError, match="needs LLaMA-Factory: pip install llamafactory"):
        importlib.import_module("prefloss.integrations.llamafactory")
