"""The first stage: the run's own observations, corrupted here or copied from a store.

The clean samples of a benchmark are corrupted once, and the corruption is kept. Observations that
`diffem ingest` wrote are copied block by block, so that the run needs nothing outside itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.seeds import derive_seed
from pipelines import build
from pipelines.ingest.stored import copy_rows, open_stored, sound, stored_generations
from pipelines.progress import stage
from pipelines.sources import choose_holdout, load_clean_samples
from pipelines.stages.bench import Json
from storage_schemas.config import BundledData, StoreData
from storage_schemas.errors import BadObservations
from storage_schemas.manifests import ObservationsManifest
from storage_schemas.objects import redact_url
from storage_schemas.observations import ObservationBlock
from storage_schemas.run_store import RunStore

__all__ = [
    "copy_generation",
    "corrupt_block",
    "corruption_rows",
    "prepare_observations",
    "require_kept",
]

# Observations are corrupted in blocks of this many, each with a seed of its own. Changing it
# changes the data of every run.
_CORRUPTION_BLOCK = 256
# Large samples take fewer, so that a block fits in memory beside its operators.
_CORRUPTION_VALUES = 2**24


def prepare_observations(run_url: str) -> Json:
    """Bring the observations into the run once, or find them sealed; repair those that came later.

    Arguments:
        run_url: The run.

    Returns:
        Digest and number of the first observations.

    Raises:
        ValueError: The store that they are to be copied from is not there, or is another now.
    """
    from pipelines.stages.following import repair_generations

    store = RunStore.open(run_url)
    sealed = store.observations_manifest() if store.has_observations() else None
    data = store.config.data
    if sealed is None:
        sealed = _copied(store, data) if isinstance(data, StoreData) else _corrupted(store, data)
    repair_generations(run_url)
    return {"data_digest": sealed.data_digest, "samples": sealed.samples}


def corruption_rows(x_shape: tuple[int, ...]) -> int:
    """Return how many samples are corrupted with one seed: 256, or fewer of large ones."""
    most = max(1, _CORRUPTION_VALUES // math.prod(x_shape))
    return min(_CORRUPTION_BLOCK, 1 << most.bit_length() - 1)


def corrupt_block(
    channel: Channel, x: NDArray[np.float32], *, seed: int, block: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """Corrupt one block of clean samples.

    Arguments:
        channel: The channel.
        x: Clean samples, `corruption_rows` of them (the last block may have fewer), shape (n,
            *x_shape), in the data's own units.
        seed: The run's seed.
        block: Number of the block.

    Returns:
        Observations, shape (n, *y_shape), and their operator parameters by name.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "corruption", block))
    clean = torch.from_numpy(x)
    params = channel.draw_params(len(x), generator=generator)
    y: Tensor = channel.corrupt(clean, params, generator=generator)
    return y.numpy(), {name: value.numpy() for name, value in params.items()}


def _corrupted(store: RunStore, data: BundledData) -> ObservationsManifest:
    config = store.config
    clean = load_clean_samples(data, seed=derive_seed(config.seed, "data"))
    x_shape = tuple(clean.x.shape[1:])
    channel = build.build_channel(config.channel, x_shape)
    holdout = choose_holdout(len(clean.x), data.holdout, seed=config.seed)
    size = corruption_rows(x_shape)
    with stage("observations", total=len(clean.x), unit="samples") as advance:

        def blocks() -> Iterator[ObservationBlock]:
            for start in range(0, len(clean.x), size):
                rows = slice(start, start + size)
                x = clean.x[rows]
                y, params = corrupt_block(channel, x, seed=config.seed, block=start // size)
                yield ObservationBlock(
                    sample=np.arange(start, start + len(x)),
                    holdout=holdout[rows],
                    y=y,
                    params=params,
                    x=x,
                    label=None if clean.label is None else clean.label[rows],
                )
                advance(len(x))

        return store.write_observations(
            blocks(),
            x_shape=x_shape,
            units=clean.units,
            source=clean.source,
            attributes={"channel": config.channel.kind},
        )


def _copied(store: RunStore, data: StoreData) -> ObservationsManifest:
    """Copy all that the store holds now; where a copy is to be repaired, what it was made of."""
    theirs = [seal.data_digest for seal in stored_generations(data)]
    sealed = store.observations_manifest()
    if sealed is not None:
        theirs = theirs[: max(1, len(sealed.copied))]
        if sealed.copied:
            require_kept(data, sealed.copied, theirs)
    # Where the seal is lost, and the store has grown since, the start knows what was copied.
    known = sealed is None and store.start().manifest() is not None
    for count in range(len(theirs), 1 if known else len(theirs), -1):
        with contextlib.suppress(BadObservations):
            return copy_generation(store, data, 0, theirs[:count])
    return copy_generation(store, data, 0, theirs[:1] if known else theirs)


def copy_generation(
    store: RunStore,
    data: StoreData,
    generation: int,
    digests: Sequence[str],
    *,
    after: int = 0,
    from_iteration: int = 0,
) -> ObservationsManifest:
    """Copy observations of a store into the run, block by block, and seal them.

    Arguments:
        store: The run.
        data: The store.
        generation: Number of the generation that they become in the run.
        digests: Data digests of the store's generations that are copied.
        after: Generations of the store that come before these.
        from_iteration: The first EM iteration that learns from them.

    Raises:
        ValueError: The store is not there, or damaged.
    """
    before = open_stored(data, generations=after) if after else ()
    source = open_stored(data, generations=after + len(digests))
    manifest = source.manifest
    size = copy_rows(manifest)
    with (
        stage("observations", total=len(source) - len(before), unit="samples") as advance,
        sound(data),
    ):
        held_out = open_stored(data, "holdout").sample_ids

        def blocks() -> Iterator[ObservationBlock]:
            for start in range(len(before), len(source), size):
                rows = slice(start, start + size)
                sample = source.sample_ids[rows]
                yield ObservationBlock(
                    sample=sample,
                    holdout=np.isin(sample, held_out) & (generation == 0),
                    y=source.y(rows),
                    params=source.params(rows),
                    x=source.truth(rows),
                    label=source.labels(rows),
                )
                advance(len(sample))

        return store.write_observations(
            blocks(),
            x_shape=manifest.x_shape,
            units=manifest.units,
            source=manifest.source,
            attributes={"channel": store.config.channel.kind},
            generation=generation,
            copied=digests,
            from_iteration=from_iteration,
        )


def require_kept(data: StoreData, copied: Sequence[str], theirs: Sequence[str]) -> None:
    """Refuse a store that no longer begins with what was copied from it.

    Arguments:
        data: The store.
        copied: Data digests of the generations that were copied from it.
        theirs: Those that it has now.

    Raises:
        ValueError: Some of them are gone, or are others now.
    """
    for number, digest in enumerate(copied):
        if number >= len(theirs) or theirs[number] != digest:
            what = "gone" if number >= len(theirs) else "others now"
            raise ValueError(
                f"data.url {redact_url(data.url)!r}: the observations of its generation {number}, "
                f"which this run learned from, are {what}; a run can follow a store that grows "
                "(diffem ingest --append), not one that changes: put them back, or start a new run"
            )
