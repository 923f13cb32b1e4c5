"""`diffem bench storage`: codecs, stores and memory, measured here and now."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import NonNegativeFloat, PositiveFloat
from rich import box
from rich.console import Console
from rich.table import Table

from storage_schemas._base import Record
from storage_schemas.benchmark import CodecSpeed, measure_codecs, noisy_images
from storage_schemas.store_benchmark import StorePlan, StoreSpeed, measure_store, plan_store

__all__ = ["StorageBenchmark", "bench_storage", "print_storage"]

_STORES = ((1_797, (1, 8, 8)), (50_000, (3, 32, 32)))
_PLAN = (1_000_000, (3, 64, 64))
_MEMORY = (5_000, 50_000)

_PROBE = """
import resource, sys
from storage_schemas.store_benchmark import measure_store
samples = int(sys.argv[2])
if samples:
    measure_store(sys.argv[1], samples=samples, x_shape=(3, 32, 32), minibatches=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


class StorageBenchmark(Record):
    """Everything that was measured."""

    codecs: tuple[CodecSpeed, ...]
    """One shard in memory, by codec."""
    stores: tuple[StoreSpeed, ...]
    """Stores, written and read."""
    plan: StorePlan
    """A large store, from its layout alone."""
    peak_mb: tuple[PositiveFloat, PositiveFloat]
    """Peak memory of a process that writes and reads 5,000 and 50,000 samples of 3 x 32 x 32."""
    growth: NonNegativeFloat
    """The second of these over the first."""


def bench_storage(url: str | None = None) -> StorageBenchmark:
    """Measure codecs, stores and memory.

    Arguments:
        url: Where the stores are written, below folders of their own, and left; a temporary
            folder, which is removed, by default.
    """
    with tempfile.TemporaryDirectory(prefix="diffem-bench-") as folder:
        base = url or folder
        stores = tuple(
            measure_store(f"{base}/{samples}", samples=samples, x_shape=shape)
            for samples, shape in _STORES
        )
        peaks = tuple(_peak(str(Path(folder) / f"memory-{n}"), n) for n in _MEMORY)
    return StorageBenchmark(
        codecs=tuple(measure_codecs(noisy_images(1000))),
        stores=stores,
        plan=plan_store(samples=_PLAN[0], x_shape=_PLAN[1]),
        peak_mb=(peaks[0], peaks[1]),
        growth=peaks[1] / peaks[0],
    )


def print_storage(result: StorageBenchmark) -> None:
    """Print the tables for people."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    table = Table(box=box.SIMPLE_HEAD, title="Codecs, one shard in memory", title_justify="left")
    for heading in ("codec", "ratio", "write MB/s", "read MB/s"):
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    for codec in result.codecs:
        table.add_row(
            codec.codec,
            f"{codec.ratio:.2f}",
            f"{codec.write_mb_s:,.0f}",
            f"{codec.read_mb_s:,.0f}",
        )
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, title="Stores", title_justify="left")
    headings = ("samples", "MB", "objects", "ratio", "write MB/s", "read MB/s", "minibatches/s")
    for heading in headings:
        table.add_column(heading, justify="right")
    for store in result.stores:
        shape = " x ".join(map(str, store.x_shape))
        table.add_row(
            f"{store.samples:,} of {shape}",
            f"{store.mb:,.1f}",
            f"{store.objects}",
            f"{store.ratio:.2f}",
            f"{store.write_mb_s:,.0f}",
            f"{store.read_mb_s:,.0f}",
            f"{store.minibatches_s:,.1f}",
        )
    console.print(table)
    plan = result.plan
    console.print(
        f"{plan.samples:,} samples of {' x '.join(map(str, plan.x_shape))}: {plan.mb:,.0f} MB in "
        f"{plan.objects:,} objects of {plan.object_mb:.1f} MB, each of "
        f"{plan.inner_chunks_per_object} chunks\n"
        f"peak memory: {result.peak_mb[0]:,.0f} MB for 5,000 samples, {result.peak_mb[1]:,.0f} MB "
        f"for 50,000: {result.growth:.2f} times",
        highlight=False,
    )


def _peak(url: str, samples: int) -> float:
    """Return the peak memory, in MB, of a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", _PROBE, url, str(samples)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(result.stdout)
