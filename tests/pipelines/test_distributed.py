"""An M-step of several processes on this machine: same model, faults, stopping, nothing left."""

from __future__ import annotations

import contextvars
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import cancellation, stages
from pipelines.config_io import load_config
from pipelines.progress import Advance, use_reporter
from pipelines.runners import distributed, worker_process
from pipelines.runners.devices import Device
from pipelines.runners.distributed import RankDied, rank_devices, training_workers
from storage_schemas.config import LocalRunner, RayRunner
from storage_schemas.run_store import RunStore
from tests.processes import alive, children_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

EVERY_STEP = "m_step.checkpoint_seconds=1e-9"


def lay_out(url: Path, config: Path, *overrides: str) -> None:
    """Bring a run to its first M-step."""
    store = RunStore.create(str(url), load_config(str(config), ["iterations=1", *overrides]))
    stages.prepare_observations(str(url))
    stages.fit_start(str(url))
    plan = stages.lay_out_iteration(str(url), 0)
    for shard in plan["missing"]:
        stages.e_step_shard(str(url), 0, shard, store.config.digest, plan["parent_digest"])


def refine(url: Path) -> dict[str, Any]:
    config = RunStore.open(str(url)).config.digest
    digest = stages.reconstructions_digest(str(url), 0)
    found: dict[str, Any] = stages.refine_model(str(url), 0, config, digest)
    return found


def weights(url: Path) -> np.ndarray[Any, Any]:
    tensors, _ = RunStore.open(str(url)).iteration(0).read_tensors("model")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def distance(a: Path, b: Path) -> float:
    """Distance of two models, relative to the second."""
    ours, theirs = weights(a), weights(b)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def steps_done(url: Path) -> int:
    found = RunStore.open(str(url)).iteration(0).read_checkpoint()
    return 0 if found is None else int(found[0]["step"])


def workers_of(url: Path, workers: int) -> None:
    """Change how many processes a run trains with: no part of what it computes."""
    store = RunStore.open(str(url))
    runner = store.config.runner.model_copy(update={"m_step_workers": workers})
    RunStore.create(str(url), store.config.model_copy(update={"runner": runner}))


def children(pid: int) -> list[int]:
    return [child.pid for child in children_of(pid)]


def ranks(pid: int) -> list[int]:
    """Process numbers of the ranks that a process has started, in the order of their ranks."""
    found = children_of(pid)
    return sorted(p.pid for p in found if b"pipelines.runners.worker" in p.command)


class AtStep:
    """A reporter that does something, once, in the middle of a training."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step = step
        self.act = act
        self.steps = 0
        self.notes: list[str] = []

    def stage(self, name: str, *, total: int | None, unit: str, done: int = 0) -> Any:
        import contextlib

        @contextlib.contextmanager
        def shown() -> Iterator[Advance]:
            yield self.advance

        return shown()

    def advance(self, items: int) -> None:
        before, self.steps = self.steps, self.steps + items
        if before < self.step <= self.steps:
            self.act()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A run whose first M-step is next: 200 steps, a checkpoint after each."""
    url = tmp_path_factory.mktemp("runs") / "run"
    prior = "prior={kind: unconditional, steps: 30, batch_size: 15}"
    lay_out(url, tiny_config, "m_step.steps=200", EVERY_STEP, "runner.m_step_workers=1", prior)
    return url


@pytest.fixture
def run(laid_out: Path, tmp_path: Path) -> Path:
    """A copy of it that trains in two processes."""
    url = tmp_path / "run"
    shutil.copytree(laid_out, url)
    workers_of(url, 2)
    return url


@pytest.fixture(scope="module")
def alone(laid_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same M-step, done by one process."""
    url = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(laid_out, url)
    refine(url)
    return url


# The model's weights are float32; 200 steps of Adam in another order of sums move them apart by
# rounding, which a step amplifies at most where a gradient is nearly zero (see
# tests/core/test_data_parallel.py): 1e-3 of their size leaves room, a part with the wrong weight
# or the wrong random numbers is off by more than 1e-2.
CLOSE = 1e-3


def test_two_processes_make_the_model_of_one(run: Path, alone: Path) -> None:
    before = set(children(os.getpid()))
    watched = AtStep(1000, lambda: None)
    with use_reporter(watched):
        assert refine(run)["reused"] is False
    assert 0 < distance(run, alone) < CLOSE
    assert watched.steps == 200, "the progress of the first process is this one's"
    record = RunStore.open(str(run)).iteration(0).stage("m_step")
    assert record is not None
    assert record.units == 200
    assert not (run / "iterations/000/checkpoint/state.safetensors").exists()
    assert set(children(os.getpid())) <= before, "no process is left behind"
    assert refine(run)["reused"] is True


def test_a_process_that_dies_is_a_fault_and_the_checkpoint_goes_on_with_any_number(
    run: Path, alone: Path
) -> None:
    before = set(children(os.getpid()))

    def kill() -> None:
        victim = ranks(os.getpid())[-1]
        os.kill(victim, signal.SIGKILL)

    began = time.monotonic()
    with use_reporter(AtStep(60, kill)), pytest.raises(RankDied, match="process 1 of the 2"):
        refine(run)
    assert set(children(os.getpid())) <= before
    done = steps_done(run)
    assert 60 <= done < 200
    assert time.monotonic() - began < 240
    workers_of(run, 1)
    watched = AtStep(1000, lambda: None)
    with use_reporter(watched):
        refine(run)
    assert watched.steps == 200 - done, "one process goes on where two stopped"
    assert 0 < distance(run, alone) < CLOSE


@pytest.mark.slow
def test_an_end_that_is_asked_for_is_a_checkpoint_in_all_processes(run: Path, alone: Path) -> None:
    before = set(children(os.getpid()))
    try:
        with (
            use_reporter(AtStep(60, lambda: cancellation.request("enough for today"))),
            pytest.raises(cancellation.Cancelled, match="enough for today"),
        ):
            refine(run)
    finally:
        cancellation.allow()
    assert set(children(os.getpid())) <= before
    assert 60 <= steps_done(run) < 200
    refine(run)
    assert 0 < distance(run, alone) < CLOSE


@pytest.mark.slow
def test_what_the_stage_raises_comes_as_it_is(
    laid_out: Path, tmp_path: Path, tiny_config: Path
) -> None:
    url = tmp_path / "run"
    lay_out(
        url,
        tiny_config,
        "m_step.learning_rate={kind: constant, value: 1000}",
        "m_step.clip_norm=1e30",
        "runner.m_step_workers=2",
    )
    before = set(children(os.getpid()))
    with pytest.raises(FloatingPointError, match="M-step diverged at step"):
        refine(url)
    assert set(children(os.getpid())) <= before


@pytest.mark.slow
def test_processes_end_with_their_parent(run: Path) -> None:
    code = f"""
from pathlib import Path
from tests.pipelines.test_distributed import refine
refine(Path({str(run)!r}))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 200
        while steps_done(run) < 20:
            assert parent.poll() is None, "it ended too early"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = ranks(parent.pid)
        assert len(pids) == 2
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    assert 20 <= steps_done(run) < 200


@pytest.mark.slow
def test_the_prior_is_trained_in_several_processes(run: Path, alone: Path) -> None:
    models = []
    for url, workers in ((alone, 1), (run, 2)):
        if url == run:
            shutil.rmtree(run)
            shutil.copytree(alone, run)
            workers_of(run, workers)
            shutil.rmtree(run / "prior")
        else:
            digest = stages.model_digest(str(url), 0)
            config = RunStore.open(str(url)).config.digest
            stages.evaluate_iteration(str(url), 0, config, digest)
            stages.commit_iteration(str(url), 0, 0)
        stages.train_prior(str(url))
        tensors, _ = RunStore.open(str(url)).prior().read_tensors("model")
        models.append(np.concatenate([tensors[name].ravel() for name in sorted(tensors)]))
    difference = float(np.linalg.norm(models[1] - models[0]) / np.linalg.norm(models[0]))
    assert 0 < difference < CLOSE


# ------------------------------------------------------------------------------- who trains where


@pytest.mark.parametrize(
    ("config", "gpus", "workers"),
    [
        (LocalRunner(device="cpu"), 4, 1),
        (LocalRunner(device="auto"), 0, 1),
        (LocalRunner(device="auto"), 4, 4),
        (LocalRunner(device="cuda"), 2, 2),
        (LocalRunner(device="cuda:1"), 2, 1),
        (LocalRunner(device="auto", m_step_workers=2), 4, 2),
        (RayRunner(), 4, 1),
        (RayRunner(m_step_workers=8), 0, 8),
    ],
)
def test_how_many_train_together(
    config: LocalRunner | RayRunner, gpus: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "count_gpus", lambda: gpus)
    assert training_workers(config) == workers


def test_each_process_has_a_gpu_of_its_own_or_its_part_of_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "count_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    devices = rank_devices(LocalRunner(device="auto", threads=8), 2)
    assert [d.environment["CUDA_VISIBLE_DEVICES"] for d in devices] == ["3", "5"]
    assert {d.environment["DIFFEM_THREADS"] for d in devices} == {"4"}
    devices = rank_devices(LocalRunner(device="cpu", threads=7), 3)
    assert not any("CUDA_VISIBLE_DEVICES" in d.environment for d in devices)
    assert {d.environment["DIFFEM_THREADS"] for d in devices} == {"2"}
    for config, size in ((LocalRunner(device="cuda"), 3), (LocalRunner(device="cuda:0"), 2)):
        with pytest.raises(ValueError, match=f"m_step_workers is {size} .* there are 2"):
            rank_devices(config, size)


def test_what_the_flow_set_holds_for_what_processes_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Among it the address of the embedded server; without it, another would be started."""
    told: contextvars.ContextVar[str] = contextvars.ContextVar("told", default="nothing")
    seen: list[tuple[int, str]] = []

    class Process:
        def __init__(self, rank: int, device: Device) -> None:
            self.rank = rank

        def call(self, stage: str, args: list[Any]) -> None:
            seen.append((self.rank, told.get()))

        def end(self, now: float) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(worker_process, "WorkerProcess", Process)
    told.set("the flow's")
    distributed._on_this_machine("stage", [], [Device("processor", {})] * 2)
    assert sorted(seen) == [(0, "the flow's"), (1, "the flow's")]
