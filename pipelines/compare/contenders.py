"""What is compared: the config of each method and seed, or why a method is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from diffem_core.gaussian import require_fittable
from diffem_core.gaussian_systems import require_linear_gaussian
from pipelines import build
from pipelines.ingest.stored import stored_seal
from storage_schemas.config import (
    GaussianStart,
    JointPrior,
    MMPSStart,
    ModelStart,
    RunConfig,
    StoreData,
)

__all__ = ["LABELS", "METHODS", "Contender", "LeftOut", "Method", "contenders"]

Method = Literal["diffem", "em-mmps", "gaussian", "clean"]
METHODS: tuple[Method, ...] = ("diffem", "em-mmps", "gaussian", "clean")
LABELS: dict[Method, str] = {
    "diffem": "DiffEM",
    "em-mmps": "EM-MMPS",
    "gaussian": "Gaussian posterior",
    "clean": "clean samples (ceiling)",
}
"""What the methods are called in tables."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One method with one seed."""

    method: Method
    seed: int
    config: RunConfig
    """The config of its run."""
    folder: str
    """Where its run lives, under the comparison's folder."""
    start_only: bool = False
    """Whether the run's start is all that it needs."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A method that cannot be compared here."""

    method: Method
    reason: str


def contenders(
    config: RunConfig, methods: Sequence[Method], seeds: Sequence[int]
) -> tuple[list[Contender], list[LeftOut]]:
    """Derive the configs that are compared.

    Each differs from the given one in `method` and `seed`, and leaves out what its method does not
    know. Network, gradient steps, learning rate, data, channel and evaluation are the same; equal
    seeds give equal observations.

    Arguments:
        config: What is asked for.
        methods: Which methods, in the table's order.
        seeds: Which seeds.

    Returns:
        Contenders, seed by seed, and the methods that are left out.

    Raises:
        ValueError: No method is left.
    """
    left_out = [
        LeftOut(method=method, reason=reason)
        for method in methods
        if (reason := _problem(config, method)) is not None
    ]
    out = {item.method for item in left_out}
    kept = [method for method in methods if method not in out]
    if not kept:
        reasons = "; ".join(f"{item.method}: {item.reason}" for item in left_out)
        raise ValueError(f"nothing is left to compare ({reasons}); name other --methods")
    found = [_contender(config, method, seed, kept) for seed in seeds for method in kept]
    return found, left_out


def _problem(config: RunConfig, method: Method) -> str | None:
    """Say why a method cannot be compared; None where it can."""
    channel = build.build_channel(config.channel, config.data.x_shape)
    match method:
        case "diffem":
            return None
        case "em-mmps":
            if isinstance(config.start, ModelStart):
                return (
                    "start.kind is 'model', whose network sees observations, which that of "
                    "EM-MMPS does not; take another start"
                )
            try:
                require_linear_gaussian(channel, "method 'em-mmps'", "compare without it")
            except ValueError as problem:
                return str(problem)
            return None
        case "gaussian":
            try:
                require_fittable(channel, _gaussian_start(config).rank)
            except ValueError as problem:
                return str(problem)
            return None
        case "clean":
            if isinstance(config.data, StoreData) and not stored_seal(config.data).truth:
                return (
                    "the observations come without clean samples; a ceiling exists only in "
                    "benchmarks, where they are known"
                )
            return None
    assert_never(method)


def _contender(config: RunConfig, method: Method, seed: int, kept: Sequence[Method]) -> Contender:
    if method != "gaussian":
        changed = _with(config, seed=seed, **_changes(config, method))
        return Contender(method=method, seed=seed, config=changed, folder=f"{method}-{seed}")
    if not isinstance(config.start, (GaussianStart, MMPSStart)):
        start = _gaussian_start(config)
        changed = _with(config, seed=seed, method="diffem", start=start.model_dump(mode="json"))
        folder = f"gaussian-{seed}"
    else:
        # Every run begins with it, and with one seed it is the same in all.
        of: Method = next((other for other in kept if other != "gaussian"), "diffem")
        changed = _with(config, seed=seed, **_changes(config, of))
        folder = f"{of}-{seed}"
    return Contender(method=method, seed=seed, config=changed, folder=folder, start_only=True)


def _changes(config: RunConfig, method: Method) -> dict[str, Any]:
    """Return what is changed in a config so that it describes another method's run."""
    changes: dict[str, Any] = {"method": method}
    if method != "diffem" and isinstance(config.start, MMPSStart):
        changes["start"] = config.start.gaussian.model_dump(mode="json")
    if method == "em-mmps":
        changes["condition"] = "observation"
        changes["m_step"] = config.m_step.model_dump(mode="json") | {"recorruption": "fresh"}
        if isinstance(config.prior, JointPrior):
            changes["prior"] = None
    return changes


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(config.model_dump(mode="json") | changes)


def _gaussian_start(config: RunConfig) -> GaussianStart:
    match config.start:
        case GaussianStart() as start:
            return start
        case MMPSStart(gaussian=start):
            return start
        case _:
            return GaussianStart()
