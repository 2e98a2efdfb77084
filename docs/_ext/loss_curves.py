"""Pictures of losses: value and gradient over the margin of a pair, the log-ratio of a label, the best of a ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import prefloss
from prefloss import Labels, LogRatios, Pairs, Rankings
from prefloss.logratios import PerToken
from prefloss.registry import LossSpec

TOKENS = 10
REFERENCE = -20.0
POINTS = torch.linspace(-30.0, 30.0, 121)
_CAPTIONS = {
    Pairs: "Loss and its derivative over the margin $h_w - h_l$ (nats), both sides moving alike; completions of 10 "
    "tokens, a reference log-prob of -20 nats, default hyperparameters.",
    Labels: "Loss and its derivative over the log-ratio $h$ (nats) of an upvoted and a downvoted completion of 10 "
    "tokens; default hyperparameters, baselines 0.",
    Rankings: "Loss of a group of three and its derivative over the log-ratio $h$ (nats) of the best completion, the "
    "others at 0 and -1; default hyperparameters.",
}


def caption(spec: LossSpec) -> str:
    """What the picture shows."""
    return _CAPTIONS[spec.feedback]


def draw(spec: LossSpec, path: Path) -> None:
    """Write the picture of a loss with its default hyperparameters."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for label, upvoted in (
        (("upvote", True), ("downvote", False)) if spec.feedback is Labels else (("", True),)
    ):
        values, slopes = _curve(spec, upvoted)
        left.plot(POINTS, values, label=label)
        right.plot(POINTS, slopes, label=label)
    unit = {Pairs: "margin $h_w - h_l$ (nats)", Labels: "log-ratio $h$ (nats)", Rankings: "best's $h$ (nats)"}
    for axis, title in ((left, "loss"), (right, "derivative")):
        axis.set_title(f"{spec.name}: {title}")
        axis.set_xlabel(unit[spec.feedback])
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        if spec.feedback is Labels:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_together(path: Path) -> None:
    """Write the picture of the README: margin losses side by side, each with a beta of 1."""
    losses = {
        "DPO": prefloss.get("dpo", beta=1.0),
        "cDPO, 10 % flipped": prefloss.get("cdpo", beta=1.0, epsilon=0.1),
        "robust DPO, 10 % flipped": prefloss.get("robust_dpo", beta=1.0, epsilon=0.1),
        "hinge": prefloss.get("hinge", beta=1.0),
        "IPO": prefloss.get("ipo", tau=0.5, per_token=False),
        "exponential": prefloss.get("gpo_exponential", beta=1.0),
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    margins = torch.linspace(-3.0, 5.0, 321).requires_grad_()
    for label, loss in losses.items():
        values = loss(Pairs(chosen=_side(margins / 2), rejected=_side(-margins / 2)))
        (slopes,) = torch.autograd.grad(values.sum(), margins)
        axes[0].plot(margins.detach(), values.detach(), label=label)
        axes[1].plot(margins.detach(), slopes)
    for axis, title, limits in ((axes[0], "Loss", (-0.6, 4.0)), (axes[1], "Gradient", (-2.2, 1.2))):
        axis.set(title=title, xlabel=r"margin $\beta\,(h_w - h_l)$", ylim=limits)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(spec: LossSpec, upvoted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # One point at a time, each with a fresh loss, so that batch-coupled and stateful losses see no other point.
    values, slopes = [], []
    settings = {"kl_baseline": "zero"} if "kl_baseline" in spec.parameters else {}
    for point in POINTS:
        margin = point.clone().requires_grad_()
        value = prefloss.get(spec.name, **settings).eval()(_feedback(spec, margin, upvoted)).sum()
        (slope,) = torch.autograd.grad(value, margin, allow_unused=True)
        values.append(value.detach())
        slopes.append(torch.zeros(()) if slope is None else slope)
    return torch.stack(values), torch.stack(slopes)


def _feedback(spec: LossSpec, margin: torch.Tensor, upvoted: bool) -> Pairs | Labels | Rankings:
    scored = "scores" in spec.needs
    if spec.feedback is Labels:
        labels = Labels(completions=_side(margin.reshape(1)), desirable=[upvoted])
        return replace(labels, scores=torch.ones(1), baseline=torch.zeros(1))
    if spec.feedback is Rankings:
        h = torch.stack([margin, torch.zeros(()), -torch.ones(())]).reshape(1, 3)
        return Rankings(completions=_side(h), scores=torch.tensor([[1.0, 0.5, 0.0]]))
    pairs = Pairs(chosen=_side(margin.reshape(1) / 2), rejected=_side(-margin.reshape(1) / 2))
    return replace(
        pairs,
        score_chosen=torch.tensor([0.9]) if scored else None,
        score_rejected=torch.tensor([0.1]) if scored else None,
        gold=_side(torch.zeros(1)) if "gold" in spec.needs else None,
        embedding=torch.ones(1, 2) if "embedding" in spec.needs else None,
    )


def _side(h: torch.Tensor) -> LogRatios:
    each = torch.full((*h.shape, TOKENS), REFERENCE / TOKENS)
    rows = PerToken(
        policy=each + h.unsqueeze(-1) / TOKENS,
        reference=each,
        mask=torch.ones_like(each, dtype=torch.bool),
        log_sum_sq=torch.full_like(each, -1.0),
        kl=torch.full_like(each, 0.1),
        reverse_kl=torch.full_like(each, 0.1),
        reference_entropy=torch.full_like(each, 0.3),
        weight=torch.ones_like(each),
    )
    return rows.log_ratios()


if __name__ == "__main__":
    draw_together(Path(__file__).parents[1] / "images" / "shapes.png")
