"""The first stage: corrupt the clean samples of a benchmark once, and keep the corruption."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from diffem_core.seeds import derive_seed
from pipelines import build
from pipelines.progress import stage
from pipelines.sources import load_clean_samples
from pipelines.stages.bench import Json
from storage_schemas.observations import ObservationBlock
from storage_schemas.run_store import RunStore

__all__ = ["prepare_observations"]

# Observations are corrupted in blocks of this many, each with a seed of its own. Changing it
# changes the data of every run.
_CORRUPTION_BLOCK = 256


def prepare_observations(run_url: str) -> Json:
    """Corrupt the bundled data once and keep the corruption, or find it sealed."""
    store = RunStore.open(run_url)
    sealed = store.observations_manifest() if store.has_observations() else None
    if sealed is None:
        config = store.config
        clean = load_clean_samples(config.data, seed=derive_seed(config.seed, "data"))
        x_shape = tuple(clean.x.shape[1:])
        channel = build.build_channel(config.channel, x_shape)
        order = np.random.default_rng(derive_seed(config.seed, "holdout")).permutation(
            len(clean.x)
        )
        holdout = np.zeros(len(clean.x), bool)
        holdout[order[: config.data.holdout]] = True

        with stage("observations", total=len(clean.x), unit="samples") as advance:

            def blocks() -> Iterator[ObservationBlock]:
                for start in range(0, len(clean.x), _CORRUPTION_BLOCK):
                    rows = slice(start, start + _CORRUPTION_BLOCK)
                    seed = derive_seed(config.seed, "corruption", start // _CORRUPTION_BLOCK)
                    generator = torch.Generator().manual_seed(seed)
                    x = torch.from_numpy(clean.x[rows])
                    params = channel.draw_params(len(x), generator=generator)
                    y = channel.corrupt(x, params, generator=generator)
                    yield ObservationBlock(
                        sample=np.arange(start, start + len(x)),
                        holdout=holdout[rows],
                        y=y.numpy(),
                        params={name: value.numpy() for name, value in params.items()},
                        x=clean.x[rows],
                        label=None if clean.label is None else clean.label[rows],
                    )
                    advance(len(x))

            sealed = store.write_observations(
                blocks(),
                x_shape=x_shape,
                units=clean.units,
                source=clean.source,
                attributes={"channel": config.channel.kind},
            )
    return {"data_digest": sealed.data_digest, "samples": sealed.samples}
