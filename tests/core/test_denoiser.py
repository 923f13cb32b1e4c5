"""The denoiser's preconditioning and the networks."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffem_core import MLP, Denoiser, SinusoidalEmbedding, UNet, denoising_loss
from diffem_core.networks.dropout import Dropout


class Recorder(nn.Module):
    """Returns a fixed output and keeps what it was called with."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None) -> Tensor:
        self.calls.append((x, c_noise, condition))
        return self.output


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def small_unet(**changes: object) -> UNet:
    settings: dict[str, object] = {
        "in_channels": 1,
        "condition_channels": 2,
        "out_channels": 1,
        "channels": (8, 12),
        "blocks": (1, 2),
        "attention": {1: 2},
        "embedding": 16,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    network = UNet(**(settings | changes))  # type: ignore[arg-type]
    with torch.no_grad():  # The last layer begins at 0, which would hide everything before it.
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    return network


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_preconditioning_identities(sigma_data: float) -> None:
    sigma = torch.logspace(-3, 2, 11, dtype=torch.float64)
    n = len(sigma)
    zero, one = (Recorder(torch.full((n, 4), v, dtype=torch.float64)) for v in (0.0, 1.0))
    x_t = randn(n, 4)
    c_skip = Denoiser(zero, sigma_data=sigma_data)(x_t, sigma) / x_t
    c_out = Denoiser(one, sigma_data=sigma_data)(x_t, sigma) - c_skip * x_t
    c_in = zero.calls[0][0] / x_t
    s = sigma.unsqueeze(1).expand(n, 4)
    total = s**2 + sigma_data**2
    # Unit variance in; unit variance of the target (x - c_skip x_t) / c_out; least amplification
    # of the network's error.
    torch.testing.assert_close(c_in**2 * total, torch.ones_like(s))
    target = ((1 - c_skip) * sigma_data) ** 2 + (c_skip * s) ** 2
    torch.testing.assert_close(target / c_out**2, torch.ones_like(s))
    torch.testing.assert_close(c_skip, sigma_data**2 / total)
    torch.testing.assert_close(zero.calls[0][1], sigma.log())


def test_the_weighted_loss_weighs_the_network_s_error_evenly() -> None:
    # lambda = 1 / sigma^2 + 1 = 1 / c_out^2 (sigma_data = 1): the loss is the plain error of F at
    # its own target.
    n = 9
    x, z, output = randn(n, 5, seed=1), randn(n, 5, seed=2), randn(n, 5, seed=3)
    sigma = torch.logspace(-2, 2, n, dtype=torch.float64)
    loss = denoising_loss(Denoiser(Recorder(output)), x, z, sigma)
    s = sigma.unsqueeze(1)
    target = (x - (x + s * z) / (s**2 + 1)) * (s**2 + 1).sqrt() / s
    torch.testing.assert_close(loss, (output - target).square().mean())


def test_one_noise_level_may_be_shared() -> None:
    denoiser = Denoiser(small_unet().double())
    x, condition = randn(3, 1, 8, 8), randn(3, 2, 8, 8, seed=1)
    each = denoiser(x, torch.full((3,), 0.7, dtype=torch.float64), condition)
    for level in (torch.tensor([0.7]).double(), torch.tensor(0.7).double()):
        torch.testing.assert_close(denoiser(x, level, condition), each)


def test_a_wrong_output_shape_is_refused() -> None:
    denoiser = Denoiser(Recorder(torch.zeros(2, 2, 8, 8)))
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 8\) for samples of shape \(2, 1, 8, 8\)"):
        denoiser(torch.zeros(2, 1, 8, 8), torch.ones(2))


def test_bad_denoisers() -> None:
    with pytest.raises(ValueError, match="sigma_data 0"):
        Denoiser(nn.Identity(), sigma_data=0)
    with pytest.raises(ValueError, match=r"precision torch\.float16; known are"):
        Denoiser(nn.Identity(), precision=torch.float16)


def test_bfloat16_stays_inside_the_network() -> None:
    network = small_unet()
    x, condition = randn(4, 1, 8, 8).float(), randn(4, 2, 8, 8, seed=1).float()
    sigma = torch.tensor([0.01, 0.1, 1.0, 10.0])
    exact = Denoiser(network)(x, sigma, condition)
    rounded = Denoiser(network, precision=torch.bfloat16)(x, sigma, condition)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    # bfloat16 has 8 bits: the network's output is off by a few per cent, scaled by c_out into the
    # estimate.
    gap = (rounded - exact).flatten(1).norm(dim=1) / (sigma / (sigma**2 + 1).sqrt())
    assert (gap < 0.1 * network(x, sigma.log(), condition).flatten(1).norm(dim=1)).all()
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_the_paper_s_network_has_the_paper_s_parameters() -> None:
    with torch.device("meta"):
        # As the official code builds it: 3 channels of x_t, 3 of the condition, and twice 3
        # channels out.
        official = UNet(
            in_channels=3, condition_channels=3, out_channels=6, attention={1: 4}, embedding=256
        )
        # As this project does: the condition also holds the mask, and only x comes out.
        ours = UNet(
            in_channels=3, condition_channels=4, out_channels=3, attention={1: 4}, embedding=256
        )
    counts = [sum(p.numel() for p in network.parameters()) for network in (official, ours)]
    assert counts[0] == 57_564_294
    assert counts[1] == pytest.approx(57_564_294, rel=1e-4)


def test_unet_shapes_and_samples_do_not_mix() -> None:
    network = small_unet(
        in_channels=3, out_channels=3, channels=(8, 8, 8), blocks=(1, 1, 1)
    ).double()
    x, condition, c = randn(4, 3, 8, 12), randn(4, 2, 8, 12, seed=1), randn(4, seed=2)
    together = network(x, c, condition)
    assert together.shape == x.shape
    for i in range(4):
        one = slice(i, i + 1)
        torch.testing.assert_close(network(x[one], c[one], condition[one]), together[one])


@pytest.mark.parametrize("what", ["x", "noise level", "data", "mask"])
def test_the_unet_uses_all_of_its_inputs(what: str) -> None:
    network = small_unet().double()
    inputs = {"x": randn(2, 1, 8, 8), "c": randn(2, seed=1), "y": randn(2, 2, 8, 8, seed=2)}
    before = network(inputs["x"], inputs["c"], inputs["y"])
    if what == "x":
        inputs["x"] = inputs["x"] + 1
    elif what == "noise level":
        inputs["c"] = inputs["c"] + 1
    else:
        inputs["y"] = inputs["y"].clone()
        inputs["y"][:, 0 if what == "data" else 1] += 1
    after = network(inputs["x"], inputs["c"], inputs["y"])
    assert (before - after).abs().mean() > 1e-3


def test_attention_reaches_across_the_image() -> None:
    x, condition = randn(1, 1, 32, 32).requires_grad_(), randn(1, 2, 32, 32, seed=1)
    c = torch.zeros(1, dtype=torch.float64)
    reach = {}
    for name, attention in (("with", {1: 2}), ("without", {})):
        network = small_unet(attention=attention, blocks=(1, 1)).double()
        (gradient,) = torch.autograd.grad(network(x, c, condition)[0, 0, 0, 0], x)
        reach[name] = float(gradient[0, 0, 31, 31].abs())
    assert reach["with"] > 0
    assert reach["without"] == 0


def test_the_order_of_the_paths_is_the_documented_one() -> None:
    # A plain re-implementation: enter, normalize below the finest level, blocks; then, from the
    # coarsest level up, normalize, upsample, concatenate the skip, convolve, blocks; leave.
    net = small_unet(condition_channels=0, channels=(4, 6, 8), blocks=(2, 1, 1)).double()
    x = randn(2, 1, 8, 8)
    c_noise = torch.tensor([-1.0, 2.0], dtype=torch.float64)

    def normalize(h: Tensor) -> Tensor:
        mean = h.mean(1, keepdim=True)
        variance = (h - mean).square().mean(1, keepdim=True)
        return (h - mean) / (variance + 1e-5).sqrt()

    def blocks(h: Tensor, level: Any, which: range) -> Tensor:
        for index in which:
            m = level.modulation
            hidden = F.silu(features @ m.weight_1[index] + m.bias_1[index])
            out = hidden @ m.weight_2[index] + m.bias_2[index]
            a, b, c = (v[:, :, None, None] for v in out.chunk(3, dim=1))
            branch = level.blocks[index](normalize((1 + a) * h + b))
            h = (h + c * branch) / (1 + c.square()).sqrt()
        return h

    features = net.embed(c_noise)
    h, skips = x, []
    for index, (enter, level) in enumerate(zip(net.enter, net.levels, strict=True)):
        h = enter(h)
        h = normalize(h) if index else h
        h = blocks(h, level, range(len(level.blocks) // 2))
        skips.append(h)
    for index in (2, 1, 0):
        level = net.levels[index]
        if index < 2:
            up = normalize(h).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = net.merge[index](torch.cat([up, skips[index]], dim=1))
        h = blocks(h, level, range(len(level.blocks) // 2, len(level.blocks)))
    torch.testing.assert_close(net(x, c_noise), net.leave(h), rtol=1e-9, atol=1e-9)


def test_a_new_unet_is_the_preconditioned_identity_and_trains() -> None:
    torch.manual_seed(0)
    network = UNet(
        in_channels=1, condition_channels=0, out_channels=1, channels=(8, 8), blocks=(1, 1)
    )
    x = randn(2, 1, 8, 8).float()
    assert (network(x, torch.zeros(2)) == 0).all()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    for _ in range(
        2
    ):  # The first step moves the last layer off 0, the second reaches every weight.
        optimizer.zero_grad()
        (network(x, torch.zeros(2)) - 1).square().mean().backward()
        optimizer.step()
    still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (1,)}, "2 channels and 1 blocks; give one of each per level"),
        ({"attention": {5: 2}}, "2 attention heads at level 5; its levels are 0 to 1"),
        ({"attention": {1: 5}}, "5 attention heads at level 1"),
        ({"embedding": 7}, "7 features; give an even number"),
        ({"dropout": 1.0}, r"rate 1.0; give a number in \[0, 1\)"),
    ],
)
def test_bad_unets(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_unet(**changes)


def test_bad_unet_inputs() -> None:
    network = small_unet()
    with pytest.raises(ValueError, match="0 condition channels but was built for 2"):
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="images of 7 x 8 but its 2 levels need multiples of 2"):
        network(torch.zeros(1, 1, 7, 8), torch.zeros(1), torch.zeros(1, 2, 7, 8))


def test_mlp() -> None:
    torch.manual_seed(0)
    network = MLP(features=5, condition_features=12, hidden=(16, 16), embedding=8)
    assert sum(p.numel() for p in network.parameters()) == 26 * 16 + 17 * 16 + 17 * 5
    network = network.double()
    x, y, c = randn(6, 5), randn(6, 12, seed=1), randn(6, seed=2)
    out = network(x, c, y)
    assert out.shape == (6, 5)
    torch.testing.assert_close(network(x[2:3], c[2:3], y[2:3]), out[2:3])
    for changed in (network(x + 1, c, y), network(x, c + 1, y), network(x, c, y + 1)):
        assert (changed - out).abs().mean() > 1e-3
    with pytest.raises(ValueError, match="3 condition features but was built for 12"):
        network(x, c, y[:, :3])
    with pytest.raises(ValueError, match="no hidden layers"):
        MLP(features=5, condition_features=0, hidden=())


def test_embedding_is_sines_and_cosines_of_falling_frequencies() -> None:
    c = torch.tensor([-3.0, 0.0, 2.5], dtype=torch.float64)
    features = SinusoidalEmbedding(6)(c)
    frequencies = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    phase = c.unsqueeze(1) * frequencies
    torch.testing.assert_close(features, torch.cat([phase.sin(), phase.cos()], dim=1))


def test_dropout_draws_from_its_generator_and_keeps_the_mean() -> None:
    dropout = Dropout(0.3)
    x = torch.ones(200, 100)

    def draw(seed: int) -> Tensor:
        dropout.generator = torch.Generator().manual_seed(seed)
        return dropout(x)

    out = draw(0)
    assert torch.equal(out, draw(0))
    assert not torch.equal(out, draw(1))
    # 20,000 values that are 0 with probability 0.3 and else 1 / 0.7: within 5 standard errors.
    assert abs(float(out.mean()) - 1) < 5 * math.sqrt(0.3 / 0.7 / x.numel())
    assert abs(float((out == 0).double().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / x.numel())
    assert dropout.eval()(x) is x


def test_networks_do_not_need_deepinv() -> None:
    code = (
        "import sys, diffem_core.networks, diffem_core.denoiser, diffem_core.samplers, "
        "diffem_core.m_step, diffem_core.gaussian; print('deepinv' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
