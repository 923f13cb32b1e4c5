"""Rows in shards: so many in each, the last with what is left."""

from __future__ import annotations

__all__ = ["shard_count", "shard_rows"]


def shard_count(samples: int, shard_size: int) -> int:
    """Return how many shards `samples` rows make, `shard_size` in each."""
    return -(-samples // shard_size)


def shard_rows(shard: int, samples: int, shard_size: int) -> tuple[int, int]:
    """Return the first row of a shard and the row after its last.

    Raises:
        ValueError: There is no such shard.
    """
    shards = shard_count(samples, shard_size)
    if not 0 <= shard < shards:
        raise ValueError(f"shard is {shard} but there are shards 0 to {shards - 1}")
    start = shard * shard_size
    return start, min(samples, start + shard_size)
