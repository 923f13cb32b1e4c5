"""What `diffem bench orchestration` measures and prints."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.bench import orchestration, tables
from pipelines.bench.orchestration import OrchestrationBenchmark, ShardCost
from pipelines.cli import app


@pytest.mark.slow
def test_a_run_is_compared_with_a_plain_loop_and_shards_are_priced(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestration, "_MANY", 60)
    found = orchestration.bench_orchestration(str(tiny_config), server=False)
    assert found.plain_work_seconds > 0
    assert found.ratio == pytest.approx(found.work_seconds / found.plain_work_seconds)
    assert [cost.shards for cost in found.shards] == [50]


def test_a_measured_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the measured .*ZeroDivisionError"):
        orchestration._run(["python3", "-c", "1 / 0"], {})


def test_the_table_has_both_and_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    cost = ShardCost(where="embedded server", milliseconds=9.4, memory_mb=15.9, shards=1000)
    tables.print_orchestration(
        OrchestrationBenchmark(
            config="digits.yaml",
            start_seconds=8.0,
            plain_start_seconds=3.0,
            work_seconds=103.0,
            plain_work_seconds=100.0,
            ratio=1.03,
            shards=(cost,),
        )
    )
    out = capsys.readouterr().out
    assert "103.0" in out
    assert "1.030" in out
    assert "9.4" in out


def test_an_unknown_benchmark_is_a_mistake() -> None:
    assert CliRunner().invoke(app, ["bench", "speed"]).exit_code == 2
