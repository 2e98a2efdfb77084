"""Losses of a chosen against a rejected completion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.losses._parameters import FlipProbability, Positive
from prefloss.losses._registry import register


@register(
    aliases={"sigmoid": "TRL, Liger, LLaMA-Factory, ms-swift"},
    difference_only=True,
    monotone=True,
)
def dpo(pairs: Pairs, *, beta: Positive = 0.1, label_smoothing: FlipProbability = 0.0) -> Tensor:
    r"""Logistic loss of the margin (DPO), with label smoothing for noisy preferences (cDPO).

    .. math::
        \ell = -(1-\varepsilon) \log \sigma(\beta (h_w - h_l)) - \varepsilon \log \sigma(-\beta (h_w - h_l))

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats.
        beta: Strength of the pull towards the reference.
        label_smoothing: Probability ε that a preference is flipped; 0 is DPO.

    Returns:
        Loss of each pair, [pairs], nats; not reduced.

    Example:
        >>> dpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.5759])

    Note:
        Peers agree on DPO. Label smoothing is the conservative form of Mitchell 2023 (cdpo.pdf, Eq. 3), which is
        bounded below; the unbiased form of robust DPO is another loss. TRL since 0.29 and Liger accept
        `label_smoothing` with `sigmoid` and ignore it.

    Reference: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    z = beta * pairs.margin()
    # logsigmoid, not log(sigmoid): the latter is -inf below -100 in float32.
    kept = -F.logsigmoid(z)
    if label_smoothing == 0:
        return kept
    return (1 - label_smoothing) * kept - label_smoothing * F.logsigmoid(-z)


@register(beta="tau", difference_only=True)
def ipo(pairs: Pairs, *, tau: Positive = 0.1, per_token: bool = True) -> Tensor:
    r"""Squared distance of the margin from a fixed target (IPO).

    .. math::
        \ell = \left(h_w - h_l - \frac{1}{2 \tau}\right)^2

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats; their token counts if `per_token`.
        tau: Strength of the pull towards the reference, in 1/nats.
        per_token: Divide each h by its number of tokens first; False is the equation as printed.

    Returns:
        Loss of each pair, [pairs], nats squared; not reduced.

    Example:
        >>> ipo(Pairs.of(chosen=[5.0], rejected=[0.0]), tau=0.1, per_token=False)
        tensor([0.])

    Note:
        The paper writes sums over tokens. TRL averages per token and reports that the authors confirmed it; so do
        HALOs, ms-swift, XTuner, PaddleNLP and mlx-lm-lora. The original DPO repository, OpenRLHF, turbo-alignment
        and TRL's online DPO sum. The target 1/(2 tau) means another thing in each, so a tau does not carry over.
        Peers call tau beta.

    Reference: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    return (pairs.margin(per_token=per_token) - 1 / (2 * tau)) ** 2


@register(difference_only=True, monotone=True)
def hinge(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Hinge loss of the margin (RSO's loss; SLiC's with a reference).

    .. math::
        \ell = \max(0, 1 - \beta (h_w - h_l))

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats.
        beta: Slope, the paper's gamma; the loss is 0 from a margin of 1/beta nats on.

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> hinge(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.7500])

    Note:
        TRL, Liger, ms-swift and torchtune (`RSOLoss`) agree. SLiC-HF's own hinge has no reference and its margin
        in nats: another loss. RSO's contribution is mostly how it samples; this is its loss alone.

    Reference: Liu et al. 2023, arXiv:2309.06657.
    """
    return torch.relu(1 - beta * pairs.margin())
