"""Logistic losses with an f-divergence in place of the reverse KL: a score s(h) takes the place of h."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.losses._authoring import Interval, Positive, Reward, maths, register, rewards, transforms
from prefloss.losses.pairwise import dpo


@register(
    aliases={"forward_kl": "TRL"},
    monotone=True,
    reward=rewards.bent(maths.forward_kl, "β (1 - exp(-h))"),
)
def f_dpo_forward_kl(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""DPO with the forward KL as its divergence (f-DPO).

    .. math::
        \ell = -\log \sigma(\beta (s_w - s_l)), \quad s = -e^{-h}

    Example:
        >>> f_dpo_forward_kl(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.5762])

    Note:
        The same as `dpo` with the modifier `divergence="forward_kl"`, which other margin losses take too. TRL adds a
        constant that cancels; ms-swift reaches it at alpha = 1; oxRL omits beta on one path. Below h = -80 the
        exponential is clamped: float32 would overflow and the pair give inf - inf; the gradient is 0 there. When to
        use: the policy should cover all of the reference's answers.

    Reference: Wang et al. 2023, arXiv:2309.16240.
    """
    return dpo(transforms.scored(pairs, maths.forward_kl), beta=beta)


@register(
    aliases={"js_divergence": "TRL, ms-swift"},
    monotone=True,
    reward=rewards.bent(maths.jensen_shannon, "β (log 2 + log σ(h))"),
)
def f_dpo_js(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""DPO with the Jensen-Shannon divergence (f-DPO).

    .. math::
        \ell = -\log \sigma(\beta (s_w - s_l)), \quad s = \log 2 + \log \sigma(h)

    Example:
        >>> f_dpo_js(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.6391])

    Note:
        The same as `dpo` with the modifier `divergence="js"`, which other margin losses take too. TRL and ms-swift
        agree; oxRL omits beta on one term. The score is bounded above, so the gradient fades where the policy is far
        above the reference. When to use: between forward and reverse KL.

    Reference: Wang et al. 2023, arXiv:2309.16240.
    """
    return dpo(transforms.scored(pairs, maths.jensen_shannon), beta=beta)


@register(
    aliases={"ms-swift:alpha_divergence": "ms-swift"},
    monotone=True,
    reward=Reward(
        lambda ratios, *, beta, alpha: beta * maths.alpha_divergence(ratios.h, alpha),
        "β (1 - exp(-α h)) / α",
        additive=False,
    ),
)
def f_dpo_alpha(
    pairs: Pairs, *, beta: Positive = 0.1, alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
) -> Tensor:
    r"""DPO with an alpha-divergence (f-DPO).

    .. math::
        \ell = -\log \sigma(\beta (s_w - s_l)), \quad s = \frac{1 - e^{-\alpha h}}{\alpha}

    Args:
        alpha: Towards 0 the reverse KL (DPO), towards 1 the forward KL.

    Example:
        >>> f_dpo_alpha(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, alpha=0.5)
        tensor([0.5824])

    Note:
        Alpha as in the paper, the authors' code, ms-swift and TRL up to 0.28. TRL since 0.29 turns it round: its
        `f_alpha_divergence_coef` is 1 - alpha, equal only at its default of 0.5. The same as `dpo` with the modifier
        `divergence="alpha(0.5)"`. Below alpha h = -80 the exponential is clamped, with gradient 0. When to use: to move
        between the two KLs.

    Reference: Wang et al. 2023, arXiv:2309.16240.
    """
    return dpo(transforms.scored(pairs, lambda h: maths.alpha_divergence(h, alpha)), beta=beta)


@register(
    monotone=True,
    reward=rewards.bent(maths.chi_squared, "β (exp(h) + h)"),
    helps={"over-optimisation": "a chi-squared term makes it costly to leave what the reference covers"},
)
def chipo(pairs: Pairs, *, beta: Positive = 0.1, r_max: Positive = 1.0) -> Tensor:
    r"""DPO with the KL and the chi-squared divergence mixed (χPO).

    .. math::
        \ell = -\log \sigma(\mathrm{clip}_{2 R_\mathrm{max}}[\beta (s_w - s_l)]), \quad s = e^h + h

    Args:
        r_max: Bound of the reward; the scaled margin is clipped to +-2 of it.

    Example:
        >>> chipo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, r_max=1.0)
        tensor([0.4162])

    Note:
        By design the clip removes the gradient of pairs whose scaled margin is beyond 2 r_max on either side; oxRL has
        no clip. The paper gives no default of r_max: set the largest reward that you believe in. Above h = 80 the
        exponential is clamped. Not `xpo` (exploratory PO). When to use: little data, with over-optimisation.

    Reference: Huang et al. 2024, arXiv:2407.13399, Alg. 1.
    """
    margin = transforms.scored(pairs, maths.chi_squared).margin()
    return -F.logsigmoid((beta * margin).clamp(-2 * r_max, 2 * r_max))
