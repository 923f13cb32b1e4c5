"""Work of a GPU that is recorded once and replayed (CUDA graphs).

A network of small images launches hundreds of kernels, each done before Python has launched the
next one. The launches of a function that always does the same are recorded, and replayed as one:
the same kernels on the same numbers, hence the same bits, without waiting for Python.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Replayed"]

_MOST = 4  # Recordings that are kept, each with memory of its own.

_Key = tuple[tuple[torch.Size, torch.dtype] | None, ...]


@dataclass(frozen=True, kw_only=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: Tensor


class Replayed:
    """A function of tensors on a GPU, recorded at its second call with tensors of some shapes.

    The first call prepares what a recording may not contain (libraries' memory, say). Where there
    is no memory left to record in, the function is called as it is; a warning tells.

    Arguments:
        function: Depends on its arguments, on `generators`, and on tensors that stay where they
            are; does the same for all arguments of the same shapes, or None, and never waits for
            the GPU; returns a tensor.
        generators: What it draws from.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.function = function
        self.generators = tuple(generators)
        self._seen: set[_Key] = set()
        self._recordings: dict[_Key, _Recording] = {}
        self._refused = False
        self._places: tuple[int, ...] = ()

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Call the function, or replay what it did with tensors of these shapes.

        Returns:
            Its result, in memory of its own.

        Raises:
            RuntimeError: It cannot be recorded, since it waits for the GPU. PyTorch's generators
                of the GPU serve no more in this process.
        """
        key = tuple(None if t is None else (t.shape, t.dtype) for t in inputs)
        recording = self._recordings.pop(key, None)
        if recording is None and key in self._seen and not self._refused:
            recording = self._record(inputs)
        if recording is None:
            self._seen.add(key)
            try:
                return self.function(*inputs)
            except torch.OutOfMemoryError:
                self.forget()  # What recordings hold may be what is missing.
                raise
        while len(self._recordings) >= _MOST:
            del self._recordings[next(iter(self._recordings))]
        self._recordings[key] = recording  # The last one used is the last to go.
        for own, given in zip(recording.inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        recording.graph.replay()
        return recording.output.clone()

    def reads(self, tensors: Iterable[Tensor]) -> None:
        """Forget all recordings if the tensors that the function reads have moved in memory.

        Arguments:
            tensors: All of them, in a fixed order.
        """
        places = tuple(tensor.data_ptr() for tensor in tensors)
        if places != self._places:
            self.forget()
        self._places = places

    def forget(self) -> None:
        """Forget all recordings, and free their memory."""
        self._recordings.clear()
        self._seen.clear()

    def _record(self, inputs: tuple[Tensor | None, ...]) -> _Recording | None:
        """Record a call, which computes nothing; return None if that cannot be."""
        states = [generator.get_state() for generator in self.generators]
        own = tuple(None if t is None else torch.empty_like(t) for t in inputs)
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            with _recording(graph, next(t.device for t in own if t is not None)):
                output = self.function(*own)
        except torch.OutOfMemoryError as error:
            self._refused = True
            reason = str(error).partition(". ")[0]
        except RuntimeError as error:
            first = error.__context__ or error
            raise RuntimeError(
                "the GPU's work could not be recorded as a CUDA graph "
                f"({str(first).partition(chr(10))[0]}), but the network says that it is "
                "replayable: take that attribute away if it is yours, or set runner.cuda_graphs "
                "(Denoiser's replay) to false"
            ) from error
        else:
            return _Recording(graph=graph, inputs=own, output=output)
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
        warnings.warn(
            f"the GPU has no memory to record its work in ({reason}); it is launched piece by "
            "piece, with the same result, but later",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Record what is launched on a GPU inside, which other threads may use meanwhile."""
    # Python must not free other recordings while one is made: CUDA forbids it.
    collects = gc.isenabled()
    gc.disable()
    try:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            yield
    finally:
        if collects:
            gc.enable()
