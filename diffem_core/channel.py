"""The corruption channel Q(y | x): one definition for data, M-step, likelihoods and monitors.

    y = N(A(x; params))         params ~ generator, one draw per sample

A channel holds a deepinv `Physics` (the operator A), its noise model N, a generator of per-sample
operator parameters and what a conditional network sees of an observation. `x` and `y` are in the
data's own units everywhere.

deepinv's objects keep their parameters as state; every method here sets that state from its
arguments before it is used, so that a channel behaves as a pure function. A channel serves one
thread at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from deepinv.physics import GaussianNoise, Inpainting, LinearPhysics, Physics, ZeroNoise
from deepinv.physics.generator import PhysicsGenerator
from torch import Tensor

from diffem_core.scaling import Scaling

__all__ = [
    "BernoulliMaskGenerator",
    "Channel",
    "MatrixPhysics",
    "Params",
    "RandomMask",
    "RandomMatrix",
    "UnitRowGenerator",
    "gaussian_noise",
]

Params = Mapping[str, Tensor]


class Channel(ABC):
    """Base of every channel.

    Arguments:
        physics: The deepinv operator with its noise model.
        generator: The deepinv generator of its per-sample parameters; None if it has none.
        x_shape: Shape of one clean sample.
        y_shape: Shape of one observation.
        params_spec: Shape of one sample's parameters, by the names that the physics knows them by.
        noise_std: Standard deviation of additive Gaussian noise; None where the noise is of
            another kind.
        linear: Whether A is linear.
    """

    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    params_spec: dict[str, tuple[int, ...]]
    noise_std: float | None
    linear: bool
    selects: bool = False
    """Whether A only selects entries of x (then `selection` says which)."""

    def __init__(
        self,
        *,
        physics: Physics,
        generator: PhysicsGenerator | None,
        x_shape: tuple[int, ...],
        y_shape: tuple[int, ...],
        params_spec: Mapping[str, tuple[int, ...]],
        noise_std: float | None,
        linear: bool,
    ) -> None:
        self.physics = physics
        self.generator = generator
        self.x_shape = tuple(x_shape)
        self.y_shape = tuple(y_shape)
        self.params_spec = dict(params_spec)
        self.noise_std = noise_std
        self.linear = linear

    @property
    @abstractmethod
    def condition_channels(self) -> int:
        """Channels (images) or features (vectors) of `condition`."""

    @abstractmethod
    def condition(self, y: Tensor, params: Params, scaling: Scaling) -> Tensor:
        """Build what a conditional network sees: the observation and the operator's parameters.

        Arguments:
            y: Observations, of shape (n, *y_shape).
            params: Their parameters.
            scaling: The change to network units.

        Returns:
            For images, a tensor of shape (n, condition_channels, H, W); for vectors, (n,
            condition_channels).
        """

    def draw_params(self, n: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw fresh operator parameters.

        Arguments:
            n: Number of samples.
            generator: Source of randomness; the parameters are made on its device.

        Returns:
            Tensors of shape (n, *params_spec[name]) by name.
        """
        if self.generator is None:
            return {}
        self.generator.rng = generator
        params: dict[str, Tensor] = self.generator.step(batch_size=n)
        return {name: params[name] for name in self.params_spec}

    def corrupt(self, x: Tensor, params: Params, *, generator: torch.Generator) -> Tensor:
        """Draw y ~ Q(. | x, params).

        Arguments:
            x: Clean samples, of shape (n, *x_shape).
            params: Their parameters.
            generator: Source of the noise, on the device of `x`.

        Returns:
            Observations of shape (n, *y_shape).

        Raises:
            ValueError: `x` has another shape than the channel.
        """
        self._check("x", x, self.x_shape)
        physics = self._bound(params, x.dtype)
        noise_model = physics.noise_model
        noise_model.rng = generator
        y: Tensor = physics(x)
        # deepinv's GaussianNoise draws from a copy of its generator (its `to` makes one at each
        # call): hand the state back,
        # or the caller's next draw would repeat the noise.
        if noise_model.rng is not generator:
            generator.set_state(noise_model.rng.get_state())
        noise_model.rng = None
        return y

    def A(self, x: Tensor, params: Params) -> Tensor:
        """Apply the operator without noise: (n, *x_shape) to (n, *y_shape)."""
        self._check("x", x, self.x_shape)
        y: Tensor = self._bound(params, x.dtype).A(x)
        return y

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        """Apply the operator's adjoint: (n, *y_shape) to (n, *x_shape)."""
        self._check("y", y, self.y_shape)
        x: Tensor = self._bound(params, y.dtype).A_adjoint(y)
        return x

    def A_dagger(self, y: Tensor, params: Params) -> Tensor:
        """Apply the operator's pseudo-inverse: (n, *y_shape) to (n, *x_shape)."""
        self._check("y", y, self.y_shape)
        x: Tensor = self._bound(params, y.dtype).A_dagger(y)
        return x

    def selection(self, params: Params) -> Tensor | None:
        """Return which entries of x are observed, where A only selects entries.

        Returns:
            Booleans of shape (n, D), with D the number of entries of x and of y, or None for any
            other operator.
        """
        return None

    def matrix(self, params: Params, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Write a linear operator as one dense matrix per sample.

        Arguments:
            params: Parameters of n samples.
            dtype: Type of the result.

        Returns:
            Matrices of shape (n, M, D), with D entries of x and M entries of y; of shape
            (1, M, D) where the operator is the same for all samples.

        Raises:
            ValueError: The operator is not linear.
        """
        if not self.linear:
            raise ValueError(f"{type(self).__name__} is not linear: it has no matrix")
        n = len(next(iter(params.values()))) if params else 1
        size = math.prod(self.x_shape)
        device = next(iter(params.values())).device if params else torch.device("cpu")
        basis = torch.eye(size, dtype=dtype, device=device).reshape(size, *self.x_shape)
        repeated = {k: v.repeat_interleave(size, dim=0) for k, v in params.items()}
        columns = self.A(basis.repeat(n, *[1] * len(self.x_shape)), repeated)
        return columns.reshape(n, size, -1).mT

    def _bound(self, params: Params, dtype: torch.dtype) -> Any:
        # Set as attributes, not through `update_parameters`, which casts to the type of the
        # parameters before.
        for name in self.params_spec:
            value = params[name]
            owner = self.physics if hasattr(self.physics, name) else self.physics.noise_model
            setattr(owner, name, value if value.is_complex() else value.to(dtype))
        return self.physics

    def _check(self, what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape[1:]) != shape:
            raise ValueError(
                f"`{what}` has shape {tuple(tensor.shape)} but {type(self).__name__} expects (n, "
                f"{', '.join(map(str, shape))}); reshape it or build the channel for its shape"
            )


class RandomMask(Channel):
    """Inpainting: each pixel is seen with probability `keep`, all bands together.

    What is seen carries Gaussian noise; hidden entries of y are exactly 0. The network sees
    `A_dagger(y - A center) * scale` (hidden pixels 0, the centre of the range) and the mask.

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        keep: Probability that a pixel is seen, in (0, 1].
        noise_std: Standard deviation of the noise, in the data's units.

    Raises:
        ValueError: `x_shape` is not (C, H, W), or a number is out of range.
    """

    selects = True

    def __init__(self, x_shape: tuple[int, ...], *, keep: float, noise_std: float) -> None:
        if len(x_shape) != 3:
            raise ValueError(f"RandomMask received x_shape {tuple(x_shape)}; images are (C, H, W)")
        if not 0 < keep <= 1:
            raise ValueError(f"RandomMask received keep {keep}; give a probability in (0, 1]")
        _, height, width = x_shape
        super().__init__(
            physics=Inpainting(img_size=tuple(x_shape), noise_model=gaussian_noise(noise_std)),
            generator=BernoulliMaskGenerator((height, width), keep=keep),
            x_shape=x_shape,
            y_shape=x_shape,
            params_spec={"mask": (1, height, width)},
            noise_std=noise_std,
            linear=True,
        )
        self.keep = keep

    @property
    def condition_channels(self) -> int:
        """Bands of the image and one for the mask."""
        return self.x_shape[0] + 1

    def condition(self, y: Tensor, params: Params, scaling: Scaling) -> Tensor:
        """Build (n, C + 1, H, W): seen pixels in network units, hidden ones 0, then the mask."""
        centered = y - self.A(torch.full_like(y, scaling.center), params)
        seen = self.A_dagger(centered, params) * scaling.scale
        return torch.cat([seen, params["mask"].to(y.dtype)], dim=1)

    def selection(self, params: Params) -> Tensor:
        """Return which entries of x are observed, as booleans of shape (n, C H W)."""
        mask = params["mask"]
        return mask.expand(-1, *self.x_shape).reshape(len(mask), -1) > 0.5


class RandomMatrix(Channel):
    """Compressive sensing of vectors by a dense matrix per sample.

    Its rows are independent and uniform on the unit sphere. The network sees, side by side, y and
    the entries of A (as in the paper) and `A_adjoint y`.

    Arguments:
        dimension: Entries of x.
        rows: Measurements per sample.
        noise_std: Standard deviation of the noise on each measurement.
    """

    def __init__(self, dimension: int, *, rows: int, noise_std: float) -> None:
        if not 1 <= rows <= dimension:
            raise ValueError(
                f"RandomMatrix received {rows} rows for {dimension} dimensions; give 1 to "
                f"{dimension}"
            )
        super().__init__(
            physics=MatrixPhysics(noise_model=gaussian_noise(noise_std)),
            generator=UnitRowGenerator(rows, dimension),
            x_shape=(dimension,),
            y_shape=(rows,),
            params_spec={"matrix": (rows, dimension)},
            noise_std=noise_std,
            linear=True,
        )

    @property
    def condition_channels(self) -> int:
        """Entries of y, of A and of x."""
        rows, dimension = self.params_spec["matrix"]
        return rows + rows * dimension + dimension

    def condition(self, y: Tensor, params: Params, scaling: Scaling) -> Tensor:
        """Build (n, condition_channels): y, A and A_adjoint y, in network units, side by side."""
        matrix = params["matrix"].to(y.dtype)
        centered = y
        if scaling.center:
            centered = y - self.A(y.new_full((len(y), *self.x_shape), scaling.center), params)
        centered = centered * scaling.scale
        return torch.cat([centered, matrix.flatten(1), self.A_adjoint(centered, params)], dim=1)

    def matrix(self, params: Params, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the matrices of n samples, of shape (n, rows, dimension)."""
        return params["matrix"].to(dtype)


class BernoulliMaskGenerator(PhysicsGenerator):  # type: ignore[misc]
    """Masks whose pixels are seen independently, drawn for a whole batch at once.

    (deepinv's own Bernoulli generator loops over the samples in Python.)

    Arguments:
        size: Height and width.
        keep: Probability of 1.
    """

    def __init__(self, size: tuple[int, int], *, keep: float) -> None:
        super().__init__()
        self.size = size
        self.keep = keep

    def step(
        self, batch_size: int = 1, seed: int | None = None, **kwargs: object
    ) -> dict[str, Tensor]:
        """Draw masks in {0, 1}, of shape (batch_size, 1, H, W)."""
        self.rng_manual_seed(seed)
        u = torch.rand(
            batch_size,
            1,
            *self.size,
            generator=self.rng,
            device=self.rng.device,
            dtype=torch.float32,
        )
        return {"mask": (u < self.keep).float()}


class UnitRowGenerator(PhysicsGenerator):  # type: ignore[misc]
    """Matrices whose rows are independent and uniform on the unit sphere.

    Arguments:
        rows: Number of rows.
        dimension: Number of columns.
    """

    def __init__(self, rows: int, dimension: int) -> None:
        super().__init__()
        self.shape = (rows, dimension)

    def step(
        self, batch_size: int = 1, seed: int | None = None, **kwargs: object
    ) -> dict[str, Tensor]:
        """Draw matrices of shape (batch_size, rows, dimension)."""
        self.rng_manual_seed(seed)
        normal = torch.randn(
            batch_size,
            *self.shape,
            generator=self.rng,
            device=self.rng.device,
            dtype=torch.float32,
        )
        return {"matrix": normal / torch.linalg.vector_norm(normal, dim=-1, keepdim=True)}


class MatrixPhysics(LinearPhysics):  # type: ignore[misc]
    """deepinv physics that multiplies each vector by a matrix of its own.

    Arguments:
        noise_model: deepinv noise model.
    """

    def __init__(self, *, noise_model: Any) -> None:
        super().__init__(noise_model=noise_model)
        self.register_buffer("matrix", None)

    def A(self, x: Tensor, matrix: Tensor | None = None, **kwargs: object) -> Tensor:
        """Multiply vectors (n, D) by the matrices (n, M, D)."""
        self.update_parameters(matrix=matrix)
        y: Tensor = (self.matrix @ x.unsqueeze(-1)).squeeze(-1)
        return y

    def A_adjoint(self, y: Tensor, matrix: Tensor | None = None, **kwargs: object) -> Tensor:
        """Multiply vectors (n, M) by the transposed matrices."""
        self.update_parameters(matrix=matrix)
        x: Tensor = (self.matrix.mT @ y.unsqueeze(-1)).squeeze(-1)
        return x

    def A_dagger(self, y: Tensor, matrix: Tensor | None = None, **kwargs: object) -> Tensor:
        """Multiply vectors (n, M) by the matrices' pseudo-inverses."""
        self.update_parameters(matrix=matrix)
        x: Tensor = (torch.linalg.pinv(self.matrix) @ y.unsqueeze(-1)).squeeze(-1)
        return x


def gaussian_noise(noise_std: float) -> Any:
    """Build the deepinv model of Gaussian noise, or of none."""
    if not 0 <= noise_std < math.inf:
        raise ValueError(f"channel received noise_std {noise_std}; give a finite number >= 0")
    return GaussianNoise(noise_std) if noise_std > 0 else ZeroNoise()
