"""Log-probs of real architectures without their logits, against their own logits in float64."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from prefloss.integrations.transformers import HeadSpec, model_logps
from prefloss.logratios import IGNORE_INDEX, completion_targets
from tests.training.architectures import CONFIGS, SMALL, V

# Architectures that compute their logits, or what leads to them, in float32, whatever the model's dtype.
SINGLE = ("mamba", "mamba2", "gptj", "gpt_neo", "inkling2")
# Its recurrence writes in place over what its own backward needs.
NO_BACKWARD = ("rwkv",)

pytestmark = pytest.mark.filterwarnings("ignore")


def built(name):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    # The grouped matmul of experts has no float64 form.
    config._experts_implementation = "eager"
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    # Its router takes float32 alone.
    return model if name == "inkling2" else model.double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (2, 9), generator=generator)
    completion = torch.zeros(2, 9, dtype=torch.bool)
    completion[0, 4:] = True
    completion[1, 3:7] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, completion_targets(ids, completion)


def expected(model, inputs, targets):
    logits = model(**inputs).logits.double()
    found = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == IGNORE_INDEX, 0.0, found)


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_are_the_models_own(name, batch):
    model, (inputs, targets) = built(name), batch
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if name in SINGLE else {"rtol": 1e-9, "atol": 1e-10}
    if name in NO_BACKWARD:
        with torch.no_grad():
            torch.testing.assert_close(
                model_logps(model, inputs, targets).logps, expected(model, inputs, targets)
            )
        return
    wanted = expected(model, inputs, targets)
    found = model_logps(model, inputs, targets)
    torch.testing.assert_close(found.logps, wanted, **tolerance, check_dtype=False)
    assert (found.aux_loss is not None) == ("moe" in name or name == "mixtral")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.linspace(0.5, 1.5, wanted.numel(), dtype=torch.float64).reshape(wanted.shape)
    theirs = torch.autograd.grad((wanted * weights).sum(), parameters, allow_unused=True)
    ours = torch.autograd.grad((found.logps * weights).sum(), parameters, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, **tolerance)


def test_no_logits_are_stored(batch):
    model, (inputs, targets) = built("llama"), batch
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        model_logps(model, inputs, targets, impl="chunked")
    assert not [shape for shape in shapes if shape[-1:] == (V,) and len(shape) > 1 and V not in shape[:1]]


@pytest.mark.parametrize("disabled", [False, True])
def test_a_lora_adapter_on_the_head_is_exact(batch, disabled):
    inputs, targets = batch
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(built("llama"), lora).double().eval()
    if disabled:
        with model.disable_adapter():
            wanted, found = expected(model, inputs, targets), model_logps(model, inputs, targets)
    else:
        wanted, found = expected(model, inputs, targets), model_logps(model, inputs, targets)
    torch.testing.assert_close(found.logps, wanted)
    if not disabled:
        factors = [p for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad]
        for mine, other in zip(
            torch.autograd.grad(found.logps.sum(), factors),
            torch.autograd.grad(wanted.sum(), factors),
            strict=True,
        ):
            torch.testing.assert_close(mine, other)


def test_a_head_without_an_exact_form_is_refused(batch):
    inputs, targets = batch
    lora = LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5)
    model = get_peft_model(built("llama"), lora).double().train()
    with pytest.raises(
        TypeError, match=r"adapter 'default' .* on the output head, expected plain LoRA without dropout"
    ):
        model_logps(model, inputs, targets)
    quantised = built("llama")
    quantised.lm_head.weight = nn.Parameter(torch.zeros(V, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"output head Linear with a weight of torch.uint8"):
        model_logps(quantised, inputs, targets)
    with pytest.raises(TypeError, match="without output embeddings"):
        model_logps(nn.Linear(2, 2), inputs, targets)


def test_a_transform_that_was_not_read_is_noticed(batch):
    class Surprising(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 1.5
            return outputs

    model = Surprising(CONFIGS["llama"]()).double().eval()
    with pytest.raises(
        TypeError,
        match=r"got Surprising, which turns logits .* expected the scale of 1.0 and the softcap of None",
    ):
        model_logps(model, *batch)
    # The head is itself again after a refusal.
    assert model(**batch[0]).logits.shape[-1] == V


class Changed(hf.LlamaForCausalLM):
    """Does something to its logits."""

    def change(self, logits):
        return logits

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.change(outputs.logits)
        return outputs


class Cut(Changed):
    def change(self, logits):
        return logits[..., : V - 11]


class Overwrites(Changed):
    def change(self, logits):
        return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], -1e4)], -1)


class ScalesTheEnd(Changed):
    def change(self, logits):
        return torch.cat([logits[..., :20], 2 * logits[..., 20:]], -1)


def test_logits_that_the_model_cuts_off_do_not_count(batch):
    """AUDIT H2: the probe had 7 columns, so the cut went unseen and padding entered the softmax."""
    inputs, targets = batch
    targets = torch.where(targets >= V - 11, IGNORE_INDEX, targets)
    for model in (Cut(CONFIGS["llama"]()).double().eval(), built("inkling2")):
        for _ in range(2):
            found = model_logps(model, inputs, targets).logps.double()
            torch.testing.assert_close(found, expected(model, inputs, targets), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [Overwrites, ScalesTheEnd])
def test_every_column_of_the_logits_is_judged(kind, batch):
    """AUDIT H2."""
    model = kind(CONFIGS["llama"]()).double().eval()
    with pytest.raises(
        TypeError, match=f"model: got {kind.__name__}, which turns logits .*prefloss.token_logps"
    ):
        model_logps(model, *batch)


def vision(kind):
    text = hf.Cohere2Config(**SMALL, logit_scale=0.3)
    parts = hf.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    return kind(kind.config_class(text_config=text, vision_config=parts)).double().eval()


@pytest.mark.parametrize(
    "kind", [hf.AyaVisionForConditionalGeneration, hf.Cohere2VisionForConditionalGeneration]
)
def test_a_scale_that_is_named_and_not_applied_is_left_out(kind, batch):
    """AUDIT H6: refused before, though what the model does is plain."""
    inputs, targets = batch
    model = vision(kind)
    for _ in range(2):
        found = model_logps(model, inputs, targets).logps
        torch.testing.assert_close(found, expected(model, inputs, targets))


def test_a_head_that_reads_more_than_one_state_per_token_is_refused_as_the_models_doing(batch):
    """AUDIT H6: the message spoke of the targets."""
    config = hf.ProphetNetConfig(
        vocab_size=V,
        hidden_size=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        is_decoder=True,
        is_encoder_decoder=False,
        add_cross_attention=False,
    )
    model = hf.ProphetNetForCausalLM(config).double().eval()
    with pytest.raises(
        TypeError, match=r"model: got ProphetNetForCausalLM, whose output head .*prefloss.token_logps"
    ):
        model_logps(model, *batch)


def test_wrapped_models_and_their_hooks(batch):
    inputs, targets = batch
    model = built("llama")
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    torch.testing.assert_close(model_logps(model, inputs, targets).logps, expected(model, inputs, targets))
    assert calls[:2] == ["head", "model"]


def test_left_padding_and_position_ids_are_passed_on(batch):
    inputs, targets = batch
    model = built("llama")
    wanted = model_logps(model, inputs, targets).logps
    pad = torch.zeros(2, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([pad, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([pad, inputs["attention_mask"]], 1),
        "position_ids": torch.cat([pad, torch.arange(9).expand(2, -1)], 1),
    }
    found = model_logps(model, padded, torch.cat([pad + IGNORE_INDEX, targets], 1)).logps
    torch.testing.assert_close(found[:, 3:], wanted)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_temperature_and_implementations(batch, impl):
    inputs, targets = batch
    model = built("gemma2")
    logits = model(**inputs).logits / 0.7
    wanted = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    found = model_logps(model, inputs, targets, temperature=0.7, impl=impl).logps
    torch.testing.assert_close(found, torch.where(targets == IGNORE_INDEX, 0.0, wanted))


def test_bad_inputs_are_named(batch):
    inputs, targets = batch
    model = built("llama")
    with pytest.raises(ValueError, match="inputs: got labels, expected them as targets"):
        model_logps(model, {**inputs, "labels": inputs["input_ids"]}, targets)
    with pytest.raises(ValueError, match=r"targets: got shape \[2, 10\], expected \[2, 9\]"):
        model_logps(model, inputs, torch.cat([targets, targets[:, :1]], 1))


def test_the_head_is_read_from_the_configuration():
    assert HeadSpec.of(built("cohere")).logit_scale == 0.3
    assert HeadSpec.of(built("granite")).logit_scale == pytest.approx(1 / 3)
    assert HeadSpec.of(built("gemma2")).softcap == 5.0
    assert HeadSpec.of(built("llama")).softcap is None
