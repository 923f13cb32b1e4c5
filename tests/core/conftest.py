"""Shared fixtures of the core's tests."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def official() -> dict[str, Tensor]:
    """Inputs and outputs of the official code (see `shared/reference/README.md`), float64."""
    with np.load(DATA / "official.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20251015)


class LinearNoise:
    """A noise source that shows what a sampler does to its noise when the sampler is affine in it.

    Row 0 of the batch gets no noise at all, row 1 + k gets ones in draw k and zeros in every
    other. If x = c + sum_k b_k z_k in each entry, row 0 of the result is c and row 1 + k less row
    0 is b_k: mean
    and variances without any sampling error.
    """

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self.used = 0

    def __len__(self) -> int:
        return 1 + self.draws

    def expect(self, draws: int) -> None:
        pass

    def normal(self, shape: Sequence[int]) -> Tensor:
        assert self.used < self.draws, "the sampler drew more noise than expected"
        z = torch.zeros(len(self), *shape, dtype=torch.float64)
        z[1 + self.used] = 1.0
        self.used += 1
        return z


@pytest.fixture
def moments() -> Callable[[Callable[[LinearNoise], Tensor], int], tuple[Tensor, Tensor]]:
    """Return `moments(sample, draws)`: exact mean and variances of an affine sampler's output."""

    def compute(sample: Callable[[LinearNoise], Tensor], draws: int) -> tuple[Tensor, Tensor]:
        x = sample(LinearNoise(draws))
        return x[0], (x[1:] - x[0]).square().sum(0)

    return compute


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep to one thread: these tensors are so small that more of them only wait for each
    other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
