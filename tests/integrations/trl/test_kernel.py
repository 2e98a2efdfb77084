"""`kernel="prefloss"` gives what `kernel="trl"` gives: losses, weights and every logged figure."""

from unittest import mock

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config
from trl.trainer import utils

from prefloss.integrations.trl import PreferenceLossCallback, attach, disable, enable
from prefloss.integrations.trl import kernel as kernel_module
from prefloss.integrations.trl.callback import attached
from prefloss.kernels import plan
from tests import tiny

SIZES = {
    "vocab_size": 43,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS = {
    "softcap": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.0),
    "scale": lambda: CohereConfig(**SIZES, logit_scale=0.25),
}


def model(name):
    torch.manual_seed(0)
    if name == "bias":
        made = tiny.model()
        made.lm_head = torch.nn.Linear(32, 43, bias=True)
    else:
        made = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in made.parameters():
        # Logits that a softcap bends, and a bias that is not 0.
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


SETTINGS = {
    "plain": {},
    "lora": {"peft_config": lora},
    "lora precomputed": {"peft_config": lora, "precompute_ref_log_probs": True},
    "checkpointed": {"activation_checkpointing": True},
    "precomputed": {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2},
    "softcap": {"policy": lambda: model("softcap")},
    "scale": {"policy": lambda: model("scale")},
    "bias": {"policy": lambda: model("bias")},
}
# Counts of operations and clocks.
UNLIKE = ("step_time", "total_flos", "epoch", "_runtime", "_second")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The fused path, where "auto" would take plain torch for such small sizes."""
    monkeypatch.setattr(plan, "NAIVE_ELEMENTS", 0)


@pytest.fixture(autouse=True)
def uncollected():
    """Every training ends in a full garbage collection, which takes longer than these trainings do."""
    with mock.patch("gc.collect"):
        yield


def train(kind, folder, kernel, loss=None, **options):
    made = {name: value() if callable(value) else value for name, value in options.items()}
    callback = PreferenceLossCallback(loss or kind, kernel=kernel)
    return tiny.train(kind, folder, [callback], **{"max_steps": 10, **made})


def assert_same_run(ours, theirs, figures=1e-4, weights=1e-5):
    assert len(ours.losses) == len(theirs.losses)
    assert max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)) < weights
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=weights)
    for step, (mine, its) in enumerate(zip(ours.logs, theirs.logs, strict=True)):
        assert mine.keys() == its.keys()
        for name in its:
            # Where policy and reference coincide, the sign of their difference is that of its rounding.
            signs = step == 0 and name in ("rewards/accuracies", "prefloss/chosen_falling")
            if not name.endswith(UNLIKE) and not signs:
                assert mine[name] == pytest.approx(its[name], abs=figures, rel=figures), name


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_ten_steps_are_those_of_trls_kernel(tmp_path, kind, setting):
    # The cache of references is found again by model and data; ours must not be TRL's.
    theirs = train(kind, tmp_path, "trl", **SETTINGS[setting])
    with mock.patch.object(
        kernel_module, "linear_token_stats", wraps=kernel_module.linear_token_stats
    ) as scored:
        ours = train(kind, tmp_path, "prefloss", **SETTINGS[setting])
    assert scored.call_count >= 10
    assert_same_run(ours, theirs)
    assert {"entropy", "logits/chosen"} <= ours.logs[-1].keys()
    assert utils._ChunkedLogProbFunction is not kernel_module._Scores


def test_wpo_reads_the_sum_of_squares(tmp_path):
    runs = [train("dpo", tmp_path, kernel, use_weighting=True) for kernel in kernel_module.KERNELS]
    assert_same_run(*runs)


def test_only_completion_tokens_are_scored(tmp_path):
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("dpo", kernel="prefloss")])
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    seen = []

    def count(hidden, *args, **kwargs):
        seen.append(len(hidden))
        return stats(hidden, *args, **kwargs)

    stats = kernel_module.linear_token_stats
    with mock.patch.object(kernel_module, "linear_token_stats", count):
        trainer.compute_loss(trainer.model, batch).backward()
    assert seen == [int(batch["completion_mask"][:, 1:].sum())]


@pytest.mark.filterwarnings("ignore:.*completion without tokens:UserWarning")
def test_a_batch_without_completion_tokens_gives_zero_gradients(tmp_path):
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("dpo", kernel="prefloss")])
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch["completion_mask"].zero_()
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_trls_function_is_back_after_an_error(tmp_path):
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("dpo", kernel="prefloss")])
    before = utils._ChunkedLogProbFunction, utils._use_triton
    with pytest.raises(KeyError):
        trainer.compute_loss(trainer.model, {})
    with kernel_module.scoring("prefloss"):
        assert utils._ChunkedLogProbFunction is kernel_module._Scores
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def test_trl_1_15_gives_completions_on_every_device(monkeypatch):
    def head(hidden):
        return _ChunkedLogProbFunction.apply(hidden)  # noqa: F821

    monkeypatch.setattr(utils, "add_fused_lm_head", head)
    with pytest.raises(RuntimeError, match="scores completions in a way that prefloss does not know"):
        kernel_module.check_kernel("prefloss")
    monkeypatch.delattr(utils, "_use_triton")
    kernel_module.check_kernel("prefloss")
    with kernel_module.scoring("prefloss"):
        assert utils._ChunkedLogProbFunction is kernel_module._Scores
        assert not hasattr(utils, "_use_triton")
    # Without Triton, it has no function.
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    with pytest.raises(RuntimeError, match="scores completions"):
        kernel_module.check_kernel("prefloss")
    monkeypatch.setattr(kernel_module, "VERSION", Version("1.15.0"))
    kernel_module.check_kernel("prefloss")


def test_half_precision_is_closer_to_float64_than_trls():
    hidden, weight = torch.randn(30, 16).bfloat16(), 3 * torch.randn(301, 16).bfloat16()
    targets = torch.randint(301, (30,))
    wanted = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    error = {}
    for kernel in kernel_module.KERNELS:
        with kernel_module.scoring(kernel):
            found = utils._ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 1.0, 32768, None, 1.0, ()
            )
        error[kernel] = (found[0] - wanted).abs().max().item()
    assert error["prefloss"] < 1e-4 < 1e-2 < error["trl"]


def test_autocast_trains(tmp_path):
    runs = []
    for kernel in kernel_module.KERNELS:
        trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("dpo", kernel=kernel)], max_steps=2)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        runs.append((loss.detach(), trainer.model.lm_head.weight.grad))
    torch.testing.assert_close(*(loss for loss, _ in runs), rtol=1e-2, atol=1e-2)
    ours, theirs = (grad for _, grad in runs)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_mean_logits_are_those_of_all_logits(softcap, monkeypatch):
    monkeypatch.setattr(kernel_module, "_SLICE", 50)
    hidden, weight, bias = torch.randn(7, 5), torch.randn(11, 5), torch.randn(11)
    logits = 3.0 * (hidden @ weight.T + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    found = kernel_module.mean_logits(hidden, weight, bias, temperature=0.5, logit_scale=3.0, softcap=softcap)
    torch.testing.assert_close(found, logits.mean(-1) / 0.5)


def test_attach_scores_with_it_and_detach_takes_it_away(tmp_path):
    trainer = tiny.build("dpo", tmp_path, max_steps=1)
    attach(trainer, "dpo", kernel="prefloss")
    with mock.patch.object(
        kernel_module, "linear_token_stats", wraps=kernel_module.linear_token_stats
    ) as scored:
        trainer.train()
    assert scored.called
    assert attached(trainer).state()["args"]["kernel"] == "prefloss"


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_enable_scores_references_too(tmp_path, kind):
    enable(kernel="prefloss")
    loss = ["dpo(beta=0.3)"] if kind == "dpo" else "kto(beta=0.3, kl_baseline='zero')"
    try:
        with mock.patch.object(kernel_module, "scoring", wraps=kernel_module.scoring) as scoring:
            trainer = tiny.build(kind, tmp_path, loss_type=loss, precompute_ref_log_probs=True)
        with pytest.raises(ValueError, match="kernel: got 'trl', but enabled with 'prefloss'"):
            enable()
    finally:
        disable()
    assert mock.call("prefloss") in scoring.mock_calls
    assert attached(trainer)._kernel == "prefloss"
    assert "prefloss" not in trainer._precompute_model_hash


def test_references_by_trl_in_half_precision_are_refused(tmp_path):
    trainer = tiny.build("dpo", tmp_path, precompute_ref_log_probs=True)
    attach(trainer, "dpo", kernel="prefloss")
    trainer.args.bf16 = True
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with pytest.raises(ValueError, match="computed beforehand by TRL's kernel in half precision"):
        trainer.compute_loss(trainer.model, batch)


def test_an_unknown_kernel_or_trl_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="kernel: got 'liger', expected 'trl' or 'prefloss'"):
        PreferenceLossCallback("dpo", kernel="liger")

    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            return hidden

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(RuntimeError, match="scores completions in a way that prefloss does not know"):
        PreferenceLossCallback("dpo", kernel="prefloss")


def test_a_head_sharded_by_zero_3_is_refused():
    weight = torch.nn.Parameter(torch.randn(5, 3))
    weight.ds_id = 0
    with pytest.raises(TypeError, match="ZeRO-3"):
        kernel_module._Scores.apply(
            torch.randn(2, 3), weight, None, torch.tensor([0, 1]), 1.0, 32768, None, 1.0, ()
        )
