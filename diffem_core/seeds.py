"""Seeds derived from what they are for, through a stable hash.

A seed is the first 63 bits of SHA-256 over the canonical text of its parts, so that it is the same
in every process, on every machine and in every order of work (Python's own `hash` is salted per
process).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["derive_seed", "seeded_initialization"]


def derive_seed(*parts: str | int) -> int:
    """Derive a seed from the things that it belongs to.

    Arguments:
        parts: Strings and integers, for example `(run_seed, "e_step", iteration, sample)`. `1` and
            `"1"` differ.

    Returns:
        An integer in [0, 2**63).

    Raises:
        ValueError: No part was given.
    """
    if not parts:
        raise ValueError("derive_seed received no parts; name at least one thing the seed is for")
    text = json.dumps(parts, separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded_initialization(seed: int) -> Iterator[None]:
    """Build networks with initial weights that depend on `seed` alone.

    PyTorch's layers draw their first weights from the global generator and accept no other; it is
    seeded here and put back afterwards. Networks are to be built on the CPU inside and moved to a
    device later.

    Arguments:
        seed: An integer, for example from `derive_seed`.
    """
    # Here only: an ingest derives seeds too, and does without 500 MB of PyTorch.
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
