"""Arrays in files of NumPy and Zarr.

A local `.npy` file is mapped, one block at a time; others, and the members of an `.npz` file, are
read as streams, with NumPy's own reader of the header. A Zarr array is read in whole chunks.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from pipelines.ingest.base import IngestError, RowArray
from storage_schemas.objects import ObjectStore, redact_url

__all__ = ["open_npy", "open_npz", "open_zarr"]

_LARGEST_PIECE = 2**26  # bytes


def open_npy(url: str, local: Path | None) -> dict[str, RowArray]:
    """Open a `.npy` file, whose one array gets the file's name.

    Raises:
        IngestError: It is not one, or holds what is no number.
    """
    name = url.rstrip("/").rpartition("/")[2].removesuffix(".npy")
    if local is not None:
        return {name: _MappedArray(name, local)}
    return {name: _StreamedArray(name, url, member=None)}


def open_npz(url: str) -> dict[str, RowArray]:
    """Open a `.npz` file: its arrays by their names.

    Raises:
        IngestError: It is not one, or holds what is no number.
    """
    import fsspec

    with _readable(url), fsspec.open(url, "rb") as file, zipfile.ZipFile(file) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
    return {
        member.removesuffix(".npy"): _StreamedArray(member.removesuffix(".npy"), url, member)
        for member in members
    }


def open_zarr(url: str) -> dict[str, RowArray]:
    """Open a Zarr array or group (version 2 or 3), with all arrays below it, by their paths.

    Raises:
        IngestError: There is none.
    """
    import zarr

    store = ObjectStore(url).zarr_store()
    try:
        node = zarr.open(store, mode="r")
    except FileNotFoundError:
        raise IngestError(
            f"{redact_url(url)} holds no Zarr array or group; give the folder that holds zarr.json"
            " (or .zgroup, .zarray)"
        ) from None
    if isinstance(node, zarr.Array):
        name = url.rstrip("/").rpartition("/")[2].removesuffix(".zarr")
        return {name: _ZarrArray(name, node)}
    members = sorted(node.members(max_depth=None))
    return {
        path: _ZarrArray(path, array)
        for path, array in members
        if isinstance(array, zarr.Array) and array.ndim
    }


class _MappedArray(RowArray):
    def __init__(self, name: str, path: Path) -> None:
        self._path = path
        array = self._mapped()
        super().__init__(name, array.shape, array.dtype)

    def _mapped(self) -> NDArray[Any]:
        try:
            return np.asarray(np.load(self._path, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise IngestError(
                f"{self._path} is not a whole .npy file of numbers ({error}); write it again with "
                "numpy.save"
            ) from None

    def pieces(self, rows: int, stop: int, start: int = 0) -> Iterator[NDArray[Any]]:
        for first in range(start, stop, rows):
            # Mapped anew for each piece: pages that were read would otherwise stay in memory.
            yield np.array(self._mapped()[first : min(stop, first + rows)])


class _StreamedArray(RowArray):
    def __init__(self, name: str, url: str, member: str | None) -> None:
        self._url = url
        self._member = member
        with self._opened(name) as file:
            shape, dtype = self._header(name, file)
        super().__init__(name, shape, dtype)

    def pieces(self, rows: int, stop: int, start: int = 0) -> Iterator[NDArray[Any]]:
        width = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        with self._opened(self.name) as file:
            self._header(self.name, file)
            with _readable(self._url):
                _skip(file, start * width)
            for first in range(start, stop, rows):
                count = min(rows, stop - first)
                with _readable(self._url):
                    data = _read_exactly(file, count * width)
                if len(data) < count * width:
                    raise IngestError(
                        f"{redact_url(self._url)}: {self.name!r} ends in sample "
                        f"{first + len(data) // max(1, width)} of {self.shape[0]}; the file is "
                        "not whole, write it again"
                    )
                yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        import fsspec

        with contextlib.ExitStack() as stack:
            with _readable(self._url):
                file = stack.enter_context(fsspec.open(self._url, "rb"))
                if self._member is not None:
                    archive = stack.enter_context(zipfile.ZipFile(file))
                    file = stack.enter_context(archive.open(self._member))
            yield file

    def _header(self, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        place = f"{redact_url(self._url)}: {name!r}" if self._member else redact_url(self._url)
        try:
            version = npy_format.read_magic(file)
            read = {
                (1, 0): npy_format.read_array_header_1_0,
                (2, 0): npy_format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(file)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise IngestError(
                f"{place} is not an array of numbers that NumPy wrote ({error}); write it again "
                "with numpy.save or numpy.savez"
            ) from None
        if dtype.hasobject:
            raise IngestError(
                f"{place} holds Python objects, which would have to be unpickled; write an array "
                "of numbers"
            )
        if fortran and len(shape) > 1:
            raise IngestError(
                f"{place} is in Fortran order, so that its samples lie scattered over the file; "
                "write numpy.ascontiguousarray of it"
            )
        return shape, dtype


class _ZarrArray(RowArray):
    def __init__(self, name: str, array: Any) -> None:
        super().__init__(name, tuple(array.shape), np.dtype(array.dtype))
        self._array = array

    def pieces(self, rows: int, stop: int, start: int = 0) -> Iterator[NDArray[Any]]:
        chunk = (self._array.shards or self._array.chunks)[0]
        width = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        # A chunk is decoded whole for each read of a part of it.
        if chunk * width <= _LARGEST_PIECE:
            rows = max(chunk, rows - rows % chunk)
        while start < stop:
            end = min(stop, start - start % rows + rows)
            try:
                piece = np.asarray(self._array[start:end])
            except Exception as error:  # each codec and cloud library has exceptions of its own
                raise IngestError(
                    f"the Zarr array {self.name!r} cannot be read from sample {start} on "
                    f"({type(error).__name__}: {error}); repair it, or leave the samples out with "
                    "--limit"
                ) from error
            yield piece
            start = end


def _skip(file: IO[bytes], size: int) -> None:
    """Go on by `size` bytes, by reading where that is the only way."""
    if file.seekable():
        file.seek(size, io.SEEK_CUR)
        return
    while size and (part := file.read(min(size, _LARGEST_PIECE))):
        size -= len(part)


def _read_exactly(file: IO[bytes], size: int) -> bytes:
    """Read `size` bytes, or fewer at the end: streams may give less than is asked for."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextlib.contextmanager
def _readable(url: str) -> Iterator[None]:
    """Say which file cannot be read, and what to do."""
    try:
        yield
    except FileNotFoundError:
        raise IngestError(f"there is nothing at {redact_url(url)}; correct the SOURCE") from None
    except (OSError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError) as error:
        raise IngestError(
            f"{redact_url(url)} cannot be read ({error}); check its permissions, or write it again"
        ) from error
