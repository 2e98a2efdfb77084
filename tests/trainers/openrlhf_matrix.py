"""Proof for one release of OpenRLHF: `python -m tests.trainers.openrlhf_matrix` where its package is installed.

Its real `DPOTrainer` and `DPOLoss` run, on a tiny model on CPU. What needs a GPU is replaced: the strategy (DeepSpeed)
by plain backward and SGD steps, the model's wrapper by one that returns the log-probs which the trainer asks for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from prefloss.integrations.openrlhf import trainer_with
from prefloss.integrations.probes import FRAMEWORKS, Prober
from prefloss.testing import compare
from tests.trainers.proof import BOUND, Proof, near

PROMPT, LENGTHS = 3, ((4, 7), (6, 2), (5, 5), (3, 6))


def load() -> Any:
    """The module `openrlhf.trainer.dpo_trainer`, without the packages that its neighbours import."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None
    root = Path(next(iter(spec.submodule_search_locations or ())))
    for name in ("models", "trainer", "utils"):
        module = types.ModuleType(f"openrlhf.{name}")
        module.__path__ = [str(root / name)]
        sys.modules[f"openrlhf.{name}"] = module
    # Imported by a neighbour of the loss, which reads nothing of it.
    sys.modules.setdefault("deepspeed", mock.MagicMock())
    sys.modules["openrlhf.models"].DPOLoss = importlib.import_module("openrlhf.models.loss").DPOLoss
    return importlib.import_module("openrlhf.trainer.dpo_trainer")


class Actor(torch.nn.Module):
    """As OpenRLHF's `Actor` answers its trainer: per-token log-probs of the next token, [rows, T - 1]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        ).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, ids: Any, attention_mask: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        logits = self.model(ids, attention_mask=attention_mask).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1), {}


class Strategy:
    """DeepSpeed's part of a step, on CPU."""

    ring_attn_group, accumulated_gradient = None, 1

    def __init__(self, **model: Any) -> None:
        options = {
            "label_smoothing": 0.0,
            "ipo_enable": False,
            "aux_loss_coef": 0.0,
            "nll_loss_coef": 0.0,
            **model,
        }
        logger = SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1)
        self.args = SimpleNamespace(
            model=SimpleNamespace(**options),
            ds=SimpleNamespace(packing_samples=False),
            logger=logger,
            eval=SimpleNamespace(steps=-1),
            ckpt=SimpleNamespace(save_steps=-1),
            train=SimpleNamespace(batch_size=4),
        )

    def is_rank_0(self) -> bool:
        return False

    def backward(self, loss: Any, model: Any, optimizer: Any) -> None:
        loss.backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model: Any) -> float:
        return 0.0

    def all_reduce(self, logs: Any) -> Any:
        return logs


def batch(seed: int) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    made: list[Any] = []
    for side in range(2):
        rows = [torch.randint(2, 32, (PROMPT + pair[side],)) for pair in LENGTHS]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        made += [
            ids,
            torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        ]
    return (*made, [PROMPT] * len(LENGTHS))


def trained(trainer_class: Any, beta: float = 0.1, **model: Any) -> tuple[list[float], Any]:
    """Losses of four steps, and the trained model."""
    policy, losses = Actor(0), []
    optimizer, tokenizer = torch.optim.SGD(policy.parameters(), 0.05), SimpleNamespace(pad_token_id=0)
    batches = DataLoader([batch(step) for step in range(4)], batch_size=None)
    scheduler = SimpleNamespace(get_last_lr=lambda: [0.05])
    model_and_data = (policy, Actor(1), Strategy(**model), tokenizer, optimizer, batches, None, scheduler)
    trainer = trainer_class(*model_and_data, beta=beta, max_epochs=1)
    inner = trainer.loss_fn
    trainer.loss_fn = lambda *logps: losses.append(inner(*logps)) or losses[-1]
    trainer.fit(trainer.args)
    return [float(found[0].detach()) for found in losses], policy


def same(theirs: Any, ours: Any, bound: float = BOUND) -> str:
    """Losses and weights of two trainings agree to 1e-5, or to a bound."""
    losses = max(abs(a - b) for a, b in zip(theirs[0], ours[0], strict=True))
    pairs = zip(theirs[1].parameters(), ours[1].parameters(), strict=True)
    weights = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return near({"losses": losses, "weights": weights}, bound)


def by_hand(value: Callable[..., Any]) -> Callable[..., Any]:
    """OpenRLHF's trainer with a loss written out: (policy sums, reference sums, token counts) of both sides."""

    def make(base: Any) -> type:
        class ByHand(base):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                counts = [torch.tensor([pair[side] for pair in LENGTHS]) for side in range(2)]
                self.loss_fn = lambda *logps: (value(*logps, *counts), logps[0].detach(), logps[1].detach())

        return ByHand

    return make


def simpo(chosen: Any, rejected: Any, _: Any, __: Any, n: Any, m: Any) -> Any:
    return -logsigmoid(2.0 * (chosen / n - rejected / m) - 0.5).mean()


def hinge_and_nll(
    chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any, n: Any, m: Any
) -> Any:
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return 0.8 * torch.relu(1 - 0.3 * margin).mean() - 0.2 * (chosen / n).mean()


def probed(prober: Prober, name: str) -> str:
    """`prefloss probe` finds that `DPOLoss` computes what is asked."""
    found = compare(prober.step(name), prober.asked(name))
    assert found, found
    return str(found)


def main() -> None:
    """Run every check of this release."""
    base = load().DPOTrainer
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "sigmoid": ("dpo", {}),
        "ipo": ("openrlhf:ipo", {"ipo_enable": True}),
        "label_smoothing": ("dpo(label_smoothing=0.1)", {"label_smoothing": 0.1}),
        "nll_loss_coef": ("dpo", {"nll_loss_coef": 0.2}),
    }
    hand = {"simpo(beta=2.0, gamma=0.5)": simpo, "0.8*hinge(beta=0.3) + 0.2*nll": hinge_and_nll}

    def compare(loss: str, options: dict[str, Any]) -> str:
        kept = {key: value for key, value in options.items() if key == "nll_loss_coef"}
        return same(trained(base, beta=0.3, **options), trained(trainer_with(loss, base), beta=0.3, **kept))

    with Proof("openrlhf", version("openrlhf")) as results:
        before = trained(base)
        for name, arguments in own.items():
            results.check("DPOTrainer", f"own {name}", compare, *arguments)
        for loss, value in hand.items():
            results.check(
                "DPOTrainer",
                f"by hand {loss}",
                lambda loss=loss, value=value: same(
                    trained(by_hand(value)(base)), trained(trainer_with(loss, base))
                ),
            )
        prober = FRAMEWORKS["openrlhf"]
        for name in prober.names():
            results.check("DPOLoss", f"probe {name}", probed, prober, name)
        results.check("DPOTrainer", "untouched", lambda: same(before, trained(base), bound=0.0))


if __name__ == "__main__":
    main()
