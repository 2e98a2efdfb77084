"""Losses of scored pairs: they read how much better the chosen completion is."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.losses._authoring import NonNegative, Positive, Reward, maths, register, transforms


@register(difference_only=True, needs=("scores",))
def soft_label_dpo(pairs: Pairs, *, beta: Positive = 0.1, eta: Positive = 1.0) -> Tensor:
    r"""Cross-entropy to the preference probability that the scores imply (soft-label DPO).

    .. math::
        \ell = -p \log \sigma(z) - (1 - p) \log \sigma(-z), \quad p = \sigma(\eta (r_w - r_l)),
        \quad z = \beta (h_w - h_l)

    Args:
        eta: Scale of the scores, in nats per unit of score.

    Example:
        >>> scores = {"score_chosen": [1.3863], "score_rejected": [0.0]}  # p = 0.8
        >>> soft_label_dpo(Pairs.of(chosen=[1.5], rejected=[-1.0], **scores), beta=0.1)
        tensor([0.6259])

    Note:
        No single paper has it: it is in RLHFlow's code, with the probabilities of a preference model. A known
        probability p enters as scores whose difference is log(p / (1 - p)). With p = 1 it is `dpo`, with p = 1 -
        epsilon `cdpo`; it is `rpo_bwd_kl` plus a constant. The chosen side may have the lower score. When to use: a
        judge that gives its confidence.

    Reference: Dong et al. 2024, arXiv:2405.07863 (code).
    """
    z, certainty = beta * pairs.margin(), eta * transforms.score_gap(pairs)
    return -torch.sigmoid(certainty) * F.logsigmoid(z) - torch.sigmoid(-certainty) * F.logsigmoid(-z)


@register(
    aliases={"sigmoid_with_margin": "turbo-alignment"}, difference_only=True, monotone=True, needs=("scores",)
)
def margin_dpo(pairs: Pairs, *, beta: Positive = 0.1, margin_weight: NonNegative = 1.0) -> Tensor:
    r"""DPO that asks for a larger margin where the scores differ more.

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l) - \lambda (r_w - r_l))

    Args:
        margin_weight: Weight λ of the difference of the scores, in nats per unit of score; 0 is DPO.

    Example:
        >>> margin_dpo(Pairs.of([1.5], [-1.0], score_chosen=[2.0], score_rejected=[1.5]), beta=0.1)
        tensor([0.8259])

    Note:
        Folklore, from the margin in Llama 2's reward model; no paper on DPO. The same as `dpo` with the modifier
        `score_margin`, which other losses take too; pass other margins as score_chosen with a score_rejected of 0.
        `odpo` takes the log of the difference. When to use: graded preferences.

    Reference: Touvron et al. 2023 (Llama 2, reward model), arXiv:2307.09288.
    """
    return -F.logsigmoid(beta * pairs.margin() - margin_weight * transforms.score_gap(pairs))


@register(
    difference_only=True,
    monotone=True,
    needs=("scores",),
    helps={"few-pairs": "asks for a larger margin where the scores differ more"},
)
def odpo(
    pairs: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 1.0, scale: Literal["log", "identity"] = "log"
) -> Tensor:
    r"""DPO with an offset that grows with the difference of the scores (ODPO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l) - \alpha f(r_w - r_l))

    Args:
        alpha: Weight of the offset.
        scale: f, `"log"` or `"identity"`; the log needs the chosen completion scored higher.

    Raises:
        ValueError: If `scale` is `"log"` and a chosen completion is not scored above the rejected one.

    Example:
        >>> odpo(Pairs.of([1.5], [-1.0], score_chosen=[3.0], score_rejected=[1.0]), beta=0.1, alpha=1.0)
        tensor([0.9391])

    Note:
        The log is the paper's and its code's default; there `ratio=true` takes log(r_w / r_l), which is this loss on
        the logs of the scores with `scale="identity"`. A difference below 1 gives a negative offset. Where values
        cannot be read (compiling, vmap) a pair without a log gives NaN instead of an error. oxRL has a constant offset.
        Not online DPO, also called ODPO. When to use: graded preferences of one scale.

    Reference: Amini et al. 2024, arXiv:2402.10571.
    """
    gap = transforms.score_gap(pairs)
    if scale == "log":
        positive, valid = gap > 0, pairs.valid
        maths.refuse(
            valid & ~positive,
            "odpo: score_chosen: got a score not above score_rejected, expected the chosen one scored higher, or "
            "scale='identity'",
        )
        # A pair that does not count gets a harmless gap: NaN would reach its other completion's gradient.
        gap = torch.where(positive, gap, torch.where(valid, torch.nan, 1.0)).log()
    return -F.logsigmoid(beta * pairs.margin() - alpha * gap)


@register(difference_only=True, needs=("scores",))
def rpo_bwd_kl(pairs: Pairs, *, beta: Positive = 0.1, eta: Positive = 1.0) -> Tensor:
    r"""KL from the scores' preference probability to the implied one (reward-aware PO, backward KL).

    .. math::
        \ell = q \log \frac{q}{p} + (1 - q) \log \frac{1 - q}{1 - p}, \quad q = \sigma(\eta (r_w - r_l)),
        \quad p = \sigma(\beta (h_w - h_l))

    Args:
        eta: Scale of the scores, in nats per unit of score.

    Returns:
        Loss of each pair, [pairs], nats, at least 0; not reduced.

    Example:
        >>> rpo_bwd_kl(Pairs.of([1.5], [-1.0], score_chosen=[2.0], score_rejected=[1.0]), beta=0.1)
        tensor([0.0610])

    Note:
        NeMo-Aligner agrees (its `gt_reward_scale` is eta). It is `soft_label_dpo` less the entropy of q: same gradient,
        and 0 at the best. Not `rpo_relative` nor `dpo_nll`, also called RPO. When to use: rewards of a trusted model.

    Reference: Adler et al. 2024 (Nemotron-4 340B), arXiv:2406.11704; Sun et al. 2025, arXiv:2502.00203.
    """
    target, z = eta * transforms.score_gap(pairs), beta * pairs.margin()
    return maths.bernoulli_kl(target, F.logsigmoid(z), F.logsigmoid(-z))


@register(difference_only=True, needs=("scores",))
def rpo_fwd_kl(pairs: Pairs, *, beta: Positive = 0.1, eta: Positive = 1.0) -> Tensor:
    r"""KL from the implied preference probability to the scores' one (reward-aware PO, forward KL).

    .. math::
        \ell = p \log \frac{p}{q} + (1 - p) \log \frac{1 - p}{1 - q}, \quad q = \sigma(\eta (r_w - r_l)),
        \quad p = \sigma(\beta (h_w - h_l))

    Args:
        eta: Scale of the scores, in nats per unit of score.

    Returns:
        Loss of each pair, [pairs], nats, at least 0; not reduced.

    Example:
        >>> rpo_fwd_kl(Pairs.of([1.5], [-1.0], score_chosen=[2.0], score_rejected=[1.0]), beta=0.1)
        tensor([0.0657])

    Note:
        NeMo-Aligner agrees, names of the directions included. With q = 1 - epsilon it is `exo_pair`. The gradient
        vanishes where p approaches 0 or 1, unlike that of `rpo_bwd_kl`. When to use: as `rpo_bwd_kl`, mode-seeking.

    Reference: Sun et al. 2025, arXiv:2502.00203.
    """
    target = eta * transforms.score_gap(pairs)
    return maths.bernoulli_kl(beta * pairs.margin(), F.logsigmoid(target), F.logsigmoid(-target))


@register(difference_only=True, needs=("scores",))
def rpo_sq(pairs: Pairs, *, beta: Positive = 0.1, eta: Positive = 1.0) -> Tensor:
    r"""Squared distance of the implied reward difference from the given one (reward-aware PO, squared).

    .. math::
        \ell = (\beta (h_w - h_l) - \eta (r_w - r_l))^2

    Args:
        eta: Scale of the scores, in nats per unit of score.

    Returns:
        Loss of each pair, [pairs], nats squared; not reduced.

    Example:
        >>> rpo_sq(Pairs.of([1.5], [-1.0], score_chosen=[2.0], score_rejected=[1.0]), beta=0.1)
        tensor([0.5625])

    Note:
        NeMo-Aligner agrees. It is beta^2 times `rebel` with eta / beta for eta; there the reference is the policy that
        wrote the data. When to use: rewards whose differences are reliable, not only their order.

    Reference: Sun et al. 2025, arXiv:2502.00203.
    """
    return (beta * pairs.margin() - eta * transforms.score_gap(pairs)) ** 2


@register(
    difference_only=True,
    needs=("scores",),
    reward=Reward(lambda ratios, *, eta: ratios.h / eta, "h / η"),
)
def rebel(pairs: Pairs, *, eta: Positive = 1.0) -> Tensor:
    r"""Regression of the margin on the difference of the rewards (REBEL).

    .. math::
        \ell = (h_w - h_l - \eta (r_w - r_l))^2

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats, against the policy that wrote them, and their
            scores r.
        eta: Step size, in nats per unit of score.

    Returns:
        Loss of each pair, [pairs], nats squared; not reduced.

    Example:
        >>> rebel(Pairs.of([1.5], [-1.0], score_chosen=[2.0], score_rejected=[1.0]), eta=1.0)
        tensor([2.2500])

    Note:
        No peer has it; the authors' code agrees. The reference is the policy of the previous iteration, not the one
        before training. The order of a pair does not matter, and equal rewards are fine. Published eta: 1, and 1e6 in
        one setting whose code scales the rewards. When to use: online, with a reward model.

    Reference: Gao et al. 2024, arXiv:2404.16767.
    """
    return (pairs.margin() - eta * transforms.score_gap(pairs)) ** 2


@register(needs=("scores",), helps={"several-judges": "aims at win rates, which may run in circles"})
def sppo(pairs: Pairs, *, beta: Positive = 0.001) -> Tensor:
    r"""Squared distance of each log-ratio from its win probability (SPPO).

    .. math::
        \ell = \frac{1}{2} \left(h_w - \frac{p_w - 1/2}{\beta}\right)^2
        + \frac{1}{2} \left(h_l - \frac{p_l - 1/2}{\beta}\right)^2

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats, and as scores their probabilities p in [0, 1] of
            winning against the current policy.
        beta: Strength of the pull towards the reference, the paper's 1/eta, in 1/nats.

    Returns:
        Loss of each pair, [pairs], nats squared; not reduced.

    Example:
        >>> sppo(Pairs.of([1.5], [-1.0], score_chosen=[0.8], score_rejected=[0.2]), beta=0.1)
        tensor([3.1250])

    Note:
        As in the authors' code; no peer has it. With p of 1 and 0 it is half of `sppo_hard`, the form that trainers
        call SPPO. Rewards are not probabilities: apply a sigmoid first. When to use: iterative self-play with a judge
        that gives win rates.

    Reference: Wu et al. 2024, arXiv:2405.00675.
    """
    win_chosen, win_rejected = transforms.scores_of(pairs)
    chosen = pairs.chosen.h - (win_chosen - 0.5) / beta
    rejected = pairs.rejected.h - (win_rejected - 0.5) / beta
    return 0.5 * (chosen**2 + rejected**2)
