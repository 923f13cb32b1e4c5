"""What `diffem reconstruct` is asked for; travels as JSON to processes that draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from pipelines.using.arguments import require_positive
from storage_schemas.config import RunConfig
from storage_schemas.posterior_store import Summary

__all__ = ["ReconstructRequest"]


@dataclass(frozen=True, kw_only=True)
class ReconstructRequest:
    """What `diffem reconstruct` was asked for."""

    run: str
    """Path or fsspec URL of the run."""
    observations: str
    """What `diffem ingest` reads or wrote."""
    out: str
    """Path or fsspec URL of the draws."""
    draws: int = 16
    """Draws of each observation."""
    steps: int | None = None
    """Steps of the sampler; those of the run's config by default."""
    summaries: tuple[Summary, ...] | None = None
    """What is kept beside the draws; mean and standard deviation by default."""
    keep_draws: bool = True
    """Whether the draws themselves are kept."""
    iteration: int | Literal["best"] = -1
    """EM iteration of the model; the last complete one by default."""
    seed: int = 0
    """Seed of all draws."""
    batch_size: int | None = None
    """Samples per network call; that of the run's config by default. Changes no number beyond
    rounding."""
    device: str | None = None
    """Where to compute; as the run's config says by default."""
    y: str | None = None
    """Name of the array of observations."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Names of the arrays of operator parameters, by the channel's name for each."""
    x_shape: tuple[int, ...] | None = None
    """Shape of a clean sample; only compared with the run's."""
    channels_last: bool = False
    """Whether the bands of images are the last axis."""
    limit: int | None = None
    """Use only the first observations."""
    overrides: tuple[str, ...] = ()
    """Where to draw, as assignments `runner.key=value`; as the run's config says by default."""
    channel: RunConfig | None = None
    """A config whose channel made the observations, to be inverted with the prior; None takes
    the run's posterior."""
    solver_iterations: int | None = None
    """Iterations of conjugate gradients per step, with the prior."""

    def __post_init__(self) -> None:
        for name in ("draws", "steps", "batch_size", "solver_iterations"):
            require_positive(f"--{name.replace('_', '-')}", getattr(self, name))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; give 0 or a positive integer")
        if self.channel is None and self.solver_iterations is not None:
            raise ValueError(
                "--solver-iterations is for sampling with the prior; leave it out, or give "
                "--using prior --channel CONFIG"
            )
        if self.channel is not None and self.iteration != -1:
            raise ValueError(
                "--iteration chooses an EM iteration's posterior, but the prior is made after the "
                "last one; leave it out"
            )
        if self.draws == 1 and "std" in (self.summaries or ()):
            raise ValueError("--summary std needs at least 2 draws but --draws is 1; give more")
        if not self.keep_draws and not self.kept_summaries:
            raise ValueError(
                "--no-draws without a summary would keep nothing; give --summary mean"
            )

    @classmethod
    def of(cls, encoded: dict[str, Any]) -> ReconstructRequest:
        """Return the request that `encoded` describes."""
        return TypeAdapter(cls).validate_python(encoded)

    def encoded(self) -> dict[str, Any]:
        """Return the request as JSON."""
        found: dict[str, Any] = TypeAdapter(ReconstructRequest).dump_python(self, mode="json")
        return found

    @property
    def kept_summaries(self) -> tuple[Summary, ...]:
        """What is kept beside the draws."""
        if self.summaries is not None:
            return self.summaries
        return ("mean", "std") if self.draws > 1 else ()
