"""Splits larger than memory: the same numbers, through a scratch file, in bounded memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.stages.feeding import gathered, spread_rows
from storage_schemas.run_store import RunStore
from tests.pipelines.test_run import make_run, results_of
from tests.storage.tiny_run import resume_run


@pytest.mark.parametrize("memory_gb", [1.0, 1e-9])
def test_rows_are_those_of_the_store(memory_gb: float, tmp_path: Path) -> None:
    folder = resume_run(str(tmp_path / "run")).iteration(1)
    everything = folder.read_reconstructions().astype(np.float32)
    for rows in (
        np.arange(len(everything)),
        np.array([0, 15, 16, 17, 31, 39]),
        np.array([20]),
        np.arange(0),
    ):
        with gathered(folder, rows, memory_gb=memory_gb) as x_hat:
            np.testing.assert_array_equal(x_hat.numpy(), everything[rows])


def test_rows_are_spread_evenly() -> None:
    assert spread_rows(10, 4).tolist() == [0, 2, 5, 7]
    assert spread_rows(3, 10).tolist() == [0, 1, 2]
    assert spread_rows(0, 10).tolist() == []
    rows = spread_rows(1_000_003, 997)
    assert np.diff(rows).min() >= 1003
    assert np.diff(rows).max() <= 1004


def test_rows_of_very_many_are_runs_of_neighbours() -> None:
    for available, wanted in ((10**8, 16_384), (10**7, 1_000), (2**22, 65_536), (2**22, 1)):
        rows = spread_rows(available, wanted)
        assert len(np.unique(rows)) == wanted
        assert (rows[0], rows.max() < available) == (0, True)
        starts = rows[::64]
        assert (np.split(rows, range(64, wanted, 64))[-1] - starts[-1] < 64).all()
        # As many objects of 64 rows are touched as there are runs, or twice as many.
        assert len(np.unique(rows // 64)) <= 2 * len(starts)
        assert np.diff(starts).size == 0 or np.ptp(np.diff(starts)) <= 1


@pytest.mark.usefixtures("prefect_server")
def test_a_run_through_the_scratch_file_ends_with_the_same_bytes(
    tiny_config: Path, tmp_path: Path
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    more = [
        "m_step.validation={fraction: 0.1, every: 5}",
        "prior={kind: unconditional, steps: 5, batch_size: 16, samples: 64}",
    ]
    make_run(inside, tiny_config, *more)
    make_run(outside, tiny_config, *more, "runner.memory_gb=1e-9")
    assert results_of(inside) == results_of(outside)
    prior = [RunStore.open(str(url)).prior().manifest() for url in (inside, outside)]
    assert prior[0] is not None
    assert prior[1] is not None
    assert prior[0].model_digest == prior[1].model_digest


_PROBE = """
import resource, sys
import numpy as np
from pipelines.stages.feeding import gathered
from storage_schemas.run_store import RunStore
folder = RunStore.open(sys.argv[1]).iteration(0)
n = folder.reconstructions().samples
total = 0.0
with gathered(folder, np.arange(n), memory_gb=float(sys.argv[2])) as x_hat:
    # What is read of a mapped file counts as resident until the system wants the room, so look at
    # what the process itself holds: RssAnon.
    for start in range(0, n, 1000):
        total += float(x_hat[start:start + 1000].sum())
    status = open("/proc/self/status").read()
print([line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")][0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_not_held_in_memory(tmp_path: Path) -> None:
    from tests.storage.tiny_run import PROVENANCE, make_blocks, make_config, write_start

    store = RunStore.create(str(tmp_path / "run"), make_config(), PROVENANCE)
    shape, samples = (1, 64, 64), 5000
    store.write_observations(
        make_blocks(samples, 500, x_shape=shape), x_shape=shape, units="1", source="test"
    )
    write_start(store)
    observations, folder = store.observations("train"), store.iteration(0)
    parent = store.parent_digest(0)
    assert parent is not None
    plan = folder.create_reconstructions(
        observations.sample_ids,
        x_shape=shape,
        shard_size=250,
        parent_digest=parent,
        seed=7,
        units="1",
    )
    for shard in range(plan.shards):
        start, stop = plan.rows(shard)
        x_hat = np.random.default_rng(shard).normal(size=(stop - start, *shape))
        folder.write_shard(shard, x_hat.astype(np.float32), seed=shard, seconds=0.0)
    held, mapped = (
        int(
            subprocess.run(
                [sys.executable, "-c", _PROBE, store.url, budget],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for budget in ("1", "1e-9")
    )
    size = 4 * plan.samples * 64 * 64 // 1024  # KiB: about 64,000
    assert held > mapped + 0.8 * size
