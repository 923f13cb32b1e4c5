"""`diffem bench storage`: codecs, stores, memory and feeding, measured here and now.

Every store is written and read in a process of its own, whose peak memory is told as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from pipelines.bench.loopback_s3 import loopback_s3
from storage_schemas._base import Record
from storage_schemas.benchmark import CodecSpeed, measure_codecs, noisy_images
from storage_schemas.errors import StoreFailed
from storage_schemas.store_benchmark import StorePlan, StoreSpeed, plan_store

__all__ = ["FeedingSpeed", "StorageBenchmark", "StoreRun", "bench_storage", "measured_alone"]

_STORES = ((1_797, (1, 8, 8)), (50_000, (3, 32, 32)))
_PLAN = (1_000_000, (3, 64, 64))
_MEMORY = (5_000, 50_000)
_FEEDS: tuple[dict[str, Any], ...] = (
    {"samples": 1_547, "x_shape": (1, 8, 8), "channels": (32, 64), "steps": 30},
    {"samples": 50_000, "x_shape": (3, 32, 32), "channels": (32, 64), "steps": 10},
)

_PROBE = """
import json, pathlib, sys
from pipelines.process_memory import highest_memory
given = json.loads(sys.argv[1])
given["x_shape"] = tuple(given["x_shape"])
if given.pop("what") == "store":
    from storage_schemas.store_benchmark import measure_store
    result = measure_store(given.pop("url"), **given)
else:
    from pipelines.bench.feeding import measure_feeding
    given["channels"] = tuple(given["channels"])
    result = measure_feeding(pathlib.Path(given.pop("url")), **given)
peak = highest_memory() / 2**20
print(json.dumps({"result": result.model_dump(mode="json"), "peak_mb": peak}))
"""


class StoreRun(Record):
    """One store, written and read."""

    speed: StoreSpeed
    """How fast."""
    peak_mb: PositiveFloat
    """Peak memory of the process that did it."""
    requests: PositiveInt | None
    """Requests that the server on loopback has noted; None elsewhere."""


class FeedingSpeed(Record):
    """What one training does."""

    samples: PositiveInt
    """Reconstructions."""
    x_shape: tuple[PositiveInt, ...]
    """Shape of one."""
    mb: PositiveFloat
    """All of them."""
    memory_step_ms: PositiveFloat
    """One gradient step, from memory; the best turn."""
    file_step_ms: PositiveFloat
    """One gradient step, through the mapped scratch file; the best turn."""
    memory_waiting: NonNegativeFloat
    """Share of all steps' time in which a batch was fetched from memory."""
    file_waiting: NonNegativeFloat
    """Share of all steps' time in which a batch was fetched from the mapped file."""


class StorageBenchmark(Record):
    """Everything that was measured."""

    codecs: tuple[CodecSpeed, ...]
    """One shard in memory, by codec."""
    stores: tuple[StoreRun, ...]
    """Stores, written and read."""
    plan: StorePlan
    """A large store, from its layout alone."""
    peak_mb: tuple[PositiveFloat, PositiveFloat]
    """Peak memory of a process that writes and reads 5,000 and 50,000 samples of 3 x 32 x 32."""
    growth: NonNegativeFloat
    """The second of these over the first."""
    feeding: tuple[FeedingSpeed, ...]
    """Training from memory and through a mapped file."""


def bench_storage(url: str | None = None, *, s3: bool = False) -> StorageBenchmark:
    """Measure codecs, stores, memory and feeding.

    Arguments:
        url: Where the stores are written, below folders of their own, and left; a temporary
            folder, which is removed, by default.
        s3: Measure them on an S3 server on loopback as well, which is started for it.

    Raises:
        ValueError: What the server needs is not installed, or there is something at the URL.
        StoreFailed: A measurement ended with an error.
    """
    with tempfile.TemporaryDirectory(prefix="diffem-bench-") as name, contextlib.ExitStack() as on:
        folder = Path(name)
        server = on.enter_context(loopback_s3(folder)) if s3 else None
        stores = [_store(f"{url or folder / 'stores'}/{n}", n, shape) for n, shape in _STORES]
        if server is not None:
            for samples, shape in _STORES:
                before = server.requests()
                place = f"{server.url}/{samples}"
                run = _store(place, samples, shape, environment=server.environment)
                made = server.requests() - before
                stores.append(run.model_copy(update={"requests": made}))
        peaks = [
            _store(str(folder / f"memory-{n}"), n, (3, 32, 32), minibatches=1).peak_mb
            for n in _MEMORY
        ]
        feeding = [
            FeedingSpeed.model_validate(
                measured_alone("feeding", str(folder / f"feed-{number}"), **given)["result"]
            )
            for number, given in enumerate(_FEEDS)
        ]
    return StorageBenchmark(
        codecs=tuple(measure_codecs(noisy_images(1000))),
        stores=tuple(stores),
        plan=plan_store(samples=_PLAN[0], x_shape=_PLAN[1]),
        peak_mb=(peaks[0], peaks[1]),
        growth=peaks[1] / peaks[0],
        feeding=tuple(feeding),
    )


def measured_alone(
    what: str, url: str, *, environment: Mapping[str, str] | None = None, **given: object
) -> dict[str, Any]:
    """Measure in a process of its own.

    Arguments:
        what: `store` or `feeding`.
        url: Where.
        environment: The process's environment; this one's by default.
        given: Keyword arguments of `measure_store` or `measure_feeding`.

    Returns:
        Its `result`, and `peak_mb`.

    Raises:
        ValueError: The process says that the caller was mistaken.
        StoreFailed: It ended otherwise than well.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps({"what": what, "url": url, **given})],
        env=dict(environment or os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "it left no message").splitlines()[-1]
        kind, colon, text = last.partition(": ")
        if colon and kind.rpartition(".")[2] in ("ValueError", "UnusableStore"):
            raise ValueError(text)
        raise StoreFailed(f"measuring {what} failed ({last}); see whether the store works")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _store(
    url: str,
    samples: int,
    x_shape: tuple[int, ...],
    *,
    environment: Mapping[str, str] | None = None,
    minibatches: int = 3,
) -> StoreRun:
    found = measured_alone(
        "store",
        url,
        environment=environment,
        samples=samples,
        x_shape=x_shape,
        minibatches=minibatches,
    )
    return StoreRun(
        speed=StoreSpeed.model_validate(found["result"]), peak_mb=found["peak_mb"], requests=None
    )
