"""Lightning trains as transformers' trainer does: weights, accumulation, resume, metrics."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, DistributedSampler

from prefloss.integrations.lightning import PreferenceLossCallback, PreferenceModule
from prefloss.integrations.transformers import PreferenceCollator, Reference
from prefloss.integrations.trl import PreferenceLossCallback as TrlCallback
from prefloss.training import TokenBatchSampler
from tests import tiny

pytestmark = [
    # Advice for real trainings, and Lightning's own use of torch.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Lines(Logger):
    """Keeps what is logged."""

    name, version = "lines", 0

    def __init__(self):
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def module(loss="dpo", **options):
    policy = tiny.model()
    options = {"reference": Reference.model(copy.deepcopy(policy)), "optimizer": sgd, **options}
    return PreferenceModule(policy, loss, **options)


def loader(data, batch_size=4, max_length=None):
    return DataLoader(
        data, batch_size, collate_fn=PreferenceCollator(tiny.tokenizer(), max_length=max_length)
    )


def trainer(folder, **options):
    settings = {"max_steps": 5, "max_epochs": -1, "log_every_n_steps": 1, "logger": Lines(), **options}
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **settings},
    )


def fit(folder, item, data, *, batch_size=4, resume=None, val=None, max_length=None, **options):
    made = trainer(folder, **options)
    training = None if data is None else loader(data, batch_size, max_length)
    validation = None if val is None else loader(val)
    made.fit(item, training, validation, ckpt_path=resume, weights_only=False)
    return made


def losses(made):
    return [line["loss"] for line in made.logger.lines if "loss" in line]


CASES = {
    "dpo": tiny.pairs,
    "kto(kl_baseline=running_mean)": tiny.labels,
    "dpo_pl": tiny.rankings,
}


@pytest.mark.parametrize("loss", CASES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_as_the_transformers_trainer(tmp_path, loss, accumulate):
    # 22 rows: the last micro-batch of an epoch is smaller, and the last step has fewer of them.
    data = CASES[loss](22)
    one = module(loss)
    options = {"max_length": 8, "max_steps": 5}
    ours = fit(tmp_path, one, data, accumulate_grad_batches=accumulate, **options)
    theirs = tiny.plain_train(
        tmp_path,
        loss,
        data,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        **options,
    )
    torch.testing.assert_close(tiny.weights(one.model), tiny.weights(theirs.model), rtol=0, atol=1e-6)
    assert not torch.equal(tiny.weights(one.model), tiny.weights(tiny.model()))
    assert losses(ours) == pytest.approx(tiny.losses_of(theirs), abs=1e-5)
    for line, entry in zip(ours.logger.lines, tiny.steps_of(theirs), strict=True):
        assert {name for name in entry if "/" in name} <= line.keys()


@pytest.mark.filterwarnings("ignore:.*completion without tokens")
@pytest.mark.parametrize("loss", ["dpo", "0.7*dpo + 0.3*kto(kl_baseline=zero)"])
def test_micro_batches_add_up(tmp_path, loss):
    # Cut so short that some completions have no tokens: counts differ from batch to batch and from term to term.
    data = tiny.pairs(24)
    one, other = module(loss), module(loss)
    options = {"max_length": 5, "max_steps": 2}
    fit(tmp_path, one, data, batch_size=3, accumulate_grad_batches=4, **options)
    fit(tmp_path, other, data, batch_size=12, **options)
    torch.testing.assert_close(tiny.weights(one.model), tiny.weights(other.model), rtol=0, atol=1e-6)


def test_a_limited_epoch_counts_what_it_uses(tmp_path):
    data = tiny.pairs(24)
    one, other = module(), module()
    fit(tmp_path, one, data, accumulate_grad_batches=4, limit_train_batches=5, max_steps=2)
    fit(tmp_path, other, [*data.select(range(16))], batch_size=16, max_steps=1)
    fit(tmp_path, other, [*data.select(range(16, 20))], max_steps=1)
    torch.testing.assert_close(tiny.weights(one.model), tiny.weights(other.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["kto(kl_baseline=running_mean)", "dpo(beta=linear(0.1, 0.5, steps=6))"])
def test_resumed_as_if_never_stopped(tmp_path, loss):
    data = CASES.get(loss, tiny.pairs)(16)
    options = {"accumulate_grad_batches": 2, "max_steps": -1}
    whole = module(loss)
    fit(tmp_path, whole, data, max_epochs=3, **options)
    begun = fit(tmp_path, module(loss), data, max_epochs=2, **options)
    begun.save_checkpoint(tmp_path / "two.ckpt")
    resumed = module(loss)
    # The reference comes with the module; a checkpoint has the policy alone.
    fit(tmp_path, resumed, data, max_epochs=3, resume=tmp_path / "two.ckpt", **options)
    assert torch.equal(tiny.weights(resumed.model), tiny.weights(whole.model))
    assert resumed.preference.objective.state_dict() == whole.preference.objective.state_dict()
    saved = torch.load(tmp_path / "two.ckpt", weights_only=False)
    assert all(name.startswith("model.") for name in saved["state_dict"])


def test_validation_metrics(tmp_path):
    data = tiny.pairs(16)
    one = module()
    made = fit(tmp_path, one, data, val=tiny.pairs(10, seed=3), max_steps=-1, max_epochs=1)
    found = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("eval_")}
    theirs = tiny.plain_build(
        tmp_path,
        tiny.plain_callback(tiny.model(), "dpo"),
        one.model,
        data=data,
        eval_data=tiny.pairs(10, seed=3),
    ).evaluate()
    assert {"eval_loss", "eval_rewards/accuracies", "eval_logps/chosen"} <= found.keys()
    assert found == pytest.approx({name: theirs[name] for name in found}, abs=1e-5)
    (tested,) = made.test(one, loader(tiny.pairs(10, seed=3)), verbose=False)
    assert tested["test_loss"] == pytest.approx(found["eval_loss"])


def test_metrics_have_one_name_in_every_trainer(tmp_path):
    """AUDIT U4."""

    def ours(logs):
        return {name for name in logs if name.startswith(("prefloss/", "rewards/", "logps/"))}

    callback = TrlCallback("dpo")
    trl = tiny.train("dpo", tmp_path, [callback], data=tiny.pairs(8), max_steps=1)
    plain = tiny.steps_of(tiny.plain_train(tmp_path, "dpo", tiny.pairs(8), max_steps=1))[0]
    lightning = fit(tmp_path, module(), tiny.pairs(8), max_steps=1).logger.lines[0]
    assert ours(trl.logs[0]) == ours(plain) == ours(lightning)
    assert {"prefloss/falling_pairs", "prefloss/empty", "rewards/accuracies"} <= ours(plain)


def test_the_best_model_by_a_metric(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    best = ModelCheckpoint(tmp_path / "best", monitor="eval_rewards/accuracies", mode="max")
    options = {"callbacks": [best], "enable_checkpointing": True, "max_steps": -1, "max_epochs": 2}
    fit(tmp_path, module(), tiny.pairs(8), val=tiny.pairs(8, seed=3), **options)
    assert best.best_model_score is not None


def test_clipping_scheduler_and_precision(tmp_path):
    options = {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}
    one = module(**options)
    made = fit(tmp_path, one, tiny.pairs(12), gradient_clip_val=1e-9, max_steps=3)
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    torch.testing.assert_close(tiny.weights(one.model), tiny.weights(tiny.model()), rtol=0, atol=1e-8)
    fit(tmp_path, module(), tiny.pairs(12), precision="bf16-mixed")


def test_logged_as_often_as_the_trainer_says(tmp_path):
    every, second = (
        fit(tmp_path, module(), tiny.pairs(16), log_every_n_steps=n, max_steps=4) for n in (1, 2)
    )
    assert len(losses(every)) == 4
    # Means over the steps since the last line.
    assert losses(second) == pytest.approx([sum(losses(every)[i : i + 2]) / 2 for i in (0, 2)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_are_one_with_the_batch_of_both(tmp_path, accumulate, monkeypatch):
    # A forked process may not use its parent's threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    data = tiny.labels(21, upvoted=0.2)
    options = {"max_length": 8, "max_steps": -1, "max_epochs": 1, "val": tiny.labels(7, seed=2)}
    loss = "kto(kl_baseline=running_mean)"
    both, one = module(loss), module(loss)
    # A distributed sampler repeats the first row, so that both shares are equal.
    wanted = fit(tmp_path, one, [*data, data[0]], batch_size=8, accumulate_grad_batches=accumulate, **options)

    def shares():
        # Lightning's own sampler shuffles.
        sampler = DistributedSampler(data, shuffle=False)
        collator = PreferenceCollator(tiny.tokenizer(), max_length=8)
        return DataLoader(data, 4, sampler=sampler, collate_fn=collator)

    both.train_dataloader = shares
    made = fit(
        tmp_path, both, None, accumulate_grad_batches=accumulate, strategy="ddp_fork", devices=2, **options
    )
    torch.testing.assert_close(tiny.weights(both.model), tiny.weights(one.model), rtol=0, atol=1e-6)
    for name, value in wanted.callback_metrics.items():
        if name.startswith("eval_"):
            assert float(made.callback_metrics[name]) == pytest.approx(float(value), abs=1e-5), name


def by_tokens(data, seen=None, **options):
    collate = PreferenceCollator(tiny.tokenizer())

    def noting(rows):
        if seen is not None:
            seen.append([row["prompt"] for row in rows])
        return collate(rows)

    sampler = TokenBatchSampler.of(data, collate, 60, **options)
    return DataLoader(data, batch_sampler=sampler, collate_fn=noting)


class SavesAt(Callback):
    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at", [4, 14])
def test_batches_by_tokens_resumed_within_an_epoch(tmp_path, at):
    data, path = tiny.pairs(24), tmp_path / "some.ckpt"
    options = {"accumulate_grad_batches": 2, "max_steps": -1, "max_epochs": 2}
    seen, rest = [], []
    whole, resumed = module(), module()
    made = trainer(tmp_path, callbacks=[SavesAt(at, path)], **options)
    made.fit(whole, by_tokens(data, seen))
    assert len(seen) % 2 == 0
    assert seen[: len(seen) // 2] != seen[len(seen) // 2 :]
    # A mean over examples, though batches differ in size.
    assert sorted(prompt for batch in seen for prompt in batch) == sorted(2 * [*data["prompt"]])
    trainer(tmp_path, **options).fit(resumed, by_tokens(data, rest), ckpt_path=path, weights_only=False)
    assert rest == seen[at:]
    assert torch.equal(tiny.weights(resumed.model), tiny.weights(whole.model))
    with pytest.raises(ValueError, match="seed: got 1, but the state to go on with was made with 0"):
        trainer(tmp_path, **options).fit(
            module(), by_tokens(data, seed=1), ckpt_path=path, weights_only=False
        )


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_batches_by_tokens_on_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    data = tiny.pairs(21)
    options = {"max_steps": -1, "max_epochs": 1, "strategy": "ddp_fork", "devices": 2}
    both, one = module(), module()
    both.train_dataloader = lambda: by_tokens(data)
    with pytest.raises(Exception, match=r"in Lightning, set Trainer\(use_distributed_sampler=False\)"):
        trainer(tmp_path, **options).fit(both)
    trainer(tmp_path, use_distributed_sampler=False, **options).fit(both)
    # All batches on one process: each round of two is a step.
    rounds = by_tokens(data, num_replicas=2, rank="all")
    trainer(tmp_path, max_steps=-1, max_epochs=1, accumulate_grad_batches=2).fit(one, rounds)
    torch.testing.assert_close(tiny.weights(both.model), tiny.weights(one.model), rtol=0, atol=1e-6)
    assert not torch.equal(tiny.weights(one.model), tiny.weights(tiny.model()))


class Own(LightningModule):
    def __init__(self, preference):
        super().__init__()
        self.model = tiny.model()
        self.preference = preference

    def training_step(self, batch, batch_idx):
        return self.preference.training_loss(self.model, batch)

    def configure_optimizers(self):
        return sgd(self.parameters())


def test_a_module_of_ones_own(tmp_path):
    callback = PreferenceLossCallback("dpo", reference=tiny.model())
    own, other = Own(callback), module()
    made = fit(tmp_path, own, tiny.pairs(12), callbacks=[callback], accumulate_grad_batches=2)
    wanted = fit(tmp_path, other, tiny.pairs(12), accumulate_grad_batches=2)
    assert torch.equal(tiny.weights(own.model), tiny.weights(other.model))
    assert made.logger.lines == wanted.logger.lines


def test_a_module_that_forgets_the_loss(tmp_path):
    class Forgets(Own):
        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch["input_ids"]).logits.mean()

    callback = PreferenceLossCallback("dpo", reference=tiny.model())
    with pytest.raises(RuntimeError, match="was not used: training_step has to return"):
        fit(tmp_path, Forgets(callback), tiny.pairs(12), callbacks=[callback])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("model", {"model": "gpt2"}),
        ("learning_rate", {"learning_rate": -1.0}),
        ("learning_rate", {"learning_rate": float("inf")}),
        ("optimizer", {"optimizer": "adamw"}),
        ("scheduler", {"scheduler": 3}),
        ("check_step_zero", {"check_step_zero": "no"}),
        ("loss", {"loss": 3}),
    ],
)
def test_a_bad_setting_is_refused_by_name(name, options):
    """AUDIT A9."""
    with pytest.raises((TypeError, ValueError), match=f"{name}: got .*, expected"):
        PreferenceModule(**{"model": tiny.model(), "loss": "dpo", "reference": Reference.cached(), **options})


def test_step_0_is_checked(tmp_path):
    with pytest.raises(RuntimeError, match="step-0 check"):
        fit(tmp_path, module(reference=tiny.model(seed=1)), tiny.pairs(12))
    fit(tmp_path, module(reference=tiny.model(seed=1), check_step_zero=False), tiny.pairs(12), max_steps=1)
