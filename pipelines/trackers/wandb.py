"""Weights & Biases: one run per run, by its own package; offline it needs no account."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.trackers.telling import Identity, Told
from storage_schemas.config import WandbTracker
from storage_schemas.objects import ObjectStore

__all__ = ["Wandb"]


class Wandb:
    """Logs metrics, pictures and the config.

    W&B cannot be asked what it was told while it is offline: `diffem-*.json` beside its files
    remembers. The horizontal axis is the number `em_iteration`, not W&B's own step, which only
    goes forward.

    Arguments:
        config: Where.
        identity: The run.
    """

    def __init__(self, config: WandbTracker, identity: Identity) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if config.mode == "online" and wandb.api.api_key is None:
            raise ValueError(
                "nobody is logged in to Weights & Biases; run `wandb login`, set WANDB_API_KEY, "
                "or take mode: offline"
            )
        self._wandb = wandb
        self._config = config
        self._identity = identity
        self._folder = Path(config.folder).expanduser()
        self._memory = ObjectStore(str(self._folder / "wandb"))
        self._name = f"diffem-{identity.key}.json"
        self._told = self.known()
        self._run: Any = None

    def _opened(self) -> Any:
        """Return W&B's run, which is opened with the first commit that is told."""
        if self._run is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._run = self._wandb.init(
                project=self._config.project,
                entity=self._config.entity,
                id=self._identity.key,
                name=self._identity.name,
                config=self._identity.config,
                dir=str(self._folder),
                mode=self._config.mode,
                resume="allow" if self._config.mode == "online" else None,
                settings=self._wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    disable_job_creation=True,
                    init_timeout=30,
                    x_disable_stats=True,
                ),
            )
            self._run.define_metric("em_iteration")
            self._run.define_metric("*", step_metric="em_iteration")
        return self._run

    def known(self) -> set[str]:
        """Return the keys of the commits that were told."""
        found = self._memory.read_many([self._name]).get(self._name)
        return set() if found is None else set(json.loads(found))

    def tell(self, told: Told) -> None:
        """Log a commit, and remember it."""
        values: dict[str, object] = {"em_iteration": told.step, **told.values}
        if told.picture is not None:
            image = Image.open(io.BytesIO(told.picture))
            values["held-out observations, restored"] = self._wandb.Image(image)
        self._opened().log(values)
        self._told.add(told.key)
        self._memory.write(self._name, json.dumps(sorted(self._told)).encode())

    def close(self) -> None:
        """Finish what is still on its way."""
        if self._run is not None:
            self._run.finish()
