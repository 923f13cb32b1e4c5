"""Channels named by deepinv's classes: they do what the named parts do, in every process."""

import hashlib
import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import deepinv.physics
import pytest
import torch
from deepinv.physics.functional import bicubic_filter, gaussian_blur
from torch import Tensor

from diffem_core import PhysicsChannel, Scaling, deepinv_channel
from diffem_core.deepinv_channels import _OnDeviceOfSeed

BLUR = {"filter": {"name": "gaussian_blur", "sigma": 1.0}}
GAUSSIAN = ("GaussianNoise", {"sigma": 0.1})
LINEAR: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "mri": (
        (2, 16, 16),
        {
            "physics": "MRI",
            "generator": ("GaussianMaskGenerator", {"acceleration": 4}),
            "noise": GAUSSIAN,
            "maps": ("mask",),
        },
    ),
    "coils": (
        (2, 16, 16),
        {"physics": "MultiCoilMRI", "generator": ("RandomMaskGenerator", {}), "noise": GAUSSIAN},
    ),
    "blur_fft": ((3, 16, 16), {"physics": "BlurFFT", "arguments": BLUR, "noise": GAUSSIAN}),
    "blur_fft_drawn": (
        (1, 16, 16),
        {"physics": "BlurFFT", "generator": ("GaussianBlurGenerator", {"psf_size": [7, 7]})},
    ),
    "blur_drawn": (
        (1, 16, 16),
        {
            "physics": "Blur",
            "arguments": {"padding": "circular"},
            "generator": ("DiffractionBlurGenerator", {"psf_size": [7, 7]}),
        },
    ),
    "downsampling": (
        (3, 16, 16),
        {"physics": "Downsampling", "arguments": {"filter": "gaussian", "factor": 2}},
    ),
    "compressed_sensing": (
        (1, 8, 8),
        {"physics": "CompressedSensing", "arguments": {"m": 20, "seed": 3}, "noise": GAUSSIAN},
    ),
    "inpainting": (
        (3, 8, 8),
        {
            "physics": "Inpainting",
            "generator": ("BernoulliSplittingMaskGenerator", {"split_ratio": 0.6}),
            "noise": GAUSSIAN,
            "maps": ["mask"],
        },
    ),
    "single_pixel": ((1, 8, 8), {"physics": "SinglePixelCamera", "arguments": {"m": 30}}),
    "tomography": (
        (1, 16, 16),
        {"physics": "Tomography", "arguments": {"angles": 8, "normalize": False}},
    ),
}
NOISES: dict[str, dict[str, Any]] = {
    "poisson": {"noise": ("PoissonNoise", {"gain": 0.5})},
    "uniform": {"noise": ("UniformNoise", {"a": 0.5})},
    "sigma": {
        "noise": ("GaussianNoise", {}),
        "generator": ("SigmaGenerator", {"sigma_min": 0.1, "sigma_max": 2.0}),
    },
}


def build(name: str) -> PhysicsChannel:
    shape, parts = LINEAR[name]
    return deepinv_channel(shape, **parts)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(channel: PhysicsChannel, n: int, seed: int = 1) -> dict[str, Tensor]:
    return channel.draw_params(n, generator=torch.Generator().manual_seed(seed))


def corrupt(
    channel: PhysicsChannel, x: Tensor, params: Mapping[str, Tensor], seed: int = 2
) -> Tensor:
    return channel.corrupt(x, params, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", LINEAR)
def test_adjoint_shapes_and_condition(name: str) -> None:
    channel = build(name)
    assert channel.linear
    x = normal(4, *channel.x_shape)
    params = draw(channel, 4)
    assert {k: tuple(v.shape) for k, v in params.items()} == {
        k: (4, *shape) for k, shape in channel.params_spec.items()
    }
    y = corrupt(channel, x, params)
    assert y.shape == (4, *channel.y_shape)
    v = normal(*y.shape, seed=3)
    left = (channel.A(x, params) * v).flatten(1).sum(1)
    right = (x * channel.A_adjoint(v, params)).flatten(1).sum(1)
    # deepinv computes in float32: sums of up to 16 * 16 * 3 products.
    scale = float(channel.A(x, params).norm() * v.norm()) / 4
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * scale)
    condition = channel.condition(y, params, Scaling.from_range(0, 16))
    assert condition.shape == (4, channel.condition_channels, *channel.x_shape[1:])
    bands = sum(channel.params_spec[m][0] for m in channel.maps)
    assert channel.condition_channels == channel.x_shape[0] + bands
    for m in channel.maps:
        assert torch.equal(condition[:, channel.x_shape[0] :], params[m])


@pytest.mark.parametrize("name", LINEAR)
def test_each_sample_has_its_own_operator_which_leaves_no_trace(name: str) -> None:
    channel = build(name)
    x = normal(3, *channel.x_shape)
    params = draw(channel, 3)
    y = channel.A(x, params)
    if params:
        other = draw(channel, 3, seed=9)
        assert not torch.allclose(channel.A(x, other), y), "parameters act"
    torch.testing.assert_close(channel.A(x, params), y, rtol=0, atol=0)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in params.items()}
        torch.testing.assert_close(channel.A(x[i : i + 1], one), y[i : i + 1])


def test_the_parts_are_the_named_ones() -> None:
    channel = build("blur_fft")
    assert channel.noise_std == pytest.approx(0.1)
    impulse = torch.zeros(1, 3, 16, 16)
    impulse[..., 8, 8] = 1
    kernel = gaussian_blur(sigma=(1.0, 1.0))
    half = kernel.shape[-1] // 2
    window = slice(8 - half, 9 + half)
    seen = channel.A(impulse, {})[..., window, window]
    torch.testing.assert_close(seen, kernel.expand(1, 3, -1, -1), rtol=1e-4, atol=1e-5)

    named = {"filter": {"name": "bicubic_filter", "factor": 2}}
    channel = deepinv_channel((1, 16, 16), physics="Downsampling", arguments=named)
    torch.testing.assert_close(channel.physics.filter, bicubic_filter(2))
    assert channel.y_shape == (1, 8, 8)
    assert channel.noise_std == 0.0
    assert deepinv_channel((1, 8, 8), physics="Denoising").noise_std == 0.0, "not deepinv's 0.1"

    mask = draw(build("mri"), 200)["mask"]
    assert torch.equal(mask[:, :1].expand_as(mask), mask), "both parts"
    assert (mask.mean((1, 2, 3)) == 0.25).all(), "a quarter of the lines"
    mask = draw(build("inpainting"), 500)["mask"]
    pixels = 500 * 64
    assert abs(float(mask[:, 0].mean()) - 0.6) < 5 * math.sqrt(0.6 * 0.4 / pixels)


@pytest.mark.parametrize("name", NOISES)
def test_noise(name: str) -> None:
    channel = deepinv_channel((1, 8, 8), physics="Denoising", **NOISES[name])
    assert channel.noise_std is None, "no single Gaussian level"
    n = 4000
    params = draw(channel, n)
    y = corrupt(channel, torch.full((n, 1, 8, 8), 3.0), params)
    assert torch.equal(y, corrupt(channel, torch.full((n, 1, 8, 8), 3.0), params))
    noise = (y - 3.0).flatten(1).double()
    count = noise.numel()
    if name == "poisson":
        assert params == {}
        assert torch.equal(y, (y / 0.5).round() * 0.5)
        # Variance gain x = 1.5; the fourth moment of a Poisson of mean 6 is (3 + 1/6) 6^2.
        assert abs(float(noise.mean())) < 5 * math.sqrt(1.5 / count)
        assert abs(float(noise.var()) / 1.5 - 1) < 5 * math.sqrt((2 + 1 / 6) / count)
    if name == "uniform":
        assert params == {}
        assert noise.abs().max() <= 0.5 + 1e-6
        # Variance 1/12; fourth moment 1/80, so that the variance varies by (1/80 - 1/144).
        assert abs(float(noise.mean())) < 5 * math.sqrt(1 / 12 / count)
        assert abs(float(noise.var()) - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / count)
    if name == "sigma":
        assert channel.params_spec == {"sigma": ()}
        sigma = params["sigma"].double()
        assert ((sigma >= 0.1) & (sigma <= 2)).all()
        assert sigma.max() - sigma.min() > 1.8
        # In each sample 64 values of its own level: sum / sigma^2 is chi-squared with 64 degrees
        # of freedom, of variance 128.
        chi = noise.square().sum(1) / sigma.square()
        assert abs(float(chi.mean()) - 64) < 5 * math.sqrt(128 / n)
        assert chi.max() < 64 + 8 * math.sqrt(128)
        assert chi.min() > 64 - 5.5 * math.sqrt(128)


def test_the_caller_s_generator_moves_on() -> None:
    channel = deepinv_channel((1, 8, 8), physics="Denoising", noise=("UniformNoise", {}))
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 1, 8, 8)
    first = channel.corrupt(x, {}, generator=generator)
    assert not torch.equal(first, channel.corrupt(x, {}, generator=generator))


@pytest.mark.parametrize(
    ("physics", "arguments"),
    [
        ("CompressedSensing", {"m": 5}),
        ("Inpainting", {"mask": 0.5}),
        ("StructuredRandomPhaseRetrieval", {"n_layers": 2, "output_size": [2, 8, 8]}),
    ],
)
def test_every_process_builds_the_same_operator(
    physics: str, arguments: dict[str, object]
) -> None:
    estimate = "y" if "Retrieval" in physics else "A_adjoint"
    code = (
        "import hashlib, torch; from diffem_core import deepinv_channel; torch.manual_seed(99); "
        f"torch.rand(3); c = deepinv_channel((2, 8, 8), physics={physics!r}, "
        f"arguments={arguments!r}, estimate={estimate!r}); "
        "y = c.A(torch.arange(128.0).reshape(1, 2, 8, 8), {}); "
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    x = torch.arange(128.0).reshape(1, 2, 8, 8)
    before = torch.random.get_rng_state()
    channel = deepinv_channel((2, 8, 8), physics=physics, arguments=arguments, estimate=estimate)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    y = channel.A(x, {})
    assert hashlib.sha256(y.numpy().tobytes()).hexdigest() == other.stdout.strip()
    if physics != "StructuredRandomPhaseRetrieval":
        seeded = [
            deepinv_channel((2, 8, 8), physics=physics, arguments={**arguments, "seed": s})
            for s in (0, 1)
        ]
        assert torch.equal(seeded[0].A(x, {}), y)
        assert not torch.equal(seeded[1].A(x, {}), y)


@pytest.mark.parametrize("name", ["compressed_sensing", "blur_fft", "downsampling"])
def test_the_operator_follows_x_to_its_device(name: str) -> None:
    # "meta" is the one other device that every machine has; it knows shapes, not values.
    channel = build(name)
    x = torch.empty(2, *channel.x_shape, device="meta")
    y = channel.A(x, {})
    assert y.device.type == "meta"
    assert channel.A_adjoint(y, {}).device.type == "meta"


def test_a_generator_of_another_device_seeds_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    # Stand-in for a GPU: a generator whose device says that it is not the CPU.
    class Elsewhere:
        device = torch.device("meta")

        def __init__(self, seed: int) -> None:
            self.rng = torch.Generator().manual_seed(seed)

    real = torch.randint

    def randint(high: int, size: tuple[int, ...], *, generator: Any, device: Any) -> Tensor:
        assert device == generator.device
        return real(high, size, generator=generator.rng)

    monkeypatch.setattr(torch, "randint", randint)
    physics = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(0.1))
    drawn = _OnDeviceOfSeed(deepinv.physics.generator.SigmaGenerator(), physics)
    seen: list[Tensor] = []
    step = drawn.drawn.step

    def spy(**arguments: Any) -> dict[str, Tensor]:
        params: dict[str, Tensor] = step(**arguments)
        seen.append(params["sigma"])
        return params

    drawn.drawn.step = spy
    rng = Elsewhere(1)
    for source in (rng, rng, Elsewhere(1)):
        drawn.rng = source
        assert drawn.step(batch_size=4)["sigma"].device.type == "meta"
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def refusal(shape: tuple[int, ...] = (1, 8, 8), **parts: Any) -> str:
    with pytest.raises(ValueError, match="deepinv") as error:
        deepinv_channel(shape, **parts)
    return str(error.value)


def test_unknown_names_list_the_known_ones() -> None:
    message = refusal(physics="Telescope")
    assert "'Telescope', which is no Physics in deepinv.physics; known are Blur" in message
    assert "GaussianNoise" not in message
    known = message.split("known are ")[1].split(", ")
    assert known == sorted(known)
    assert "'GaussianNoise', which is no Physics" in refusal(physics="GaussianNoise")
    assert "'Physics', which is no Physics" in refusal(physics="Physics")
    message = refusal(physics="Denoising", generator=("SigmaGen", {}))
    assert "no PhysicsGenerator in deepinv.physics.generator; known are" in message
    assert "SigmaGenerator" in message
    assert "BaseMaskGenerator" not in message, "abstract"
    message = refusal(physics="Denoising", noise=("MRI", {}))
    assert "'MRI', which is no NoiseModel in deepinv.physics; known are Fisher" in message


def test_wrong_arguments_are_named() -> None:
    message = refusal(physics="CompressedSensing", arguments={"m": 5, "rows": 3})
    assert "CompressedSensing received the unknown argument 'rows'; its arguments are" in message
    assert "channelwise, img_size, m, max_iter, seed, solver, tol" in message
    message = refusal(physics="CompressedSensing")
    assert "CompressedSensing received {} but needs m; its arguments are channel" in message
    for name in ("rng", "device", "noise_model"):
        assert f"unknown argument '{name}'" in refusal(
            physics="CompressedSensing", arguments={"m": 5, name: None}
        )
    message = refusal(physics="Denoising", arguments={"seed": 1})
    assert "unknown argument 'seed'; its arguments are max_iter, solver, tol" in message
    message = refusal(physics="CompressedSensing", arguments={"m": 5, "seed": 0.5})
    assert "seed 0.5; give an integer" in message
    message = refusal(physics="Inpainting", arguments={"mask": "half"})
    assert "deepinv's Inpainting refused {'mask': 'half'}: mask should" in message
    message = refusal(physics="Denoising", generator=("SigmaGenerator", {"sigma": 1}))
    assert "SigmaGenerator received the unknown argument 'sigma'; its arguments are" in message
    # deepinv's mask generators would drop this one without a word.
    message = refusal(physics="MRI", generator=("GaussianMaskGenerator", {"accelerate": 4}))
    assert "unknown argument 'accelerate'; its arguments are acceleration, center_fr" in message
    message = refusal(physics="BlurFFT", arguments={"filter": {"name": "motion"}})
    assert "the filter 'motion'; known are bicubic_filter, bilinear_filter, gaussian" in message
    with pytest.raises(ValueError, match="gaussian_blur received the unknown argument 'width'"):
        deepinv_channel(
            (1, 8, 8),
            physics="BlurFFT",
            arguments={"filter": {"name": "gaussian_blur", "width": 1}},
        )


# deepinv 0.5's DownsamplingGenerator copies a tensor in a way that PyTorch warns of.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize(
    ("shape", "parts", "expected"),
    [
        ((3, 8, 8), {"physics": "MRI"}, "MRI does not fit a PhysicsChannel for samples of shape"),
        ((1, 8, 8), {"physics": "Inpainting"}, "it has no mask: give it, or a generator of it"),
        (
            (1, 8, 8),
            {"physics": "Denoising", "generator": ("SigmaGenerator", {})},
            "draws sigma, which neither Denoising nor ZeroNoise has",
        ),
        (
            (1, 8, 8),
            {"physics": "Denoising", "noise": ("GammaNoise", {})},
            "draws from torch's global generator",
        ),
        (
            (1, 16, 16),
            {
                "physics": "Downsampling",
                "arguments": {"filter": None},
                "generator": ("DownsamplingGenerator", {"psf_size": [15, 15]}),
            },
            "draws the factor, on which the shape of y depends; give one factor",
        ),
        (
            (1, 8, 8),
            {"physics": "Downsampling", "arguments": {"filter": None}, "estimate": "y"},
            r"the estimate 'y' of y has shape \(1, 4, 4\)",
        ),
        ((1, 8, 8), {"physics": "SpatialUnwrapping"}, "not linear; take 'y'"),
    ],
)
def test_what_does_not_fit_is_said(
    shape: tuple[int, ...], parts: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        deepinv_channel(shape, **parts)
    assert "does not fit a PhysicsChannel" in str(error.value)
