"""The denoiser `f(x_t, sigma_t, y) ~ E[x | x_t, y]`: a network and what preconditions it.

One class serves conditional and unconditional use: a network that needs the observation takes it
as an argument.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffem_core.preconditioning import EDMPreconditioning, Preconditioning
from diffem_core.replay import Replayed

__all__ = ["Denoiser"]


class Denoiser(nn.Module):
    """A preconditioned network.

    Arguments:
        network: Module called as `network(x, c_noise, condition)` with x of shape (n, ...) scaled
            to unit variance, c_noise = log sigma of shape (n,) or (1,), and the condition or None;
            returns the shape of x.
        sigma_data: Standard deviation of the data, in network units.
        precision: Type in which the network computes; preconditioning and weights keep theirs.
        preconditioning: What surrounds the network; EDM's with `sigma_data` by default.
        replay: Whether a GPU may replay what the network does (`Replayed`), if the network has the
            attribute `replayable = True`: it then does the same for all arguments of the same
            shapes.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        sigma_data: float = 1.0,
        precision: torch.dtype = torch.float32,
        preconditioning: Preconditioning | None = None,
        replay: bool = True,
    ) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"Denoiser received sigma_data {sigma_data}; it must be positive")
        if precision not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"Denoiser received precision {precision}; known are torch.float32 and "
                "torch.bfloat16"
            )
        self.network = network
        self.sigma_data = sigma_data
        self.precision = precision
        self.preconditioning = preconditioning or EDMPreconditioning(sigma_data=sigma_data)
        self.replay = replay
        self._repeated = _Repeated()

    def forward(self, x_t: Tensor, sigma_t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Estimate E[x | x_t, y].

        Arguments:
            x_t: Noisy samples x + sigma_t z, of shape (n, ...), in network units.
            sigma_t: Noise levels, of shape (n,), or (1,) or () for one level shared by all.
            condition: What the network sees of the observation, or None.

        Returns:
            Estimates of the shape and type of x_t.

        Raises:
            ValueError: The network returned another shape than that of x_t.
        """
        active = self._repeated.active
        return (active or self._estimate)(x_t, sigma_t, condition)

    def _estimate(self, x_t: Tensor, sigma_t: Tensor, condition: Tensor | None) -> Tensor:
        sigma_t = sigma_t.reshape(-1)
        c_noise = sigma_t.log()

        def network(x: Tensor) -> Tensor:
            # Tensors without values (meta) know no autocast; their shapes are the same without.
            plain = not torch.amp.is_autocast_available(x.device.type)
            if plain or self.precision == torch.float32:
                output: Tensor = self.network(x, c_noise, condition)
            else:
                with torch.autocast(x.device.type, self.precision):
                    output = self.network(x, c_noise, condition)
            if output.shape != x.shape:
                raise ValueError(
                    f"the network returned shape {tuple(output.shape)} for samples of shape "
                    f"{tuple(x.shape)}; a denoiser's network keeps the shape (check out_channels)"
                )
            return output.to(x_t.dtype)

        return self.preconditioning(network, x_t, sigma_t, condition)

    @property
    def replays(self) -> bool:
        """Whether a GPU replays what the denoiser does."""
        return (
            self.replay
            and getattr(self.network, "replayable", False)
            and next(self.parameters()).device.type == "cuda"
        )

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Prepare for many estimates with the same weights, which are not to be trained inside.

        The network's weights are cast once, not at each estimate, and a GPU replays its work where
        no gradients are asked for. The estimates are the same, to the bit.
        """
        own = self.network
        cast = getattr(own, "cast", None)
        if self.precision != torch.float32 and cast is not None:
            self.network = self._repeated.copy_of(own, lambda: cast(self.precision))
        if self.replays and not torch.is_grad_enabled():
            self._repeated.active = self._repeated.replayed(self)
        try:
            yield
        finally:
            self._repeated.active = None
            self.network = own


class _Repeated:
    """What a denoiser keeps from one use of `repeated` to the next; copies of it know nothing."""

    def __init__(self) -> None:
        self.active: Replayed | None = None
        """What computes estimates at the moment, in the denoiser's place."""
        self._original: nn.Module | None = None
        self._copy: nn.Module | None = None
        self._replayed: Replayed | None = None

    def __reduce__(self) -> tuple[type[_Repeated], tuple[()]]:
        return _Repeated, ()

    def copy_of(self, network: nn.Module, cast: Callable[[], nn.Module]) -> nn.Module:
        """Return a copy that `cast` makes, or the one from before with the weights of today."""
        # Also in inference mode, where tensors from outside of it may not be written.
        with torch.inference_mode(False), torch.no_grad():
            given = network.state_dict()
            kept = {} if self._copy is None else self._copy.state_dict()
            known = self._original is network and _places(given) == _places(kept)
            if self._copy is None or not known:
                self._original, self._copy = network, cast()
            else:
                for name, tensor in kept.items():
                    tensor.copy_(given[name])
        return self._copy

    def replayed(self, denoiser: Denoiser) -> Replayed:
        """Return the denoiser's replayed work, which reads its present weights."""
        if self._replayed is None:
            own = weakref.ref(denoiser)  # Else neither would be freed before a collection.

            def estimate(x_t: Tensor, sigma_t: Tensor, condition: Tensor | None) -> Tensor:
                itself = own()
                assert itself is not None, "the denoiser holds this function"
                return itself._estimate(x_t, sigma_t, condition)

            self._replayed = Replayed(estimate)
        self._replayed.reads([*denoiser.parameters(), *denoiser.buffers()])
        return self._replayed


def _places(state: Mapping[str, Tensor]) -> dict[str, torch.device]:
    return {name: tensor.device for name, tensor in state.items()}
