"""Rewards of a data set's completions, from token ids to numbers: ``python -m benchmarks.bench_score``.

The baseline scores as RewardBench does: six examples at a time in the order of the data, all their completions as
padded rows, the whole logits of policy and reference, their log-softmax, and the entries of the tokens. RewardBench
takes pairs alone; its way is extended to rankings here. Llama of 4 layers, H 256, V 32,000; lengths vary as those of
instructions and answers do.
"""

import argparse
import random
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import prefloss
from benchmarks.measure import in_turns, report
from benchmarks.shapes import SCORE, Score
from prefloss.data.tokens import Encoded, pad

BASELINE = "RewardBench's way"
# Examples of a batch, the default of RewardBench.
EXAMPLES = 6
# of a completion's log-ratio against float64, nats
LIMIT = 1e-3


def model(shape: Score, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.width // 64),
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def examples(shape: Score) -> list[list[Encoded]]:
    """Prompts with their completions; the logarithm of a length is normal."""
    rng = random.Random(0)

    def ids(median: int) -> list[int]:
        length = max(1, min(4 * median, round(median * rng.lognormvariate(0, 0.6))))
        return [rng.randrange(2, shape.vocabulary) for _ in range(length)]

    rows = []
    for _ in range(shape.examples):
        prompt = ids(shape.prompt)
        rows.append([(prompt, ids(shape.completion)) for _ in range(shape.completions)])
    return rows


@torch.no_grad()
def whole_logits(policy: LlamaForCausalLM, reference: LlamaForCausalLM, data: list[list[Encoded]]) -> Tensor:
    """Log-ratios of all completions, [N], nats."""
    found = []
    for start in range(0, len(data), EXAMPLES):
        batch = pad([row for rows in data[start : start + EXAMPLES] for row in rows], 0)
        found.append(logps(policy, batch) - logps(reference, batch))
    return torch.cat(found)


def logps(scorer: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    logits = scorer(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (chosen * mask).sum(-1)


def run(name: str, shape: Score, rounds: int, save: bool) -> None:
    """Measure both ways on one shape, and report."""
    policy, reference, data = model(shape, 0), model(shape, 1), examples(shape)
    rows = [row for sides in data for row in sides]
    scorer = prefloss.Scorer(policy, None, reference, loss="dpo(beta=1.0)")
    ways: dict[str, Callable[[], Tensor]] = {
        BASELINE: lambda: whole_logits(policy, reference, data),
        "prefloss": lambda: scorer.encoded(rows).reward,
    }
    policy.double(), reference.double()
    exact = torch.cat([whole_logits(policy, reference, [sides]) for sides in data[:EXAMPLES]])
    policy.float(), reference.float()
    errors = {way: (call()[: len(exact)] - exact).abs().max().item() for way, call in ways.items()}
    records = in_turns(ways, rounds, warm=False)
    for way, record in records.items():
        record.logp_error, record.ok = errors[way], errors[way] < LIMIT
    row = {"bench": "score", "what": "rewards", "shape": name, "dtype": "float32", "frozen": True}
    report(f"{row['what']}, {shape}", records, BASELINE, row, "cpu", save)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["pairs", "rankings"], choices=SCORE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    for shape in arguments.shape:
        run(shape, SCORE[shape], arguments.rounds, not arguments.dry)


if __name__ == "__main__":
    main()
