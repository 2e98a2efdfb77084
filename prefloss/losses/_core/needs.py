"""What a loss needs of its feedback, checked before its function runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prefloss import feedback as _feedback

if TYPE_CHECKING:
    from prefloss.losses._core.registry import LossSpec

NEEDS = {
    "tokens": "completion token counts",
    "scores": "graded feedback (score_chosen and score_rejected of pairs, scores of labels)",
    "gold": "a third completion of each prompt (Pairs.gold)",
    "baseline": "the value of each prompt (Labels.baseline)",
    "embedding": "an embedding of each prompt (Pairs.embedding)",
    "mismatched": "completions under prompts they do not belong to (Labels.mismatched)",
    "kl": "a KL baseline computed elsewhere (Labels.kl)",
    "per_token": "the log-probs of each token (LogRatios.per_token)",
    "per_token.log_sum_sq": "the log of the sum of squared probabilities at each token",
    "per_token.kl": "KL(reference || policy) over the vocabulary at each token",
    "per_token.reverse_kl": "KL(policy || reference) over the vocabulary at each token",
    "per_token.reference_entropy": "the reference's normalised entropy at each token",
    "per_token.weight": "an importance weight of each token",
}
"""Names that a loss may list in `needs` and `reads`, in words."""

_CONVERSIONS = {
    ("Rankings", "Pairs"): "convert with rankings.to_pairs('best_worst' | 'adjacent' | 'all')",
    ("Rankings", "Labels"): "convert with rankings.to_pairs(...).to_labels()",
    ("Pairs", "Labels"): "convert with pairs.to_labels()",
    ("Pairs", "Rankings"): "convert with pairs.to_rankings()",
}


def check(name: str, spec: LossSpec, needs: Iterable[str], feedback: Any) -> None:
    """Refuse feedback that the loss cannot read.

    Raises:
        TypeError: If it is of another kind; the message names the conversion.
        ValueError: If something that the loss needs is missing.
    """
    wanted = spec.feedback
    if not isinstance(feedback, wanted):
        got = type(feedback).__name__
        hint = _CONVERSIONS.get((got, wanted.__name__))
        raise TypeError(
            f"{name}: feedback: got {got}, expected {wanted.__name__}{f'; {hint}' if hint else ''}"
        )
    if spec.needs_reference and any(part.reference is None for part in feedback.parts):
        raise ValueError(
            f"{name}: reference: got None, expected reference log-probs: the loss reads log-ratios"
        )
    for need in needs:
        if not _has(feedback, need):
            raise ValueError(f"{name}: {need}: got none, expected {NEEDS[need]}")


def _has(feedback: _feedback.Feedback, need: str) -> bool:
    first, _, rest = need.partition(".")
    if first == "per_token":
        rows = [part.per_token for part in feedback.parts]
        return all(row is not None and (not rest or getattr(row, rest) is not None) for row in rows)
    if need == "tokens":
        return all(part.tokens is not None for part in feedback.parts)
    if need == "scores" and isinstance(feedback, _feedback.Pairs):
        return feedback.score_chosen is not None
    return getattr(feedback, need, None) is not None
