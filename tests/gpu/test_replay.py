"""CUDA graphs: the same bits as without, and what cannot be recorded works as it did."""

import functools
import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from diffem_core import (
    MLP,
    BetaTime,
    Denoiser,
    DiffusionPosterior,
    MStepResult,
    RandomMask,
    Scaling,
    TrainingState,
    UNet,
    VELogLinear,
    constant_rate,
    dpm_solver,
    e_step,
    log_linear_grid,
    m_step,
    seeded_initialization,
)
from diffem_core.noise import SampleNoise
from diffem_core.preconditioning import FactorPreconditioning
from diffem_core.replay import Replayed
from pipelines import build
from storage_schemas.config import LocalRunner

CHANNEL = RandomMask((3, 16, 16), keep=0.5, noise_std=0.1)
SCALING = Scaling.from_range(0, 1)
SAMPLER = functools.partial(dpm_solver, sigmas=log_linear_grid(10.0, 0.01, 6))


def unet(*, replay: bool, precision: torch.dtype = torch.float32) -> Denoiser:
    with seeded_initialization(0):
        network = UNet(
            in_channels=3,
            condition_channels=CHANNEL.condition_channels,
            out_channels=3,
            channels=(32, 64),
            blocks=(1, 1),
            attention={1: 4},
            embedding=16,
            dropout=0.2,
        )
        nn.init.normal_(network.leave.weight, std=0.2)
    return Denoiser(network, precision=precision, replay=replay).cuda()


def observations(n: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    params = CHANNEL.draw_params(n, generator=generator)
    x = torch.rand(n, *CHANNEL.x_shape, generator=generator)
    return CHANNEL.corrupt(x, params, generator=generator), params


def draw(denoiser: Denoiser, n: int = 20) -> Tensor:
    y, params = observations(n)
    posterior = DiffusionPosterior(denoiser, CHANNEL, SCALING, SAMPLER)
    return e_step(posterior, y, params, seeds=range(n), batch_size=8)


def train(denoiser: Denoiser, *, deterministic: bool = True, **changes: object) -> MStepResult:
    x_hat = torch.rand(64, *CHANNEL.x_shape, generator=torch.Generator().manual_seed(4))
    settings: dict[str, object] = {
        "steps": 40,
        "batch_size": 24,
        "learning_rate": constant_rate(1e-3),
        "ema_decay": 0.9,
        "clip_norm": 1.0,
        "seed": 5,
    }
    runner = LocalRunner(device="cuda", deterministic=deterministic)
    with build.repeatable(runner, build.build_device(runner)):
        return m_step(
            denoiser, x_hat, CHANNEL, SCALING, VELogLinear(), BetaTime(), **(settings | changes)
        )  # type: ignore[arg-type]


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_replayed_e_step_draws_the_same_bits(precision: torch.dtype) -> None:
    launched = draw(unet(replay=False, precision=precision))
    replayed = unet(replay=True, precision=precision)
    assert replayed.replays
    assert torch.equal(draw(replayed), launched)
    assert torch.equal(draw(replayed), launched), "recordings of before serve"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_replayed_m_step_learns_the_same_bits(precision: torch.dtype) -> None:
    launched = train(unet(replay=False, precision=precision))
    replayed = train(unet(replay=True, precision=precision))
    assert differing(replayed.weights, launched.weights) == []
    assert replayed.mean_loss == launched.mean_loss
    assert replayed.mean_loss > replayed.last_loss > 0


def test_what_no_gpu_repeats_is_refused_unless_allowed() -> None:
    class Summing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None = None) -> Tensor:
            return nn.functional.interpolate(self.weight * x, scale_factor=1.0, mode="bicubic")

    with pytest.raises(
        ValueError, match=r"upsample_bicubic2d.*set runner\.deterministic to false"
    ):
        train(Denoiser(Summing()).cuda(), steps=2)
    assert not torch.are_deterministic_algorithms_enabled()
    train(Denoiser(Summing()).cuda(), deterministic=False, steps=2)


def test_an_m_step_on_a_gpu_goes_on_with_the_same_bits() -> None:
    whole = train(unet(replay=True))
    kept: dict[str, Tensor] = {}

    def keep(state: TrainingState) -> None:
        if state.step == 17:
            kept.update(state.tensors())

    train(unet(replay=True), on_step=keep)
    resumed = train(unet(replay=True), state=TrainingState.from_tensors(kept))
    assert differing(resumed.weights, whole.weights) == []


def test_where_gradients_are_asked_for_nothing_is_replayed() -> None:
    denoiser = unet(replay=True)
    x = torch.randn(4, *CHANNEL.x_shape, device="cuda", requires_grad=True)
    condition = torch.randn(4, CHANNEL.condition_channels, 16, 16, device="cuda")
    with denoiser.repeated():
        for _ in range(3):
            denoiser(x, torch.ones(1, device="cuda"), condition).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_weights_that_were_trained_or_moved_are_seen() -> None:
    denoiser = unet(replay=True, precision=torch.bfloat16)
    before = draw(denoiser)
    train(denoiser)
    plain = unet(replay=False, precision=torch.bfloat16)
    plain.load_state_dict(denoiser.state_dict())
    expected = draw(plain)
    assert torch.equal(draw(denoiser), expected)
    assert not torch.equal(before, expected)


def test_a_denoiser_around_the_gaussian_posterior_is_replayed() -> None:
    n, dimension = 64, 5
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    features = dimension * (dimension + 1)
    with seeded_initialization(0):
        network = MLP(features=dimension, condition_features=features, hidden=(64, 64))
    denoiser = Denoiser(network, preconditioning=FactorPreconditioning(dimension=dimension)).cuda()
    arguments = normal(n, dimension), torch.tensor([0.7], device="cuda"), normal(n, features)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = denoiser(*arguments)
        with denoiser.repeated():
            for _ in range(3):
                assert torch.equal(denoiser(*arguments), expected)


def test_a_denoiser_and_its_recordings_are_freed_at_once() -> None:
    draw(unet(replay=True))
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        denoiser = unet(replay=True)
        draw(denoiser)
        gone = weakref.ref(denoiser)
        del denoiser
        assert gone() is None
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


class Asking(nn.Module):
    """A network whose work depends on numbers: Python waits for them."""

    replayable = True  # That is a lie.

    def __init__(self) -> None:
        super().__init__()
        self.own = unet(replay=False).network

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None = None) -> Tensor:
        if float(x.mean()) > 1e9:
            raise ValueError("far away")
        out: Tensor = self.own(x, c_noise, condition)
        return out


def test_a_network_that_waits_for_the_gpu_is_refused_with_the_remedy() -> None:
    """In a process of its own: generators of the GPU do not survive it."""
    script = (
        "from tests.gpu.test_replay import Asking, Denoiser, draw\n"
        "draw(Denoiser(Asking(), replay=False).cuda())\n"
        "draw(Denoiser(Asking()).cuda())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "could not be recorded as a CUDA graph" in last
    assert "set runner.cuda_graphs" in last


def test_networks_of_ones_own_are_launched_unless_they_ask() -> None:
    class Own(nn.Linear):
        pass

    assert not Denoiser(Own(2, 2)).cuda().replays
    assert not unet(replay=False).replays
    assert not unet(replay=True).cpu().replays


def test_noise_on_a_gpu_is_that_of_the_processor() -> None:
    seeds = range(40, 77)
    for shape in ((3, 16, 16), (5,)):
        here, there = SampleNoise(seeds), SampleNoise(seeds, device="cuda")
        there.expect(15)
        for _ in range(20):
            assert torch.equal(here.normal(shape), there.normal(shape).cpu())


def test_results_are_not_overwritten_by_the_next_replay() -> None:
    doubled = Replayed(lambda x: 2 * x)
    inputs = [torch.full((4,), float(i), device="cuda") for i in range(5)]
    results = [doubled(x) for x in inputs]
    assert [float(r[0]) for r in results] == [0.0, 2.0, 4.0, 6.0, 8.0]
