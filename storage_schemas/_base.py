"""The base of every model in this package: frozen, and strict about keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Count", "NoiseLevel", "Record", "Steps", "Width"]

# Beyond these, a number is a slip of the keyboard that would only be noticed by its end: by an
# allocation that fails, or by a loop that never does.
Count = Annotated[int, Field(gt=0, le=10**9)]
"""A number of samples or of steps that are done one by one."""
Steps = Annotated[int, Field(gt=0, le=10**5)]
"""A number of steps or rounds of which a list is kept."""
NoiseLevel = Annotated[float, Field(ge=1e-9, le=1e9)]
"""A noise level in network units; single precision holds its square and its inverse square."""
Width = Annotated[int, Field(gt=0, le=2**16)]
"""A number of features."""


class Record(BaseModel):
    """A frozen pydantic model that refuses unknown keys and non-finite numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        ser_json_inf_nan="null",
        validate_default=True,
    )
