"""Which source a path or URL is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from pipelines.ingest import arrays, datasets, images
from pipelines.ingest.base import IngestError, Source
from storage_schemas.config import RunConfig
from storage_schemas.documents import digest_of
from storage_schemas.objects import redact_url

__all__ = ["opened_source"]

_HDF5 = (".h5", ".hdf5", ".nc", ".nc4")
_ZARR_METADATA = ("zarr.json", ".zgroup", ".zarray")
_CHANGING = ("mtime", "created", "LastModified", "last_modified", "updated", "ETag", "etag")
"""What file systems tell of a file, beside its size, that differs once it was written again."""
_KNOWN = (
    "a .npy, .npz, HDF5 (.h5, .hdf5) or NetCDF 4 (.nc) file, a Zarr array or group, a folder of "
    "images (png, jpg, tiff), hf://NAME or bundled:NAME"
)


@contextlib.contextmanager
def opened_source(source: str, corruption: RunConfig | None) -> Iterator[Source]:
    """Open a source; nothing but headers is read.

    Arguments:
        source: Path, fsspec URL, `hf://NAME` or `bundled:NAME`.
        corruption: The config that is going to corrupt clean samples, if any.

    Raises:
        ValueError: It is none of what is known, cannot be read, or its URL holds a password.
    """
    if re.search(r"://[^/@]*:[^/@]*@", source):
        raise IngestError(
            f"{redact_url(source)} holds a password, which would be shown; leave it out and give "
            "it where the library of this store looks for it (environment, profile)"
        )
    with contextlib.ExitStack() as opened:
        found = _source(source, corruption, opened)
        if not found.arrays:
            raise IngestError(
                f"{redact_url(source)} holds no array of numbers; SOURCE is {_KNOWN}"
            )
        yield found


def _source(source: str, corruption: RunConfig | None, opened: contextlib.ExitStack) -> Source:
    if source.startswith("bundled:"):
        return datasets.open_bundled(source.removeprefix("bundled:"), corruption)
    if source.startswith("hf://"):
        return Source(
            description=source, arrays=datasets.open_hub(source.removeprefix("hf://").rstrip("/"))
        )
    local = _local(source)
    if local is not None and not local.exists():
        raise IngestError(f"there is nothing at {redact_url(source)}; SOURCE is {_KNOWN}")
    # A query may follow the name in a URL; it is not shown anywhere.
    name = re.sub(r"[?#].*$", "", source) if local is None else source
    suffix = Path(name.rstrip("/")).suffix.lower()
    match suffix:
        case ".npy":
            found = arrays.open_npy(source, local)
        case ".npz":
            found = arrays.open_npz(source)
        case _ if suffix in _HDF5:
            found = datasets.open_hdf5(source, local, opened)
        case _ if suffix == ".zarr" or _is_zarr(source):
            found = arrays.open_zarr(source)
        case _ if local is not None and local.is_file():
            raise IngestError(
                f"{redact_url(source)} is a file of another kind; SOURCE is {_KNOWN}"
            )
        case _:
            found = images.open_images(source)
    return Source(
        description=redact_url(source), arrays=found, state=lambda: _state_of_files(source)
    )


def _state_of_files(source: str) -> str | None:
    """Return a digest of the names, sizes, times and tags of the files at a path or URL."""
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(source)
    files = {root: fs.info(root)} if fs.isfile(root) else fs.find(root, detail=True)
    known = {
        str(name): {key: str(info[key]) for key in _CHANGING if info.get(key) is not None}
        for name, info in files.items()
    }
    if not all(known.values()):
        return None
    return digest_of([known, [[str(name), info.get("size")] for name, info in files.items()]])


def _local(source: str) -> Path | None:
    scheme, separator, rest = source.partition("://")
    if not separator:
        return Path(source).expanduser()
    return Path(rest).expanduser() if scheme in ("file", "local") else None


def _is_zarr(source: str) -> bool:
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(source)
    except ImportError as error:
        raise IngestError(
            f"{redact_url(source)} needs a library that is not installed ({error}); install it, "
            "for example by pip install 'diffem[s3]'"
        ) from error
    except ValueError as error:
        raise IngestError(
            f"{redact_url(source)} cannot be opened ({error}); SOURCE is {_KNOWN}"
        ) from error
    return any(fs.exists(f"{root.rstrip('/')}/{name}") for name in _ZARR_METADATA)
