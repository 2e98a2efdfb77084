"""What `skip_below` saves and costs: ``python -m benchmarks.bench_skip``, some minutes on a CPU.

On two heads, hidden states to gradients of hidden states and head: that of a small Llama trained here on Python's
own standard library (so the logits are those of a trained model, if a small one), and a synthetic one with a large
vocabulary, whose tokens are about as frequent as those of a text: the r-th likeliest has probability about 1/r.
"""

import argparse
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measure import in_turns, report
from benchmarks.peers import naive_logits
from prefloss.kernels import heads
from prefloss.logprobs import linear_token_logps

LIMITS = {"skip nothing": 0.0, "skip below 2^-14": 2**-14, "2^-12": 2**-12, "2^-10": 2**-10}
VOCABULARY, LENGTH, STEPS, BATCH = 8192, 128, 150, 16
TOKENS = 1024

Head = tuple[Tensor, Tensor, Tensor]


def trained(steps: int = STEPS, width: int = 256) -> Head:
    """Hidden states [n, H] of held-out text, weight [V, H] and next tokens [n] of a model trained on text."""
    from prefloss.demo.model import tiny_llama, train_tokenizer

    texts = sources()
    tokenizer = train_tokenizer(texts, VOCABULARY)
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    held_out, rows = rows[: TOKENS // LENGTH + 1], rows[TOKENS // LENGTH + 1 :]
    model = tiny_llama(tokenizer, hidden=width, max_length=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    mean = 0.0
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        hidden = model.model(batch[:, :-1]).last_hidden_state
        loss = -linear_token_logps(hidden, model.lm_head.weight, batch[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean = 0.95 * mean + 0.05 * loss.item()
    print(f"trained for {steps} steps of {BATCH} x {LENGTH} tokens: {mean:.2f} nats a token")
    with torch.no_grad():
        hidden = model.model(held_out[:, :-1]).last_hidden_state.reshape(-1, width)[:TOKENS]
    return hidden, model.lm_head.weight.detach(), held_out[:, 1:].reshape(-1)[:TOKENS]


def sources(most: int = 2_000_000) -> list[str]:
    """Texts of the standard library, in a fixed order that mixes its subjects, so many characters in all."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    texts, total = [], 0
    for path in paths:
        texts.append(path.read_text(errors="replace"))
        total += len(texts[-1])
        if total > most:
            break
    return texts


def synthetic(vocabulary: int = 32_000, width: int = 1024) -> Head:
    """A head whose softmax is peaked as a trained one's: Zipf's law from one hidden direction, noise from the rest."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, width)
    hidden[:, 0] = 1
    weight = 2 * torch.randn(vocabulary, width) / width**0.5
    weight[:, 0] = -torch.arange(1, vocabulary + 1).float().log()
    targets = (hidden @ weight.T).softmax(-1).multinomial(1).squeeze(-1)
    return hidden, weight, targets


def run(name: str, head: Head, dtype: torch.dtype, rounds: int, save: bool) -> None:
    """Time, share of the vocabulary left out and gradient error of each limit."""
    hidden, weight = (z.to(dtype).requires_grad_() for z in head[:2])
    targets = head[2]
    exact = [z.detach().double().requires_grad_() for z in (hidden, weight)]
    logps = naive_logits(exact[0] @ exact[1].T, targets, torch.float64)
    wanted = torch.autograd.grad(-logps.mean(), exact)

    def step(limit: float) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            out = linear_token_logps(hidden, weight, targets, impl="chunked", skip_below=limit)
            return torch.autograd.grad(-out.mean(), (hidden, weight))

        return call

    shares = {way: share_left_out(step(limit)) for way, limit in LIMITS.items()}
    steps = {f"{way}: {shares[way]:.0%} left out": step(limit) for way, limit in LIMITS.items()}
    records = in_turns(steps, rounds)
    for way, record in records.items():
        grads = steps[way]()
        record.gradient_error = max(
            ((a - b).norm() / b.norm()).item() for a, b in zip(grads, wanted, strict=True)
        )
    row: dict[str, object] = {
        "bench": "skip",
        "what": name,
        "shape": f"{len(hidden)}x{hidden.shape[1]}x{len(weight)}",
        "dtype": str(dtype).removeprefix("torch."),
        "frozen": False,
    }
    report(f"{name}, {row['shape']} {row['dtype']}", records, next(iter(steps)), row, "cpu", save)


def share_left_out(step: Callable[[], object]) -> float:
    """Of the columns of all tiles, those that the backward matmuls leave out."""
    kept, total = 0, 0
    likely_columns = heads.likely_columns

    def watched(dz: Tensor, limit: Tensor | float) -> Tensor | None:
        nonlocal kept, total
        found = likely_columns(dz, limit)
        kept += dz.shape[1] if found is None else len(found)
        total += dz.shape[1]
        return found

    with mock.patch.object(heads, "likely_columns", watched):
        step()
    return 1 - kept / total if total else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    for name, head in (
        ("head of a small trained model", trained()),
        ("synthetic head, Zipf", synthetic()),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            run(name, head, dtype, arguments.rounds, not arguments.dry)


if __name__ == "__main__":
    main()
