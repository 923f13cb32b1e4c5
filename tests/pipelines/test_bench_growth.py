"""What `diffem bench growth` runs, and what it makes of what it measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.bench import growth
from pipelines.bench.growth import GrowthBenchmark, GrowthRun, bench_growth, print_growth
from pipelines.check import check_config
from pipelines.process_memory import peak_of
from storage_schemas.config import RunConfig


def measured(samples: int, workers: int, cpu: float, peak: float) -> GrowthRun:
    return GrowthRun(
        samples=samples,
        workers=workers,
        shards=max(1, samples // 1000),
        seconds=cpu,
        cpu_seconds=cpu,
        observations=0.1,
        e_step=1.0,
        m_step=2.0,
        evaluate=0.5,
        peak_mb=peak,
        worker_mb=2 * peak if workers > 1 else 0.0,
        stored_mb=1.0,
        objects=10,
    )


def test_growth_is_that_of_the_last_step_and_memory_that_of_the_largest_process() -> None:
    runs = (
        measured(1_000, 1, 10.0, 500.0),
        measured(10_000, 1, 19.0, 510.0),
        measured(100_000, 1, 199.0, 550.0),
        measured(1_000, 2, 10.0, 500.0),
        measured(10_000, 2, 19.0, 500.0),
        measured(100_000, 2, 109.0, 750.0),
    )
    result = GrowthBenchmark(runs=runs, load=1.0, cpus=2)
    assert result.grown(1) == pytest.approx((2.0, 1.1))
    assert result.grown(2) == pytest.approx((1.0, 1.5))


def test_the_table_has_a_line_for_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    runs = tuple(measured(10**k, 1, 10.0 + 10 ** (k - 3), 500.0) for k in (3, 4, 5))
    print_growth(GrowthBenchmark(runs=runs, load=3.25, cpus=2))
    out = capsys.readouterr().out
    assert "100,000" in out
    assert "load 3.2" in out
    assert "memory grows 1.00 times" in out


def test_the_work_of_the_measured_run_is_proportional_to_its_images(tmp_path: Path) -> None:
    url = str(tmp_path / "images")
    growth._write_images(url, 400)
    few = RunConfig.model_validate(growth._config(url, 1_000, 1))
    many = RunConfig.model_validate(growth._config(url, 100_000, 2))
    check_config(few)
    assert many.m_step.steps == 100 * few.m_step.steps
    assert many.runner.memory_gb * 2**30 < 100_000 * 64 * 4
    assert {**few.model_dump(), "m_step": 0, "runner": 0} == {
        **many.model_dump(),
        "m_step": 0,
        "runner": 0,
    }


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_workers_are_found_below_the_process_that_started_them() -> None:
    sleeping = "import time; time.sleep(60)"
    # Its command line holds the name of the worker's module, as that of a worker does.
    child = subprocess.Popen([sys.executable, "-c", sleeping, "pipelines.runners.worker"])
    other = subprocess.Popen([sys.executable, "-c", sleeping])
    try:
        found = growth._workers_below(os.getpid())
        assert child.pid in found
        assert other.pid not in found
        assert 1 < peak_of(child.pid) / 2**20 < 200
    finally:
        for process in (child, other):
            process.kill()
            process.wait()
    assert peak_of(child.pid) == 0


@pytest.mark.slow
def test_runs_are_measured_in_processes_of_their_own() -> None:
    result = bench_growth(sizes=(300, 2_100), workers=(1, 2))
    assert [(run.samples, run.workers, run.shards) for run in result.runs] == [
        (300, 1, 1),
        (2_100, 1, 3),
        (300, 2, 1),
        (2_100, 2, 3),
    ]
    for run in result.runs:
        assert run.cpu_seconds > run.m_step / 2
        assert run.peak_mb > 100
        assert (run.worker_mb > 100) == (run.workers == 2)


def test_a_measured_process_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_LOOP", "1 / 0")
    with pytest.raises(RuntimeError, match=r"(?s)the measured process failed.*ZeroDivisionError"):
        growth._measured(tmp_path, 100, 1, dict(os.environ))
