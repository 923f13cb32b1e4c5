"""When work is recorded, replayed and forgotten; tests/gpu holds it against a GPU's own graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from diffem_core import MLP, Denoiser
from diffem_core.replay import Replayed


class Graph:
    """Stands for a CUDA graph: `launch` tells it what was launched while it was recording."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def replay(self) -> None:
        for work in self.work:
            work()

    def register_generator_state(self, generator: torch.Generator) -> None:
        pass


@contextmanager
def recording(graph: Graph, *, stream: object, capture_error_mode: str) -> Iterator[None]:
    Graph.recording = graph
    try:
        yield
    finally:
        Graph.recording = None


class Doubling:
    """2 x + w, as kernels would compute it: into the same memory at every replay."""

    def __init__(self) -> None:
        self.w = torch.tensor([1.0])
        self.calls = 0

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        self.calls += 1
        w, out = self.w, torch.empty_like(x)

        def launched() -> None:
            torch.add(2 * x + w, 0 if add is None else add, out=out)

        launched()
        if Graph.recording is not None:
            Graph.recording.work.append(launched)
        return out


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)


def test_the_second_call_is_recorded_and_later_ones_replay_it() -> None:
    own = Doubling()
    replayed = Replayed(own)
    results = [replayed(torch.full((3,), float(i))) for i in range(5)]
    assert [r.tolist() for r in results] == [[2.0 * i + 1] * 3 for i in range(5)]
    assert own.calls == 2, "once to prepare, once to record"


def test_every_shape_and_every_absence_has_its_own_recording() -> None:
    own = Doubling()
    replayed = Replayed(own)
    ones, few = torch.ones(3), torch.ones(2)
    for _ in range(3):
        assert replayed(ones, None).tolist() == [3.0] * 3
        assert replayed(ones, ones).tolist() == [4.0] * 3
        assert replayed(few, None).tolist() == [3.0] * 2
        assert replayed(ones.double(), None).dtype == torch.float64
    assert own.calls == 8


def test_what_is_read_may_change_where_it_is_but_not_move_unseen() -> None:
    own = Doubling()
    replayed = Replayed(own)
    x = torch.ones(3)
    for value in (1.0, 5.0, 7.0):
        own.w.fill_(value)
        replayed.reads([own.w])
        assert replayed(x).tolist() == [2 + value] * 3
    assert own.calls == 2
    own.w = torch.tensor([9.0])
    replayed.reads([own.w])
    for _ in range(3):
        assert replayed(x).tolist() == [11.0] * 3
    assert own.calls == 4, "prepared and recorded anew"


def test_only_the_recordings_that_were_used_last_are_kept() -> None:
    own = Doubling()
    replayed = Replayed(own)
    shapes = [torch.ones(n) for n in range(1, 6)]
    for x in shapes[:4]:
        replayed(x), replayed(x)
    replayed(shapes[0])
    assert own.calls == 8
    replayed(shapes[4]), replayed(shapes[4])
    assert len(replayed._recordings) == 4
    replayed(shapes[0])
    assert own.calls == 10, "the first one was used after the second, which had to go"
    assert replayed(shapes[1]).tolist() == [3.0, 3.0]
    assert own.calls == 11


def test_where_memory_is_short_recordings_are_given_back() -> None:
    own = Doubling()

    def large(x: Tensor) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return own(x)

    replayed = Replayed(large)
    replayed(torch.ones(3)), replayed(torch.ones(3))
    assert len(replayed._recordings) == 1
    with pytest.raises(torch.OutOfMemoryError):
        replayed(torch.ones(4))
    assert len(replayed._recordings) == 0


def test_hooks_of_a_replayed_denoiser_are_called_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By one of them an end that is asked for is heard between two network calls."""
    denoiser = Denoiser(MLP(features=3, condition_features=0, hidden=(4,), embedding=4))
    called: list[int] = []
    denoiser.register_forward_pre_hook(lambda *_: called.append(len(called)))
    monkeypatch.setattr(Denoiser, "replays", property(lambda self: True))
    x, sigma = torch.ones(2, 3), torch.ones(1)
    with torch.inference_mode(), denoiser.repeated():
        for _ in range(5):
            denoiser(x, sigma)
    assert len(called) == 5
    assert denoiser._repeated.active is None


def test_without_memory_for_a_recording_the_function_is_called_and_that_is_told_once() -> None:
    own = Doubling()
    generator = torch.Generator().manual_seed(0)

    def large(x: Tensor) -> Tensor:
        out = own(x) + torch.rand(3, generator=generator)
        if Graph.recording is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return out

    replayed = Replayed(large, generators=[generator])
    with pytest.warns(RuntimeWarning, match=r"no memory to record .* \(CUDA out of") as told:
        results = [replayed(torch.ones(3)) for _ in range(4)]
    assert len(told) == 1
    assert own.calls == 5, "one attempt, whose draws do not count"
    generator.manual_seed(0)
    for result in results:
        assert torch.equal(result, 3 + torch.rand(3, generator=generator))


def test_a_network_that_waits_for_the_gpu_is_refused_with_the_remedy() -> None:
    def asking(x: Tensor) -> Tensor:
        if Graph.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nand a trace")
        return x

    replayed = Replayed(asking)
    replayed(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"\(operation .* capturing\).*runner\.cuda_graphs"):
        replayed(torch.ones(3))


def test_a_mistake_while_recording_is_not_hidden() -> None:
    def wrong(x: Tensor) -> Tensor:
        if Graph.recording is not None:
            raise ValueError("a mistake")
        return x

    replayed = Replayed(wrong)
    replayed(torch.ones(3))
    with pytest.raises(ValueError, match="a mistake"):
        replayed(torch.ones(3))
