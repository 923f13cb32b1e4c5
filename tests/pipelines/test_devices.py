"""Stages on several devices of one machine: two processes that share the processor.

GPUs are not there to test with: which one a worker would be bound to is tested, not its work.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch

from pipelines import build, cancellation, stages
from pipelines.build import training
from pipelines.config_io import load_config
from pipelines.progress import Advance, use_reporter
from pipelines.runners import devices, distributed, worker
from pipelines.runners.devices import DevicePool, WorkerDied, choose_devices, open_devices
from pipelines.runners.processors import usable_threads
from pipelines.runners.worker_process import WorkerProcess
from pipelines.stages.bench import Bench
from storage_schemas.config import LocalRunner
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.faults.cli import results_at
from tests.processes import alive

Call = Callable[..., Any]

TWO = LocalRunner(device="cpu", workers=2, threads=1)
STEPS = 300
LONG = (f"m_step.steps={STEPS}", "m_step.checkpoint_seconds=0.05")


def here(stage: str, *args: Any) -> Any:
    """Do a stage in this process."""
    return getattr(stages, stage)(*args)


def prepare(url: Path, config: Path, *overrides: str) -> Path:
    """Make a run up to the last shard of its first E-step."""
    RunStore.create(str(url), load_config(str(config), overrides))
    here("prepare_observations", str(url))
    here("fit_start", str(url))
    e_step(here, url, 0)
    return url


def e_step(call: Call, url: Path, iteration: int) -> str:
    """Reconstruct, two shards side by side; return the digest of the config."""
    plan = call("lay_out_iteration", str(url), iteration)
    config: str = plan["config_digest"]

    def shard(number: int) -> None:
        call("e_step_shard", str(url), iteration, number, config, plan["parent_digest"])

    with ThreadPoolExecutor(1 if call is here else 2) as threads:
        list(threads.map(shard, range(plan["shards"])))
    return config


def m_step(call: Call, url: Path) -> Any:
    store = RunStore.open(str(url))
    digest = store.iteration(0).reconstructions_digest()
    return call("refine_model", str(url), 0, store.config.digest, digest)


def whole_run(call: Call, url: Path) -> dict[str, str]:
    """Do all of a run, stage by stage; return the checksums of what it computed."""
    call("prepare_observations", str(url))
    call("fit_start", str(url))
    for iteration in range(2):
        config = e_step(call, url, iteration)
        digest = call("reconstructions_digest", str(url), iteration)
        model = call("refine_model", str(url), iteration, config, digest)["model_digest"]
        call("evaluate_iteration", str(url), iteration, config, model)
        call("commit_iteration", str(url), iteration, 0)
    return results_at(str(url))


class Recorder:
    """A reporter that keeps what it is told, and does something at an advance."""

    def __init__(self, then: Callable[[int], None] = lambda _: None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.then = then
        self._advances = itertools.count(1)

    @contextmanager
    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Advance]:
        def advance(items: int) -> None:
            self.told.append(("advanced", items))
            self.then(next(self._advances))

        self.told.append(("opened", name, total, unit, done))
        try:
            yield advance
        except BaseException as error:
            self.told.append(("failed", type(error)))
            raise
        self.told.append(("closed", name))

    def note(self, text: str) -> None:
        self.told.append(("note", text))


def at_advance(number: int, act: Callable[[], None]) -> Recorder:
    return Recorder(lambda count: act() if count == number else None)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def has_ended(child: int) -> bool:
    """Tell whether a child could be waited for, as `Popen.poll` asks; it is not.

    Linux shows a process as a zombie as soon as its first thread has ended, and lets its parent
    wait for it when the last one has.
    """
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # It was waited for.
        return True


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Leave the number of threads as it was: stages set it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _nobody_asks_for_an_end() -> Iterator[None]:
    cancellation.allow()
    yield
    cancellation.allow()


@pytest.fixture(scope="module")
def pool() -> Iterator[DevicePool]:
    """Two workers of one thread each, for all tests; what is left of them is gone afterwards."""
    with open_devices(TWO) as opened:
        yield opened
        pids = [pid for pid in opened.pids if alive(pid)]
        assert pids, "a worker that a test ended is replaced at the next call only"
        began = time.monotonic()
    assert time.monotonic() - began < devices.GRACE_SECONDS, "idle workers end at once"
    assert not any(map(alive, pids))
    with pytest.raises(cancellation.Cancelled, match="closed"):
        opened.call("is_complete", "anywhere", 0)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A run whose M-step comes next, and takes a second or more. Tests copy it."""
    return prepare(tmp_path_factory.mktemp("devices") / "ready", tiny_config, *LONG)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> str:
    """Digest of the model that an undisturbed M-step makes in this process."""
    url = shutil.copytree(ready, tmp_path_factory.mktemp("devices") / "undisturbed")
    digest: str = m_step(here, url)["model_digest"]
    return digest


@pytest.fixture
def run(tmp_path: Path, ready: Path) -> Path:
    return shutil.copytree(ready, tmp_path / "run")


def steps_reused(url: Path) -> int:
    record = RunStore.open(str(url)).iteration(0).stage("m_step")
    assert record is not None
    return record.reused


def test_two_workers_compute_the_bytes_of_one_process(
    pool: DevicePool, tiny_config: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        RunStore.create(str(tmp_path / name), load_config(str(tiny_config)))
    assert devices.current() is pool
    assert pool.size == 2
    assert len(set(pool.pids)) == 2
    assert os.getpid() not in pool.pids
    assert whole_run(pool.call, tmp_path / "two") == whole_run(here, tmp_path / "one")
    assert verify(str(tmp_path / "two")).ok


def test_shards_run_side_by_side(pool: DevicePool, run: Path, tmp_path: Path) -> None:
    """Two M-steps, in two runs, advance in turn and not one after the other."""
    other = shutil.copytree(run, tmp_path / "other")
    recorder = Recorder()
    with use_reporter(recorder), ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda url: m_step(pool.call, url), (run, other)))
    kinds = [told[0] for told in recorder.told]
    assert kinds.count("advanced") == 2 * STEPS
    first_closed = kinds.index("closed")
    assert kinds[:first_closed].count("opened") == 2
    assert kinds[:first_closed].count("advanced") > STEPS


def test_progress_is_told_as_if_the_work_were_done_here(
    pool: DevicePool, ready: Path, tmp_path: Path
) -> None:
    told = {}
    for name, call in (("here", here), ("there", pool.call)):
        url = shutil.copytree(ready, tmp_path / name)
        for stage in ("shards", "start"):
            shutil.rmtree(url / ("iterations/000/shards" if stage == "shards" else "start"))
        recorder = Recorder()
        with use_reporter(recorder):
            call("fit_start", str(url))
            parent = RunStore.open(str(url)).parent_digest(0)
            call("e_step_shard", str(url), 0, 1, RunStore.open(str(url)).config.digest, parent)
        told[name] = [
            entry if entry[0] != "note" else ("note", entry[1].rpartition(",")[0])  # its seconds
            for entry in recorder.told
        ]
    assert told["there"] == told["here"]
    opened = [entry[1] for entry in told["there"] if entry[0] == "opened"]
    assert opened[-1] == "iteration 000 · E-step · shard 2/4"
    assert ("advanced", 32) in told["there"]
    assert any(entry[0] == "note" for entry in told["there"])


def test_mistakes_come_back_as_they_are(pool: DevicePool, tmp_path: Path) -> None:
    caught = {}
    for name, call in (("here", here), ("there", pool.call)):
        with pytest.raises(ValueError, match="no run") as info:
            call("is_complete", str(tmp_path), 0)
        caught[name] = info.value
    assert type(caught["there"]) is type(caught["here"])
    assert str(caught["there"]) == str(caught["here"])
    (note,) = caught["there"].__notes__
    assert "in worker" in note
    assert "Traceback" in note
    with pytest.raises(ValueError, match=r"no stage 'e_steps'; known are .*e_step_shard"):
        pool.call("e_steps")


def test_a_stage_that_fails_fails_its_progress(
    pool: DevicePool, tiny_config: Path, tmp_path: Path
) -> None:
    rate = "m_step.learning_rate={kind: constant, value: 1000}"
    url = prepare(tmp_path / "run", tiny_config, rate)
    recorder = Recorder()
    with use_reporter(recorder), pytest.raises(FloatingPointError, match="M-step diverged"):
        m_step(pool.call, url)
    assert recorder.told[-1] == ("failed", FloatingPointError)


def test_a_killed_worker_fails_its_stage_and_is_replaced(
    pool: DevicePool, run: Path, undisturbed: str
) -> None:
    before = pool.pids

    def kill() -> None:
        for pid in pool.pids:  # The one that works, and an idle one.
            os.kill(pid, signal.SIGKILL)

    died = pytest.raises(WorkerDied, match=r"worker \d \(processor\) was ended by SIGKILL.*refine")
    with use_reporter(at_advance(7, kill)), died:
        m_step(pool.call, run)
    assert RunStore.open(str(run)).iteration(0).stage("m_step") is None
    # An idle one that dies in the moment in which it is called fails that call, as it should.
    assert wait_for(lambda: all(map(has_ended, before)), 60)
    with ThreadPoolExecutor(2) as threads:  # Threads end here, and what they started must not.
        again = threads.submit(m_step, pool.call, run)
        assert threads.submit(pool.call, "is_complete", str(run), 0).result() is False
        assert again.result()["model_digest"] == undisturbed
    time.sleep(0.3)
    assert all(map(alive, pool.pids))
    assert not set(before) & set(pool.pids)
    assert not any(map(alive, before))


def test_cancelling_stops_at_a_checkpoint_and_the_next_call_goes_on(
    pool: DevicePool, run: Path, undisturbed: str
) -> None:
    asked: list[float] = []

    def cancel() -> None:
        asked.append(time.monotonic())
        cancellation.request("somebody pressed Ctrl-C")

    stopped = pytest.raises(cancellation.Cancelled, match=r"somebody pressed Ctrl-C")
    with use_reporter(at_advance(7, cancel)), stopped:
        m_step(pool.call, run)
    assert time.monotonic() - asked[0] < 5
    with pytest.raises(cancellation.Cancelled, match="Ctrl-C"):
        m_step(pool.call, run)  # Nothing begins after that.
    cancellation.allow()
    pids = pool.pids
    assert m_step(pool.call, run)["model_digest"] == undisturbed
    assert 7 <= steps_reused(run) < STEPS
    assert pool.pids == pids, "a worker that was asked to stop goes on working"


def test_a_worker_that_is_terminated_stops_at_a_checkpoint(pool: DevicePool, run: Path) -> None:
    def terminate() -> None:
        for pid in pool.pids:
            os.kill(
                pid, signal.SIGINT
            )  # Ctrl-C on a terminal reaches them all; the parent decides.
            os.kill(pid, signal.SIGTERM)

    stopped = pytest.raises(cancellation.Cancelled, match="terminated")
    with use_reporter(at_advance(7, terminate)), stopped:
        m_step(pool.call, run)
    found = RunStore.open(str(run)).iteration(0).read_checkpoint()
    assert found is not None
    assert 7 <= int(found[0]["step"]) < STEPS


def test_an_e_step_stops_between_batches(run: Path) -> None:
    """In this process, as in a worker: the shard is not written, and the next start redoes it."""
    shutil.rmtree(run / "iterations/000/shards")
    store = RunStore.open(str(run))
    arguments = (str(run), 0, 2, store.config.digest, store.parent_digest(0))
    recorder = at_advance(1, lambda: cancellation.request("test"))
    with use_reporter(recorder), pytest.raises(cancellation.Cancelled):
        here("e_step_shard", *arguments)
    assert recorder.told.count(("advanced", 32)) == 1, "the second of two batches never began"
    assert store.iteration(0).shard(2) is None
    cancellation.allow()
    # One that is asked to stop after its last batch has nothing left to do but to write.
    with use_reporter(at_advance(2, lambda: cancellation.request("test"))):
        assert here("e_step_shard", *arguments)["reused"] is False
    assert store.iteration(0).shard(2) is not None


def test_a_call_that_is_given_up_ends_its_worker(pool: DevicePool, run: Path) -> None:
    """As Prefect gives up a stage that hangs: by an exception in the thread that waits.

    One that looks like a broken pipe is not taken for the death of the worker.
    """

    def give_up() -> None:
        raise ConnectionResetError("the server went away")

    before = set(pool.pids)
    with use_reporter(at_advance(7, give_up)), pytest.raises(ConnectionResetError, match="went"):
        m_step(pool.call, run)
    assert sum(map(alive, before)) == 1
    assert (run / "iterations/000/checkpoint/state.safetensors").exists(), "it was asked first"


def test_closing_ends_what_is_going_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "GRACE_SECONDS", 1.0)
    outer = devices.current()
    with ThreadPoolExecutor(3) as threads:
        with open_devices(TWO) as pool:
            assert devices.current() is pool
            pids = pool.pids
            os.kill(pids[1], signal.SIGSTOP)  # One that hears nothing has to be killed.
            calls = [threads.submit(m_step, pool.call, run) for _ in range(3)]
            assert wait_for(lambda: pool._idle.empty(), 10)
            began = time.monotonic()
        assert time.monotonic() - began < 10
        assert not any(map(alive, pids))
        for call in calls:  # Two were going on and one waited for a device.
            assert isinstance(call.exception(), cancellation.Cancelled)
    assert devices.current() is outer


PARENT = """
import contextlib, os, subprocess, sys
from pathlib import Path
from pipelines.progress import use_reporter
from pipelines.runners.devices import open_devices
from storage_schemas.config import LocalRunner

class Reporter:
    @contextlib.contextmanager
    def stage(self, *_, **__):
        # The pipes stay open in another process, so that their end tells the workers nothing.
        sockets = [int(fd.name) for fd in Path("/proc/self/fd").iterdir()
                   if os.path.islink(fd) and os.readlink(fd).startswith("socket:")]
        keeper = subprocess.Popen(["sleep", "60"], pass_fds=sockets, stdout=subprocess.DEVNULL)
        print(len(sockets), keeper.pid, *pool.pids, flush=True)
        yield lambda _: None

with open_devices(LocalRunner(device="cpu", workers=2, threads=2)) as pool:
    with use_reporter(Reporter()):
        pool.call("refine_model", sys.argv[1], 0, *sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the end of the pipe alone tells")
def test_workers_are_killed_with_their_parent(run: Path) -> None:
    store = RunStore.open(str(run))
    digests = [store.config.digest, store.iteration(0).reconstructions_digest()]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(run), *digests], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        sockets, keeper, *workers = map(int, parent.stdout.readline().split())
        try:
            assert sockets >= 2
            assert len(workers) == 2
            assert all(map(alive, workers))
            os.kill(parent.pid, signal.SIGKILL)
            parent.wait()
            assert wait_for(lambda: not any(map(alive, workers)), 2)
        finally:
            os.kill(keeper, signal.SIGKILL)


def test_a_worker_ends_when_its_pipe_does() -> None:
    """This process is its parent and lives on; the worker is busy importing."""
    ours, theirs = Pipe()
    command = [sys.executable, "-m", "pipelines.runners.worker", str(theirs.fileno())]
    worker = subprocess.Popen([*command, str(os.getpid())], pass_fds=[theirs.fileno()])
    theirs.close()
    ours.close()
    assert worker.wait(20) == 1


def test_a_worker_whose_parent_ended_before_it_began_ends() -> None:
    ours, theirs = Pipe()
    with ours, theirs:
        command = [sys.executable, "-m", "pipelines.runners.worker", str(theirs.fileno()), "1"]
        assert subprocess.run(command, pass_fds=[theirs.fileno()], timeout=60).returncode == 1


def test_one_device_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "is_complete", lambda *_: os.getpid())
    for config in (LocalRunner(device="cpu"), LocalRunner(device="auto", workers=1)):
        with open_devices(config) as one:
            assert one.size == 1
            assert one.pids == []
            assert one.call("is_complete", "anywhere", 0) == os.getpid()
            with pytest.raises(ValueError, match="no stage 'nothing'"):
                one.call("nothing")
            cancellation.request("test")
            with pytest.raises(cancellation.Cancelled):
                one.call("is_complete", "anywhere", 0)
            cancellation.allow()
    code = (
        "import sys\n"
        "from pipelines.runners.devices import open_devices\n"
        "from storage_schemas.config import LocalRunner\n"
        "with open_devices(LocalRunner(device='cpu', threads=2)) as pool: pool.size\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "prefect", "multiprocessing.connection"} & set(done.stdout.split())


def environments(config: LocalRunner, gpus: int) -> list[str | None]:
    return [d.environment.get("CUDA_VISIBLE_DEVICES") for d in choose_devices(config, gpus)]


@pytest.mark.parametrize(
    ("runner", "gpus", "visible", "expected"),
    [
        ({"device": "auto"}, 0, None, [None]),
        ({"device": "auto"}, 1, None, ["0"]),
        ({"device": "auto"}, 4, None, ["0", "1", "2", "3"]),
        ({"device": "cuda"}, 2, None, ["0", "1"]),
        ({"device": "cuda"}, 2, "5,7", ["5", "7"]),
        ({"device": "cuda"}, 2, "5,7,-1,3", ["5", "7"]),
        ({"device": "cuda"}, 2, "GPU-aa, GPU-bb", ["GPU-aa", "GPU-bb"]),
        ({"device": "auto", "workers": 3}, 2, None, ["0", "1", "0"]),
        ({"device": "auto", "workers": 2}, 0, None, [None, None]),
        ({"device": "cuda:1"}, 4, None, [None]),
        ({"device": "cuda:1", "workers": 2}, 4, None, [None, None]),
        ({"device": "cpu"}, 4, None, [None]),
        ({"device": "cpu", "workers": 2}, 4, None, [None, None]),
    ],
)
def test_each_worker_sees_a_device_of_its_own(
    runner: dict[str, Any],
    gpus: int,
    visible: str | None,
    expected: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environments(LocalRunner.model_validate(runner), gpus) == expected


@pytest.mark.parametrize(
    ("threads", "workers", "share"), [(8, 2, 4), (7, 2, 3), (2, 4, 1), (None, 2, 3), (5, 1, 5)]
)
def test_threads_are_divided(
    threads: int | None, workers: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (devices, training):
        monkeypatch.setattr(module, "usable_threads", lambda: 6)
    runner = LocalRunner(device="cpu", threads=threads, workers=workers)
    chosen = choose_devices(runner, 0)
    assert len(chosen) == workers
    for device in chosen:
        assert device.environment["OMP_NUM_THREADS"] == str(share)
        monkeypatch.setenv(devices.THREADS_VARIABLE, device.environment[devices.THREADS_VARIABLE])
        build.build_device(runner)
        assert torch.get_num_threads() == share


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (3, 2), (16, 15)])
def test_one_core_of_many_is_left_to_others(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda *, only_physical_cores: cores)
    usable_threads.cache_clear()
    try:
        assert usable_threads() == threads
    finally:
        usable_threads.cache_clear()


def test_threads_are_those_of_the_cores_that_the_process_is_bound_to() -> None:
    script = "from pipelines.runners.processors import usable_threads; print(usable_threads())"
    one = {next(iter(os.sched_getaffinity(0)))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        preexec_fn=lambda: os.sched_setaffinity(0, one),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


def test_only_shards_share_the_threads(pool: DevicePool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int | None]] = []

    def call(self: WorkerProcess, stage: str, args: list[Any], threads: int | None) -> None:
        asked.append((stage, threads))

    monkeypatch.setattr(WorkerProcess, "call", call)
    pool.call("e_step_shard", "anywhere", 0, 0, "", "")
    pool.call("refine_model", "anywhere", 0, "", "")
    assert asked == [("e_step_shard", None), ("refine_model", TWO.threads)]

    monkeypatch.setenv(devices.THREADS_VARIABLE, "")  # What the worker sets, it sets here.
    monkeypatch.setattr(stages, "is_complete", lambda *_: os.environ[devices.THREADS_VARIABLE])
    for threads, expected in ((None, "2"), (5, "5"), (None, "2")):
        message = {"stage": "is_complete", "args": ["anywhere", 0], "threads": threads}
        assert worker._answer(message, "2") == {"result": expected}


def test_a_worker_knows_of_all_gpus_and_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that trains on all of them is begun in a worker."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    first, second = choose_devices(LocalRunner(device="auto"), 2)
    for name, value in second.environment.items():
        monkeypatch.setenv(name, value)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert devices.count_gpus() == 2
    ranks = distributed.rank_devices(LocalRunner(device="auto"), 2)
    for rank, device in zip(ranks, (first, second), strict=True):
        assert (
            rank.environment["CUDA_VISIBLE_DEVICES"] == device.environment["CUDA_VISIBLE_DEVICES"]
        )


def test_gpus_are_counted_where_the_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def count() -> int:
        counted.append(1)
        return 1

    monkeypatch.setattr(devices, "count_gpus", count)
    monkeypatch.setattr(devices, "_has_cuda", lambda config: config.device != "cpu")
    for device, calls in (("cpu", 0), ("auto", 1)):
        with open_devices(LocalRunner(device=device)) as pool:
            assert pool.size == 1
            assert pool.pids == []
        assert len(counted) == calls


def test_a_smaller_batch_is_told_once_and_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore.open(str(run))
    undisturbed = store.iteration(0).read_reconstructions()
    shutil.rmtree(run / "iterations/000/shards")
    real, sizes = Bench.posterior, []

    class SmallGPU:
        def __init__(self, posterior: Any) -> None:
            self.posterior = posterior

        def sample(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            sizes.append(len(y))
            if len(y) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            drawn: torch.Tensor = self.posterior.sample(y, *args, **kwargs)
            return drawn

    monkeypatch.setattr(
        Bench, "posterior", lambda self, *args, **kwargs: SmallGPU(real(self, *args, **kwargs))
    )
    monkeypatch.setattr(stages.iterations, "_fitting", {})
    recorder = Recorder()
    with use_reporter(recorder):
        for shard in range(2):
            here("e_step_shard", str(run), 0, shard, store.config.digest, store.parent_digest(0))
    assert sizes == [32, *[16] * 8]
    assert [told[1] for told in recorder.told if told[0] == "note"] == [
        "iteration 000 · E-step · shard 1/4: no memory for a larger batch, going on with batches "
        "of 16"
    ]
    ours = store.iteration(0).read_reconstructions(slice(0, 128))
    # The noise is the same; solves of another batch size may round differently.
    torch.testing.assert_close(
        torch.from_numpy(ours), torch.from_numpy(undisturbed[:128]), rtol=0, atol=2e-3
    )
