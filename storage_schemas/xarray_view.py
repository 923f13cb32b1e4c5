"""A run as an `xarray.DataTree`: lazily, and also while the run is going.

    /                        attributes: name, config digest, code version
    /observations            observation(sample, ...), split; params and truth below it
    /generations/001         observation(sample, ...) of those that came later
    /start                   the start's numbers, scalars
    /metrics                 every number of the table over `em_iteration`
    /iterations/000          x_hat(sample, ...)

Values are read when they are asked for. What has yet to be drawn reads as NaN; `complete` among
the attributes of an iteration says whether that can be.

Zarr reads ten objects at a time, by a setting of the whole process that is looked up at every
reading, so that opening cannot choose it. From a bucket that answers slowly, more may pay:

    with zarr.config.set({"async.concurrency": 64}):
        tree["iterations/000/x_hat"].load()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from storage_schemas.generations import generation_folder
from storage_schemas.iteration_store import IterationStore
from storage_schemas.metrics import Metrics
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import FOLDER
from storage_schemas.reconstructions import ARRAY
from storage_schemas.run_store import RunStore

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["metrics_dataset", "open_run"]


def open_run(url: str | ObjectStore) -> xr.DataTree:
    """Open a run's observations, reconstructions and metrics.

    Arguments:
        url: The run.

    Returns:
        The tree; nodes of what is not there yet are left out.

    Raises:
        NotARun: If there is no run.
    """
    store = RunStore.open(url)
    nodes: dict[str, xr.Dataset] = {
        "/": xr.Dataset(
            attrs={
                "title": store.config.description or store.config.name,
                "run": store.config.name,
                "config_digest": store.manifest.config_digest,
                "code_version": store.manifest.provenance.code_version,
            }
        )
    }
    seal = store.observations_manifest()
    if seal is not None:
        nodes["/observations"] = _group(store.objects, FOLDER)
        if seal.parameters:
            nodes["/observations/params"] = _group(store.objects, FOLDER, "params")
        if seal.truth or seal.labels:
            nodes["/observations/truth"] = _group(store.objects, FOLDER, "truth")
    for number in range(1, len(store.generations())):
        folder = generation_folder(number)
        nodes[f"/{folder}"] = _group(store.objects, f"{folder}/{FOLDER}")
    start = store.start().metrics()
    if start is not None:
        nodes["/start"] = xr.Dataset(
            {
                name: ((), np.nan if metric.value is None else metric.value, _attributes(metric))
                for name, metric in start.values.items()
            }
        )
    history: dict[int, Metrics] = {}
    for number in store.iteration_numbers():
        iteration = store.iteration(number)
        if iteration.reconstructions() is None:
            continue
        nodes[f"/iterations/{number:03d}"] = _iteration(iteration)
        metrics = iteration.metrics()
        if metrics is not None:
            history[number] = metrics
    if history:
        nodes["/metrics"] = metrics_dataset(history)
    return xr.DataTree.from_dict(nodes)


def metrics_dataset(history: Mapping[int, Metrics]) -> xr.Dataset:
    """Return metrics over `em_iteration`, with units, and `NAME_standard_error` where known.

    Arguments:
        history: Metrics by iteration.
    """
    numbers = sorted(history)
    names = {name: None for number in numbers for name in history[number].values}
    variables: dict[str, Any] = {}
    for name in names:
        found = [history[number].values.get(name) for number in numbers]
        attributes = next(_attributes(metric) for metric in found if metric is not None)
        variables[name] = (
            "em_iteration",
            np.array([_number(metric.value if metric else None) for metric in found]),
            attributes,
        )
        errors = [metric.standard_error if metric else None for metric in found]
        if any(error is not None for error in errors):
            variables[f"{name}_standard_error"] = (
                "em_iteration",
                np.array([_number(error) for error in errors]),
                {**attributes, "long_name": f"standard error of {attributes['long_name']}"},
            )
    coordinate = ("em_iteration", numbers, {"long_name": "EM iteration", "units": "1"})
    return xr.Dataset(variables, coords={"em_iteration": coordinate})


def _iteration(iteration: IterationStore) -> xr.Dataset:
    dataset = _group(iteration.objects, iteration.path(ARRAY))
    return dataset.assign_attrs(complete=int(iteration.manifest() is not None))


def _group(objects: ObjectStore, path: str, group: str | None = None) -> xr.Dataset:
    dataset: xr.Dataset = xr.open_zarr(
        objects.zarr_store(path), group=group, consolidated=True, zarr_format=3, chunks=None
    )
    return dataset


def _attributes(metric: Any) -> dict[str, str]:
    found = {"long_name": metric.long_name, "units": metric.units}
    return found | ({"better": metric.better} if metric.better else {})


def _number(value: float | None) -> float:
    return np.nan if value is None else value
