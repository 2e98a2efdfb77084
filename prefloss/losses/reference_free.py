"""Losses on the policy's own log-probs and token counts: no reference model."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs, required
from prefloss.logratios import LogRatios
from prefloss.losses._authoring import NonNegative, Positive, Reward, maths, register, rewards, transforms


@register(
    aliases={
        "slic": "HALOs, whose NLL is per token",
        "SLIC_HF": "turbo-alignment, whose margin has no gradient",
    },
    needs_reference=False,
    monotone=True,
    holds_chosen=True,
    reads=("gold",),
    reward=Reward(lambda ratios: ratios.policy, "log π(y)", needs=frozenset()),
)
def slic_hf(pairs: Pairs, *, delta: NonNegative = 1.0, nll_weight: NonNegative = 0.1) -> Tensor:
    r"""Hinge loss of the log-probs plus a negative log-likelihood (SLiC-HF).

    .. math::
        \ell = \max(0, \delta - \log \pi(y_w) + \log \pi(y_l)) - \lambda \log \pi(y_\mathrm{reg})

    Args:
        pairs: Reads the policy's log-probs of both sides, [pairs], nats; y_reg is `gold` if the pairs carry it, else
            the chosen completion.
        delta: Margin that is asked for, nats.
        nll_weight: Weight λ of the regulariser.

    Example:
        >>> slic_hf(Pairs.of(chosen=[-20.0], rejected=[-24.0]), delta=1.0, nll_weight=0.1)
        tensor([2.])

    Note:
        The log-likelihood is a sum over tokens, as printed. `hinge` is RSO's form: with a reference, and a margin of 1
        at slope beta. TRL's CPO with `loss_type="hinge"` has that slope without a reference; HALOs adds an NLL per
        token; turbo-alignment puts the margin outside the max, where it has no gradient. When to use: a supervised
        target (`gold`) and no memory for a reference.

    Reference: Zhao et al. 2023, arXiv:2305.10425.
    """
    target = pairs.chosen if pairs.gold is None else pairs.gold
    return torch.relu(delta - pairs.chosen.policy + pairs.rejected.policy) - nll_weight * target.policy


@register(
    needs_reference=False,
    monotone=True,
    needs=("tokens",),
    reward=rewards.MEAN_LOG_PROB,
    helps={"length": "compares log-probs per token"},
)
def simpo(pairs: Pairs, *, beta: Positive = 2.5, gamma: NonNegative = 1.375) -> Tensor:
    r"""Logistic loss of the difference in log-prob per token, with a margin (SimPO).

    .. math::
        \ell = -\log \sigma\left(\frac{\beta}{|y_w|} \log \pi(y_w) - \frac{\beta}{|y_l|} \log \pi(y_l)
        - \gamma\right)

    Args:
        beta: Scale of the reward, in tokens.
        gamma: Margin γ that is asked for, nats.

    Example:
        >>> chosen, rejected = LogRatios(policy=[-20.0], tokens=[10]), LogRatios(policy=[-24.0], tokens=[8])
        >>> simpo(Pairs(chosen, rejected), beta=2.0, gamma=1.0)
        tensor([0.3133])

    Note:
        Gamma as in the equation, HALOs, LLaMA-Factory (`simpo_gamma`) and TRL; the authors' code takes the ratio gamma
        / beta, 0.55 here. TRL's CPO trainer, ms-swift, Axolotl and Liger add a negative log-likelihood by default:
        `trl:simpo` is `cpo_simpo`. PaddleNLP subtracts the reference, turbo-alignment puts gamma inside beta. DPO's
        beta of 0.1 makes it nearly flat; 2 to 10 is usual. Nothing keeps the policy close to its start. When to use: no
        memory for a reference, answers of mixed length.

    Reference: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    return -F.logsigmoid(beta * (pairs.chosen.policy_mean - pairs.rejected.policy_mean) - gamma)


@register(needs_reference=False, monotone=True, holds_chosen=True, needs=("tokens",), reward=rewards.LOG_PROB)
def cpo(pairs: Pairs, *, beta: Positive = 0.1, nll_weight: NonNegative = 1.0) -> Tensor:
    r"""DPO without a reference, plus the negative log-likelihood of the chosen completion (CPO).

    .. math::
        \ell = -\log \sigma\left(\beta \log \frac{\pi(y_w)}{\pi(y_l)}\right)
        - \alpha \frac{\log \pi(y_w)}{|y_w|}

    Args:
        beta: Scale of the margin.

    Example:
        >>> chosen, rejected = LogRatios(policy=[-20.0], tokens=[10]), LogRatios(policy=[-24.0], tokens=[8])
        >>> cpo(Pairs(chosen, rejected), beta=0.1, nll_weight=1.0)
        tensor([2.5130])

    Note:
        TRL's CPO trainer (`loss_type="sigmoid"`), Liger, ms-swift and oxRL agree, except that TRL's NLL is one mean
        over all chosen tokens of the batch; here it is each completion's own. When to use: translation and other tasks
        with one good answer, if the chosen completion must not become less likely.

    Reference: Xu et al. 2024, arXiv:2401.08417, Eq. 3.
    """
    return _preference(pairs, beta) + nll_weight * transforms.nll(pairs.chosen)


@register(
    aliases={
        "trl:simpo": ("TRL's CPO trainer", {"nll_weight": 1.0}),
        "ms-swift:simpo": ("ms-swift", {"nll_weight": 1.0}),
        "axolotl:simpo": ("Axolotl", {"nll_weight": 1.0}),
        "liger:simpo": ("Liger", {"nll_weight": 1.0}),
    },
    needs_reference=False,
    monotone=True,
    holds_chosen=True,
    needs=("tokens",),
    reward=rewards.MEAN_LOG_PROB,
)
def cpo_simpo(
    pairs: Pairs, *, beta: Positive = 10.0, gamma: NonNegative = 5.4, nll_weight: NonNegative = 0.05
) -> Tensor:
    r"""SimPO plus the negative log-likelihood of the chosen completion (CPO-SimPO).

    .. math::
        \ell = -\log \sigma\left(\frac{\beta}{|y_w|} \log \pi(y_w) - \frac{\beta}{|y_l|} \log \pi(y_l)
        - \gamma\right) - \alpha \frac{\log \pi(y_w)}{|y_w|}

    Args:
        beta: Scale of the reward, in tokens.
        gamma: Margin γ that is asked for, nats.

    Example:
        >>> chosen, rejected = LogRatios(policy=[-20.0], tokens=[10]), LogRatios(policy=[-24.0], tokens=[8])
        >>> cpo_simpo(Pairs(chosen, rejected), beta=2.0, gamma=1.0, nll_weight=1.0)
        tensor([2.3133])

    Note:
        No paper: the repository fe1ixxu/CPO_SIMPO, whose Llama 3 configuration gives the defaults here. What TRL's CPO
        trainer, ms-swift, Axolotl and Liger run under the name simpo, with a weight of 1 (`trl:simpo`). The
        repository's text writes the log-likelihood as a sum, its code averages per token. When to use: SimPO that loses
        fluency.

    Reference: Xu et al. 2024, arXiv:2401.08417, with Meng et al. 2024, arXiv:2405.14734.
    """
    return simpo(pairs, beta=beta, gamma=gamma) + nll_weight * transforms.nll(pairs.chosen)


@register(needs_reference=False, monotone=True, holds_chosen=True, needs=("tokens",), reward=rewards.LOG_ODDS)
def orpo(pairs: Pairs, *, odds_weight: NonNegative = 0.1) -> Tensor:
    r"""Negative log-likelihood of the chosen completion plus the logistic loss of an odds ratio (ORPO).

    .. math::
        \ell = -\log \bar p_w - \lambda \log \sigma\left(\log \frac{\bar p_w}{1 - \bar p_w}
        - \log \frac{\bar p_l}{1 - \bar p_l}\right), \quad \bar p = \pi(y)^{1 / |y|}

    Args:
        odds_weight: Weight λ of the odds ratio; peers call it beta.

    Example:
        >>> chosen, rejected = LogRatios(policy=[-20.0], tokens=[10]), LogRatios(policy=[-24.0], tokens=[8])
        >>> orpo(Pairs(chosen, rejected), odds_weight=0.1)
        tensor([2.0289])

    Note:
        The log-likelihood is that of the completion, as in the equation, LLaMA-Factory, Liger and HALOs. The authors'
        code and TRL take it over prompt and completion, which log-ratios of completions do not contain. A mean
        probability of 1 counts as one just below it, so that the odds stay finite. ColossalAI takes odds per token.
        When to use: training from a base model without a supervised stage.

    Reference: Hong et al. 2024, arXiv:2403.07691, Eqs. 4-7.
    """
    odds_ratio = transforms.log_odds(pairs.chosen) - transforms.log_odds(pairs.rejected)
    return transforms.nll(pairs.chosen) - odds_weight * F.logsigmoid(odds_ratio)


@register(
    needs_reference=False,
    monotone=True,
    needs=("tokens",),
    reward=Reward(
        lambda ratios, *, alpha, beta: beta * _alpha_reward(ratios, alpha),
        "β (1 - p^-α) / α with p = π(y)^(1 / |y|)",
        additive=False,
        needs=frozenset(("tokens",)),
    ),
    helps={
        "falling-chosen": "bends the reward, so that both log-probs fall less",
        "over-optimisation": "bends the reward, so that the policy moves less",
    },
)
def alphapo(pairs: Pairs, *, alpha: float = 0.25, beta: Positive = 2.5, gamma: NonNegative = 0.1) -> Tensor:
    r"""SimPO with a reward that bends the probability per token (AlphaPO).

    .. math::
        \ell = -\log \sigma(\beta (r_w - r_l) - \gamma), \quad r = \frac{1 - \bar p^{-\alpha}}{\alpha},
        \quad \bar p = \pi(y)^{1 / |y|}

    Args:
        alpha: Shape of the reward; 0 is SimPO.
        beta: Scale of the reward.
        gamma: Margin γ that is asked for, nats.

    Example:
        >>> chosen, rejected = LogRatios(policy=[-20.0], tokens=[10]), LogRatios(policy=[-24.0], tokens=[8])
        >>> alphapo(Pairs(chosen, rejected), alpha=0.25, beta=2.5, gamma=0.1)
        tensor([0.0102])

    Note:
        TRL's CPO trainer and oxRL agree on the form; expm1 is used because a power of the probability loses every digit
        near alpha = 0 and overflows for tiny probabilities. Its exponent is clamped at 80 (-320 nats per token at the
        default alpha), with gradient 0 beyond. Not `alpha_dpo` nor the alpha-divergence `f_dpo_alpha`. When to use:
        SimPO runs that lower both likelihoods.

    Reference: Gupta et al. 2025, arXiv:2501.03884.
    """
    margin = _alpha_reward(pairs.chosen, alpha) - _alpha_reward(pairs.rejected, alpha)
    return -F.logsigmoid(beta * margin - gamma)


@register(
    needs_reference=False,
    monotone=True,
    holds_chosen=True,
    needs=("tokens",),
    reward=Reward(
        lambda ratios: _inverse_perplexity(ratios),
        "π(y)^(1 / |y|)",
        additive=False,
        needs=frozenset(("tokens",)),
    ),
)
def simper(pairs: Pairs) -> Tensor:
    r"""Difference of inverse perplexities (SimPER).

    .. math::
        \ell = -\bar p_w + \bar p_l, \quad \bar p = \pi(y)^{1 / |y|}

    Returns:
        Loss of each pair, [pairs], in [-1, 1]; not reduced.

    Example:
        >>> chosen, rejected = LogRatios(policy=[-20.0], tokens=[10]), LogRatios(policy=[-24.0], tokens=[8])
        >>> simper(Pairs(chosen, rejected))
        tensor([-0.0855])

    Note:
        As in the authors' code; no peer has it. Nothing to tune but the learning rate, which sees gradients of at most
        1 / |y| per nat. When to use: no budget for a hyperparameter search.

    Reference: Xiao et al. 2025, arXiv:2502.00883.
    """
    return _inverse_perplexity(pairs.rejected) - _inverse_perplexity(pairs.chosen)


@register(needs_reference=False, monotone=True, needs=("tokens", "gold"), reward=rewards.LOG_PROB)
def tpo(pairs: Pairs, *, beta: Positive = 0.01, nll_weight: NonNegative = 1.0) -> Tensor:
    r"""DPO without a reference, plus the negative log-likelihood of a gold completion (triple preference, TPO).

    .. math::
        \ell = -\log \sigma\left(\beta \log \frac{\pi(y_w)}{\pi(y_l)}\right)
        - \alpha \frac{\log \pi(y_\mathrm{gold})}{|y_\mathrm{gold}|}

    Args:
        beta: Scale of the margin.

    Example:
        >>> chosen, rejected = LogRatios(policy=[-20.0], tokens=[10]), LogRatios(policy=[-24.0], tokens=[8])
        >>> gold = LogRatios(policy=[-18.0], tokens=[10])
        >>> tpo(Pairs(chosen, rejected, gold=gold), beta=0.01, nll_weight=1.0)
        tensor([2.4733])

    Note:
        TRL's experimental TPO trainer agrees (`loss_type="sigmoid"`), except that its NLL is one mean over all gold
        tokens of the batch. It is `cpo` with the likelihood of a third completion. Temporal and thought preference
        optimisation are also called TPO. When to use: a human-written answer beside the judged pair.

    Reference: Saeidi et al. 2024, arXiv:2405.16681.
    """
    return _preference(pairs, beta) + nll_weight * transforms.nll(required(pairs, "gold"))


@register(
    aliases={"tpo-l": "TRL"},
    needs_reference=False,
    monotone=True,
    needs=("tokens", "gold"),
    reward=rewards.MEAN_LOG_PROB,
)
def tpo_l(
    pairs: Pairs, *, beta: Positive = 0.01, gamma: NonNegative = 0.5, nll_weight: NonNegative = 1.0
) -> Tensor:
    r"""SimPO plus the negative log-likelihood of a gold completion (length-normalised triple preference, TPO-L).

    .. math::
        \ell = -\log \sigma\left(\frac{\beta}{|y_w|} \log \pi(y_w) - \frac{\beta}{|y_l|} \log \pi(y_l)
        - \gamma\right) - \alpha \frac{\log \pi(y_\mathrm{gold})}{|y_\mathrm{gold}|}

    Args:
        beta: Scale of the reward, in tokens.
        gamma: Margin γ that is asked for, nats.

    Example:
        >>> chosen, rejected = LogRatios(policy=[-20.0], tokens=[10]), LogRatios(policy=[-24.0], tokens=[8])
        >>> gold = LogRatios(policy=[-18.0], tokens=[10])
        >>> tpo_l(Pairs(chosen, rejected, gold=gold), beta=2.0, gamma=0.5, nll_weight=1.0)
        tensor([2.0014])

    Note:
        TRL's experimental TPO trainer agrees (`loss_type="tpo-l"`), except for the divisor of the NLL, as in `tpo`. Its
        beta of 0.01, the default here, gives a margin per token almost no slope: SimPO's is 2 to 10. When to use:
        `tpo`, if lengths differ.

    Reference: Saeidi et al. 2024, arXiv:2405.16681.
    """
    return simpo(pairs, beta=beta, gamma=gamma) + nll_weight * transforms.nll(required(pairs, "gold"))


def chosen_has_tokens(pairs: Pairs) -> Tensor:
    """True where there is a chosen completion, whatever the other sides are, [pairs]."""
    return ~pairs.chosen.empty


@register(
    aliases={"sft": ("TRL", {"average": "batch"})},
    needs_reference=False,
    monotone=True,
    holds_chosen=True,
    needs=("tokens",),
    valid=chosen_has_tokens,
    reward="it raises one completion and compares none",
)
def nll(pairs: Pairs, *, average: Literal["sequence", "sum", "batch"] = "sequence") -> Tensor:
    r"""Negative log-likelihood of the chosen completion (supervised fine-tuning).

    .. math::
        \ell = -\frac{\log \pi(y_w)}{|y_w|}

    Args:
        pairs: Reads the policy's log-prob of the chosen side, [pairs], nats, and its token count |y|.
        average: Divisor: `"sequence"` each completion's own token count, `"sum"` none, `"batch"` the mean token count
            of the batch, so that the mean over pairs is one mean over all chosen tokens.

    Returns:
        Loss of each pair, [pairs], nats per token (nats for `"sum"`); not reduced. Pairs whose chosen side has tokens
        count, whatever the rejected side.

    Example:
        >>> pairs = Pairs(LogRatios([-20.0, -5.0], tokens=[10, 5]), LogRatios([-24.0, -6.0], tokens=[8, 4]))
        >>> nll(pairs)
        tensor([2., 1.])
        >>> nll(pairs, average="batch").mean()
        tensor(1.6667)

    Note:
        A term for sums such as `"dpo + 1.0*nll"`. TRL's `sft` divides by the tokens of the local batch
        (`average="batch"`): a pair's loss then depends on its batch, so gradient accumulation and ranks change it.
        LLaMA-Factory and OpenRLHF average per completion, NeMo sums by default. When to use: beside a preference loss,
        to keep the chosen completion likely.

    Reference: Pang et al. 2024 (NLL term), arXiv:2404.19733.
    """
    chosen = pairs.chosen
    if average == "sum":
        return -chosen.policy
    if average == "sequence":
        return transforms.nll(chosen)
    # An empty completion adds 0 tokens and 0 nats.
    count = chosen_has_tokens(pairs).sum().to(chosen.policy.dtype)
    return -chosen.policy * count / transforms.lengths(chosen).sum().clamp(min=1)


def _alpha_reward(ratios: LogRatios, alpha: float) -> Tensor:
    """AlphaPO's reward before its scale, [...]; at alpha = 0 the mean log-prob."""
    mean = ratios.policy_mean
    return mean if alpha == 0 else maths.alpha_divergence(mean, alpha)


def _inverse_perplexity(ratios: LogRatios) -> Tensor:
    # Log-probs are at most 0, so the clamp acts only on wrong input, where it prevents inf - inf.
    return torch.exp(ratios.policy_mean.clamp(max=maths.MAX_EXPONENT))


def _preference(pairs: Pairs, beta: float) -> Tensor:
    """Logistic loss of the policy's log-probs, [pairs], nats."""
    return -F.logsigmoid(beta * (pairs.chosen.policy - pairs.rejected.policy))
