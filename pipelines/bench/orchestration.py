"""What the pipeline costs: `diffem bench orchestration`.

The same experiment through `diffem run` and as a plain loop over the same functions; and tasks
that do nothing, mapped a thousand times, on the embedded server, on a server of its own and on a
Ray cluster. Every measurement is a process of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pydantic import PositiveFloat, PositiveInt

from pipelines.bench.loopback_prefect import prefect_server
from storage_schemas._base import Record

__all__ = ["OrchestrationBenchmark", "ShardCost", "Way", "bench_orchestration"]

_FEW, _MANY = 10, 1010
_PLAIN_LOOP = "plain loop, store in memory"
_EMBEDDED, _SERVER = "embedded server", "server"

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


class Way(Record):
    """One way of doing the same run; medians over the rounds."""

    where: str
    """How it is done."""
    start_seconds: PositiveFloat
    """From the command to the first stage."""
    work_seconds: PositiveFloat
    """From the first stage to the end of the process, wall clock."""
    work_cpu_seconds: PositiveFloat
    """The same in processor time of that process: nearly the same on a busy machine."""
    ratio: PositiveFloat
    """Wall-clock time of the work over that of the plain loop of the same round."""
    cpu_ratio: PositiveFloat
    """The same in processor time."""


class OrchestrationBenchmark(Record):
    """Everything that was measured."""

    config: str
    """The experiment."""
    rounds: PositiveInt
    """How often each way was measured, one after the other."""
    load: float
    """Processes that wanted the processor when it began: the machine's load average."""
    ways: tuple[Way, ...]
    """The plain loop first."""
    shards: tuple[ShardCost, ...]
    """Cost of a shard."""


class _Timing(NamedTuple):
    start: float
    work: float
    work_cpu: float


def bench_orchestration(
    config: str,
    overrides: tuple[str, ...] = (),
    *,
    server: bool = True,
    ray: bool = False,
    rounds: int = 1,
) -> OrchestrationBenchmark:
    """Measure the pipeline against a plain loop, and the cost of a shard.

    Arguments:
        config: Path or URL of the experiment's config.
        overrides: Assignments `key.sub=value`.
        server: Measure on a server of its own as well.
        ray: Measure shards on a Ray cluster of this machine as well.
        rounds: How often each way is measured; they take turns.

    Raises:
        RuntimeError: A measured process failed; the message ends with what it said.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="diffem-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        embedded = {**os.environ, "PREFECT_HOME": str(folder / "prefect")}
        embedded.pop("PREFECT_API_URL", None)
        places = {_EMBEDDED: embedded}
        if server or ray:
            home = folder / "server"
            home.mkdir()
            served = stack.enter_context(prefect_server(home, embedded)).environment
            if server:
                places[_SERVER] = served
        sets = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "pipelines.cli", "run", config, "--json-logs", *sets]
        dry = [*command, "--store", str(folder / "first"), "--dry-run", "--no-calibration"]
        _run(dry, embedded)  # warms up
        found: dict[str, list[_Timing]] = {_PLAIN_LOOP: [], **{where: [] for where in places}}
        for number in range(rounds):
            for where, environment in places.items():
                url = str(folder / f"run-{number}-{len(found[where])}-{where[:2]}")
                found[where].append(
                    _timed([*command, "--store", url], environment, '"checking the run"')
                )
            plain = [sys.executable, "-c", _PLAIN, config, "memory://bench", *overrides]
            found[_PLAIN_LOOP].append(_timed(plain, embedded, "begin"))
        shards = [
            _shard_cost(f"{where}, threads", environment, folder / where[:2])
            for where, environment in places.items()
        ]
        if ray:
            # A local cluster would leave a token of its own in the user's home, and every cluster
            # that is started there later would ask for it.
            token = folder / "token"
            token.write_text(secrets.token_hex(32))
            own = {**served, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            shards.append(_shard_cost(f"{_SERVER}, Ray", own, folder / "ray", ray=True))
    return OrchestrationBenchmark(
        config=config,
        rounds=rounds,
        load=load,
        ways=tuple(_way(where, found[where], found[_PLAIN_LOOP]) for where in found),
        shards=tuple(shards),
    )


def _way(where: str, timings: list[_Timing], plain: list[_Timing]) -> Way:
    return Way(
        where=where,
        start_seconds=median(timing.start for timing in timings),
        work_seconds=median(timing.work for timing in timings),
        work_cpu_seconds=median(timing.work_cpu for timing in timings),
        ratio=median(one.work / other.work for one, other in zip(timings, plain, strict=True)),
        cpu_ratio=median(
            one.work_cpu / other.work_cpu for one, other in zip(timings, plain, strict=True)
        ),
    )


def _timed(command: list[str], environment: dict[str, str], mark: str) -> _Timing:
    """Measure the time until a line on standard error holds the mark, and from there on."""
    began = time.perf_counter()
    marked, cpu_before, said = None, 0.0, []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if marked is None and mark in line:
                marked, cpu_before = time.perf_counter(), _cpu_seconds(process.pid)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # It still can be asked.
        ended, cpu = time.perf_counter(), _cpu_seconds(process.pid)
    if process.returncode or marked is None:
        raise RuntimeError(f"the measured process failed: {''.join(said[-5:])}")
    return _Timing(marked - began, ended - marked, cpu - cpu_before)


def _cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, without its children (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
