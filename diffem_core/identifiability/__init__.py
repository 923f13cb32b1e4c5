"""Identifiability: what a channel lets one know of x, before anything is trained.

    H = E[A' A]            hidden directions: its null space         first moments
    T: D -> E[P D P]       pairs never seen together: its null space second moments,   P = A' A

`identify` looks at a batch of operators; the verdict is a property of what it returns.
"""

from __future__ import annotations

from diffem_core.identifiability.analysis import identify
from diffem_core.identifiability.pairs import Pairs
from diffem_core.identifiability.priors import FittedPrior, StandInPrior, VariancePrior
from diffem_core.identifiability.report import Identifiability, Verdict

__all__ = [
    "FittedPrior",
    "Identifiability",
    "Pairs",
    "StandInPrior",
    "VariancePrior",
    "Verdict",
    "identify",
]
