"""The ceiling of a benchmark: the conditional network, trained on the clean samples themselves.

    theta_{k+1} = argmin E_{x, y_tilde ~ Q(.|x), t, z}
                      lambda_t || f_theta(x + sigma_t z, sigma_t, y_tilde) - x ||^2

It is what DiffEM would reach if its reconstructions were perfect: network, re-corruption, gradient
steps, learning rate and evaluation are those of `method: diffem`, only x stands where x_hat stood.

No other method ever reads a clean sample on its way to a model. This module and the evaluation
(`judge`) are the only stages that read any, and this one does so for `method: clean` alone, a part
of the config that is stored in `run.json`, in its digest, with the model, with the samples, and
told by `diffem status` and `diffem report`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.stages.bench import Bench
from storage_schemas.config import RunConfig

__all__ = ["CLEAN_ATTRIBUTES", "clean_samples", "learns_from_clean"]

CLEAN_ATTRIBUTES = {
    "title": "Clean samples, not reconstructions: a ceiling (method: clean)",
    "method": "clean",
}
"""What the arrays of such a run say of themselves."""


def learns_from_clean(config: RunConfig) -> bool:
    """Tell whether a run is the ceiling: its models learn from clean samples."""
    return config.method == "clean"


def clean_samples(bench: Bench, iteration: int, rows: slice) -> Tensor:
    """Read the clean samples that stand for an iteration's reconstructions.

    Arguments:
        bench: A run whose method is `clean`.
        iteration: EM iteration, of whose observations they are.
        rows: Which of them.

    Returns:
        Shape (n, *x_shape), in data units.

    Raises:
        RuntimeError: The run has another method, which must not see them.
        ValueError: Nobody knows them.
    """
    if not learns_from_clean(bench.config):
        raise RuntimeError(
            f"clean samples were asked for by a run whose method is {bench.config.method!r}, "
            "which learns from observations alone; only method 'clean' may read them"
        )
    x = bench.store.training(iteration).truth(rows)
    if x is None:
        raise ValueError(
            "method is 'clean' but the observations come without clean samples; take 'diffem', or "
            "give data whose clean samples are known"
        )
    return torch.from_numpy(x)
