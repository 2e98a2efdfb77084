"""Losses of a chosen against a rejected completion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs, required
from prefloss.losses._authoring import NonNegative, Positive, Reward, register, rewards, transforms


@register(aliases={"sigmoid": "TRL, Liger, LLaMA-Factory, ms-swift"}, difference_only=True, monotone=True)
def dpo(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Logistic loss of the margin (DPO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l))

    Example:
        >>> dpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.5759])

    Note:
        Peers agree. With the modifier `label_smoothing` it is the conservative form of Mitchell 2023 (`cdpo`), bounded
        below; the unbiased form is `robust_dpo`. TRL since 0.29 and Liger accept `label_smoothing` with `sigmoid` and
        ignore it.

    Reference: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    # logsigmoid, not log(sigmoid): the latter is -inf below -100 in float32.
    return -F.logsigmoid(beta * pairs.margin())


@register(
    aliases={
        "openrlhf:ipo": ("OpenRLHF", {"per_token": False}),
        "oxrl:ipo": ("oxRL", {"per_token": False}),
        "turbo:ipo": ("turbo-alignment", {"per_token": False}),
    },
    beta="tau",
    difference_only=True,
    reads=("tokens",),
    reward=Reward(
        lambda ratios, *, beta, per_token: beta * (ratios.h_mean if per_token else ratios.h),
        "β h, / |y| if per_token",
    ),
    helps={"deterministic": "stops at a margin of 1/(2 tau), however often one side won"},
)
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
        HALOs, ms-swift, XTuner, PaddleNLP and mlx-lm-lora. The original DPO repository, OpenRLHF, turbo-alignment and
        TRL's online DPO sum. The target 1/(2 tau) means something different in each form, so a tau does not carry over.
        Peers call tau beta.

    Reference: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    return (pairs.margin(per_token=per_token) - 1 / (2 * tau)) ** 2


@register(
    aliases={"RSOLoss": "torchtune", "hinge-norm": "the RSO paper"}, difference_only=True, monotone=True
)
def hinge(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Hinge loss of the margin (RSO's loss; SLiC's with a reference).

    .. math::
        \ell = \max(0, 1 - \beta (h_w - h_l))

    Args:
        beta: Slope, the paper's gamma; the loss is 0 from a margin of 1/beta nats on.

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> hinge(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.7500])

    Note:
        TRL, Liger, ms-swift and torchtune (`RSOLoss`) agree. SLiC-HF's own hinge has no reference and its margin in
        nats: it is a different loss. RSO's main contribution is its sampling; this is only its loss.

    Reference: Liu et al. 2023, arXiv:2309.06657.
    """
    return torch.relu(1 - beta * pairs.margin())


@register(
    aliases={"sigmoid_norm": "TRL", "dpo_norm": "open-instruct"},
    difference_only=True,
    monotone=True,
    needs=("tokens",),
    reward=rewards.MEAN_LOG_RATIO,
    helps={"length": "compares log-ratios per token"},
)
def ln_dpo(pairs: Pairs, *, beta: Positive = 5.0) -> Tensor:
    r"""Logistic loss of the margin per token (length-normalised DPO).

    .. math::
        \ell = -\log \sigma\left(\beta \left(\frac{h_w}{|y_w|} - \frac{h_l}{|y_l|}\right)\right)

    Args:
        beta: Strength of the pull towards the reference, in tokens: about 50 times DPO's.

    Example:
        >>> chosen = LogRatios(policy=[-20.0], reference=[-21.5], tokens=[10])
        >>> rejected = LogRatios(policy=[-24.0], reference=[-23.0], tokens=[8])
        >>> ln_dpo(Pairs(chosen, rejected), beta=5.0)
        tensor([0.2254])

    Note:
        TRL, open-instruct, NeMo (`preference_average_log_probs`) and Liger (`average_log_prob`) agree on the form but
        keep DPO's default beta of 0.1, with which this loss is nearly flat; Tülu 3 swept 2 to 15. When to use: long
        completions, or when DPO makes answers grow.

    Reference: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124, Eq. 6.
    """
    return -F.logsigmoid(beta * pairs.margin(per_token=True))


@register(
    difference_only=True,
    monotone=True,
    needs=("tokens",),
    reward=Reward(
        lambda ratios, *, beta, alpha: beta * ratios.h + alpha * transforms.lengths(ratios),
        "β h + α |y|",
        needs=frozenset(("reference", "tokens")),
    ),
    helps={"length": "a length term keeps what length alone earned out of the margin"},
)
def r_dpo(pairs: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 0.01) -> Tensor:
    r"""Logistic loss of the margin plus a length term (R-DPO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l) + \alpha (|y_w| - |y_l|))

    Args:
        alpha: Strength of the length term, in 1/tokens.

    Example:
        >>> chosen = LogRatios(policy=[-20.0], reference=[-21.5], tokens=[10])
        >>> rejected = LogRatios(policy=[-24.0], reference=[-23.0], tokens=[8])
        >>> r_dpo(Pairs(chosen, rejected), beta=0.1, alpha=0.01)
        tensor([0.5672])

    Note:
        The plus sign follows from the objective, the reward minus alpha |y|: length already explains part of why a
        longer completion won, so that pair pulls less. oxRL, AlphaDPO, gamma-PO and RLHFlow write a minus, rewarding
        length; AlphaDPO and gamma-PO take lengths from the batch dimension (the term is 0), RLHFlow from padded rows.
        The paper has no default alpha; 0.01 is SamPO's and oxRL's. Not `robust_dpo`, also called rDPO. When to use: to
        remove the effect of length from the preference data.

    Reference: Park et al. 2024, arXiv:2403.19159.
    """
    longer_by = transforms.lengths(pairs.chosen) - transforms.lengths(pairs.rejected)
    return -F.logsigmoid(beta * pairs.margin() + alpha * longer_by)


@register(
    monotone=True,
    reward=Reward(
        lambda ratios, *, beta, alpha: beta * (ratios.h - (1 - alpha) * ratios.policy),
        "α β log π(y) - β log π_ref(y)",
    ),
)
def hdpo(pairs: Pairs, *, beta: Positive = 0.1, alpha: Positive = 0.9) -> Tensor:
    r"""Logistic loss with separate weights on policy and reference (H-DPO).

    .. math::
        \ell = -\log \sigma\left(\alpha \beta \log \frac{\pi(y_w)}{\pi(y_l)}
        - \beta \log \frac{\pi_\mathrm{ref}(y_w)}{\pi_\mathrm{ref}(y_l)}\right)

    Args:
        pairs: Reads the log-probs of both sides under policy and reference, [pairs], nats.
        alpha: Weight of the policy's entropy; below 1 the policy gets sharper, 1 is DPO.

    Example:
        >>> hdpo(Pairs(LogRatios([-20.0], [-21.5]), LogRatios([-24.0], [-23.0])), beta=0.1, alpha=0.9)
        tensor([0.5936])

    Note:
        Formula checked against oxRL, the one peer that has it. The paper sweeps alpha around 1 and names no default.
        When to use: if DPO leaves the policy too flat or too sharp.

    Reference: Omura et al. 2024, arXiv:2411.07595.
    """
    # The same as the equation, from log-ratios: no digits are lost to large log-probs at alpha = 1.
    sharpening = (1 - alpha) * (pairs.chosen.policy - pairs.rejected.policy)
    return -F.logsigmoid(beta * (pairs.margin() - sharpening))


@register(
    monotone=True,
    holds_chosen=True,
    needs=("tokens",),
    helps={
        "falling-chosen": "the NLL term keeps the chosen completion likely (arXiv:2404.19733)",
        "over-optimisation": "the NLL term holds the policy near good data (arXiv:2405.16436)",
    },
)
def dpo_nll(pairs: Pairs, *, beta: Positive = 0.1, nll_weight: NonNegative = 1.0) -> Tensor:
    r"""DPO plus the negative log-likelihood of the chosen completion (iterative reasoning PO, regularized PO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l)) - \alpha \frac{\log \pi(y_w)}{|y_w|}

    Example:
        >>> chosen = LogRatios(policy=[-20.0], reference=[-21.5], tokens=[10])
        >>> rejected = LogRatios(policy=[-24.0], reference=[-23.0], tokens=[8])
        >>> dpo_nll(Pairs(chosen, rejected), beta=0.1, nll_weight=1.0)
        tensor([2.5759])

    Note:
        The divisor of the NLL differs, so a weight does not carry over. Here, in LLaMA-Factory (`pref_ftx`) and in
        OpenRLHF (`nll_loss_coef`) it is each completion's own token count. TRL's `["sigmoid", "sft"]` takes one mean
        over all chosen tokens of the batch: `dpo + 1.0*nll(average="batch")`. NeMo sums by default. The first version
        of the paper divided by the length of prompt and completion. Published weights: 1 (iterative reasoning), 0.005
        (regularized). When to use: to keep the chosen completion likely, especially in reasoning.

    Reference: Pang et al. 2024, arXiv:2404.19733; Liu et al. 2024, arXiv:2405.16436.
    """
    return dpo(pairs, beta=beta) + nll_weight * transforms.nll(pairs.chosen)


@register(monotone=True, needs=("gold",))
def xpo(pairs: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 1e-5) -> Tensor:
    r"""DPO that moves the policy away from the reference's own samples (exploratory PO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l)) + \alpha \log \pi(y_\mathrm{ref})

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats, and the policy's log-prob of y_ref: `gold` carries
            a sample of the reference policy.
        alpha: Strength of the exploration.

    Returns:
        Loss of each pair, [pairs], nats; not reduced. Unbounded below.

    Example:
        >>> xpo(Pairs.of([1.5], [-1.0], gold=LogRatios(policy=[-30.0], reference=[-30.0])), beta=0.1)
        tensor([0.5756])

    Note:
        The sign is intended: a positive alpha makes the samples less likely (optimism). TRL's XPO trainer, gone by
        1.16, agrees and sums over tokens. The term is unbounded below, so keep alpha small. Not `chipo` (χPO). When to
        use: online training, when the policy's samples are no longer diverse.

    Reference: Xie et al. 2024, arXiv:2405.21046.
    """
    return dpo(pairs, beta=beta) + alpha * required(pairs, "gold").policy
