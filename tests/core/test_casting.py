"""Networks in bfloat16: weights that are cast once, inputs that are not rounded, attention."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from diffem_core import MLP, Denoiser, UNet
from diffem_core.networks import unet
from diffem_core.training import FlatAdam


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP(features=3, condition_features=2, hidden=(16, 16), embedding=8)


def small_unet() -> UNet:
    torch.manual_seed(0)
    network = UNet(
        in_channels=1,
        condition_channels=1,
        out_channels=1,
        channels=(8, 16),
        blocks=(1, 1),
        attention={1: 2},
        embedding=8,
        dropout=0.0,
    )
    for parameter in network.leave.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def given(network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, condition = ((4, 3), (4, 2)) if isinstance(network, MLP) else ((4, 1, 8, 8),) * 2
    return (
        torch.randn(x, generator=generator),
        torch.tensor([0.3]),
        torch.randn(condition, generator=generator),
    )


@pytest.mark.parametrize("build", [mlp, small_unet])
def test_weights_that_are_cast_once_estimate_the_same_bits(build: type[nn.Module]) -> None:
    denoiser = Denoiser(build(), precision=torch.bfloat16).eval()
    own = denoiser.network
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    with torch.inference_mode():
        expected = denoiser(*given(own))
        with denoiser.repeated():
            types = {p.dtype for p in denoiser.network.parameters()}
            found = denoiser(*given(own))
    assert torch.equal(found, expected)
    assert types == {torch.bfloat16, torch.float32}  # The first layer stays.
    assert denoiser.network is own
    for name, value in denoiser.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_weights_of_today_are_cast_at_each_use() -> None:
    denoiser = Denoiser(mlp(), precision=torch.bfloat16).eval()
    with torch.inference_mode(), denoiser.repeated():
        before = denoiser(*given(denoiser.network))
        first = denoiser.network
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.5)
    with torch.inference_mode():
        expected = denoiser(*given(denoiser.network))
        with denoiser.repeated():
            found = denoiser(*given(denoiser.network))
            assert denoiser.network is first, "the copy is made once"
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_copies_of_a_denoiser_share_nothing_with_it() -> None:
    denoiser = Denoiser(mlp(), precision=torch.bfloat16).eval()
    with torch.inference_mode(), denoiser.repeated():
        expected = denoiser(*given(denoiser.network))
    copied = copy.deepcopy(denoiser)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    with torch.inference_mode(), denoiser.repeated():
        assert torch.equal(denoiser(*given(denoiser.network)), expected)
    assert denoiser.state_dict().keys() == copied.state_dict().keys()


def test_a_denoiser_is_freed_at_once_after_use() -> None:
    denoiser = Denoiser(mlp(), precision=torch.bfloat16).eval()
    with torch.inference_mode(), denoiser.repeated():
        denoiser(*given(denoiser.network))
    gone = weakref.ref(denoiser)
    del denoiser
    assert gone() is None, "nothing waits for Python's collection of cycles"


def test_float32_and_networks_of_ones_own_are_not_cast() -> None:
    for denoiser in (Denoiser(mlp()), Denoiser(nn.Identity(), precision=torch.bfloat16)):
        own = denoiser.network
        with denoiser.repeated():
            assert denoiser.network is own


def test_the_own_network_is_back_after_an_error() -> None:
    denoiser = Denoiser(mlp(), precision=torch.bfloat16)
    own = denoiser.network
    with pytest.raises(RuntimeError, match="stop"), denoiser.repeated():
        raise RuntimeError("stop")
    assert denoiser.network is own


@pytest.mark.parametrize("build", [mlp, small_unet])
def test_the_first_layer_sees_what_bfloat16_would_round_away(build: type[nn.Module]) -> None:
    network = build().eval()
    first = network.hidden[0] if isinstance(network, MLP) else network.enter[0]
    seen: list[tuple[Tensor, Tensor]] = []
    handle = first.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    x, sigma, condition = given(network)
    x = 1 + 1e-4 * x  # bfloat16 knows nothing between 1 and 1.0078.
    assert (x.bfloat16() == 1).all()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        network(x, sigma.log(), condition)
    handle.remove()
    ((received, made),) = seen
    with torch.inference_mode():
        assert torch.equal(made, first(received))
    assert torch.equal(received[:, : x.shape[1]], x)


def test_attention_in_training_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, 16, 8)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(3))
    expected = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    q.requires_grad_()
    found = unet._attend(q, k, v)
    assert found.dtype == torch.bfloat16
    # Weights and values are rounded to 8 bits: 2^-8 each of values of order 1.
    assert (found.double() - expected).abs().max() < 4 * 2.0**-8
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None


def test_parts_of_the_buffers_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for part in (2**18, 64):
        monkeypatch.setattr("diffem_core.training._PART", part)
        optimizer = FlatAdam(mlp(), clip_norm=0.5, ema_decay=0.9)
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            optimizer.gradient.normal_(generator=generator)
            optimizer.update(step + 1, 0.1)
        assert len(optimizer._parts) == (1 if part > 64 else -(-len(optimizer.weights) // 64))
        states.append([flat.clone() for flat in optimizer.flats()])
    for whole, parts in zip(*states, strict=True):
        assert torch.equal(whole, parts)
