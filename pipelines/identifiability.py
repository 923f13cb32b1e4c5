"""`diffem check`: how much of x a config's channel, or a run's observations, ever show.

The operators are those of the observations where there are some (a run, or a store of one's own),
and draws of the channel otherwise; x is as varied as the run's fitted Gaussian start says, or a
stand-in where nothing has been fitted. Clean samples are never read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.identifiability import FittedPrior, Identifiability, StandInPrior, identify
from diffem_core.seeds import derive_seed
from pipelines import build
from pipelines.check import check_config
from pipelines.identifiability_words import advice_on, findings_of, summary_of
from pipelines.ingest.stored import open_stored, sound, stored_seal
from storage_schemas._base import Record
from storage_schemas.config import RunConfig, StoreData
from storage_schemas.objects import redact_url
from storage_schemas.observations import Observations
from storage_schemas.run_store import RunStore

__all__ = [
    "IdentifiabilityReport",
    "PairsReport",
    "Subject",
    "check_source",
    "examine",
    "report_on",
    "subject_of_config",
    "subject_of_run",
]

_MOST_DRAWN = 16_384
_MOST_DRAWN_VALUES = 2**27  # Of all operators' parameters together.
_LISTED = 20
_SPECTRUM = 64


class PairsReport(Record):
    """Second moments: what pairs of entries or directions are ever observed together."""

    kind: str
    """`selection`: pairs of entries; `commuting`: pairs of directions that all operators share;
    `few`: the directions of a covariance."""
    count: int
    """Pairs that were examined."""
    unseen: int
    """How many of them no observation shows together."""
    least: float | None
    """Least probability that a pair is seen in one observation, of those that are (`selection`);
    least level as a part of the greatest (others)."""
    whole: bool
    """Whether all entries were examined, or a part of them."""
    settled: bool
    """Whether half of the operators said the same."""


class IdentifiabilityReport(Record):
    """How much of x is ever observed, and what to make of it."""

    subject: str
    """The config or run."""
    name: str
    """Its name."""
    channel: str
    """Kind of the channel."""
    x_shape: tuple[int, ...]
    """Shape of a sample."""
    verdict: Literal["identifiable", "partly", "not", "undetermined"]
    """See `diffem_core.identifiability.Identifiability.verdict`."""
    summary: str
    """The verdict in words."""
    findings: tuple[str, ...]
    """What was found, a sentence each."""
    advice: tuple[str, ...]
    """What to change, a sentence each."""
    size: int
    """Entries of x."""
    rank: int
    """Directions of x that some observation sees."""
    method: str
    """How E[A' A] was looked at."""
    operators: int
    """Operators that were looked at."""
    operators_from: Literal["observations", "channel", "none"]
    """Where they come from; `none`: the channel has no parameters."""
    observations: int
    """Observations to learn from."""
    fixed: bool
    """Whether the operator is the same for all samples."""
    settled: bool
    """Whether half of the operators said the same."""
    seen_once: float | None
    """Share of the directions that one observation sees, on average."""
    hidden_share: float
    """Share of the directions that no observation sees."""
    hidden_energy: float
    """Share of x's variance in them."""
    drowned_share: float
    """Share of the directions that are seen, but lost in the noise."""
    drowned_energy: float
    """Share of x's variance in them."""
    share_error: float
    """Standard error of the shares, at most; 0 where they are exact."""
    prior: Literal["gaussian_start", "stand_in"]
    """Where x's variance comes from."""
    noise_std: float
    """Standard deviation of the noise, in the data's units."""
    noise_simulated: bool
    """Whether it was measured on simulated observations."""
    signal_to_noise: float | None
    """What one observation knows of a direction, on average, in units of the prior's precision;
    null without noise."""
    needed: float | None
    """Observations that tell the variance of the least observed direction from that of the noise,
    hidden ones left out; null where there is none."""
    roughness: float | None
    """1 where the response is smooth; null where it is not finite."""
    spectrum: tuple[float, ...]
    """Levels of E[A' A] at evenly spaced quantiles, greatest first."""
    never_seen: tuple[tuple[int, ...], ...]
    """Entries of x that no observation sees, the first 20."""
    never_seen_count: int
    """How many there are."""
    pairs: PairsReport | None
    """Second moments; null where they were not examined."""
    seconds: float
    """Time of the analysis."""
    pictures: tuple[str, ...] = ()
    """What was drawn."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is examined."""

    where: str
    """The config or run, to be shown."""
    config: RunConfig
    channel: Channel
    params: Mapping[str, Tensor]
    """Parameters of a batch of operators."""
    operators_from: Literal["observations", "channel", "none"]
    prior: FittedPrior | StandInPrior
    observations: int
    """Observations to learn from."""
    drawn_coverage: tuple[float, float] | None = None
    """Where stored masks are judged but the M-step draws others: the share of entries that those
    show, and its standard error."""


def subject_of_config(config: RunConfig, *, where: str, samples: int) -> Subject:
    """Gather what a config says, before anything is trained.

    Arguments:
        config: The config.
        where: What to call it.
        samples: Operators to look at, at most where they are stored.

    Raises:
        ValueError: The config does not describe something that can run.
    """
    check_config(config)
    data = config.data
    channel = build.build_channel(config.channel, data.x_shape)
    drawn = None
    if isinstance(data, StoreData):
        seal = stored_seal(data)
        training = seal.samples - seal.holdout
    else:
        training = data.count - data.holdout
    params: Mapping[str, Tensor]
    if not channel.params_spec:
        params, source = {}, "none"
    elif isinstance(data, StoreData):
        with sound(data):
            stored = open_stored(data, "train")
            params = _stored(stored, samples)
        source = "observations"
        if channel.selects and not build.resamples_operators(config.channel):
            drawn = _drawn_coverage(channel, config.seed)
    else:
        params, source = _drawn(channel, samples, config.seed), "channel"
    return Subject(
        where=where,
        config=config,
        channel=channel,
        params=params,
        operators_from=source,  # type: ignore[arg-type]
        prior=_stand_in(config),
        observations=training,
        drawn_coverage=drawn,
    )


def subject_of_run(store: RunStore, *, samples: int) -> Subject:
    """Gather what a run holds: the parameters of its observations, and its Gaussian start.

    Arguments:
        store: The run.
        samples: Operators to look at, at most.

    Raises:
        ValueError: The run has no observations yet, or its config no longer fits this machine.
    """
    config = store.config
    where = redact_url(store.url)
    if store.observations_manifest() is None:
        raise ValueError(
            f"the run at {where} has no observations yet; give its config instead, or go on with "
            "`diffem run`"
        )
    training = store.observations("train")
    channel = build.build_channel(config.channel, training.x_shape)
    params = _stored(training, samples)
    prior: FittedPrior | StandInPrior = _stand_in(config)
    fit = store.start().stage("fit", checksum=False)
    if fit is not None:
        digest = fit.objects["model.safetensors"].sha256
        tensors, metadata = store.start().read_tensors("model", digest=digest)
        if metadata["kind"] == "gaussian":
            prior = FittedPrior(prior=GaussianPrior.from_tensors(_tensors(tensors)))
    return Subject(
        where=where,
        config=config,
        channel=channel,
        params=params,
        operators_from="observations" if params else "none",
        prior=prior,
        observations=len(training),
    )


def examine(subject: Subject) -> Identifiability:
    """Analyse a subject; operators that are drawn are drawn more of until the answer is settled.

    Arguments:
        subject: What is examined.
    """
    seed = derive_seed(subject.config.seed, "identifiability")
    params = subject.params
    while True:
        found = identify(
            subject.channel,
            params,
            prior=subject.prior,
            observations=subject.observations,
            seed=seed,
        )
        given = len(next(iter(params.values()))) if params else 0
        unsettled = not found.settled or (
            found.pairs is not None and found.pairs.unseen > 0 and not found.pairs.settled
        )
        values = sum(math.prod(shape) for shape in subject.channel.params_spec.values())
        more = min(4 * given, _MOST_DRAWN, _MOST_DRAWN_VALUES // max(values, 1))
        looked_at_all = found.operators == given
        if (
            not unsettled
            or not looked_at_all
            or more <= given
            or subject.operators_from != "channel"
        ):
            return found
        params = _drawn(subject.channel, more, subject.config.seed)


def report_on(source: Subject, found: Identifiability, *, seconds: float) -> IdentifiabilityReport:
    """Put an analysis into words and numbers.

    Arguments:
        source: What was examined.
        found: The analysis.
        seconds: How long it took.
    """
    config = source.config
    prior: Literal["gaussian_start", "stand_in"] = (
        "gaussian_start" if isinstance(source.prior, FittedPrior) else "stand_in"
    )
    seen = found.level > found.floor
    needed = float(found.needed[seen & (found.share > 0)].max()) if bool(seen.any()) else math.inf
    pairs = found.pairs
    return IdentifiabilityReport(
        subject=source.where,
        name=config.name,
        channel=config.channel.kind,
        x_shape=source.channel.x_shape,
        verdict=found.verdict,
        summary=summary_of(found),
        findings=findings_of(found, prior=prior, operators_from=source.operators_from),
        advice=advice_on(found, config, source.drawn_coverage),
        size=found.size,
        rank=found.rank,
        method=found.method,
        operators=found.operators,
        operators_from=source.operators_from,
        observations=found.observations,
        fixed=found.fixed,
        settled=found.settled,
        seen_once=found.seen_once,
        hidden_share=found.hidden_share,
        hidden_energy=found.hidden_energy,
        drowned_share=found.drowned_share,
        drowned_energy=found.drowned_energy,
        share_error=found.error,
        prior=prior,
        noise_std=found.noise_std,
        noise_simulated=found.noise_simulated,
        signal_to_noise=_finite(found.signal_to_noise),
        needed=_finite(needed),
        roughness=_finite(found.roughness),
        spectrum=_quantiles(found),
        never_seen=tuple(tuple(row) for row in found.never_seen[:_LISTED].tolist()),
        never_seen_count=len(found.never_seen),
        pairs=None
        if pairs is None
        else PairsReport(
            kind=pairs.kind,
            count=pairs.count,
            unseen=pairs.unseen,
            least=_finite(pairs.least),
            whole=pairs.whole,
            settled=pairs.settled,
        ),
        seconds=seconds,
    )


def check_source(
    source: str, overrides: list[str], *, samples: int
) -> tuple[Subject, Identifiability, IdentifiabilityReport]:
    """Examine a config or a run.

    Arguments:
        source: Path or URL of a YAML file, or of a run.
        overrides: Assignments `key.sub=value` to a config.
        samples: Operators to look at.

    Returns:
        What was examined, the analysis, and the report.

    Raises:
        ValueError: It is neither, cannot run, or a run is given with overrides.
    """
    from pipelines.config_io import load_config

    if samples < 2:
        raise ValueError(f"--samples received {samples}; give at least 2, to see what varies")
    began = time.perf_counter()
    if _is_config(source):
        config = load_config(source, overrides)
        subject = subject_of_config(config, where=redact_url(source), samples=samples)
    else:
        if overrides:
            raise ValueError(
                f"--set changes a config, but {redact_url(source)} is taken for a run, which is "
                "what it is; give a YAML file, or leave --set out"
            )
        subject = subject_of_run(RunStore.open(source), samples=samples)
    found = examine(subject)
    return subject, found, report_on(subject, found, seconds=time.perf_counter() - began)


def _is_config(source: str) -> bool:
    return Path(source).suffix.lower() in {".yaml", ".yml", ".json"} or Path(source).is_file()


def _stored(observations: Observations, samples: int) -> dict[str, Tensor]:
    """Read parameters of so many observations, spread over all."""
    count = min(samples, len(observations))
    rows = np.linspace(0, len(observations) - 1, count).round().astype(np.int64)
    return _tensors(observations.params(rows))


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _drawn(channel: Channel, n: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "identifiability", "operators"))
    return channel.draw_params(n, generator=generator)


def _drawn_coverage(channel: Channel, seed: int) -> tuple[float, float]:
    seen = channel.selection(_drawn(channel, 256, seed))
    assert seen is not None
    shares = seen.double().mean(1)
    return float(shares.mean()), float(shares.std()) / math.sqrt(len(shares))


def _stand_in(config: RunConfig) -> StandInPrior:
    """Spread x over its range: a standard deviation of a quarter, half of it in complex images.

    Real and imaginary part of a complex image lie on both sides of 0 and share the magnitude.
    """
    data = config.data
    if data.value_range is None:
        return StandInPrior(x_shape=data.x_shape)
    low, high = data.value_range
    complex_image = len(data.x_shape) == 3 and data.x_shape[0] == 2 and low == -high
    std = high / (4 * math.sqrt(2)) if complex_image else (high - low) / 4
    return StandInPrior(x_shape=data.x_shape, center=(low + high) / 2, std=std)


def _quantiles(found: Identifiability) -> tuple[float, ...]:
    """Return levels at evenly spaced places of the cumulated shares."""
    some = found.share > 0
    level, place = found.level[some], found.share[some].cumsum(0)
    wanted = (torch.arange(min(_SPECTRUM, found.size)) + 0.5) / min(_SPECTRUM, found.size)
    index = torch.searchsorted(place.contiguous(), wanted.to(place.dtype))
    return tuple(level[index.clamp_max(len(level) - 1)].tolist())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
