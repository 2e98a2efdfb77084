"""What the proofs of the frameworks share: a tiny model, rows, recorded trainings, losses by hand, printed lines.

Each `*_matrix.py` of this folder runs in the environment of one release: `python -m tests.trainers.swift_matrix`, with
parts of checks' names behind it to run these alone ("own ipo"). It prints one JSON line a check and exits with 1 if one
failed; `make trainers` makes the environments and the matrix.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import logsigmoid  # noqa: E402

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<bos>"]
BOUND = 1e-5
# (model, batch) -> the loss that the batch should have
ByHand = Callable[[Any, Mapping[str, Any]], Tensor]
# the framework's loss -> the framework's options, and our loss under the same options
Own = Mapping[str, tuple[dict[str, Any], str]]


def tokenizer() -> Any:
    """A tokenizer of words."""
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny(kind: str = "Llama", seed: int = 0, **settings: Any) -> Any:
    """A tiny language model with random weights, in float32.

    Args:
        kind: Its family in transformers.
        seed: Of its weights.
        **settings: Of its configuration, beside those that all have.
    """
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        **settings,
    )
    made = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def write_model(folder: str, seed: int = 0) -> None:
    """A tiny Llama with its tokenizer, as a folder to load from."""
    words = tokenizer()
    words.bos_token = "<bos>"
    words.chat_template = "{% for message in messages %} {{ message['content'] }}{% endfor %}"
    words.save_pretrained(folder)
    tiny(seed=seed, bos_token_id=3).save_pretrained(folder)


def texts(seed: int = 0) -> Callable[[int, int], str]:
    """A function (shortest, longest) -> random words."""
    rng = random.Random(seed)
    return lambda shortest, longest: " ".join(
        rng.choice(WORDS) for _ in range(rng.randint(shortest, longest))
    )


@dataclass
class Training:
    """A training that was watched: its trainer, the loss of each micro-batch, and what it would be by hand."""

    trainer: Any = None
    losses: list[float] = field(default_factory=list)
    by_hand: list[float] = field(default_factory=list)

    @property
    def weights(self) -> Tensor:
        """Final weights, flat."""
        return torch.cat([parameter.detach().flatten() for parameter in self.trainer.model.parameters()])


@contextmanager
def watched(by_hand: ByHand | None = None) -> Iterator[Training]:
    """Record the training that runs inside.

    Args:
        by_hand: (model, batch) -> the loss that the batch should have.
    """
    training = Training()
    own = transformers.Trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        training.trainer = self
        if by_hand is not None:
            with torch.no_grad():
                training.by_hand.append(by_hand(self.model, inputs).item())
        loss = own(self, model, inputs, *args, **kwargs)
        training.losses.append(loss.item())
        return loss

    with mock.patch.object(transformers.Trainer, "training_step", training_step):
        yield training


def same(theirs: Training, ours: Training) -> str:
    """Losses and final weights of two trainings agree to 1e-5; says how well."""
    losses = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    moved = max(theirs.losses) - min(theirs.losses)
    assert moved > 100 * BOUND, f"the losses hardly differ from step to step: {theirs.losses}"
    return near({"losses": losses, "weights": (theirs.weights - ours.weights).abs().max().item()})


def near(differences: Mapping[str, float], bound: float = BOUND) -> str:
    """Differences are at most 1e-5, or a bound; says what they are."""
    detail = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    # A NaN is not at most anything.
    assert all(value <= bound for value in differences.values()), detail
    return detail


def identical(before: Training, after: Training) -> str:
    """Two trainings agree to the bit."""
    assert before.losses == after.losses, f"losses {before.losses} and {after.losses}"
    assert torch.equal(before.weights, after.weights), "other weights"
    return "losses and weights are the same to the bit"


def agrees_by_hand(training: Training) -> str:
    """The loss of each micro-batch is what it would be by hand, to 1e-5 of its size."""
    pairs = list(zip(training.losses, training.by_hand, strict=True))
    worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
    assert worst <= BOUND, f"trained {training.losses}, by hand {training.by_hand}"
    return f"{len(pairs)} steps, differences at most {worst:.1e}"


class References:
    """Scores batches under a policy and the reference in a folder, which is loaded once."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._model: Any = None

    def scores(self, model: Any, batch: Mapping[str, Any], prefix: str = "") -> Scores:
        """Log-probs of the rows whose names begin with the prefix."""
        if self._model is None:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(self._folder).float()
        rows = [batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels")]
        policy, mask = token_log_probs(model, *rows)
        return Scores(policy, token_log_probs(self._model, *rows)[0], mask)


def token_log_probs(model: Any, ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the next token and where completions stand, [rows, T - 1] each, from a plain forward pass."""
    logits = model(input_ids=ids, attention_mask=attention_mask).logits.double()
    targets, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] >= 0
    return logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask, mask


@dataclass
class Scores:
    """Per-token log-probs of completions under both models, and where they stand, [rows, T] each."""

    policy: Tensor
    reference: Tensor
    mask: Tensor

    @property
    def tokens(self) -> Tensor:
        """Completion tokens, [rows]."""
        return self.mask.sum(-1)

    @property
    def h(self) -> Tensor:
        """Log-ratios, [rows]."""
        return (self.policy - self.reference).sum(-1)

    @property
    def mean(self) -> Tensor:
        """The policy's log-prob a token, [rows]."""
        return self.policy.sum(-1) / self.tokens

    def halves(self) -> tuple[Scores, Scores]:
        """Chosen and rejected."""
        half = len(self.mask) // 2
        return self[:half], self[half:]

    def __getitem__(self, index: Any) -> Scores:
        return Scores(self.policy[index], self.reference[index], self.mask[index])


def simpo(scores: Scores) -> Tensor:
    """`simpo(beta=2.0, gamma=0.5)`."""
    chosen, rejected = scores.halves()
    return -logsigmoid(2.0 * (chosen.mean - rejected.mean) - 0.5).mean()


def ipo_and_nll(scores: Scores) -> Tensor:
    """`0.7*ipo(tau=0.2) + 0.3*nll`."""
    chosen, rejected = scores.halves()
    margin = chosen.h / chosen.tokens - rejected.h / rejected.tokens
    return 0.7 * ((margin - 2.5) ** 2).mean() - 0.3 * chosen.mean.mean()


def length_desensitized(scores: Scores) -> Tensor:
    """`dpo(beta=0.3, ld_alpha=0.5)`."""
    chosen, rejected = scores.halves()
    shorter = torch.minimum(chosen.tokens, rejected.tokens)[:, None]

    def weighted(side: Scores) -> Tensor:
        place = side.mask.cumsum(-1)
        return ((side.policy - side.reference) * torch.where(place <= shorter, 1.0, 0.5)).sum(-1)

    return -logsigmoid(0.3 * (weighted(chosen) - weighted(rejected))).mean()


def zero_baseline(scores: Scores, desirable: Tensor) -> Tensor:
    """`kto(beta=0.3, desirable_weight=2.0, kl_baseline='zero')`."""
    sign, weight = torch.where(desirable, 1.0, -1.0), torch.where(desirable, 2.0, 1.0)
    return (weight * (1 - (0.3 * sign * scores.h).sigmoid())).mean()


def two_label_losses(scores: Scores, desirable: Tensor) -> Tensor:
    """`0.5*kto_zero(beta=0.3) + 0.5*kto_logsigmoid(beta=0.3, kl_baseline='zero')`."""
    scaled = 0.3 * torch.where(desirable, 1.0, -1.0) * scores.h
    return 0.5 * (1 - scaled.sigmoid()).mean() - 0.5 * logsigmoid(scaled).mean()


def hinge(scores: Scores) -> Tensor:
    """`hinge(beta=0.3)`."""
    chosen, rejected = scores.halves()
    return (1 - 0.3 * (chosen.h - rejected.h)).relu().mean()


def expected(loss: str, scores: Scores, desirable: Tensor | None = None) -> Tensor:
    """The mean loss of a batch by hand; labels say what is desirable."""
    return PAIRS_BY_HAND[loss](scores) if desirable is None else LABELS_BY_HAND[loss](scores, desirable)


PAIRS_BY_HAND: Mapping[str, Callable[[Scores], Tensor]] = {
    "simpo(beta=2.0, gamma=0.5)": simpo,
    "hinge(beta=0.3)": hinge,
    "0.7*ipo(tau=0.2) + 0.3*nll": ipo_and_nll,
    "dpo(beta=0.3, ld_alpha=0.5)": length_desensitized,
}
LABELS_BY_HAND: Mapping[str, Callable[[Scores, Tensor], Tensor]] = {
    "kto(beta=0.3, desirable_weight=2.0, kl_baseline='zero')": zero_baseline,
    "0.5*kto_zero(beta=0.3) + 0.5*kto_logsigmoid(beta=0.3, kl_baseline='zero')": two_label_losses,
}


class Matrix(Protocol):
    """What a framework's proof can do; a kind is "dpo" or "kto"."""

    def train(self, kind: str, **options: Any) -> Training:
        """Train with the framework alone."""
        ...

    def train_ours(self, kind: str, loss: str, by_hand: ByHand | None = None, **options: Any) -> Training:
        """Train with a prefloss loss in the framework."""
        ...

    def own(self, kind: str, name: str, options: Mapping[str, Any], ours: str) -> str:
        """Compare the framework's loss by the framework and by us."""
        ...

    def by_hand(self, kind: str, loss: str) -> str:
        """Compare a loss with plain forward passes."""
        ...

    def untouched(self, kind: str, before: Training) -> str:
        """Compare trainings without prefloss with one from before it was imported."""
        ...


class Proof:
    """Runs the checks of a release inside `with`, prints a JSON line for each, and exits with 1 if one failed.

    A line has framework, version, trainer, check, verdict ("same" or "FAILED") and detail. The arguments of the process
    are parts of names: with some, only checks that hold one of them run.

    Args:
        framework: Its name.
        release: Its version.
    """

    def __init__(self, framework: str, release: str) -> None:
        self._release = {"framework": framework, "version": release}
        self._failed = False
        self._parts = sys.argv[1:]

    def __enter__(self) -> Proof:
        return self

    def __exit__(self, kind: type | None, *details: Any) -> None:
        if kind is None:
            sys.exit(int(self._failed))

    def check(self, trainer: str, name: str, run: Callable[..., str], *arguments: Any) -> None:
        """Run a check, which returns a detail or raises; the checks after it still run."""
        if self._parts and not any(part in f"{trainer} {name}" for part in self._parts):
            return
        try:
            verdict, detail = "same", run(*arguments)
        except Exception as error:
            verdict, detail = "FAILED", f"{type(error).__name__}: {error}"
            self._failed = True
        line = {**self._release, "trainer": trainer, "check": name, "verdict": verdict, "detail": detail}
        print("\n" + json.dumps(line), flush=True)

    def check_all(
        self, matrix: Matrix, own: Mapping[str, Own], refused: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """The checks that all frameworks share.

        Args:
            matrix: The framework.
            own: Kind -> the framework's losses -> its options, and our loss under the same options.
            refused: What the error must say -> our loss as `prefloss`, and options that it cannot take.
        """
        before = {kind: matrix.train(kind) for kind in own}
        assert "prefloss" not in sys.modules, "prefloss was imported before the first run"
        for kind, losses in own.items():
            for name, (options, ours) in losses.items():
                self.check(kind, f"own {name}", matrix.own, kind, name, options, ours)
            for loss in PAIRS_BY_HAND if kind == "dpo" else LABELS_BY_HAND:
                self.check(kind, f"by hand {loss}", matrix.by_hand, kind, loss)
            self.check(kind, "untouched", matrix.untouched, kind, before[kind])
        for word, options in refused.items():
            self.check("dpo", f"refused {word}", _refuses, matrix, word, options)


@contextmanager
def proving(package: str, write_data: Callable[[Path], None]) -> Iterator[tuple[Proof, Path]]:
    """A package's proof, and a folder with `model`, `reference` and the data that it trains on.

    Args:
        package: Its name on the package index.
        write_data: Writes the data into the folder.
    """
    with Proof(package, version(package)) as results, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(str(folder / "model"))
        write_model(str(folder / "reference"), seed=1)
        write_data(folder)
        yield results, folder


def _refuses(matrix: Matrix, word: str, options: Mapping[str, Any]) -> str:
    settings = {"prefloss": "dpo(beta=0.3)", **options}
    try:
        matrix.train_ours(settings.pop("kind", "dpo"), settings.pop("prefloss"), **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        if word in str(error):
            return str(error)
        raise
    raise AssertionError(f"{word} was accepted")
