"""Do time and memory grow as they should? `diffem bench growth`.

The same run on 1,000, 10,000 and 100,000 images of 8 x 8, with a network that costs next to
nothing, so that what is measured is the pipeline: every run is a process of its own, which calls
the stages one after the other and maps shards over worker processes where it is asked to. What
Prefect adds to each shard is measured by `diffem bench orchestration`. An M-step goes once through
all reconstructions, of which it keeps a fixed part in memory, so that the seconds of each stage
should be proportional to the number of images and memory should not grow. Processor seconds are
told beside those on the clock, since they do not depend on what else the machine is doing.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from rich import box
from rich.table import Table

from pipelines.bench.layout import wide_console
from pipelines.process_memory import peak_of
from storage_schemas._base import Record
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import ObservationBlock, write_observations

__all__ = ["SIZES", "WORKERS", "GrowthBenchmark", "GrowthRun", "bench_growth", "print_growth"]

SIZES = (1_000, 10_000, 100_000)
"""Training observations."""
WORKERS = (1, 2)
"""Shards that are worked on side by side."""

_HOLDOUT = 128
_SHARD = 1_000
_BATCH = 250
_BLOCK = 1_000
_MEMORY_GB = 0.005
"""Less than 100,000 images take, so that an M-step reads most of them through its scratch file."""
_POLL_SECONDS = 0.2

_LOOP = """
import sys
from pipelines.bench.probes import mapped_loop
mapped_loop(sys.argv[1], sys.argv[2])
"""


class GrowthRun(Record):
    """One run."""

    samples: PositiveInt
    """Training observations."""
    workers: PositiveInt
    """Shards side by side."""
    shards: PositiveInt
    """Shards of an E-step."""
    seconds: PositiveFloat
    """The whole process, on the clock."""
    cpu_seconds: PositiveFloat
    """Processor seconds of the process and everything that it started."""
    observations: NonNegativeFloat
    """Seconds of copying the observations into the run."""
    e_step: NonNegativeFloat
    """Seconds of the last E-step, shards added up."""
    m_step: NonNegativeFloat
    """Seconds of the last M-step."""
    evaluate: NonNegativeFloat
    """Seconds of the last evaluation, whose work does not depend on the number."""
    peak_mb: PositiveFloat
    """Peak memory of the process."""
    worker_mb: NonNegativeFloat
    """Peak memory of the largest worker process; 0 where there is none."""
    stored_mb: PositiveFloat
    """What it left in the store."""
    objects: PositiveInt
    """Objects in the store."""


class GrowthBenchmark(Record):
    """Everything that was measured."""

    runs: tuple[GrowthRun, ...]
    """By workers, then by size."""
    load: NonNegativeFloat
    """Processes that were ready to run on the machine, on average."""
    cpus: PositiveInt
    """Processors of the machine."""

    def grown(self, workers: int) -> tuple[float, float]:
        """Compare the largest run with the one before it.

        Returns:
            How many times as many processor seconds each additional observation took as those of
            the smaller step before, and how many times the memory of the smallest run it took.
        """
        runs = [run for run in self.runs if run.workers == workers]
        slopes = [
            (b.cpu_seconds - a.cpu_seconds) / (b.samples - a.samples)
            for a, b in itertools.pairwise(runs)
        ]
        largest = [max(run.peak_mb, run.worker_mb) for run in (runs[0], runs[-1])]
        return slopes[-1] / max(slopes[0], 1e-9), largest[1] / largest[0]


def bench_growth(
    sizes: Sequence[int] = SIZES, workers: Sequence[int] = WORKERS
) -> GrowthBenchmark:
    """Run the pipeline on more and more observations.

    Arguments:
        sizes: Training observations of each run, rising.
        workers: Shards side by side, each with all sizes.

    Raises:
        RuntimeError: A measured process failed; the message ends with what it said.
    """
    loads: list[float] = []
    runs: list[GrowthRun] = []
    with tempfile.TemporaryDirectory(prefix="diffem-bench-") as name:
        folder = Path(name)
        for samples in sizes:
            _write_images(str(folder / f"images-{samples}"), samples)
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        for count in workers:
            for samples in sizes:
                runs.append(_measured(folder, samples, count, environment))
                loads.append(os.getloadavg()[0])
    return GrowthBenchmark(
        runs=tuple(runs), load=sum(loads) / len(loads), cpus=os.cpu_count() or 1
    )


def print_growth(result: GrowthBenchmark) -> None:
    """Print what was measured."""
    console = wide_console(150)
    title = f"Growth; {result.cpus} processors, load {result.load:.1f}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    headings = (
        *("samples", "workers", "shards", "seconds", "processor s", "observations", "E-step"),
        *("M-step", "evaluation", "peak MB", "worker MB", "stored MB", "objects"),
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for run in result.runs:
        table.add_row(
            f"{run.samples:,}",
            f"{run.workers}",
            f"{run.shards}",
            *(f"{value:,.1f}" for value in (run.seconds, run.cpu_seconds, run.observations)),
            *(f"{value:,.1f}" for value in (run.e_step, run.m_step, run.evaluate)),
            f"{run.peak_mb:,.0f}",
            f"{run.worker_mb:,.0f}" if run.worker_mb else "",
            f"{run.stored_mb:,.1f}",
            f"{run.objects:,}",
        )
    console.print(table)
    if len({run.samples for run in result.runs}) < 3:
        return
    for workers in sorted({run.workers for run in result.runs}):
        slope, memory = result.grown(workers)
        console.print(
            f"{workers} workers: an additional observation costs {slope:.2f} times the processor "
            f"time that it costs in smaller runs; memory grows {memory:.2f} times",
            highlight=False,
            soft_wrap=True,
        )


def _write_images(url: str, samples: int) -> None:
    """Write observations as `diffem ingest` does: smooth images behind 50 % masks."""
    x, y = np.meshgrid(np.linspace(0, 1, 8), np.linspace(0, 1, 8))
    total = samples + _HOLDOUT

    def blocks() -> Iterator[ObservationBlock]:
        for start in range(0, total, _BLOCK):
            count = min(_BLOCK, total - start)
            rng = np.random.default_rng(start)
            frequency, phase = rng.uniform(1, 6, size=(2, count, 1, 1, 1))
            image = 8 + 8 * np.sin(frequency * (x + 2 * y) + phase)
            mask = (rng.uniform(size=image.shape) < 0.5).astype(np.float32)
            noise = 0.4 * rng.normal(size=image.shape)
            yield ObservationBlock(
                sample=np.arange(start, start + count),
                holdout=np.arange(start, start + count) < _HOLDOUT,
                y=(mask * (image + noise)).astype(np.float32),
                params={"mask": mask},
            )

    write_observations(
        ObjectStore(url),
        blocks(),
        x_shape=(1, 8, 8),
        units="1",
        source="benchmark",
        attributes={},
    )


def _measured(folder: Path, samples: int, workers: int, environment: dict[str, str]) -> GrowthRun:
    """Do one run in a process of its own."""
    from pipelines.status import read_status
    from storage_schemas.run_store import RunStore

    config = folder / "config.json"
    config.write_text(json.dumps(_config(str(folder / f"images-{samples}"), samples, workers)))
    url = str(folder / f"run-{samples}-{workers}")
    command = [sys.executable, "-c", _LOOP, str(config), url]
    before, began = _children_cpu(), time.perf_counter()
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        peaks = _Peaks(process.pid)
        process.wait()
        own, largest = peaks.end()
        seconds, cpu = time.perf_counter() - began, _children_cpu() - before
        log.seek(0)
        said = log.read()
    if process.returncode:
        raise RuntimeError(f"the measured process failed: {said[-2000:]}")
    store = RunStore.open(url)
    status = read_status(store)
    seal = store.observations_manifest()
    assert seal is not None
    stages = status.history[-1].stages
    stored = store.objects.sizes()
    return GrowthRun(
        samples=samples,
        workers=workers,
        shards=stages["e_step"].units,
        seconds=seconds,
        cpu_seconds=cpu,
        observations=seal.seconds,
        e_step=stages["e_step"].seconds,
        m_step=stages["m_step"].seconds,
        evaluate=stages["evaluate"].seconds,
        peak_mb=own,
        worker_mb=largest,
        stored_mb=sum(stored.values()) / 1e6,
        objects=len(stored),
    )


def _config(url: str, samples: int, workers: int) -> dict[str, object]:
    """Return the config of a run whose work is proportional to the number of observations."""
    return {
        "name": "growth",
        "iterations": 2,
        "data": {"kind": "store", "url": url, "x_shape": [1, 8, 8], "value_range": [0, 16]},
        "channel": {"kind": "random_mask", "keep": 0.5, "noise_std": 0.4},
        "network": {
            "kind": "unet",
            "channels": [8],
            "blocks": [1],
            "attention": {},
            "embedding": 16,
            "dropout": 0.0,
        },
        "start": {"kind": "pseudo_inverse"},
        "e_step": {
            "sampler": {"kind": "dpm_solver", "steps": 2},
            "shard_size": _SHARD,
            "batch_size": _BATCH,
        },
        "m_step": {"steps": max(1, samples // _BATCH), "batch_size": _BATCH},
        "evaluation": {"draws": 2, "reconstructions": 64, "monitors": [], "preview": 0},
        "runner": {"workers": workers, "threads": workers, "memory_gb": _MEMORY_GB},
    }


def _children_cpu() -> float:
    """Return the processor seconds of all processes that this one has started and seen end."""
    times = os.times()
    return times.children_user + times.children_system


class _Peaks:
    """Watches the memory of a process and of the workers that it starts.

    Arguments:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peaks: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> tuple[float, float]:
        """Stop watching; return the peak of the process and that of its largest worker, in MB."""
        self._ended.set()
        self._thread.join()
        others = [peak for pid, peak in self._peaks.items() if pid != self._pid]
        return max(self._peaks.get(self._pid, 0.0), 0.001), max(others, default=0.0)

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            for pid in (self._pid, *_workers_below(self._pid)):
                self._peaks[pid] = max(peak_of(pid) / 2**20, self._peaks.get(pid, 0.0))


def _workers_below(pid: int) -> list[int]:
    """Return the worker processes among the descendants of a process; none but on Linux."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything; the parent is the second word after it.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    found, below = [], {pid}
    while new := {child for child, parent in parents.items() if parent in below} - below:
        below |= new
    for child in below - {pid}:
        try:
            command = Path(f"/proc/{child}/cmdline").read_text()
        except OSError:
            continue
        if "pipelines.runners.worker" in command:
            found.append(child)
    return found
