"""Bytes in and out of a store at any fsspec URL, each object written atomically.

| | local path, `file://` | bucket (`s3://`, `gs://`, `az://`), `memory://` |
|---|---|---|
| `write` | temporary file, fsync, rename, fsync of the folder | one put |
| `create` | temporary file, fsync, hard link (fails if the name exists) | one conditional put |

An object is therefore whole or absent, also after `kill -9` or a power cut. What a killed writer
leaves behind is a `*.partial` file, which no reader looks at and `sweep` removes. `file://` never
goes through fsspec, whose local writer leaves torn files under the final name.

Everything that a run stores passes through here, Zarr objects included (`zarr_objects` encodes
them in memory). Credentials and endpoints come from each cloud library's usual places (for S3
also `FSSPEC_S3_ENDPOINT_URL` or `AWS_ENDPOINT_URL`): then a URL alone suffices to open the same
store in another process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from storage_schemas.errors import NoSpace, UnusableStore
from storage_schemas.redaction import redact_url, secret_part
from storage_schemas.remote_objects import RemoteObjects

if TYPE_CHECKING:
    from zarr.abc.store import Store

__all__ = ["ObjectStore", "redact_url"]

Names = list[str]  # in the class below, `list` is a method

_PARTIAL = ".partial"
_UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ObjectStore:
    """Objects (bytes) under a URL, named by relative paths with `/`.

    Arguments:
        url: A local path, `file://` or any fsspec URL. Nothing is created by opening.
        storage_options: Keyword arguments of the fsspec file system; for local paths there are
            none.

    Raises:
        UnusableStore: If the scheme is unknown, its library is not installed, or the URL holds a
            password or a token: URLs are shown and stored.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        if part := secret_part(url):
            raise UnusableStore(
                f"{redact_url(url)} holds {part}, but URLs are shown and stored; leave it out and "
                "give it where the library of this store looks for it (environment, profile)"
            )
        if not url:
            raise UnusableStore("the URL is empty; give a path or a URL, such as runs/digits")
        self.url = re.sub(r"(?<=[^:/])/+$", "", url)
        self._options = dict(storage_options or {})
        local = _local_path(self.url)
        self._backend: _Backend
        if local is not None:
            self._backend = _LocalFiles(local)
        else:
            self._backend = RemoteObjects(self.url, self._options, partial=_PARTIAL)
        self.local_path = local
        """Folder of a local store, None elsewhere."""

    def __repr__(self) -> str:
        return f"ObjectStore({redact_url(self.url)!r})"

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        if self._options:
            raise TypeError(
                f"{self!r} has storage options, which may be secret and are not passed on to "
                "other processes; give them by environment or profile, and pass the URL"
            )
        return ObjectStore, (self.url,)

    def below(self, folder: str) -> ObjectStore:
        """Return the store of the objects in a folder."""
        return ObjectStore(f"{self.url}/{_checked(folder)}", self._options)

    def read(self, path: str) -> bytes:
        """Return an object's bytes; FileNotFoundError if it does not exist."""
        return self._backend.read(_checked(path))

    def write(self, path: str, data: bytes) -> None:
        """Write an object atomically, replacing the one that exists."""
        self._backend.write(_checked(path), data)

    def create(self, path: str, data: bytes) -> None:
        """Write an object atomically unless it exists; FileExistsError if it does."""
        self._backend.create(_checked(path), data)

    def size(self, path: str) -> int | None:
        """Return an object's size in bytes, None if it does not exist."""
        return self._backend.size(_checked(path))

    def exists(self, path: str) -> bool:
        """Tell whether an object exists."""
        return self.size(path) is not None

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes of several small objects by path, without those that do not exist."""
        return self._backend.read_many([_checked(path) for path in paths])

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the sizes of all objects under a folder by path, without `*.partial` files."""
        found = self._backend.walk(prefix)
        return {path: found[path] for path in sorted(found) if not path.endswith(_PARTIAL)}

    def list(self, prefix: str = "") -> Names:
        """Return the paths of all objects under a folder, sorted, without `*.partial` files."""
        return [*self.sizes(prefix)]

    def children(self, prefix: str = "") -> Names:
        """Return the names directly in a folder, sorted, without `*.partial` files."""
        return sorted(n for n in self._backend.children(prefix) if not n.endswith(_PARTIAL))

    def delete(self, path: str) -> None:
        """Delete an object; nothing happens if it does not exist."""
        self._backend.delete(_checked(path))

    def delete_folder(self, prefix: str) -> None:
        """Delete all objects under a folder, those named `*.json` first: manifests go first."""
        paths = self.list(prefix)
        for path in sorted(paths, key=lambda p: (not p.endswith(".json"), p)):
            self.delete(path)

    def partials(self, prefix: str = "") -> Names:
        """Return the `*.partial` files that writers have open or have left behind, sorted."""
        return sorted(p for p in self._backend.walk(prefix) if p.endswith(_PARTIAL))

    def sweep(self, prefix: str = "") -> None:
        """Delete `*.partial` files. Only for the holder of the run's lease, before any writing."""
        for path in self.partials(prefix):
            self.delete(path)

    def zarr_store(self, path: str = "", *, read_only: bool = True) -> Store:
        """Return a Zarr store for a folder."""
        from zarr.storage import FsspecStore, LocalStore

        if self.local_path is not None:
            return LocalStore(self.local_path / path, read_only=read_only)
        url = f"{self.url}/{path}".rstrip("/")
        options = {"use_listings_cache": False, **self._options}
        return FsspecStore.from_url(url, storage_options=options, read_only=read_only)


# ---------------------------------------------------------------------------------------- backends


class _Backend(Protocol):
    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> None: ...
    def size(self, path: str) -> int | None: ...
    def read_many(self, paths: Sequence[str]) -> dict[str, bytes]: ...
    def walk(self, prefix: str) -> dict[str, int]: ...
    def children(self, prefix: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...


class _LocalFiles:
    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        with self._synced_partial(target, data) as partial:
            partial.replace(target)

    def create(self, path: str, data: bytes) -> None:
        target = self.root / path
        with self._synced_partial(target, data) as partial:
            try:
                os.link(partial, target)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise UnusableStore(
                        f"{self.root} lies on a file system without hard links, which creating an "
                        "object at most once needs; choose a --store on another file system"
                    ) from error
                raise

    @contextlib.contextmanager
    def _synced_partial(self, target: Path, data: bytes) -> Iterator[Path]:
        """Hold `data` in a temporary file beside the target; sync the folder when it is placed."""
        partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}{_PARTIAL}")
        try:
            _make_folder(target.parent)
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield partial
            _sync_folder(target.parent)
        except OSError as error:
            if error.errno in _UNUSABLE:
                raise UnusableStore(
                    f"cannot write {target}: {os.strerror(error.errno)}; choose another "
                    "--store or change the permissions"
                ) from error
            if error.errno in _FULL:
                raise NoSpace.at(error.errno, target) from error
            if error.filename is None and error.errno is not None:  # write() names no file
                raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
            raise
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def size(self, path: str) -> int | None:
        target = self.root / path
        try:
            return target.stat().st_size if target.is_file() else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_many(self, paths: Sequence[str]) -> dict[str, bytes]:
        found = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                found[path] = self.read(path)
        return found

    def walk(self, prefix: str) -> dict[str, int]:
        found = {}
        for folder, _, files in os.walk(self.root / prefix):
            relative = Path(folder).relative_to(self.root)
            for name in files:
                with contextlib.suppress(FileNotFoundError):  # a writer's temporary file
                    found[(relative / name).as_posix()] = (Path(folder) / name).stat().st_size
        return found

    def children(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        return [child.name for child in folder.iterdir()] if folder.is_dir() else []

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------- local helpers


def _local_path(url: str) -> Path | None:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Path(url).expanduser()
    return Path(rest).expanduser() if scheme in ("file", "local") else None


def _checked(path: str) -> str:
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} does not name an object; give a path relative to the store")
    return path


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they outlast a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:  # a file is in the way: not what `create` means by FileExistsError
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
