"""A whole training step on padded rows, packed ones, and prompts computed once: ``python -m benchmarks.bench_layouts``.

The model's layers dominate: 8 of H 512, or 4 of H 256, and V 4,096. The baseline is prefloss's own padded form, every
prompt as often as it has completions. ``--limits`` measures what the time of shared prompts is held to.
"""

import argparse
import copy
import logging
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from benchmarks.bench_train_step import Step
from benchmarks.measure import Record, in_turns, report
from benchmarks.shapes import BY_LENGTH, LAYOUT_LIMITS, LAYOUTS, Layout
from prefloss.integrations.transformers import PreferenceCollator, PreferenceLossCallback, Reference

BASELINE = "padded"
WAYS = (BASELINE, "packed", "shared_prefix", "auto")
# of the gradient against that of padded rows, relative
GRADIENT_LIMIT = 1e-4


def model(shape: Layout) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=8 * shape.width // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.width // 64),
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config)


def examples(shape: Layout) -> Dataset:
    """Groups of completions as token ids; two make a pair. Lengths vary by a quarter of the mean, if they do."""
    rng = random.Random(0)

    def ids(mean: int) -> list[int]:
        spread = mean // 4 if shape.varied else 0
        return [rng.randrange(2, shape.vocabulary) for _ in range(rng.randint(mean - spread, mean + spread))]

    rows = []
    for _ in range(shape.examples):
        completions = [ids(shape.completion) for _ in range(shape.completions)]
        # What the reference says does not matter to the time.
        logps = [-float(shape.completion)] * shape.completions
        row: dict[str, Any] = {"prompt_ids": ids(shape.prompt)}
        if shape.completions == 2:
            row |= {"chosen_ids": completions[0], "rejected_ids": completions[1]}
            row |= {"ref_chosen_logps": logps[0], "ref_rejected_logps": logps[1]}
        else:
            row |= {"completions_ids": completions, "ref_logps": logps}
            row |= {"scores": [float(i) for i in range(shape.completions)]}
        rows.append(row)
    return Dataset.from_list(rows)


def trainer(shape: Layout, policy: LlamaForCausalLM, layout: str, folder: str) -> Trainer:
    loss = "dpo" if shape.completions == 2 else "dpo_pl"
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=shape.examples,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        remove_unused_columns=False,
    )
    return Trainer(
        copy.deepcopy(policy),
        arguments,
        train_dataset=examples(shape),
        data_collator=PreferenceCollator(layout=layout),
        callbacks=[PreferenceLossCallback(loss, reference=Reference.cached(), check_step_zero=False)],
    )


def computed_tokens(step: Step) -> int:
    """Tokens that the model computes in a step."""
    counts: list[int] = []
    hook = step.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: counts.append(inputs[0].numel())
    )
    step.gradient()
    hook.remove()
    return counts[-1]


def run(name: str, shape: Layout, ways: Sequence[str], rounds: int, save: bool) -> dict[str, Record]:
    """Measure layouts on one shape, and report."""
    policy = model(shape)
    with tempfile.TemporaryDirectory() as folder:
        steps = {layout: Step(trainer(shape, policy, layout, folder)) for layout in ways}
        wanted = steps[BASELINE].gradient()
        found = {layout: (step.gradient(), computed_tokens(step)) for layout, step in steps.items()}
        records = in_turns(dict(steps), rounds, warm=False)
    for layout, record in records.items():
        gradient, record.tokens = found[layout]
        record.gradient_error = ((gradient - wanted).norm() / wanted.norm()).item()
        record.ok = record.gradient_error < GRADIENT_LIMIT
    row = {"bench": "layouts", "what": "training step", "shape": name, "dtype": "float32", "frozen": False}
    report(f"{row['what']}, {shape}", records, BASELINE, row, "cpu", save)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=LAYOUTS, help="default: those of 8 layers")
    parser.add_argument("--lengths", action="store_true", help="pairs and rankings of 128 to 4,096 tokens")
    parser.add_argument("--limits", action="store_true", help="the shapes with a limit, on two layouts")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    large = [name for name, shape in LAYOUTS.items() if shape.layers == 8]
    shapes = arguments.shape or (
        LAYOUT_LIMITS if arguments.limits else BY_LENGTH if arguments.lengths else large
    )
    ways = (
        (BASELINE, "shared_prefix") if arguments.limits else tuple(dict.fromkeys((BASELINE, *arguments.ways)))
    )
    for name in shapes:
        records = run(name, LAYOUTS[name], ways, arguments.rounds, not arguments.dry)
        if arguments.limits:
            ratio = records["shared_prefix"].median / records[BASELINE].median
            print(f"{name}: {ratio:.3f} of the time of padded rows, limit {LAYOUT_LIMITS[name]}", flush=True)


if __name__ == "__main__":
    main()
