"""Names that several papers share, and the message for a name that no loss has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from prefloss.arguments import shown

# One name, several papers: no loss has the name, and the message lists what it may mean.
AMBIGUOUS: dict[str, tuple[str, ...]] = {
    "rpo": (
        "dpo_nll: iterative reasoning PO, arXiv:2404.19733, and regularized PO, arXiv:2405.16436: DPO plus NLL",
        "rpo_relative: relative preference optimization, arXiv:2402.10958",
        "rpo_bwd_kl: reward-aware PO, arXiv:2406.11704; also rpo_fwd_kl, rpo_sq",
    ),
    "rdpo": (
        "robust_dpo: provably robust DPO, arXiv:2403.00409",
        "r_dpo: DPO with a length penalty, arXiv:2403.19159",
    ),
    "alphadpo": (
        "alpha_dpo: adaptive reward margin, arXiv:2410.10148",
        "alphapo: reward shape, arXiv:2501.03884",
        "f_dpo_alpha: DPO with an alpha-divergence, arXiv:2309.16240",
    ),
    "odpo": (
        "odpo: DPO with an offset, arXiv:2402.10571",
        "dpo: online DPO, arXiv:2402.04792: dpo on freshly judged samples",
    ),
    "bpo": (
        "balanced_bpo: balanced preference optimization, arXiv:2506.03557",
        "bregman_dpo: Bregman preference optimization, arXiv:2505.19601",
    ),
    "xpo": ("xpo: exploratory PO, arXiv:2405.21046", "chipo: chi-squared PO, arXiv:2407.13399"),
    "tpo": (
        "tpo: triple preference optimization, arXiv:2405.16681",
        "tpo_l: triple preference optimization, length-normalised, arXiv:2405.16681",
    ),
    "sdpo": (
        "s_dpo: softmax DPO with several rejected completions, arXiv:2406.09215",
        "(none): self-distillation in TRL's experimental folder: not a preference loss",
    ),
    "mpo": (
        "(none): mixed preference optimization, arXiv:2411.10442: '0.8*dpo + 0.2*bco_pair + 1.0*nll'",
        "(none): model preference optimization and others of that name",
    ),
    "drdpo": (
        "dr_dpo: distributionally robustified DPO, arXiv:2407.07880",
        "dro: offline regularised RL, arXiv:2405.19107",
    ),
    "asft": (
        "asft: aligned supervised fine-tuning, arXiv:2409.10571",
        "(none): LLaMA-Factory's anchored supervised fine-tuning: not a preference loss",
    ),
}


def unknown(name: str, known: Iterable[str]) -> str:
    """The message for a name that no loss has: the candidates if it means several papers, else close names."""
    candidates = AMBIGUOUS.get(squeezed(name))
    if candidates:
        return "\n  ".join([f"unknown loss {shown(name)}: the name means several things:", *candidates])
    bysqueezed = {squeezed(candidate): candidate for candidate in sorted(known)}
    # Comparing takes time that grows with the square of the length.
    close = difflib.get_close_matches(squeezed(name[:200]), bysqueezed, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(bysqueezed[match]) for match in close)}?" if close else "."
    return f"unknown loss {shown(name)}{hint} prefloss.specs holds all, `prefloss losses` lists them"


def squeezed(name: str) -> str:
    """A name without case and punctuation, as names are compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
