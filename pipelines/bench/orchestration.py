"""What the pipeline costs: `diffem bench orchestration`.

The same experiment through `diffem run` and as a plain loop over the same functions; and tasks
that do nothing, mapped a thousand times, on the embedded server, on a server of its own and on a
Ray cluster. Every measurement is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from pydantic import PositiveFloat, PositiveInt

from pipelines.bench.loopback_prefect import prefect_server
from storage_schemas._base import Record

__all__ = ["OrchestrationBenchmark", "ShardCost", "bench_orchestration"]

_FEW, _MANY = 10, 1010

_PLAIN = """
import sys, time
from pipelines.bench.probes import plain_loop
plain_loop(sys.argv[1], sys.argv[2], sys.argv[3:])
"""
_SHARDS = """
import sys
from pipelines.bench.probes import map_nothing
map_nothing(int(sys.argv[1]), sys.argv[2], ray=sys.argv[3] == "ray")
"""


class ShardCost(Record):
    """What a shard costs beside its work."""

    where: str
    """On which server and runner."""
    milliseconds: float
    """Wall-clock time of each additional shard."""
    memory_mb: float
    """Growth of the process's memory with 1,000 more shards."""
    shards: PositiveInt
    """Additional shards that were measured."""


class OrchestrationBenchmark(Record):
    """Everything that was measured."""

    config: str
    """The experiment."""
    start_seconds: PositiveFloat
    """From the command to the first stage: Python, Prefect's embedded server, PyTorch."""
    plain_start_seconds: PositiveFloat
    """The same of the plain loop: Python and PyTorch."""
    work_seconds: PositiveFloat
    """From the first stage to the end of the process, through Prefect and into a store on disk."""
    plain_work_seconds: PositiveFloat
    """The same of the plain loop, into a store in memory."""
    ratio: PositiveFloat
    """The first of these over the second."""
    shards: tuple[ShardCost, ...]
    """Cost of a shard."""


def bench_orchestration(
    config: str, overrides: tuple[str, ...] = (), *, server: bool = True, ray: bool = False
) -> OrchestrationBenchmark:
    """Measure the pipeline against a plain loop, and the cost of a shard.

    Arguments:
        config: Path or URL of the experiment's config.
        overrides: Assignments `key.sub=value`.
        server: Measure shards on a server of its own as well.
        ray: Measure shards on a Ray cluster of this machine as well.

    Raises:
        RuntimeError: A measured process failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="diffem-bench-") as name:
        folder = Path(name)
        environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect")}
        environment.pop("PREFECT_API_URL", None)
        sets = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "pipelines.cli", "run", config, "--json-logs", *sets]
        _run([*command, "--store", str(folder / "first"), "--dry-run"], environment)  # warms up
        start, work = _timed(
            [*command, "--store", str(folder / "run")], environment, '"checking the run"'
        )
        plain_start, plain_work = _timed(
            [sys.executable, "-c", _PLAIN, config, "memory://bench", *overrides],
            environment,
            "begin",
        )
        shards = [_shard_cost("embedded server, threads", environment, folder / "a")]
        if server or ray:
            with ExitStack() as stack:
                home = folder / "server"
                home.mkdir()
                served = stack.enter_context(prefect_server(home, environment)).environment
                if server:
                    shards.append(_shard_cost("server, threads", served, folder / "b"))
                if ray:
                    shards.append(_shard_cost("server, Ray", served, folder / "c", ray=True))
    return OrchestrationBenchmark(
        config=config,
        start_seconds=start,
        plain_start_seconds=plain_start,
        work_seconds=work,
        plain_work_seconds=plain_work,
        ratio=work / plain_work,
        shards=tuple(shards),
    )


def _timed(command: list[str], environment: dict[str, str], mark: str) -> tuple[float, float]:
    """Return the seconds until a line on standard error holds the mark, and from there on."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    marked, said = None, []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if marked is None and mark in line:
            marked = time.perf_counter()
    process.wait()
    ended = time.perf_counter()
    if process.returncode or marked is None:
        raise RuntimeError(f"the measured process failed: {''.join(said[-5:])}")
    return marked - began, ended - marked


def _shard_cost(
    where: str, environment: dict[str, str], folder: Path, *, ray: bool = False
) -> ShardCost:
    """Compare mapping few and many tasks that do nothing."""
    few, many = (
        json.loads(
            _run(
                [sys.executable, "-c", _SHARDS, str(n), str(folder / str(n)), "ray" * ray],
                environment,
            ).splitlines()[-1]
        )
        for n in (_FEW, _MANY)
    )
    more = _MANY - _FEW
    return ShardCost(
        where=where,
        milliseconds=1000 * (many["seconds"] - few["seconds"]) / more,
        memory_mb=(many["memory_mb"] - few["memory_mb"]) * 1000 / more,
        shards=more,
    )


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measured process failed: {done.stderr[-2000:]}")
    return done.stdout
