"""Channels named by classes of deepinv: what a configuration file can say of a physics.

    y = sensor(noise(A(x; params))),      params ~ generator

A physics, its generator and its noise model are looked up by name among deepinv's own classes and
built from plain values, so that every operator of deepinv that maps real images to real tensors
can be used without a line of code.

deepinv's classes pass unknown arguments on, and some drop them without a word: arguments are
checked here against what the class and its parents name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import deepinv.physics
import deepinv.physics.functional
import deepinv.physics.generator
import torch
from deepinv.physics import DecomposablePhysics, LinearPhysics, NoiseModel, Physics, ZeroNoise
from deepinv.physics.generator import PhysicsGenerator
from torch import Tensor

from diffem_core.channel import Params
from diffem_core.physics_channels import Estimate, PhysicsChannel
from diffem_core.seeds import seeded_initialization

__all__ = ["deepinv_channel"]

# Set by the channel, or not to be written in plain values.
_RESERVED = frozenset(
    {"A", "A_adjoint", "device", "dtype", "noise_model", "physics", "rng", "sensor_model", "step"}
)
_FOUNDATIONS = (Physics, LinearPhysics, DecomposablePhysics, PhysicsGenerator, NoiseModel)
_SOLVER = ("max_iter", "solver", "tol")
# Classes whose `img_size` has no bands.
_WITHOUT_BANDS = frozenset(
    {"NonCartesianMRI", "RadioInterferometry", "TomographyWithAstra", "UltrasoundPlaneWave"}
)
_FILTERS = ("bicubic_filter", "bilinear_filter", "gaussian_blur", "sinc_filter")


def deepinv_channel(
    x_shape: Sequence[int],
    *,
    physics: str,
    arguments: Mapping[str, Any] | None = None,
    generator: tuple[str, Mapping[str, Any]] | None = None,
    noise: tuple[str, Mapping[str, Any]] | None = None,
    estimate: Estimate = "A_adjoint",
    maps: Sequence[str] = (),
) -> PhysicsChannel:
    """Build a channel from names of deepinv's classes and their arguments.

    Sizes (`img_size`, `img_width`) that a class takes and that are not given are those of x. Lists
    of numbers become tuples. A `filter` is given as `{"name": "gaussian_blur", "sigma": 1.0}`,
    with a function of `deepinv.physics.functional`. An operator that draws its own entries takes a
    `seed` (0 by default), and is the same in every process.

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        physics: Class in `deepinv.physics`, for example "MRI".
        arguments: Its arguments.
        generator: Class in `deepinv.physics.generator` that draws per-sample parameters, with its
            arguments; None if the operator is the same for all.
        noise: Noise model in `deepinv.physics`, with its arguments; None for no noise, whatever
            the physics' own default is.
        estimate: What the network sees of y; see `PhysicsChannel`.
        maps: Parameters that the network sees as well, each of shape (c, H, W).

    Returns:
        The channel. Its `noise_std` is None where a generator draws the noise level.

    Raises:
        ValueError: A name is unknown, an argument is wrong, the noise cannot be seeded, or the
            physics does not fit a `PhysicsChannel`.
    """
    operator = _build(deepinv.physics, Physics, physics, arguments or {}, x_shape)
    # Some physics come with noise of their own (Denoising with 0.1): only what is named is added.
    operator.noise_model = _build(
        deepinv.physics, NoiseModel, *(noise or ("ZeroNoise", {})), x_shape
    )
    _check_noise(operator.noise_model, physics)
    drawn = None
    if generator is not None:
        drawn = _build(
            deepinv.physics.generator, PhysicsGenerator, *generator, x_shape, seeded=False
        )
    try:
        drawn = None if drawn is None else _OnDeviceOfSeed(drawn, operator)
        channel = _DeepinvChannel(
            operator, x_shape=x_shape, generator=drawn, estimate=estimate, maps=maps
        )
        channel.try_out()
    # deepinv's classes raise whatever their code runs into.
    except Exception as error:
        parts = [physics, *(part[0] for part in (generator, noise) if part is not None)]
        unset = [name for name, value in vars(operator)["_buffers"].items() if value is None]
        hint = f" (it has no {', '.join(unset)}: give it, or a generator of it)" if unset else ""
        raise ValueError(
            f"deepinv's {' with '.join(parts)} does not fit a PhysicsChannel for samples of shape "
            f"{tuple(x_shape)}: {error} ({type(error).__name__}){hint}; a channel needs a real "
            "tensor y of one row per sample and tensors as parameters, and uses A, A_adjoint or "
            "A_dagger as `estimate` says"
        ) from error
    return channel


class _DeepinvChannel(PhysicsChannel):
    """A PhysicsChannel for classes that were not written with channels in mind."""

    def try_out(self) -> None:
        """Apply the channel to two samples.

        Raises:
            ValueError: Parameters or observations are not what a channel can hold.
        """
        n = 2
        rng = torch.Generator().manual_seed(0)
        params = self.draw_params(n, generator=rng)
        for name, value in params.items():
            if len(value) != n:
                raise ValueError(
                    f"the generator drew {name!r} of shape {tuple(value.shape)} for {n} samples"
                )
            if not hasattr(self.physics, name):
                # The level that the model was built with is not that of any sample.
                self.noise_std = None
        x = torch.rand(n, *self.x_shape, generator=rng)
        for y in (
            self._bound(params, x.dtype).A(x),
            self._bound(params, x.dtype)(x),
        ):
            if not isinstance(y, Tensor) or y.is_complex() or y.shape != (n, *self.y_shape):
                kind = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(
                    f"it maps {n} samples to {kind}, not to real numbers of shape "
                    f"{(n, *self.y_shape)}"
                )
        self.corrupt(x, params, generator=rng)

    def _bound(self, params: Params, dtype: torch.dtype) -> Any:
        physics = super()._bound(params, dtype)
        own = {name: getattr(physics, name) for name in params if hasattr(physics, name)}
        if own:
            # What a physics computes from a parameter (BlurFFT: the filter's spectrum) follows it.
            physics.update_parameters(**own)
        return physics


class _OnDeviceOfSeed(PhysicsGenerator):  # type: ignore[misc]
    """Draws on the CPU and returns on the device of the random generator.

    deepinv's generators are tied to the device that they were built on. For a random generator on
    another device, theirs is seeded by one of its numbers. What they draw besides the operator's
    and the noise's parameters (DiffractionBlurGenerator: the pupil) is left out, as deepinv's
    physics do.

    Raises:
        ValueError: No draw is a parameter of the operator or its noise, one is not a tensor, or
            the shape of y would change.
    """

    def __init__(self, drawn: PhysicsGenerator, operator: Physics) -> None:
        super().__init__()
        self.drawn = drawn
        self.drawn.rng = torch.Generator().manual_seed(0)
        draws = self.drawn.step(batch_size=1)
        owners = (operator, operator.noise_model)
        self.names = [name for name in draws if any(hasattr(owner, name) for owner in owners)]
        if not self.names:
            raise ValueError(
                f"the generator draws {', '.join(draws)}, which neither "
                f"{type(operator).__name__} nor {type(operator.noise_model).__name__} has; take "
                "another generator"
            )
        if "factor" in self.names:
            raise ValueError(
                f"{type(self.drawn).__name__} draws the factor, on which the shape of y depends; "
                "give one factor in the physics' arguments"
            )
        for name in self.names:
            if not isinstance(draws[name], Tensor):
                raise ValueError(
                    f"{type(self.drawn).__name__} draws {name!r} as "
                    f"{type(draws[name]).__name__}, not as a tensor"
                )

    def step(
        self, batch_size: int = 1, seed: int | None = None, **kwargs: object
    ) -> dict[str, Tensor]:
        self.rng_manual_seed(seed)
        device = self.rng.device
        if device.type == "cpu":
            self.drawn.rng = self.rng
        else:
            number = torch.randint(2**62, (1,), generator=self.rng, device=device)
            self.drawn.rng = torch.Generator().manual_seed(int(number))
        params = self.drawn.step(batch_size=batch_size)
        return {name: params[name].detach().to(device) for name in self.names}


def _build(
    module: Any,
    base: type,
    name: str,
    arguments: Mapping[str, Any],
    x_shape: Sequence[int],
    *,
    seeded: bool = True,
) -> Any:
    """Look a class up and build it from plain values."""
    known = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value is not base
        and not inspect.isabstract(value)
    }
    if name not in known:
        raise ValueError(
            f"deepinv_channel received {name!r}, which is no {base.__name__} in "
            f"{module.__name__}; known are {', '.join(sorted(known))}"
        )
    cls = known[name]
    accepted = _accepted(cls)
    seeded = seeded and "rng" in accepted
    taken = {key for key in accepted if key not in _RESERVED} | ({"seed"} if seeded else set())
    takes = f"its arguments are {', '.join(sorted(taken)) or 'none'}"
    unknown = sorted(set(arguments) - taken)
    if unknown:
        raise ValueError(f"deepinv's {name} received the unknown argument {unknown[0]!r}; {takes}")
    values = {key: _plain(value) for key, value in arguments.items() if key != "seed"}
    if isinstance(values.get("filter"), Mapping):
        values["filter"] = _filter(values["filter"])
    sizes: dict[str, Any] = {"img_size": tuple(x_shape[1:] if name in _WITHOUT_BANDS else x_shape)}
    if len(set(x_shape[1:])) == 1:
        sizes["img_width"] = x_shape[-1]
    values = {key: size for key, size in sizes.items() if key in taken} | values
    missing = [
        key for key in sorted(taken - {"seed"}) if accepted[key] is _REQUIRED and key not in values
    ]
    if missing:
        raise ValueError(
            f"deepinv's {name} received {dict(arguments)} but needs {', '.join(missing)}; {takes}"
        )
    seed = arguments.get("seed", 0) if seeded else 0
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"deepinv's {name} received seed {seed!r}; give an integer")
    if seeded:
        values["rng"] = torch.Generator().manual_seed(seed)
    try:
        # Some classes draw from the global generator.
        with seeded_initialization(seed):
            return cls(**values)
    # deepinv's classes raise whatever their code runs into.
    except Exception as error:
        raise ValueError(
            f"deepinv's {name} refused {dict(arguments)}: {error} ({type(error).__name__}); "
            f"{takes}"
        ) from error


_REQUIRED = inspect.Parameter.empty


def _accepted(cls: type) -> dict[str, Any]:
    """Return the defaults of all arguments that a class names, or passes on to one that does."""
    defaults: dict[str, Any] = {}
    positional = True  # Whether every class so far passes on what it is given by position.
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        if owner in _FOUNDATIONS:
            if issubclass(owner, Physics):
                defaults |= dict.fromkeys(_SOLVER)
            else:
                defaults.setdefault("rng", None)
            break
        parameters = list(inspect.signature(owner).parameters.values())
        for parameter in parameters:
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            # What a parent cannot do without is given by the class itself.
            if named and (positional or parameter.default is not _REQUIRED):
                defaults.setdefault(parameter.name, parameter.default)
        kinds = {parameter.kind for parameter in parameters}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
        positional = positional and inspect.Parameter.VAR_POSITIONAL in kinds
    return defaults


def _plain(value: Any) -> Any:
    """Turn lists, as they are read from YAML, into the tuples that sizes are."""
    if isinstance(value, list):
        return tuple(_plain(entry) for entry in value)
    return value


def _filter(arguments: Mapping[str, Any]) -> Tensor:
    """Build a filter, of shape (1, 1, h, w), from its name and arguments."""
    name = arguments.get("name")
    if name not in _FILTERS:
        raise ValueError(
            f"deepinv_channel received the filter {name!r}; known are {', '.join(_FILTERS)}"
        )
    function = getattr(deepinv.physics.functional, name)
    values = {key: _plain(value) for key, value in arguments.items() if key != "name"}
    taken = sorted(set(inspect.signature(function).parameters) - _RESERVED)
    unknown = sorted(set(values) - set(taken))
    if unknown:
        raise ValueError(
            f"the filter {name} received the unknown argument {unknown[0]!r}; its arguments are "
            f"{', '.join(taken)}"
        )
    if name == "gaussian_blur" and isinstance(values.get("sigma"), int | float):
        # One number would give a filter of one dimension.
        values["sigma"] = (float(values["sigma"]),) * 2
    built: Tensor = function(**values)
    return built


def _check_noise(noise_model: Any, physics: str) -> None:
    """Refuse noise that would not be a function of the channel's generator."""
    if isinstance(noise_model, ZeroNoise):
        return
    if "rng" not in inspect.signature(type(noise_model)).parameters:
        raise ValueError(
            f"deepinv's {physics} with the noise {type(noise_model).__name__} does not fit a "
            "PhysicsChannel: this noise draws from torch's global generator, so that a run could "
            "not be repeated; take another noise model"
        )
