"""Log-probs of each text model class in each layout against its own logits: ``python -m benchmarks.architectures``.

Each class is built tiny (`tiny_models`). A first copy meets a batch of short rows at its first weights, then, with
grown weights, one of long rows; a second copy has grown weights and meets the long rows first. Prints what came of each
class, then counts, and writes benchmarks/results/architectures.csv. ``python -m benchmarks.architectures 2/8`` does the
second of eight parts.
"""

from __future__ import annotations

import collections
import copy
import csv
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from benchmarks import tiny_models
from prefloss.logratios import IGNORE_INDEX, completion_targets
from prefloss.training import PreferenceCollator, batch_logps, model_logps

RESULTS = Path(__file__).parent / "results" / "architectures.csv"
LAYOUTS = ("padded", "packed", "shared_prefix")
_TOLERANCE = 1e-3
# For one class, s.
_SECONDS = 60


class Outcome(NamedTuple):
    """What came of a class in a layout: equal, padded rows (with a warning), refused, WRONG or ERROR; and why."""

    kind: str
    reason: str = ""


def examples(shortest: int, longest: int, seed: int) -> list[dict[str, Any]]:
    """Rankings of two or three completions of a prompt."""
    rng = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randint(3, 80) for _ in range(rng.randint(least, most))]

    rows = []
    for _ in range(3):
        completions = [ids(2, 8) for _ in range(rng.randint(2, 3))]
        scores = [float(i) for i in range(len(completions))]
        rows.append({"prompt_ids": ids(shortest, longest), "completions_ids": completions, "scores": scores})
    return rows


SHORT, LONG = examples(2, 5, seed=0), examples(30, 45, seed=1)


def own_logps(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Log-probs from the model's own logits."""
    logits = model(**inputs).logits.double()
    found = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == IGNORE_INDEX, 0.0, found)


def against_logits(model: nn.Module, data: list[dict[str, Any]], left: bool) -> float:
    """Largest difference from the model's own logits on rows padded right or left, nats."""
    rows = PreferenceCollator()(data)
    ids, mask, completion = (rows[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    if left:
        ids, mask, completion = (
            torch.stack([row.roll(int((kept == 0).sum())) for row, kept in zip(item, mask, strict=True)])
            for item in (ids, mask, completion)
        )
    targets = completion_targets(ids, completion)
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = model_logps(model, inputs, targets).logps
    return float((found - own_logps(model, inputs, targets)).abs().nan_to_num(torch.inf).max())


def summed(model: nn.Module, data: list[dict[str, Any]], layout: str) -> tuple[Tensor, list[str]]:
    """Log-prob of each completion, nats, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logps = batch_logps(model, PreferenceCollator(layout=layout)(data).rows).logps.sum(-1)  # type: ignore[arg-type]
    return logps, [str(entry.message) for entry in caught if "layout:" in str(entry.message)]


def compared(fresh: nn.Module, grown: nn.Module, layout: str) -> Outcome:
    """A layout against padded rows, short rows first and long rows first."""
    notes: list[str] = []
    worst = 0.0
    first, second = copy.deepcopy(fresh), copy.deepcopy(grown)
    for model, batches in ((first, (SHORT, LONG)), (second, (LONG, SHORT))):
        for number, data in enumerate(batches):
            if number == 1:
                model.load_state_dict(grown.state_dict())
            found, said = summed(model, data, layout)
            wanted, _ = summed(model, data, "padded")
            worst = max(
                worst, float(((found - wanted).abs() / (1 + wanted.abs())).nan_to_num(torch.inf).max())
            )
            notes += said
    if worst > _TOLERANCE:
        return Outcome("WRONG", f"{worst:.2g} relative; {notes[:1]}")
    return Outcome("padded rows", notes[0].split(": ", 2)[-1]) if notes else Outcome("equal")


def surveyed(kind: Any) -> dict[str, Outcome]:
    """The outcome in each layout; empty if no tiny model of the class answers text."""
    fresh = tiny_models.built(kind)
    grown = copy.deepcopy(fresh)
    tiny_models.grow(grown)
    found: dict[str, Outcome] = {}
    for layout in LAYOUTS:
        try:
            if layout == "padded":
                worst = max(
                    against_logits(grown, data, left) for data in (SHORT, LONG) for left in (False, True)
                )
                found[layout] = (
                    Outcome("equal") if worst < _TOLERANCE else Outcome("WRONG", f"{worst:.2g} nats")
                )
            else:
                found[layout] = compared(fresh, grown, layout)
        except TimeoutError:
            raise
        except TypeError as error:
            named = str(error).startswith("model: ")
            found[layout] = Outcome("refused" if named else "ERROR", str(error))
        except Exception as error:
            found[layout] = Outcome("ERROR", f"{type(error).__name__}: {error}")
    return found


def main() -> None:
    """Survey all classes, or a part of them, and print the counts."""
    signal.signal(signal.SIGALRM, _too_long)
    part, parts = map(int, (sys.argv[1] if len(sys.argv) > 1 else "1/1").split("/"))
    chosen = sys.argv[2:]
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    rows: list[list[str]] = []
    everything = [*tiny_models.classes().items()]
    for name, kind in (
        [item for item in everything if item[0] in chosen] if chosen else everything[part - 1 :: parts]
    ):
        signal.alarm(_SECONDS)
        try:
            with torch.no_grad():
                found = surveyed(kind)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            rows.append([name, "", "", "", text])
        else:
            reasons = dict.fromkeys(outcome.reason for outcome in found.values() if outcome.reason)
            text = " ".join(" | ".join(reasons).split())[:300]
            rows.append([name, *(found[layout].kind for layout in LAYOUTS), text])
        print(", ".join(rows[-1]), flush=True)
    built = [row for row in rows if row[1]]
    print(f"{len(rows)} classes, {len(built)} built tiny that answer text alone")
    for column, layout in enumerate(LAYOUTS, start=1):
        print(f"{layout}: {dict(collections.Counter(row[column] for row in built))}")
    save(rows)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"took more than {_SECONDS} s")


def save(rows: list[list[str]]) -> None:
    """Write the outcomes in place of older ones of the same classes."""
    header = ["class", *LAYOUTS, "reason"]
    saved = list(csv.reader(RESULTS.read_text().splitlines())) if RESULTS.exists() else [header]
    by_class = {row[0]: row for row in [*saved[1:], *rows]}
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [header, *(by_class[name] for name in sorted(by_class))]
        )


if __name__ == "__main__":
    main()
