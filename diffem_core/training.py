"""The state of an M-step: weights, their moving average and Adam's moments, in flat buffers.

With every parameter a view of one buffer, clipping, Adam and the moving average are about a dozen
operations on long vectors, whatever the number of parameters; for small networks that is most of
what a step costs beside the network. For large ones these vectors are gone through in parts that
fit the cache of the processor: each is read from memory once, not a dozen times. No bit changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["FlatAdam", "TrainingState"]

_GROUPS = ("weights", "ema", "adam_m", "adam_v")
_PART = 2**18  # Values: the five buffers' parts stay in the processor's cache between operations.


class TrainingState:
    """Everything that an M-step needs to go on after a given step, as named tensors.

    Arguments:
        step: Steps done.
        losses: Sum of the losses of these steps and the loss of the last of them, float64 of shape
            (2,).
        groups: Tensors by group (`weights`, `ema`, `adam_m`, `adam_v`, `buffers`) and parameter
            name; may be live views.
        looks: Step (from 1) and loss of every look at held-out reconstructions so far.
    """

    def __init__(
        self,
        *,
        step: int,
        losses: Tensor,
        groups: Mapping[str, Mapping[str, Tensor]],
        looks: tuple[tuple[int, float], ...] = (),
    ) -> None:
        self.step = step
        self.losses = losses
        self.groups = groups
        self.looks = looks

    @property
    def mean_loss(self) -> float:
        """Mean of the losses so far; on a GPU, asking waits for it."""
        return float(self.losses[0]) / max(1, self.step)

    @property
    def last_loss(self) -> float:
        """Loss of the last step; on a GPU, asking waits for it."""
        return float(self.losses[1])

    def tensors(self) -> dict[str, Tensor]:
        """Copy the state into a flat dictionary of CPU tensors, ready to be stored.

        Looks, if there were any, are `looks`, float64 of shape (looks, 2).
        """
        flat = {
            f"{group}/{name}": tensor.detach().to(
                "cpu", copy=True, memory_format=torch.contiguous_format
            )
            for group, tensors in self.groups.items()
            for name, tensor in tensors.items()
        }
        flat["step"] = torch.tensor(self.step, dtype=torch.int64)
        flat["losses"] = self.losses.to("cpu", copy=True)
        if self.looks:
            flat["looks"] = torch.tensor(self.looks, dtype=torch.float64)
        return flat

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Build a state from what `tensors` returned.

        Raises:
            ValueError: An entry is missing.
        """
        missing = {"step", "losses"} - tensors.keys()
        if missing:
            raise ValueError(
                f"training state lacks {sorted(missing)}; it holds {sorted(tensors)[:6]}...; give "
                "all tensors of one TrainingState.tensors()"
            )
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            if name:
                groups.setdefault(group, {})[name] = tensor
        looks = tuple(
            (int(step), loss)
            for step, loss in (tensors["looks"].tolist() if "looks" in tensors else ())
        )
        return cls(step=int(tensors["step"]), losses=tensors["losses"], groups=groups, looks=looks)


class FlatAdam:
    """Adam with clipping and a moving average, on one buffer that all parameters are views of.

        g <- g min(1, clip / |g|)         m <- b1 m + (1 - b1) g         v <- b2 v + (1 - b2) g^2
        w <- w - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)      w_ema <- d w_ema + (1 - d)
        w

    Arguments:
        module: The module to train; its parameters share one type and device. `release` gives them
            memory of their own.
        clip_norm: Largest norm of a gradient.
        ema_decay: Decay d of the moving average, which starts at the weights.

    References:
        Kingma and Ba 2015 (Adam, arXiv 1412.6980), algorithm 1.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        clip_norm: float,
        ema_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.module = module
        self.clip_norm = clip_norm
        self.ema_decay = ema_decay
        self.betas = betas
        self.eps = eps
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the module has no parameters to train; give a network that has some")
        size = sum(p.numel() for p in self.parameters.values())
        first = next(iter(self.parameters.values()))
        self.weights = torch.empty(size, dtype=first.dtype, device=first.device)
        self.summed = torch.zeros(size + 2, dtype=first.dtype, device=first.device)
        """The gradient and two more numbers: what processes that train together add up at once."""
        self.gradient = self.summed[:size]
        with torch.no_grad():
            weights, gradients = self._views(self.weights), self._views(self.gradient)
            for name, parameter in self.parameters.items():
                weights[name].copy_(parameter)
                parameter.data = weights[name]
                parameter.grad = gradients[name]
        self.ema = self.weights.clone()
        self.adam_m = torch.zeros_like(self.weights)
        self.adam_v = torch.zeros_like(self.weights)
        part = _PART if first.device.type == "cpu" else size
        flats = (self.gradient, self.adam_m, self.adam_v, self.weights, self.ema)
        self._parts = list(zip(*(torch.split(flat, part) for flat in flats), strict=True))

    @torch.no_grad()
    def update(self, step: int, learning_rate: float) -> Tensor:
        """Take one step with the accumulated gradient, and clear it.

        Arguments:
            step: Number of this step, from 1.
            learning_rate: Its learning rate.

        Returns:
            The norm of the gradient before clipping, of shape ().
        """
        beta_1, beta_2 = self.betas
        norm: Tensor = torch.linalg.vector_norm(self.gradient)
        clipping = (self.clip_norm / (norm + 1e-12)).clamp_max(1.0)
        for g, m, v, w, w_ema in self._parts:
            g.mul_(clipping)
            m.lerp_(g, 1 - beta_1)
            v.mul_(beta_2).addcmul_(g, g, value=1 - beta_2)
            denominator = v.sqrt().div_(math.sqrt(1 - beta_2**step)).add_(self.eps)
            w.addcdiv_(m, denominator, value=-learning_rate / (1 - beta_1**step))
            w_ema.lerp_(w, 1 - self.ema_decay)
            g.zero_()
        return norm

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Return live views of the state, by group and parameter name."""
        flats = (self.weights, self.ema, self.adam_m, self.adam_v)
        groups = {name: self._views(flat) for name, flat in zip(_GROUPS, flats, strict=True)}
        buffers = {n: b for n, b in self.module.state_dict().items() if n not in self.parameters}
        return {**groups, "buffers": buffers} if buffers else groups

    def flats(self) -> list[Tensor]:
        """Return live views of the state as few long tensors: what processes share."""
        buffers = self.groups().get("buffers", {})
        return [self.weights, self.ema, self.adam_m, self.adam_v, *buffers.values()]

    @torch.no_grad()
    def load(self, state: TrainingState) -> None:
        """Take over the tensors of a state.

        Raises:
            ValueError: The state belongs to another network.
        """
        for group, own in self.groups().items():
            given = state.groups.get(group, {})
            for name, tensor in own.items():
                if name not in given or given[name].shape != tensor.shape:
                    found = tuple(given[name].shape) if name in given else "nothing"
                    raise ValueError(
                        f"training state holds {found} for {group}/{name} where this network "
                        f"expects {tuple(tensor.shape)}; resume with the network that wrote the "
                        "state"
                    )
                tensor.copy_(given[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the module hold the averaged weights, and give it back its own, to the bit."""
        own = self.weights.clone()
        with torch.no_grad():
            self.weights.copy_(self.ema)
        try:
            yield
        finally:
            with torch.no_grad():
                self.weights.copy_(own)

    @torch.no_grad()
    def release(self) -> None:
        """Give the module the averaged weights, in memory of their own, and drop the gradients."""
        averaged = self._views(self.ema)
        for name, parameter in self.parameters.items():
            parameter.data = averaged[name].clone(memory_format=torch.preserve_format)
            parameter.grad = None

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        views: dict[str, Tensor] = {}
        offset = 0
        for name, parameter in self.parameters.items():
            # Keeps channels-last weights channels-last; parameters are dense, so their strides fit
            # the segment.
            views[name] = flat.as_strided(parameter.shape, _dense_stride(parameter), offset)
            offset += parameter.numel()
        return views


def _dense_stride(parameter: Tensor) -> tuple[int, ...]:
    return torch.empty_like(parameter, device="meta", memory_format=torch.preserve_format).stride()
