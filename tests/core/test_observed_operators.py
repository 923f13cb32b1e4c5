"""Channels that draw their operators from those of the observed data."""

import math

import pytest
import torch
from torch import Tensor

from diffem_core import Channel, PhysicsChannel, RandomMask, denoising, with_observed_operators
from diffem_core.operators import BlockAverage, ShiftGenerator

N = 12


class Pairs(RandomMask):
    """A mask with a second parameter, so that rows can come apart."""

    def __init__(self) -> None:
        super().__init__((1, 4, 4), keep=0.5, noise_std=0.1)
        self.params_spec = {"mask": (1, 4, 4), "number": ()}


def bank(n: int = N) -> dict[str, Tensor]:
    number = torch.arange(n, dtype=torch.float32)
    return {"mask": number[:, None, None, None].expand(n, 1, 4, 4), "number": number}


def test_rows_stay_together_and_come_from_the_bank() -> None:
    observed = bank()
    channel = with_observed_operators(Pairs(), observed)
    params = channel.draw_params(500, generator=torch.Generator().manual_seed(0))
    assert {k: tuple(v.shape) for k, v in params.items()} == {
        "mask": (500, 1, 4, 4),
        "number": (500,),
    }
    rows = params["number"].long()
    assert ((rows >= 0) & (rows < N)).all()
    for name, value in params.items():
        assert torch.equal(value, observed[name][rows]), name


def test_every_row_is_as_likely() -> None:
    channel = with_observed_operators(Pairs(), bank())
    draws = 60000
    params = channel.draw_params(draws, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(params["number"].long(), minlength=N).double()
    # Binomial counts, within 5 standard errors each.
    spread = math.sqrt(draws * (1 / N) * (1 - 1 / N))
    assert (counts - draws / N).abs().max() < 5 * spread
    # Independent draws, with replacement: consecutive rows coincide once in N times.
    rows = params["number"]
    same = (rows[1:] == rows[:-1]).double().mean()
    assert abs(float(same) - 1 / N) < 5 * math.sqrt((1 / N) * (1 - 1 / N) / draws)


def test_draws_are_a_function_of_the_generator_which_moves_on() -> None:
    channel = with_observed_operators(Pairs(), bank())
    generator = torch.Generator().manual_seed(2)
    first, second = (channel.draw_params(20, generator=generator)["number"] for _ in range(2))
    again = channel.draw_params(20, generator=torch.Generator().manual_seed(2))["number"]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "original",
    [
        RandomMask((2, 4, 4), keep=0.3, noise_std=0.1),
        PhysicsChannel(
            BlockAverage(2, noise_model=denoising((1, 4, 4), noise_std=0.1).physics.noise_model),
            x_shape=(1, 4, 4),
            generator=ShiftGenerator(2),
        ),
    ],
    ids=["mask", "shifted_blocks"],
)
def test_the_original_is_unchanged_and_the_copy_works_like_it(original: Channel) -> None:
    def draw(channel: Channel, n: int) -> dict[str, Tensor]:
        return channel.draw_params(n, generator=torch.Generator().manual_seed(3))

    before = draw(original, 50)
    observed = draw(original, 3)
    copy = with_observed_operators(original, observed)
    after = draw(original, 50)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(copy) is type(original)
    params = draw(copy, 50)
    for name, value in params.items():
        near = (value.unsqueeze(1) == observed[name].unsqueeze(0)).flatten(2).all(2)
        assert near.any(1).all(), "every row is one of the three"
    x = torch.rand(50, *original.x_shape, generator=torch.Generator().manual_seed(4))
    y, expected = (
        c.corrupt(x, params, generator=torch.Generator().manual_seed(5)) for c in (copy, original)
    )
    assert torch.equal(y, expected)


def test_bad_banks() -> None:
    with pytest.raises(ValueError, match=r"PhysicsChannel without parameters.*use the channel"):
        with_observed_operators(denoising((1, 4, 4), noise_std=0.1), {})
    with pytest.raises(ValueError, match=r"\['mask'\] but Pairs has \['mask', 'number'\]"):
        with_observed_operators(Pairs(), {"mask": bank()["mask"]})
    with pytest.raises(ValueError, match=r"\['mask', 'more', 'number'\] but Pairs has"):
        with_observed_operators(Pairs(), {**bank(), "more": torch.zeros(N)})
    message = (
        r"Pairs expects mask: \(n, \*\(1, 4, 4\)\), number: \(n, \*\(\)\) with the same n >= 1"
    )
    with pytest.raises(ValueError, match=message):
        with_observed_operators(Pairs(), {**bank(), "mask": torch.zeros(N, 1, 4, 5)})
    with pytest.raises(ValueError, match=message):
        with_observed_operators(Pairs(), {**bank(), "number": torch.zeros(N - 1)})
    with pytest.raises(ValueError, match=message):
        with_observed_operators(Pairs(), bank(0))
