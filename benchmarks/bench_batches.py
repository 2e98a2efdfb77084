"""An epoch in batches by tokens and in plain batches of the same memory: ``python -m benchmarks.bench_batches``.

The memory of a run is that of its largest batch. So plain batches, of a fixed number of rows in a random order, are
formed first; their largest number of padded tokens is the budget of the others. The time is that of forward and
backward passes over one epoch with DPO, DPO-PL or KTO (Llama, 2 layers, H 128, V 4,096, random weights). The gradient
of the mean loss over the epoch must be the same for all.

Lengths: log-normal ones, and with ``--data FOLDER`` those of pairs.jsonl, unpaired.jsonl and ranked.jsonl there, by a
byte-level BPE that is trained on them.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.bench_layouts import GRADIENT_LIMIT, model
from benchmarks.measure import in_turns, report
from benchmarks.shapes import Layout
from prefloss.data.examples import read_example
from prefloss.demo.model import train_tokenizer
from prefloss.training import (
    PreferenceCollator,
    PreferenceObjective,
    Reference,
    TokenBatchSampler,
    token_lengths,
)

BASELINE = "plain batches"
FILES = {"pairs": "pairs.jsonl", "votes": "unpaired.jsonl", "rankings": "ranked.jsonl"}
LOSSES = {"pairs": "dpo", "votes": "kto(kl_baseline=zero)", "rankings": "dpo_pl"}
# Rows of a plain batch, and examples that an epoch has at most.
ROWS, EXAMPLES = {"pairs": 8, "votes": 16, "rankings": 4}, 160
LLAMA = Layout(0, 2, 0, 0, layers=2, width=128)
TINY = Layout(0, 2, 0, 0, layers=1, width=64)


def log_normal(examples: int) -> list[dict[str, Any]]:
    """Pairs whose prompts have a median of 60 tokens and completions one of 120; at most 1,024 each."""
    rng = random.Random(0)

    def ids(median: int) -> list[int]:
        count = min(1024, max(2, round(median * rng.lognormvariate(0, 0.8))))
        return [rng.randrange(2, LLAMA.vocabulary) for _ in range(count)]

    return [
        {"prompt_ids": ids(60), "chosen_ids": ids(120), "rejected_ids": ids(120)} for _ in range(examples)
    ]


def real(folder: Path, kind: str, examples: int) -> list[dict[str, Any]]:
    """Rows of a file as token ids."""
    lines = (folder / FILES[kind]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    tokenizer = train_tokenizer(_texts(rows), vocab_size=LLAMA.vocabulary)
    made = []
    for index, row in enumerate(rows[:examples]):
        encoded = read_example(index, row, tokenizer, allow_empty=True).rows
        completions = [completion for _, completion in encoded]
        ids: dict[str, Any] = {"prompt_ids": encoded[0][0]}
        if kind == "pairs":
            ids |= {"chosen_ids": completions[0], "rejected_ids": completions[1]}
        elif kind == "votes":
            ids |= {"completion_ids": completions[0], "label": row["label"]}
        else:
            ids |= {"completions_ids": completions, "scores": row["scores"]}
        made.append(ids)
    return made


def _texts(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for name in ("prompt", "chosen", "rejected", "completion"):
            if name in row:
                yield row[name]
        yield from row.get("completions", ())


def with_references(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """What the reference says does not matter to the time."""
    if kind == "pairs":
        return [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} for row in rows]
    if kind == "votes":
        return [{**row, "ref_logps": -1.0} for row in rows]
    return [{**row, "ref_logps": [-1.0] * len(row["scores"])} for row in rows]


class Epoch:
    """Forward and backward passes over all batches, as one optimizer step."""

    def __init__(self, policy: LlamaForCausalLM, loss: str, batches: list[Any]) -> None:
        self.policy, self.batches = policy.train(), batches
        self.objective = PreferenceObjective(
            loss, reference=Reference.cached(), check_step_zero=False, diagnose=False
        )
        self.objective.count(batches)

    def __call__(self) -> None:
        self.policy.zero_grad()
        for batch in self.batches:
            self.objective(self.policy, batch).loss.backward()

    def gradient(self) -> torch.Tensor:
        """The gradient of the epoch's mean loss."""
        self()
        return torch.cat(
            [weight.grad.flatten() for weight in self.policy.parameters() if weight.grad is not None]
        )


def run(name: str, kind: str, rows: list[dict[str, Any]], shape: Layout, rounds: int, save: bool) -> None:
    """Measure plain batches, the same sorted by length, and batches by tokens, and report."""
    collate = PreferenceCollator()
    lengths = token_lengths(rows, collate)
    rows = with_references(rows, kind)
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    plain = [order[start : start + ROWS[kind]] for start in range(0, len(order), ROWS[kind])]
    budget = max(map(lengths.of_batch, plain))
    by_length = sorted(order, key=lambda index: int(lengths.tokens[index]))
    grouped = [by_length[start : start + ROWS[kind]] for start in range(0, len(order), ROWS[kind])]
    by_tokens = [*TokenBatchSampler(lengths, budget)]
    ways = {BASELINE: plain, "plain batches, grouped by length": grouped, "batches by tokens": by_tokens}
    policy = model(shape)
    epochs = {
        way: Epoch(policy, LOSSES[kind], [collate([rows[i] for i in batch]) for batch in batches])
        for way, batches in ways.items()
    }
    gradients = {way: epoch.gradient() for way, epoch in epochs.items()}
    records = in_turns(dict(epochs), rounds, warm=False)
    real_tokens = sum(int(batch["attention_mask"].sum()) for batch in epochs[BASELINE].batches)
    wanted = gradients[BASELINE]
    print(f"\n{name}: {len(rows)} examples, {real_tokens} tokens, at most {budget} padded tokens a batch")
    for way, record in records.items():
        record.gradient_error = ((gradients[way] - wanted).norm() / wanted.norm()).item()
        record.ok = record.gradient_error < GRADIENT_LIMIT
        sizes = [lengths.of_batch(batch) for batch in ways[way]]
        print(
            f"{way:36}{len(sizes):5} batches of at most {max(sizes):6} padded tokens, {real_tokens / sum(sizes):5.1%} "
            f"of them real; {1e3 * real_tokens / record.median:8.0f} tokens a second"
        )
    row = {"bench": "batches", "what": "epoch", "shape": name, "dtype": "float32", "frozen": False}
    report(f"epoch, {name}", records, BASELINE, row, "cpu", save)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of real preferences")
    parser.add_argument("--kind", nargs="+", default=[*FILES], choices=FILES, help="files to read")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-log-normal", action="store_true", help="the files alone")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    shape, save = TINY if arguments.tiny else LLAMA, not arguments.dry
    if not arguments.skip_log_normal:
        run("log-normal pairs", "pairs", log_normal(arguments.examples), shape, arguments.rounds, save)
    for kind in arguments.kind if arguments.data else ():
        rows = real(arguments.data, kind, arguments.examples)
        run(f"real {kind}", kind, rows, shape, arguments.rounds, save)


if __name__ == "__main__":
    main()
