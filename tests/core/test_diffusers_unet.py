"""The U-Net of diffusers as a denoiser's network. Nothing is downloaded: weights are random."""

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffem_core import Denoiser, DiffusersUNet, denoising_loss, seeded_initialization
from diffem_core.networks.dropout import Dropout
from diffem_core.networks.embedding import SinusoidalEmbedding

pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}


def network(condition_channels: int = 0, **arguments: Any) -> DiffusersUNet:
    with seeded_initialization(0):
        return DiffusersUNet((2, 8, 12), condition_channels, {**SMALL, **arguments}).eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("condition_channels", [0, 3])
def test_shapes_and_levels(condition_channels: int) -> None:
    net = network(condition_channels)
    x = normal(4, 2, 8, 12)
    condition = normal(4, condition_channels, 8, 12, seed=1) if condition_channels else None
    c_noise = torch.tensor([-2.0, 0.0, 1.0, 4.0])
    with torch.no_grad():
        out = net(x, c_noise, condition)
        assert out.shape == x.shape
        for i in range(4):
            # Each sample sees its own level and condition; one shared level is given as (1,).
            one = None if condition is None else condition[i : i + 1]
            alone = net(x[i : i + 1], c_noise[i : i + 1], one)
            torch.testing.assert_close(alone, out[i : i + 1], rtol=1e-4, atol=1e-5)
        shared = net(x, c_noise[:1], condition)
        torch.testing.assert_close(shared, net(x, c_noise[:1].expand(4), condition))
        torch.testing.assert_close(shared[0], out[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(shared[1:], out[1:], atol=1e-4)
        if condition is not None:
            assert not torch.allclose(net(x, c_noise, -condition), out, atol=1e-4)


def test_the_timestep_is_log_sigma() -> None:
    net = network(freq_shift=1)
    seen: list[Tensor] = []
    net.unet.time_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    c_noise = torch.tensor([-6.9, 0.25, 4.6])
    net(normal(3, 2, 8, 12), c_noise)
    sines, cosines = SinusoidalEmbedding(8)(c_noise).chunk(2, dim=-1)
    torch.testing.assert_close(seen[0], torch.cat([cosines, sines], dim=-1))


def test_it_trains_inside_a_denoiser() -> None:
    denoiser = Denoiser(network(3)).train()
    x, z, condition = normal(4, 2, 8, 12), normal(4, 2, 8, 12, seed=1), normal(4, 3, 8, 12, seed=2)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = denoising_loss(denoiser, x, z, torch.full((4,), 1.0), condition)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None for p in denoiser.parameters())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        low = Denoiser(denoiser.network, precision=torch.bfloat16)(x, torch.ones(1), condition)
    assert low.dtype == torch.float32


def test_dropout_draws_from_the_given_generator() -> None:
    net = network(dropout=0.5).train()
    assert not any(isinstance(module, nn.Dropout) for module in net.modules())
    dropouts = [module for module in net.modules() if isinstance(module, Dropout)]
    assert {module.rate for module in dropouts} == {0.0, 0.5}

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        for module in dropouts:
            module.generator = generator
        out: Tensor = net(normal(2, 2, 8, 12), torch.zeros(1))
        return out

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("name", ["sample_size", "in_channels", "out_channels"])
def test_shapes_are_not_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}', which follows from .*; leave it out"):
        network(**{name: 2})


def test_bad_arguments() -> None:
    for name in ("width", "num_class_embeds", "class_embed_type", "num_train_timesteps"):
        with pytest.raises(ValueError, match=f"argument '{name}'; known are center_input_sample"):
            network(**{name: 2})
    with pytest.raises(ValueError, match=r"time_embedding_type 'fourier'; it takes 'positional'"):
        network(time_embedding_type="fourier")
    with pytest.raises(ValueError, match=r"UNet2DModel refused .*same number of"):
        network(block_out_channels=[8])
    with pytest.raises(ValueError, match=r"UNet2DModel refused .*NoBlock"):
        network(down_block_types=["NoBlock", "DownBlock2D"])
    with pytest.raises(ValueError, match=r"images of 7 x 8 but its 2 levels need multiples of 2"):
        DiffusersUNet((1, 7, 8), 0, SMALL)
    with pytest.raises(ValueError, match=r"shape \(5,\); images are \(C, H, W\)"):
        DiffusersUNet((5,), 0, SMALL)
    with pytest.raises(ValueError, match="received 0 condition channels but was built for 3"):
        network(3)(normal(1, 2, 8, 12), torch.zeros(1))


def test_without_diffusers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers":
            raise ImportError("no diffusers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"no diffusers.*pip install diffem\[hub\]"):
        network()
