"""How many threads a run takes where nobody says: those that it may, less one for others."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["torch_threads", "usable_threads"]


@functools.cache
def usable_threads() -> int:
    """Count the threads that compute, by default.

    Cores, not their hardware threads, that affinity and the limits of a container leave to this
    process. Threads of one loop wait for the last of them, which anything else that runs on its
    core holds up (Prefect's server does): of more than two cores, one is left to others.

    Returns:
        The number, at least 1.
    """
    import joblib  # A fifth of a second, which an import of this module does not take.

    cores = int(joblib.cpu_count(only_physical_cores=True))
    return cores if cores <= 2 else cores - 1


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
