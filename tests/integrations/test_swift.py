"""The plugin on stand-ins of ms-swift's modules; `make trainers` runs it in ms-swift itself."""

import runpy
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch

import prefloss
from prefloss.integrations.swift import PLUGIN
from tests.integrations import standins


@dataclass
class Args:
    loss_type: object = field(default_factory=lambda: ["sigmoid"])
    loss_weights: object = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    ld_alpha: float | None = None


class Trainer:
    def __init__(self, args, template):
        self.loss_type = args.loss_type
        self.model = SimpleNamespace(training=True)
        self.callback_handler = SimpleNamespace(callbacks=[])

    def add_callback(self, callback):
        self.callback_handler.callbacks.append(callback)

    def get_per_token_logps(self, scores, mask):
        return scores, scores, mask

    def get_batch_loss_metrics(self, model, batch):
        for scores, mask in batch["passes"]:
            self.get_per_token_logps(scores, mask)
        losses, *rest = self.dpo_loss() if hasattr(self, "dpo_loss") else self.kto_loss()
        return losses.mean(), rest


@pytest.fixture
def swift(monkeypatch):
    modules = standins.install(
        monkeypatch,
        (
            "swift.trainers",
            "swift.pipelines.train.rlhf",
            "swift.rlhf_trainers.dpo_trainer",
            "swift.rlhf_trainers.kto_trainer",
        ),
    )
    modules["swift.trainers"].TrainerFactory = type(
        "TrainerFactory", (), {"TRAINER_MAPPING": {"rm": "its own"}}
    )
    modules["swift.rlhf_trainers.dpo_trainer"].DPOTrainer = type("DPOTrainer", (Trainer,), {})
    modules["swift.rlhf_trainers.kto_trainer"].KTOTrainer = type("KTOTrainer", (Trainer,), {})
    modules["swift.pipelines.train.rlhf"].prepare_kto_dataset = lambda args, *data: args.loss_type
    with standins.imported("prefloss.integrations.swift.trainers") as ours:
        runpy.run_path(str(PLUGIN))
        yield SimpleNamespace(
            ours=ours,
            mapping=modules["swift.trainers"].TrainerFactory.TRAINER_MAPPING,
            prepare=modules["swift.pipelines.train.rlhf"].prepare_kto_dataset,
        )


def built(swift, kind, template=None, **options):
    function = swift.mapping[kind].rpartition(".")[2]
    return getattr(swift.ours, function)(args=Args(**options), template=template or SimpleNamespace())


def scored(count):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[6], [3], [2], [5]])
    return [(-torch.rand(4, 6, generator=generator) * mask, mask) for _ in range(count)]


def test_takes_dpo_and_kto_over_and_nothing_else(swift):
    ours = "prefloss.integrations.swift.trainers"
    assert swift.mapping == {"rm": "its own", "dpo": f"{ours}.dpo_trainer", "kto": f"{ours}.kto_trainer"}


@pytest.mark.parametrize(
    ("kind", "names"),
    [("dpo", ["sigmoid"]), ("dpo", ["hinge", "sft"]), ("dpo", "ipo"), ("kto", "apo_zero_unpaired")],
)
def test_names_of_ms_swift_stay_its_own(swift, kind, names):
    trainer = built(swift, kind, loss_type=names)
    assert type(trainer).__module__ == __name__
    assert not trainer.callback_handler.callbacks


@pytest.mark.parametrize(
    ("names", "weights", "expected"),
    [
        (["ipo()"], None, "ipo(tau=0.3)"),
        ("simpo(beta=0.3)", None, "simpo(beta=0.3)"),
        (["sigmoid", "nll"], [0.7, 0.3], "0.7*dpo(beta=0.3) + 0.3*nll"),
    ],
)
def test_other_names_are_losses_of_prefloss(swift, names, weights, expected):
    args = Args(loss_type=names, loss_weights=weights, beta=0.3)
    trainer = swift.ours.dpo_trainer(args=args, template=SimpleNamespace())
    assert repr(trainer.prefloss.loss) == repr(prefloss.get(expected))
    assert trainer.loss_type == ["sigmoid"]
    assert args.loss_type == names
    passes = scored(2)
    value, _ = trainer.get_batch_loss_metrics(None, {"passes": passes})
    both = prefloss.LogRatios.from_token_logps(passes[0][0], passes[0][1], passes[1][0])
    assert torch.allclose(value, prefloss.get(expected).mean(prefloss.Pairs(both[:2], both[2:])))


@pytest.mark.parametrize(("loss", "passes"), [("kto()", 4), ("kto(kl_baseline='zero')", 2)])
def test_kto_scores_mismatched_completions_for_losses_that_read_them(swift, loss, passes):
    trainer = built(swift, "kto", loss_type=loss, desirable_weight=2.0)
    assert trainer.calculate_KL == (passes == 4)
    batch = {"passes": scored(passes), "label": [True, False, True, True]}
    value, (liked, disliked, kl) = trainer.get_batch_loss_metrics(None, batch)
    policy, reference = batch["passes"][1 if passes == 4 else 0], batch["passes"][-1]
    completions = prefloss.LogRatios.from_token_logps(*policy, reference[0])
    estimate = 0.0
    if passes == 4:
        own, other = batch["passes"][0], batch["passes"][2]
        estimate = prefloss.LogRatios.from_token_logps(*own, other[0]).h.mean().clamp(min=0)
    labels = prefloss.Labels(completions, torch.tensor(batch["label"]), kl=torch.as_tensor(estimate))
    assert torch.allclose(value, prefloss.get("kto", desirable_weight=2.0, kl_baseline="column").mean(labels))
    assert (len(liked), len(disliked)) == (3, 1)
    assert kl == pytest.approx(float(estimate))


def test_data_without_mismatched_completions(swift):
    assert swift.prepare(Args(loss_type="kto_zero()"), "rows") == "apo_zero_unpaired"
    assert swift.prepare(Args(loss_type="kto()"), "rows") == "kto()"
    assert swift.prepare(Args(loss_type="kto"), "rows") == "kto"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dpo", {"loss_type": "simmpo"}, "unknown loss 'simmpo'"),
        ("dpo", {"loss_type": "dpo()", "ld_alpha": 0.5}, "ld_alpha: got 0.5 beside a prefloss loss"),
        (
            "dpo",
            {"loss_type": "nca_pair()", "label_smoothing": 0.1},
            "label_smoothing: got 0.1, but nca_pair",
        ),
        ("dpo", {"loss_type": "dpo()", "template": SimpleNamespace(packing=True)}, "packing: got True"),
        (
            "dpo",
            {"loss_type": "dpo()", "template": SimpleNamespace(padding_free=True)},
            "padding_free: got True",
        ),
        (
            "dpo",
            {"loss_type": "dpo()", "template": SimpleNamespace(sequence_parallel_size=2)},
            "sequence_parallel_size: got 2",
        ),
    ],
)
def test_refuses_what_it_cannot_train(swift, kind, options, message):
    with pytest.raises(ValueError, match=message):
        built(swift, kind, **options)
    with pytest.raises(TypeError, match="takes Pairs, but ms-swift's KTO trainer gives Labels"):
        built(swift, "kto", loss_type="dpo()")


def test_the_megatron_path_is_refused(swift, monkeypatch):
    monkeypatch.setitem(sys.modules, "swift.megatron", ModuleType("swift.megatron"))
    with pytest.raises(RuntimeError, match="Megatron trainers, which compute a loss of their own"):
        swift.ours.register()


def test_the_module_prints_the_path_of_the_plugin(capsys):
    runpy.run_module("prefloss.integrations.swift", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(PLUGIN)
