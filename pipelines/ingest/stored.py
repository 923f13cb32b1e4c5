"""Reading what `diffem ingest` wrote, and asking whether it fits a config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from storage_schemas.config import StoreData
from storage_schemas.errors import DamageError
from storage_schemas.generations import GrownObservations, read_generations
from storage_schemas.layout import observation_layout
from storage_schemas.manifests import ObservationsManifest
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.observations import Observations, Split

__all__ = ["copy_rows", "open_stored", "require_fit", "sound", "stored_generations", "stored_seal"]


def stored_seal(data: StoreData) -> ObservationsManifest:
    """Read the seal of a store of observations, and compare it with the config.

    Arguments:
        data: Where it is, and what the config says of it.

    Returns:
        The seal, with the samples of all generations.

    Raises:
        ValueError: There are no complete observations, or they are not what the config says.
    """
    seals = stored_generations(data)
    return seals[0].model_copy(update={"samples": sum(seal.samples for seal in seals)})


def stored_generations(data: StoreData) -> list[ObservationsManifest]:
    """Read the seals of all generations of a store of observations; see `stored_seal`.

    Raises:
        ValueError: As `stored_seal`.
    """
    where = f"data.url {redact_url(data.url)!r}"
    with sound(data):
        try:
            seals = read_generations(ObjectStore(data.url))
        except (PermissionError, NotADirectoryError, OSError) as error:
            raise ValueError(
                f"{where} cannot be read ({error}); give the URL that `diffem ingest` wrote to, "
                "and check its permissions and the credentials"
            ) from error
    if not seals:
        raise ValueError(
            f"{where} holds no complete observations (no observations.json); write them with "
            "`diffem ingest SOURCE URL`, or correct the URL"
        )
    seal = seals[0]
    if seal.x_shape != data.x_shape:
        raise ValueError(
            f"data.x_shape is {list(data.x_shape)} but the samples at {redact_url(data.url)} have "
            f"{list(seal.x_shape)}; set data.x_shape: {list(seal.x_shape)}"
        )
    if data.labelled and not seal.labels:
        raise ValueError(
            f"data.labelled is true but {redact_url(data.url)} holds no classes; set "
            "data.labelled: false, or ingest them with --label"
        )
    if not 0 < seal.holdout < seal.samples:
        raise ValueError(
            f"{where} holds out {seal.holdout} of {seal.samples} observations, but some are "
            "needed to learn from and some to judge by; ingest them with --holdout"
        )
    return seals


def open_stored(
    data: StoreData, split: Split | None = None, *, generations: int | None = None
) -> Observations:
    """Open a store of observations for reading.

    Arguments:
        data: Where it is.
        split: `train`, `holdout`, or None for all.
        generations: How many of its generations, from the first on; all by default.

    Raises:
        ValueError: As `stored_seal`.
    """
    stored_seal(data)
    with sound(data):
        return GrownObservations(ObjectStore(data.url), split, generations)


@contextmanager
def sound(data: StoreData) -> Iterator[None]:
    """Say where damage is: the store is not the run, which `diffem run` would repair."""
    try:
        yield
    except DamageError as error:
        raise ValueError(
            f"data.url {redact_url(data.url)!r} is damaged ({error.path}: {error.problem}); run "
            "the `diffem ingest` that wrote it again, which repairs it"
        ) from error


def copy_rows(manifest: ObservationsManifest) -> int:
    """Return the rows of a whole shard, the most that one read decodes anyway."""
    layout = observation_layout(
        samples=1,
        x_shape=manifest.x_shape,
        y_shape=manifest.y_shape,
        y_dtype="float32",
        parameters={name: (shape, "float32") for name, shape in manifest.parameters.items()},
        x_dtype="float32" if manifest.truth else None,
        label_dtype="int64" if manifest.labels else None,
        units="",
        attributes={},
    )
    return layout.arrays["observation"].object_rows


def require_fit(
    data: StoreData,
    *,
    y_shape: tuple[int, ...],
    parameters: Mapping[str, tuple[int, ...]],
    channel: str,
) -> None:
    """Check that stored observations can have come out of a channel.

    Arguments:
        data: The store.
        y_shape: Shape of one observation, as the channel makes it.
        parameters: Shape of one sample's operator parameters, by name, as the channel takes them.
        channel: Kind of the channel.

    Raises:
        ValueError: There is no store, or it does not fit the config or the channel.
    """
    seal = stored_seal(data)
    where = redact_url(data.url)
    if seal.y_shape != y_shape:
        raise ValueError(
            f"the observations at {where} have shape {seal.y_shape} but channel.kind {channel!r} "
            f"makes {y_shape} of samples of shape {data.x_shape}; correct the channel, or the "
            "arrays that were ingested"
        )
    missing = sorted(parameters.keys() - seal.parameters.keys())
    if missing:
        name = missing[0]
        raise ValueError(
            f"the observations at {where} have {_known(seal.parameters)} but channel.kind "
            f"{channel!r} needs {name!r} of shape {parameters[name]} for each; ingest it with "
            f"--param {name}[=ARRAY], or take another channel"
        )
    for name, shape in sorted(seal.parameters.items()):
        if name not in parameters:
            raise ValueError(
                f"the observations at {where} have the operator parameter {name!r} but "
                f"channel.kind {channel!r} takes {_known(parameters)}; ingest them without it or "
                "under the right name (--param NAME=ARRAY), or take another channel"
            )
        if shape != parameters[name]:
            hint = ""
            if math.prod(shape) == math.prod(parameters[name]):
                hint = f" (reshape the array to (n, {', '.join(map(str, parameters[name]))}))"
            raise ValueError(
                f"the operator parameter {name!r} at {where} has shape {shape} but channel.kind "
                f"{channel!r} takes {parameters[name]}; ingest it in that shape{hint}"
            )


def _known(parameters: Mapping[str, object]) -> str:
    if not parameters:
        return "no operator parameters"
    return f"the operator parameters {', '.join(map(repr, sorted(parameters)))}"
