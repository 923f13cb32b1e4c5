"""Data sets that a library reads: HDF5 and NetCDF, Hugging Face, and what ships with packages."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.ingest.base import IngestError, RowArray, Source
from pipelines.ingest.images import pixels_of
from storage_schemas.config import (
    BundledData,
    DigitsData,
    ManifoldData,
    Mnist5kData,
    PhotosData,
    RunConfig,
)
from storage_schemas.objects import redact_url

__all__ = ["BUNDLED", "open_bundled", "open_hdf5", "open_hub"]

BUNDLED: dict[str, type[BundledData]] = {
    "digits": DigitsData,
    "mnist5k": Mnist5kData,
    "manifold": ManifoldData,
    "photos": PhotosData,
}


def open_hdf5(url: str, local: Path | None, opened: contextlib.ExitStack) -> dict[str, RowArray]:
    """Open an HDF5 or NetCDF 4 file through xarray: the variables of its root group.

    NetCDF's `scale_factor`, `add_offset` and `_FillValue` are applied, as xarray does.

    Arguments:
        url: Where it is.
        local: Its path, where it is a local file.
        opened: What closes the file.

    Raises:
        IngestError: It cannot be read, or h5netcdf is not installed.
    """
    if importlib.util.find_spec("h5netcdf") is None:
        raise IngestError(
            f"{redact_url(url)} is read by xarray with h5netcdf, which is not installed; run pip "
            "install 'diffem[hdf5]'"
        )
    import fsspec
    import xarray as xr

    try:
        file: Any = local if local is not None else opened.enter_context(fsspec.open(url, "rb"))
        dataset = opened.enter_context(
            xr.open_dataset(file, engine="h5netcdf", decode_times=False, phony_dims="sort")
        )
    except FileNotFoundError:
        raise IngestError(f"there is nothing at {redact_url(url)}; correct the SOURCE") from None
    except (OSError, ValueError, KeyError) as error:
        raise IngestError(
            f"{redact_url(url)} is not an HDF5 or NetCDF 4 file that xarray reads ({error}); "
            "check that it is whole"
        ) from error
    return {
        str(name): _Variable(str(name), variable)
        for name, variable in dataset.variables.items()
        if variable.ndim and np.dtype(variable.dtype).kind in "fiubc"
    }


def open_hub(name: str) -> dict[str, RowArray]:
    """Open a data set of the Hugging Face hub by name, its columns as arrays.

    The library downloads it into its own cache (once), whose files it maps.

    Arguments:
        name: `NAME` or `NAME:SPLIT`; the split is `train` by default.

    Raises:
        IngestError: The library is not installed, or cannot load it.
    """
    if importlib.util.find_spec("datasets") is None:
        raise IngestError(
            f"hf://{name} is read by Hugging Face's datasets, which is not installed; run pip "
            "install 'diffem[hub]'"
        )
    import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]

    path, _, split = name.partition(":")
    try:
        table = datasets.load_dataset(path, split=split or "train")
    # The library raises errors of its own, of requests and of the data set's reader.
    except Exception as error:
        raise IngestError(
            f"hf://{name} cannot be loaded ({type(error).__name__}: {error}); check the name, the "
            "split (hf://NAME:SPLIT), the network and, where it is private, HF_TOKEN"
        ) from error
    arrays: dict[str, RowArray] = {}
    for column in table.column_names:
        with contextlib.suppress(IngestError):  # text and the like: not an array
            arrays[column] = _Column(column, table)
    return arrays


def open_bundled(name: str, corruption: RunConfig | None) -> Source:
    """Load a data set that ships inside a package.

    Arguments:
        name: `digits`, `mnist5k`, `manifold` or `photos`.
        corruption: The config that is going to corrupt it: its `data` says how, where it is of
            this kind, and its seed makes synthetic data.

    Raises:
        ValueError: There is no such data set, or its package is not installed.
    """
    from diffem_core.seeds import derive_seed
    from pipelines.sources import load_clean_samples

    if name not in BUNDLED:
        raise IngestError(
            f"SOURCE is 'bundled:{name}' but known are "
            + ", ".join(f"'bundled:{known}'" for known in BUNDLED)
        )
    config = BUNDLED[name]()
    if corruption is not None and isinstance(corruption.data, type(config)):
        config = corruption.data
    seed = 0 if corruption is None else corruption.seed
    samples = load_clean_samples(config, seed=derive_seed(seed, "data"))
    arrays: dict[str, RowArray] = {"x": _InMemory("x", samples.x)}
    if samples.label is not None:
        arrays["label"] = _InMemory("label", samples.label)
    return Source(
        description=samples.source,
        arrays=arrays,
        units=samples.units,
        clean=True,
        label=None if samples.label is None else "label",
        value_range=config.value_range,
        state=lambda: _content(samples.x, samples.label),
    )


def _content(*arrays: NDArray[Any] | None) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


class _Variable(RowArray):
    def __init__(self, name: str, variable: Any) -> None:
        super().__init__(name, tuple(variable.shape), np.dtype(variable.dtype))
        self._variable = variable

    def pieces(self, rows: int, stop: int, start: int = 0) -> Iterator[NDArray[Any]]:
        for first in range(start, stop, rows):
            try:
                yield np.asarray(self._variable[first : min(stop, first + rows)].values)
            except (OSError, RuntimeError) as error:
                raise IngestError(
                    f"the variable {self.name!r} cannot be read from sample {first} on ({error}); "
                    "check that the file is whole"
                ) from error


class _Column(RowArray):
    def __init__(self, name: str, table: Any) -> None:
        self._table = table
        first = self._array(table[0][name], 0, name)
        super().__init__(name, (len(table), *first.shape), first.dtype)
        self.bands_first = first.ndim == 3 and not isinstance(table[0][name], list)

    def pieces(self, rows: int, stop: int, start: int = 0) -> Iterator[NDArray[Any]]:
        for first in range(start, stop, rows):
            values = self._table[first : min(stop, first + rows)][self.name]
            arrays = [self._array(v, first + i, self.name) for i, v in enumerate(values)]
            for i, array in enumerate(arrays):
                if array.shape != self.shape[1:]:
                    raise IngestError(
                        f"sample {first + i}: {self.name!r} has shape {array.shape} but sample 0 "
                        f"has {self.shape[1:]}; make all samples alike"
                    )
            yield np.stack(arrays)

    @staticmethod
    def _array(value: Any, row: int, name: str) -> NDArray[Any]:
        from PIL import Image

        if isinstance(value, Image.Image):
            return pixels_of(value, f"{name} of sample {row}")
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise IngestError(
                f"sample {row}: {name!r} holds {type(value).__name__}; name a column of images or "
                "numbers"
            )
        return array


class _InMemory(RowArray):
    def __init__(self, name: str, array: NDArray[Any]) -> None:
        super().__init__(name, array.shape, array.dtype)
        self._array = array

    def pieces(self, rows: int, stop: int, start: int = 0) -> Iterator[NDArray[Any]]:
        for first in range(start, stop, rows):
            yield self._array[first : min(stop, first + rows)]
