"""Where the work is done: one machine, or a Ray cluster. Changes no number beyond rounding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
)

from storage_schemas._base import Record
from storage_schemas.redaction import secret_part

__all__ = ["LocalRunner", "RayRunner", "RunnerConfig"]


class _Runner(Record):
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`."""
    threads: PositiveInt | None = None
    """Processor threads, divided among processes that work side by side on one machine. By default
    the cores that affinity and a container's limits leave, less one if they are more than two."""
    cuda_graphs: bool = True
    """Whether a GPU records what the networks of this package do and replays it, which gives the
    same bits sooner; custom networks take part by an attribute `replayable = True`."""
    deterministic: bool = True
    """Whether a GPU trains in an order of sums that is always the same, so that a run that is
    repeated or resumed ends with the same bytes. Custom networks may do what has no such order."""
    memory_gb: PositiveFloat = 4.0
    """Reconstructions of an iteration, in GiB as float32, that the M-step keeps in memory; more
    are read through a scratch file in the folder for temporary files."""
    m_step_workers: PositiveInt | None = None
    """Processes that train together, each on a device of its own and on its part of every batch;
    by default one per GPU on one machine, one on the processor or on a cluster."""
    retries: int = Field(3, ge=0, le=100)
    """How often a stage is tried again after a fault of storage or device, with growing pauses. A
    caller's mistake is never tried again."""
    stage_timeout: PositiveFloat | None = None
    """Seconds after which a stage counts as hung and fails; no limit by default."""


class LocalRunner(_Runner):
    """This machine: a shard goes to a device that is free; each has its own process."""

    kind: Literal["local"] = "local"
    workers: PositiveInt | None = None
    """Shards that are reconstructed side by side; by default one per GPU, one on the processor."""


class RayRunner(_Runner):
    """A Ray cluster: shards go to wherever the resources below are free (extra `ray`)."""

    kind: Literal["ray"] = "ray"
    address: str = "auto"
    """Address of the cluster: `auto` (the one that this machine belongs to), `HOST:PORT`, or
    `ray://HOST:PORT`."""
    gpus_per_shard: NonNegativeFloat = 1.0
    """GPUs that a shard takes; 0 works on processors."""
    cpus_per_shard: PositiveFloat = 1.0
    """Processors that a shard takes."""

    @field_validator("address")
    @classmethod
    def _holds_no_secret(cls, value: str) -> str:
        found = secret_part(value)
        if found is not None:
            raise ValueError(
                f"runner.address holds {found}, but addresses are shown and stored; leave it out"
            )
        return value


def _kind(value: object) -> object:
    """Return the kind of a runner; a section without one means this machine."""
    if isinstance(value, dict):
        return value.get("kind", "local")
    return getattr(value, "kind", None)


RunnerConfig = Annotated[
    Annotated[LocalRunner, Tag("local")] | Annotated[RayRunner, Tag("ray")],
    Discriminator(
        _kind,
        custom_error_type="unknown_runner",
        custom_error_message="Input should be 'local' or 'ray'; set runner.kind to one of them",
    ),
]
