"""DiffEM beside its baselines and its ceiling, over seeds: mean and spread in one table.

    diffem     the config as it is
    em-mmps    an unconditional network and moment-matching posterior sampling (linear channels)
    gaussian   the linear-Gaussian posterior that EM begins with
    clean      the conditional network, trained on clean samples: the ceiling

Each is an ordinary run in a store of its own under one folder, so that a comparison that was
killed goes on, and each can be looked at like any other.
"""

from __future__ import annotations

from pipelines.compare.contenders import METHODS, Contender, LeftOut, Method, contenders
from pipelines.compare.numbers import Comparison, Outcome, collect
from pipelines.compare.work import compare

__all__ = [
    "METHODS",
    "Comparison",
    "Contender",
    "LeftOut",
    "Method",
    "Outcome",
    "collect",
    "compare",
    "contenders",
]
