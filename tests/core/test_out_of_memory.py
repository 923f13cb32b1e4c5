"""An E-step on a GPU that has no memory for a whole batch."""

from collections.abc import Mapping, Sequence
from typing import cast

import pytest
import torch
from torch import Tensor

from diffem_core.drawing import draw_prior
from diffem_core.e_step import e_step
from diffem_core.noise import SampleNoise
from diffem_core.posterior import DiffusionPrior


class SmallGPU:
    """Draws y + z, z ~ N(0, 1), and has memory for `fits` observations at a time."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.batches: list[int] = []

    def sample(
        self,
        y: Tensor,
        params: Mapping[str, Tensor],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> Tensor:
        assert all(len(value) == len(y) == len(seeds) for value in params.values())
        self.batches.append(len(y))
        if len(y) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        noise = SampleNoise(seeds, device=y.device, dtype=y.dtype, scale=temperature)
        return y * params["gain"] + noise.normal(y.shape[1:])


def draw(posterior: SmallGPU, n: int = 21) -> tuple[Tensor, list[int], list[int]]:
    y = torch.linspace(0, 1, 3 * n).reshape(n, 3)
    gain = torch.linspace(1, 2, n).reshape(n, 1)
    progress: list[int] = []
    smaller: list[int] = []
    x_hat = e_step(
        posterior,
        y,
        {"gain": gain},
        seeds=range(100, 100 + n),
        batch_size=8,
        on_progress=progress.append,
        on_smaller_batch=smaller.append,
    )
    return x_hat, progress, smaller


def test_batches_are_halved_until_they_fit_and_the_bytes_stay_the_same() -> None:
    enough, _, none = draw(SmallGPU(fits=8))
    assert none == []
    gpu = SmallGPU(fits=3)
    x_hat, progress, smaller = draw(gpu)
    assert torch.equal(x_hat, enough)
    assert smaller == [4, 2]
    assert gpu.batches == [8, 4, *[2] * 10, 1], "the rest goes on at the size that fits"
    assert progress == [*[2] * 10, 1]


def test_memory_that_runs_out_later_costs_nothing_that_was_drawn() -> None:
    class Shrinking(SmallGPU):
        def sample(self, y: Tensor, params: Mapping[str, Tensor], **kwargs: object) -> Tensor:
            if len(self.batches) == 2:
                self.fits = 2
            return super().sample(y, params, **kwargs)  # type: ignore[arg-type]

    gpu = Shrinking(fits=8)
    x_hat, progress, smaller = draw(gpu)
    # The last batch is one of 5, so it is that which is halved.
    assert gpu.batches == [8, 8, 5, 2, 2, 1]
    assert progress == [8, 8, 2, 2, 1]
    assert smaller == [2]
    assert torch.equal(x_hat, draw(SmallGPU(fits=8))[0])


def test_no_memory_for_a_single_observation_says_what_to_do() -> None:
    gpu = SmallGPU(fits=0)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"one sample.*take a smaller network.*2\.00 GiB"
    ):
        draw(gpu)
    assert gpu.batches == [8, 4, 2, 1]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Broken(SmallGPU):
        def sample(self, y: Tensor, params: Mapping[str, Tensor], **kwargs: object) -> Tensor:
            self.batches.append(len(y))
            raise RuntimeError("the device went away")

    gpu = Broken(fits=8)
    with pytest.raises(RuntimeError, match="the device went away"):
        draw(gpu)
    assert gpu.batches == [8]


class SmallGPUPrior:
    """Draws one number a seed, and has memory for two at a time."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def sample(self, *, seeds: Sequence[int]) -> Tensor:
        self.batches.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return SampleNoise(seeds).normal((3,))


def test_samples_of_a_prior_are_drawn_in_smaller_batches_too() -> None:
    prior, progress = SmallGPUPrior(), list[int]()
    x = draw_prior(
        cast(DiffusionPrior, prior), range(5), batch_size=4, on_progress=progress.append
    )
    assert prior.batches == [4, 2, 2, 1]
    assert progress == [2, 2, 1]
    expected = SampleNoise(range(5)).normal((3,))
    assert torch.equal(x, expected)
