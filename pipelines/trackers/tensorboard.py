"""TensorBoard: one event file per commit, below `folder`, whole or absent."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipelines.trackers.telling import Identity, Told
from storage_schemas.config import TensorboardTracker
from storage_schemas.objects import ObjectStore

__all__ = ["Tensorboard"]

_PREFIX = "events.out.tfevents"  # what TensorBoard looks for


class Tensorboard:
    """Writes event files by PyTorch's own writer.

    Arguments:
        config: Where.
        identity: The run.
    """

    def __init__(self, config: TensorboardTracker, identity: Identity) -> None:
        # Whether the package is there, before anything else is done.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter  # PyTorch does not annotate it
        self._identity = identity
        self._objects = ObjectStore(config.folder).below(identity.key)

    def known(self) -> set[str]:
        """Return the keys of the event files that are there."""
        names = self._objects.children()
        return {n.rpartition(".")[2] for n in names if n.startswith(_PREFIX)}

    def tell(self, told: Told) -> None:
        """Write the event file of a commit; TensorBoard reads them in the order of their names."""
        name = f"{_PREFIX}.{told.finished:017.6f}.{told.key}"
        self._objects.write(name, self._events(told))

    def close(self) -> None:
        """Leave the files as they are."""

    def _events(self, told: Told) -> bytes:
        with tempfile.TemporaryDirectory(prefix="diffem-") as folder:
            writer = self._writer(folder)
            if told.key == "start":
                text = yaml.safe_dump(self._identity.config, sort_keys=False)
                indented = "".join(f"    {line}\n" for line in text.splitlines())
                writer.add_text("config", indented, told.step, walltime=told.finished)
            for name, value in told.values.items():
                writer.add_scalar(name, value, told.step, walltime=told.finished)
            if told.picture is not None:
                pixels = np.asarray(Image.open(io.BytesIO(told.picture)).convert("RGB"))
                writer.add_image(
                    "held-out observations, restored",
                    pixels,
                    told.step,
                    walltime=told.finished,
                    dataformats="HWC",
                )
            writer.close()
            (written,) = Path(folder).iterdir()
            return written.read_bytes()
