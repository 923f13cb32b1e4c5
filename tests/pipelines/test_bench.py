"""What `diffem bench storage` measures: in processes of their own, on a disk and on loopback."""

import io
import os
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pipelines.bench import feeding, loopback_s3, storage
from pipelines.bench.feeding import measure_feeding
from pipelines.bench.storage import measured_alone
from pipelines.bench.tables import print_storage
from pipelines.cli import app
from storage_schemas.errors import StoreFailed
from storage_schemas.objects import ObjectStore
from storage_schemas.store_benchmark import plan_store
from tests.storage.servers import require_server


def test_an_s3_server_is_started_measured_and_stopped(tmp_path: Path) -> None:
    require_server("moto")
    samples, shape = 700, (1, 8, 8)
    before = dict(os.environ)
    with loopback_s3.loopback_s3(tmp_path) as server:
        asked = server.requests()
        found = measured_alone(
            "store",
            f"{server.url}/store",
            environment=server.environment,
            samples=samples,
            x_shape=shape,
            minibatches=2,
        )
        made = server.requests() - asked
        assert found["result"]["samples"] == samples
        assert 30 < found["peak_mb"] < 1000
        plan = plan_store(samples=samples, x_shape=shape)
        # Besides these two minibatches, and what asks whether something is there already.
        least = plan.write_requests + plan.read_requests + 2
        assert least <= made <= least + 20
        endpoint = server.environment["AWS_ENDPOINT_URL"]
    assert dict(os.environ) == before
    assert not loopback_s3._answers(int(endpoint.rpartition(":")[2]))


@pytest.mark.slow
def test_the_whole_benchmark_is_one_object_or_four_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_STORES", ((60, (1, 8, 8)),))
    monkeypatch.setattr(storage, "_MEMORY", (100, 4000))
    feed = {"samples": 70, "x_shape": (1, 8, 8), "channels": (8,), "steps": 2}
    monkeypatch.setattr(storage, "_FEEDS", (feed,))
    url = str(tmp_path / "here")
    result = CliRunner().invoke(app, ["bench", "storage", "--url", url, "--json"])
    assert result.exit_code == 0, result.output
    told = storage.StorageBenchmark.model_validate_json(result.stdout)
    assert [run.speed.url for run in told.stores] == [f"{url}/60"]
    assert ObjectStore(f"{url}/60").exists("observations.json")
    assert told.growth == told.peak_mb[1] / told.peak_mb[0]
    # 4,000 x 3 x 32 x 32 are 49 MB, of which four objects of 12.6 MB are written and read.
    assert 1.1 < told.growth < 10
    assert (told.feeding[0].samples, told.plan.samples) == (70, 1_000_000)
    with monkeypatch.context() as patch:
        out = io.StringIO()
        patch.setattr("sys.stdout", out)
        print_storage(told)
    for words in ("disk", "60 of 1 x 8 x 8", "not written: 49,152 MB in 3,907 objects", "%"):
        assert words in out.getvalue()
    again = CliRunner().invoke(app, ["bench", "storage", "--url", url])
    assert again.exit_code == 2
    assert "is not empty; give a place where nothing is yet" in again.stderr


def test_what_the_server_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback_s3, "find_spec", lambda name: None)
    with (
        pytest.raises(ValueError, match=r"moto is not installed; run pip install 'moto\[server"),
        loopback_s3.loopback_s3(tmp_path),
    ):
        pass


def test_a_measurement_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    store: dict[str, Any] = {"samples": 10, "x_shape": (1, 8, 8)}
    with pytest.raises(ValueError, match="is not empty; give a place where nothing is yet"):
        measured_alone("store", str(tmp_path), **store)
    with pytest.raises(StoreFailed, match=r"measuring store failed .*unexpected keyword"):
        measured_alone("store", str(tmp_path), **store, colour="red")


class _Slow:
    """Reconstructions that take 20 ms to fetch."""

    shape = torch.Size((100, 1, 8, 8))

    def __len__(self) -> int:
        return 100

    def __getitem__(self, rows: Tensor) -> Tensor:
        time.sleep(0.02)
        return torch.zeros(len(rows), 1, 8, 8)


def test_waiting_is_what_passes_while_a_batch_is_fetched(tmp_path: Path) -> None:
    total, waiting = feeding._trained(cast("Tensor", _Slow()), (8,), 5)
    assert 5 * 0.02 <= waiting < total
    speed = measure_feeding(tmp_path, samples=100, x_shape=(1, 8, 8), channels=(8,), steps=3)
    assert speed.mb == 100 * 64 * 4e-6
    for share in (speed.memory_waiting, speed.file_waiting):
        assert 0 < share < 1
    assert min(speed.memory_step_ms, speed.file_step_ms) > 0
