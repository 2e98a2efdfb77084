"""Sizes to measure at, as data."""

from typing import NamedTuple


class Logits(NamedTuple):
    tokens: int
    vocabulary: int


class Linear(NamedTuple):
    """Pairs of completions; each sequence has so many tokens, the first part of them prompt."""

    pairs: int
    sequence: int
    prompt: int
    width: int
    vocabulary: int


LOGITS = {
    "tiny": Logits(24, 301),
    "32k": Logits(2048, 32_000),
    "128k": Logits(512, 128_256),
    "gpu-32k": Logits(16_384, 32_000),
    "gpu-128k": Logits(16_384, 128_256),
}

LINEAR = {
    "tiny": Linear(2, 8, 4, 16, 301),
    "few": Linear(1, 40, 20, 1024, 32_000),
    "32k": Linear(4, 256, 128, 1024, 32_000),
    "128k": Linear(4, 512, 256, 1024, 128_256),
    "32k-no-prompt": Linear(4, 256, 0, 512, 32_000),
    "gpu-128k": Linear(8, 2048, 1024, 4096, 128_256),
}


class TrainStep(NamedTuple):
    """A Llama and a batch of pairs; every sequence is a prompt and a completion of so many tokens."""

    pairs: int
    prompt: int
    completion: int
    layers: int
    width: int
    vocabulary: int


TRAIN_STEP = {
    "tiny": TrainStep(2, 4, 4, 1, 64, 301),
    "1:1": TrainStep(4, 128, 128, 4, 256, 32_000),
    "4:1": TrainStep(4, 205, 51, 4, 256, 32_000),
}


class Layout(NamedTuple):
    """A Llama and groups of completions, so many tokens each; `varied` lengths differ by up to a quarter."""

    examples: int
    completions: int
    prompt: int
    completion: int
    varied: bool = False
    layers: int = 8
    width: int = 512
    vocabulary: int = 4096


LAYOUTS = {
    "tiny": Layout(2, 2, 4, 4, layers=1, width=64, vocabulary=301),
    "pairs 1:1": Layout(4, 2, 128, 128),
    "pairs 4:1": Layout(4, 2, 204, 52),
    "pairs 1:1, lengths vary": Layout(4, 2, 128, 128, varied=True),
    "rankings of 8, 4:1": Layout(2, 8, 204, 52),
}


def _small(completions: int, prompt: int, completion: int, varied: bool = False) -> Layout:
    """Of 4 layers, H 256: two pairs or one ranking, one pair where two are long."""
    examples = 2 if completions == 2 and prompt + completion < 4000 else 1
    return Layout(examples, completions, prompt, completion, varied, layers=4, width=256)


BY_LENGTH = {
    f"{kind}, {total // 2}+{total // 2}": _small(completions, total // 2, total // 2)
    for kind, completions in (("pairs", 2), ("rankings of 8", 8))
    for total in (128, 256, 512, 1024, 2048, 4096)
}
LAYOUTS |= BY_LENGTH | {
    "pairs, 3200+800": _small(2, 3200, 800),
    "pairs, 640+600, lengths vary": _small(2, 640, 600, varied=True),
    "rankings of 8, 512+128": _small(8, 512, 128),
    "rankings of 8, 256+1024": _small(8, 256, 1024),
    "rankings of 8, 400+300, lengths vary": _small(8, 400, 300, varied=True),
}

LAYOUT_LIMITS = {
    "pairs, 512+512": 0.85,
    "pairs, 1024+1024": 0.87,
    "pairs, 3200+800": 0.76,
    "rankings of 8, 512+128": 0.38,
    "rankings of 8, 512+512": 0.66,
    "rankings of 8, 256+1024": 0.97,
    "pairs 1:1": 0.75,
    "pairs 4:1": 0.57,
    "rankings of 8, 4:1": 0.31,
}
"""Time of shared prompts over padded rows, at most, on two cores with nothing else to do."""


class Score(NamedTuple):
    """Examples of so many completions; prompt and completion are median lengths, tokens."""

    examples: int
    completions: int
    prompt: int
    completion: int
    layers: int
    width: int
    vocabulary: int


SCORE = {
    "tiny": Score(7, 2, 6, 8, 1, 64, 301),
    "pairs": Score(6, 2, 60, 120, 4, 256, 32_000),
    "rankings": Score(3, 4, 60, 120, 4, 256, 32_000),
}


class GpuLogits(NamedTuple):
    """Logits on a GPU; `softcap` bounds them."""

    tokens: int
    vocabulary: int
    dtype: str = "bfloat16"
    softcap: float | None = None


class GpuLinear(NamedTuple):
    """Hidden states of so many tokens on a GPU, a multiple of 16, and a head."""

    tokens: int
    width: int
    vocabulary: int
    dtype: str = "bfloat16"
    softcap: float | None = None

    @property
    def pairs(self) -> Linear:
        """The tokens as completions of eight pairs."""
        return Linear(8, self.tokens // 16, 0, self.width, self.vocabulary)


class GpuSizes(NamedTuple):
    """What the parts of `bench_gpu` measure, the most important first."""

    logits: tuple[GpuLogits, ...]
    linear: tuple[GpuLinear, ...]
    peer_logits: tuple[GpuLogits, ...]
    peer_linear: tuple[GpuLinear, ...]
    odd_logits: tuple[GpuLogits, ...]
    odd_linear: tuple[GpuLinear, ...]
    # tokens, width and vocabulary of the checks, and the logits of the one past 2**31
    checks: tuple[int, int, int] = (257, 512, 32_003)
    past: GpuLogits | None = GpuLogits(17_000, 128_256)


GPU = {
    "full": GpuSizes(
        logits=(
            GpuLogits(16_384, 128_256), GpuLogits(16_384, 32_000), GpuLogits(16_384, 128_256, softcap=30.0),
            GpuLogits(8_192, 128_256, "float32"), GpuLogits(16_384, 128_256, "float16"),
        ),
        linear=(
            GpuLinear(16_384, 4096, 128_256), GpuLinear(16_384, 4096, 32_000),
            GpuLinear(16_384, 4096, 128_256, softcap=30.0), GpuLinear(4_096, 4096, 32_000, "float32"),
            GpuLinear(16_384, 4096, 32_000, "float16"),
        ),
        peer_logits=(GpuLogits(16_384, 128_256), GpuLogits(16_384, 32_000)),
        peer_linear=(GpuLinear(16_384, 4096, 128_256), GpuLinear(16_384, 4096, 32_000)),
        odd_logits=(
            GpuLogits(16_384, 32_001), GpuLogits(16_384, 50_257), GpuLogits(8_192, 50_257, "float32"),
            GpuLogits(16_384, 128_257), GpuLogits(16_384, 32_001, softcap=30.0), GpuLogits(2_048, 128_256),
            GpuLogits(512, 128_256), GpuLogits(64, 128_256), GpuLogits(1, 128_256),
        ),
        odd_linear=(
            GpuLinear(16_384, 4096, 50_257), GpuLinear(16_384, 4096, 32_001), GpuLinear(2_048, 4096, 128_256),
            GpuLinear(512, 4096, 128_256), GpuLinear(16_384, 2048, 151_936),
        ),
    ),
    "tiny": GpuSizes(
        logits=(GpuLogits(20, 301), GpuLogits(20, 301, "float32", 30.0)),
        linear=(GpuLinear(32, 16, 301), GpuLinear(32, 16, 301, "float32", 30.0)),
        peer_logits=(GpuLogits(20, 301),),
        peer_linear=(GpuLinear(32, 16, 301),),
        odd_logits=(GpuLogits(1, 301),),
        odd_linear=(GpuLinear(16, 16, 303),),
        checks=(9, 16, 301),
        past=None,
    ),
}  # fmt: skip


# What `forecast` forecasts: logits, and hidden states.
FORECAST: dict[str, tuple[tuple[GpuLogits, ...], tuple[GpuLinear, ...]]] = {
    "full": (
        tuple(
            GpuLogits(tokens, vocabulary, dtype, softcap)
            for tokens, vocabulary, dtype, softcap in (
                (16_384, 128_256, "bfloat16", None), (16_384, 32_000, "bfloat16", None),
                (8_192, 128_256, "float32", None), (16_384, 128_256, "bfloat16", 30.0),
                (16_384, 32_001, "bfloat16", None), (16_384, 50_257, "bfloat16", None),
                (512, 128_256, "bfloat16", None), (64, 128_256, "bfloat16", None),
            )
        ),
        tuple(
            GpuLinear(16_384, 4096, vocabulary, dtype, softcap)
            for vocabulary, dtype, softcap in (
                (128_256, "bfloat16", None), (32_000, "bfloat16", None), (128_256, "bfloat16", 30.0),
                (32_000, "float32", None), (50_257, "bfloat16", None),
            )
        ),
    ),
    "tiny": ((GpuLogits(64, 4096),), (GpuLinear(256, 64, 4096),)),
}  # fmt: skip
