"""Proof for a checkout of NeMo-RL, which is not on the package index: `python -m tests.trainers.nemo_rl_matrix PATH`.

Its real loss and protocol modules run, on tensors on CPU. The modules beside them, which need Ray and a GPU, are empty;
`masked_mean` is read from its own file. NeMo-RL's `dpo_train` was not run.
"""

from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional
from unittest import mock

import torch
from torch.nn.functional import logsigmoid

from tests.trainers.proof import BOUND, Proof, near

EMPTY = (
    "nemo_rl.algorithms.x_token",
    "nemo_rl.algorithms.x_token.loss_utils",
    "nemo_rl.distributed",
    "nemo_rl.distributed.batched_data_dict",
    "nemo_rl.distributed.model_utils",
    "nemo_rl.models",
    "nemo_rl.models.dtensor",
    "nemo_rl.models.dtensor.parallelize",
)


def load(root: Path) -> Any:
    """The module `nemo_rl.algorithms.loss.loss_functions`."""
    for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        module = types.ModuleType(name)
        module.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = module
    for name in EMPTY:
        sys.modules[name] = mock.MagicMock()
    tree = ast.parse((root / "nemo_rl/algorithms/utils.py").read_text())
    found = [node for node in tree.body if getattr(node, "name", "") == "masked_mean"]
    utilities: Any = types.ModuleType("nemo_rl.algorithms.utils")
    utilities.torch, utilities.Optional, utilities.calculate_kl = torch, Optional, None
    exec(compile(ast.Module(found, []), "utils.py", "exec"), vars(utilities))
    sys.modules[utilities.__name__] = utilities
    return importlib.import_module("nemo_rl.algorithms.loss.loss_functions")


def batch(rows: int, seed: int) -> dict[str, Any]:
    """Log-probs and masks of rows, chosen and rejected in turn; the last pair fills the batch up and is not valid."""
    torch.manual_seed(seed)
    width = 9
    places, lengths = torch.arange(width), torch.randint(2, 6, (rows, 1))
    valid = torch.ones(rows)
    valid[-2:] = 0
    return {
        "policy": -3 * torch.rand(rows, width - 1, dtype=torch.float64),
        "reference_policy_logprobs": -3 * torch.rand(rows, width, dtype=torch.float64),
        "token_mask": ((places >= 3) & (places < 3 + lengths)).double(),
        "sample_mask": valid,
    }


def step(loss: Any) -> tuple[float, Any]:
    """Loss and gradient of a step of two micro-batches, added up as NeMo-RL's workers do."""
    parts = [batch(6, 0), batch(4, 1)]
    seqs = torch.stack([part["sample_mask"].sum() for part in parts]).sum()
    total, slopes = 0.0, []
    for part in parts:
        policy = part["policy"].clone().requires_grad_()
        value, metrics = loss(policy, data=part, global_valid_seqs=seqs, global_valid_toks=torch.tensor(1.0))
        assert abs(metrics["loss"] - value.item()) < BOUND
        total += value.item()
        slopes.append(torch.autograd.grad(value, policy)[0].flatten())
    return total, torch.cat(slopes)


def by_hand(value: Any) -> Any:
    """A loss written out, of (log-ratio sums, policy sums, token counts) of both sides."""

    def loss(policy: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any:
        mask = data["token_mask"][:, 1:]
        sums, known = (
            (logps * mask).sum(-1) for logps in (policy, data["reference_policy_logprobs"][:, :-1])
        )
        sides = [(sums - known)[side::2] for side in (0, 1)] + [sums[side::2] for side in (0, 1)]
        sides += [mask.sum(-1)[side::2] for side in (0, 1)]
        total = (value(*sides) * data["sample_mask"][::2]).sum() / (global_valid_seqs / 2)
        return total, {"loss": total.item()}

    return loss


def simpo(_: Any, __: Any, chosen: Any, rejected: Any, n: Any, m: Any) -> Any:
    return -logsigmoid(2.0 * (chosen / n - rejected / m) - 0.5)


def hinge_and_nll(h_chosen: Any, h_rejected: Any, chosen: Any, _: Any, n: Any, __: Any) -> Any:
    return 0.8 * torch.relu(1 - 0.3 * (h_chosen - h_rejected)) - 0.2 * chosen / n


def same(theirs: Any, ours: Any, bound: float) -> str:
    """Value and gradient of two losses agree to 1e-5, or to a bound."""
    (expected, slopes), (got, found) = step(theirs), step(ours)
    return near({"loss": abs(expected - got), "gradient": float((slopes - found).abs().max())}, bound)


def main() -> None:
    """Run every check of a checkout."""
    root = Path(sys.argv.pop(1)).resolve()
    module = load(root)
    from prefloss.integrations.nemo_rl import PreferenceLoss, loss_of

    def own(**options: Any) -> Any:
        return module.DPOLossFn(module.DPOLossConfig(**options))

    default, averaged = {"reference_policy_kl_penalty": 0.3}, {"preference_average_log_probs": True}
    sft = {"sft_loss_weight": 0.2, "sft_average_log_probs": True}
    checks = {
        "own sigmoid": (own(**default), PreferenceLoss("dpo", SimpleNamespace(**default))),
        "own average_log_probs": (own(**default, **averaged), PreferenceLoss("ln_dpo(beta=0.3)")),
        "own sft_loss_weight": (own(**default, **sft), PreferenceLoss("dpo(beta=0.3) + 0.2*nll")),
        "by hand simpo": (by_hand(simpo), PreferenceLoss("simpo(beta=2.0, gamma=0.5)")),
        "by hand 0.8*hinge + 0.2*nll": (
            by_hand(hinge_and_nll),
            PreferenceLoss("0.8*hinge(beta=0.3) + 0.2*nll"),
        ),
        "pickled": (own(**default), pickle.loads(pickle.dumps(PreferenceLoss("dpo(beta=0.3)")))),
        "untouched": (
            own(**default),
            loss_of(module.DPOLossFn)(module.DPOLossConfig(**default)),
        ),
    }
    head = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    with Proof("nemo_rl", head.stdout.strip() or "checkout") as results:
        for name, losses in checks.items():
            results.check("DPOLossFn", name, same, *losses, 0.0 if name == "untouched" else BOUND)


if __name__ == "__main__":
    main()
