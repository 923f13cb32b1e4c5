"""Trackers that follow a run: numbers and pictures for tools that people already use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from storage_schemas._base import Record
from storage_schemas.redaction import secret_part

__all__ = ["MlflowTracker", "TensorboardTracker", "TrackerConfig", "WandbTracker"]


def _shown(value: str | None, key: str) -> str | None:
    """Refuse an address that holds a secret: configs are shown and stored."""
    found = None if value is None else secret_part(value)
    if found is not None:
        raise ValueError(
            f"trackers.{key} holds {found}, but addresses are shown and stored; leave it out, and "
            "give credentials in the environment"
        )
    return value


class TensorboardTracker(Record):
    """Event files for TensorBoard, in a folder of the run's own below `folder`."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: str = Field("runs/tensorboard", min_length=1)
    """Path or fsspec URL: what `tensorboard --logdir` is given."""

    @field_validator("folder")
    @classmethod
    def _holds_no_secret(cls, value: str) -> str | None:
        return _shown(value, "folder")


class MlflowTracker(Record):
    """A run in an MLflow tracking server, file or database."""

    kind: Literal["mlflow"] = "mlflow"
    tracking_uri: str | None = None
    """`http://HOST:PORT`, `sqlite:///FILE`; by default what MLflow takes from its environment."""
    experiment: str = Field("diffem", min_length=1)
    """Name of the experiment, which is made where there is none."""

    @field_validator("tracking_uri")
    @classmethod
    def _holds_no_secret(cls, value: str | None) -> str | None:
        return _shown(value, "tracking_uri")


class WandbTracker(Record):
    """A run in Weights & Biases."""

    kind: Literal["wandb"] = "wandb"
    project: str = Field("diffem", min_length=1)
    """Name of the project."""
    entity: str | None = None
    """User or team; the one that is logged in by default."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes below `folder`, for `wandb sync` later."""
    folder: str = Field("runs", min_length=1)
    """Folder in which the package keeps its files (`wandb/`)."""


TrackerConfig = Annotated[
    TensorboardTracker | MlflowTracker | WandbTracker, Field(discriminator="kind")
]
