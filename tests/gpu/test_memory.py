"""A GPU whose memory is short: batches are halved, steps are split, and the work is done."""

import gc
from collections.abc import Iterator

import pytest
import torch

from diffem_core import DiffusionPosterior, Scaling, e_step
from tests.gpu.test_replay import CHANNEL, SAMPLER, observations, train, unet


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process have 128 MB more than it has."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + 128 * 2**20) / total
    )
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.usefixtures("little_memory")
@pytest.mark.filterwarnings("ignore:the GPU has no memory to record")
def test_an_e_step_halves_its_batches(replay: bool) -> None:
    n = 4096
    y, params = observations(n)
    denoiser = unet(replay=replay)
    posterior = DiffusionPosterior(denoiser, CHANNEL, Scaling.from_range(0, 1), SAMPLER)
    smaller: list[int] = []
    x_hat = e_step(
        posterior, y, params, seeds=range(n), batch_size=n, on_smaller_batch=smaller.append
    )
    assert smaller, "the whole batch does not fit"
    few = slice(100, 120)
    alone = e_step(
        posterior,
        y[few],
        {k: v[few] for k, v in params.items()},
        seeds=range(100, 120),
        batch_size=20,
    )
    # Kernels for other batch sizes round otherwise (TF32: 11 bits), six steps one after another.
    assert float((x_hat[few] - alone).abs().max()) < 0.05


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.usefixtures("little_memory")
@pytest.mark.filterwarnings("ignore:the GPU has no memory to record")
def test_an_m_step_splits_its_batches(replay: bool) -> None:
    splits: list[int] = []
    # A recording that finds no room is no reason to fail: the work is launched.
    result = train(unet(replay=replay), batch_size=1024, steps=6, on_split=splits.append)
    assert splits
    assert splits == [2**k for k in range(1, 1 + len(splits))]
    assert 0 < result.last_loss < 1e4
