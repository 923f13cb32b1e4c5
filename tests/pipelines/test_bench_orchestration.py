"""What `diffem bench orchestration` measures and prints."""

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.bench import orchestration, tables
from pipelines.bench.orchestration import OrchestrationBenchmark, ShardCost, Way
from pipelines.cli import app


@pytest.mark.slow
def test_a_run_is_compared_with_a_plain_loop_and_shards_are_priced(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestration, "_MANY", 60)
    found = orchestration.bench_orchestration(str(tiny_config), server=False, rounds=2)
    plain, embedded = found.ways
    assert (plain.ratio, plain.cpu_ratio) == (1.0, 1.0)
    # A process of one thread cannot have worked for longer than the clock went.
    assert 0 < plain.work_cpu_seconds <= plain.work_seconds + 0.1
    assert embedded.ratio > 0
    assert [cost.shards for cost in found.shards] == [50]


def test_ways_are_compared_within_a_round() -> None:
    plain = [orchestration._Timing(1, 10, 8), orchestration._Timing(1, 40, 9)]
    piped = [orchestration._Timing(7, 11, 8.8), orchestration._Timing(9, 44, 9.9)]
    way = orchestration._way("embedded server", piped, plain)
    # The median of 11 and 44 over that of 10 and 40 would be the same; a slow round is not.
    assert way.ratio == pytest.approx(1.1)
    assert way.cpu_ratio == pytest.approx(1.1)
    assert way.work_seconds == 27.5
    busy = [orchestration._Timing(7, 11, 8.8), orchestration._Timing(9, 88, 9.9)]
    assert orchestration._way("", busy, plain).ratio == pytest.approx((1.1 + 2.2) / 2)


def test_processor_time_is_that_of_the_work_alone() -> None:
    code = (
        "import sys, time\n"
        "def burn(s):\n"
        "    end = time.process_time() + s\n"
        "    while time.process_time() < end: pass\n"
        "burn(0.6); print('begin', file=sys.stderr, flush=True); burn(0.3); time.sleep(0.5)\n"
    )
    timing = orchestration._timed([sys.executable, "-c", code], dict(os.environ), "begin")
    assert timing.work_cpu == pytest.approx(0.3, abs=0.1)  # The clock has ticks of 0.01 s.
    assert timing.work > 0.75
    assert timing.start > 0.6


def test_a_measured_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the measured .*ZeroDivisionError"):
        orchestration._run(["python3", "-c", "1 / 0"], {})


def test_the_table_has_both_and_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    cost = ShardCost(where="embedded server", milliseconds=9.4, memory_mb=15.9, shards=1000)
    tables.print_orchestration(
        OrchestrationBenchmark(
            config="digits.yaml",
            rounds=3,
            load=0.4,
            ways=(
                Way(
                    where="embedded server",
                    start_seconds=8.0,
                    work_seconds=103.0,
                    work_cpu_seconds=101.5,
                    ratio=1.03,
                    cpu_ratio=1.021,
                ),
            ),
            shards=(cost,),
        )
    )
    out = capsys.readouterr().out
    assert "103.0" in out
    assert "1.030" in out
    assert "101.5" in out
    assert "1.021" in out
    assert "3 rounds, load 0.4" in out
    assert "9.4" in out


def test_an_unknown_benchmark_is_a_mistake() -> None:
    assert CliRunner().invoke(app, ["bench", "speed"]).exit_code == 2
