"""Channels whose operators are those of the observed data.

    params ~ Uniform{params_1, ..., params_n},      y = N(A(x; params))

With a real instrument the parameters of every observation are known (the masks that were scanned,
the measured point spread functions) but not the law that they come from. The M-step then
re-corrupts with operators that are drawn from the observed ones.
"""

from __future__ import annotations

import copy

import torch
from deepinv.physics.generator import PhysicsGenerator
from torch import Tensor

from diffem_core.channel import Channel, Params

__all__ = ["with_observed_operators"]


def with_observed_operators(channel: Channel, params: Params) -> Channel:
    """Copy a channel so that it draws its parameters from observed ones, with replacement.

    The copy shares the operator with the original, which goes on drawing from its own generator.

    Arguments:
        channel: A channel with parameters.
        params: The parameters of the observed data, tensors of shape (n, *params_spec[name]) by
            name, on any device. Row i of each belongs to observation i; rows stay together.

    Returns:
        A channel of the same class, whose `draw_params` returns rows of `params`, on the device of
        the generator that it is given.

    Raises:
        ValueError: The channel has no parameters, or `params` are none, or of other names or
            shapes than the channel's.
    """
    spec = channel.params_spec
    if not spec:
        raise ValueError(
            f"with_observed_operators received a {type(channel).__name__} without parameters, "
            "whose operator is the same for all samples; use the channel as it is"
        )
    if sorted(params) != sorted(spec):
        raise ValueError(
            f"with_observed_operators received the parameters {sorted(params)} but "
            f"{type(channel).__name__} has {sorted(spec)}; give exactly these"
        )
    shapes = {name: tuple(params[name].shape) for name in spec}
    n = shapes[next(iter(spec))][0] if shapes[next(iter(spec))] else 0
    for name, shape in spec.items():
        if n < 1 or shapes[name] != (n, *shape):
            expected = ", ".join(f"{k}: (n, *{v})" for k, v in spec.items())
            raise ValueError(
                f"with_observed_operators received parameters of shapes {shapes} but "
                f"{type(channel).__name__} expects {expected} with the same n >= 1; give one row "
                "per observation"
            )
    observed = copy.copy(channel)
    observed.generator = _Resampled({name: params[name] for name in spec})
    return observed


class _Resampled(PhysicsGenerator):  # type: ignore[misc]
    """Draws whole rows of a bank of parameters, uniformly and with replacement."""

    def __init__(self, bank: dict[str, Tensor]) -> None:
        super().__init__()
        self.bank = bank

    def step(
        self, batch_size: int = 1, seed: int | None = None, **kwargs: object
    ) -> dict[str, Tensor]:
        self.rng_manual_seed(seed)
        n = len(next(iter(self.bank.values())))
        device = self.rng.device
        rows = torch.randint(n, (batch_size,), generator=self.rng, device=device)
        return {name: v[rows.to(v.device)].to(device) for name, v in self.bank.items()}
