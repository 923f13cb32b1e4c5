"""MLflow: one run per run, by MLflow's own client."""

from __future__ import annotations

import io
import logging
import os

import yaml
from PIL import Image

from pipelines.trackers.telling import Identity, Told
from storage_schemas.config import MlflowTracker

__all__ = ["Mlflow"]

_RUN = "diffem.run"
_TOLD = "diffem.told."
_PATIENCE = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is away holds the run up
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}


class Mlflow:
    """Logs metrics, pictures and the config to the MLflow run that has this run's tag.

    Arguments:
        config: Where.
        identity: The run.
    """

    def __init__(self, config: MlflowTracker, identity: Identity) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # it tells of every migration
        self._client = MlflowClient(tracking_uri=config.tracking_uri)
        self._identity = identity
        self._run = self._found(config.experiment)

    def _found(self, experiment: str) -> str:
        """Return the id of the MLflow run, which is made where there is none."""
        found = self._client.get_experiment_by_name(experiment)
        where = self._client.create_experiment(experiment) if found is None else None
        id_ = where if found is None else found.experiment_id
        assert id_ is not None
        runs = self._client.search_runs([id_], f"tags.`{_RUN}` = '{self._identity.key}'")
        if runs:
            run: str = runs[0].info.run_id
            self._client.update_run(run, status="RUNNING")
            return run
        created = self._client.create_run(
            id_, tags={_RUN: self._identity.key}, run_name=self._identity.name
        )
        run = created.info.run_id
        text = yaml.safe_dump(self._identity.config, sort_keys=False)
        self._client.log_text(run, text, "config.yaml")
        return run

    def known(self) -> set[str]:
        """Return the keys of the commits whose tags the MLflow run has."""
        tags = self._client.get_run(self._run).data.tags
        return {tag.removeprefix(_TOLD) for tag in tags if tag.startswith(_TOLD)}

    def tell(self, told: Told) -> None:
        """Log a commit: its picture, then its numbers and the tag that says so, in one batch."""
        from mlflow.entities import Metric, RunTag

        if told.picture is not None:
            image = Image.open(io.BytesIO(told.picture))
            self._client.log_image(self._run, image, artifact_file=f"pictures/{told.key}.png")
        milliseconds = int(1000 * told.finished)
        metrics = [Metric(n, v, milliseconds, told.step) for n, v in told.values.items()]
        self._client.log_batch(self._run, metrics=metrics, tags=[RunTag(_TOLD + told.key, "1")])

    def close(self) -> None:
        """Say that nobody writes now."""
        self._client.set_terminated(self._run)
