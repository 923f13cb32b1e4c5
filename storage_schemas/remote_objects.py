"""Objects in a bucket, or in whatever else fsspec reaches: what `objects` does there.

Requests are repeated by the cloud libraries (s3fs: connections reset, answers torn, 500 and 503),
and by this module where a library gave up, within bounds. So a create-only write may be carried
out twice: when the answer to the first is lost, the second finds the object there. What is there
then is compared with what was to be written.

A server that ignores the condition of a create-only write is found out before the first one: on
it two processes could write one run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from storage_schemas.errors import StoreFailed, UnusableStore
from storage_schemas.redaction import keep_libraries_quiet, redact_url, without_secrets

__all__ = ["SINGLE_WRITER", "RemoteObjects"]

SINGLE_WRITER = "DIFFEM_SINGLE_WRITER"
"""Environment variable: with `1`, servers without create-only writes are accepted."""

_Answer = TypeVar("_Answer")

_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
_ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
"""Not failures of a request: what was asked is so."""
_CONNECTION = {
    # Names, since these libraries are imported only where they are needed.
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "EndpointConnectionError",  # botocore
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseParserError",
    "ServiceRequestError",  # azure
    "ServiceResponseError",
}
_REPEATS = 4
_PATIENCE = 10.0
"""Seconds after which a request is not repeated any more; the libraries waited themselves."""

_CREATES_ONLY: dict[tuple[object, str], bool] = {}
"""Whether create-only writes are such, by file system and bucket; asked once a process."""


class RemoteObjects:
    """Objects below a URL.

    Arguments:
        url: The URL, without secrets.
        options: Keyword arguments of the fsspec file system.
        partial: Ending of the names of what is no object.

    Raises:
        UnusableStore: If the scheme is unknown or its library is not installed.
    """

    def __init__(self, url: str, options: dict[str, Any], *, partial: str) -> None:
        from fsspec import available_protocols
        from fsspec.core import url_to_fs

        keep_libraries_quiet()
        scheme = url.partition("://")[0]
        self._url = redact_url(url)
        self._options = options
        self._partial = partial
        try:
            # Listings must show what other processes wrote a moment ago.
            self.fs, root = url_to_fs(url, **{"use_listings_cache": False, **options})
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            remedy = f"pip install 'diffem[{extra}]'" if extra else f"install it ({error})"
            raise UnusableStore(
                f"{self._url} needs a library that is not installed; {remedy}"
            ) from error
        except ValueError as error:
            known = available_protocols()
            if scheme in known:
                raise UnusableStore(
                    f"{self._url} cannot be opened ({self._shown(error)}); give the credentials "
                    "where the library of this store looks for them (environment, profile)"
                ) from None
            raise UnusableStore(
                f"{self._url} has the scheme {scheme!r}, which cannot be opened "
                f"({self._shown(error)}); known are local paths and {', '.join(sorted(known))}"
            ) from None
        self.root = str(root).rstrip("/")

    def read(self, path: str) -> bytes:
        """Return an object's bytes."""
        return bytes(self._asked("read", path, lambda: self.fs.cat_file(self._key(path))))

    def write(self, path: str, data: bytes) -> None:
        """Write an object: whole, or not at all."""
        try:
            self._asked("write", path, lambda: self.fs.pipe_file(self._key(path), data))
        except FileNotFoundError as error:
            raise self._refused("write to", error) from None

    def create(self, path: str, data: bytes) -> None:
        """Write an object unless it exists."""
        if not self._creates_only():
            if self.size(path) is not None:
                raise FileExistsError(self._key(path))
            self.write(path, data)
            return
        try:
            self._put_new(path, data)
        except FileExistsError:
            # The answer to our own request may have been lost, and a library repeated it. Where
            # it matters who was first, documents hold who wrote them and when.
            with contextlib.suppress(FileNotFoundError):
                if self.read(path) == data:
                    return
            raise

    def size(self, path: str) -> int | None:
        """Return an object's size in bytes, None if it does not exist."""
        try:
            info = self._asked("read", path, lambda: self.fs.info(self._key(path)))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def read_many(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of several objects by path, without those that do not exist."""
        keys = {self._key(path): path for path in paths}
        if not keys:
            return {}

        def ask() -> dict[str, Any]:
            found: dict[str, Any] = self.fs.cat([*keys], on_error="return")
            for data in found.values():
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise data
            return found

        found = self._asked("read", "", ask)
        return {keys[k]: bytes(d) for k, d in found.items() if not isinstance(d, Exception)}

    def walk(self, prefix: str) -> dict[str, int]:
        """Return the sizes of everything below a folder by path."""
        start = len(self.root) + 1
        try:
            found = self._asked(
                "list", prefix, lambda: self.fs.find(self._key(prefix), detail=True)
            )
        except FileNotFoundError:
            return {}
        return {str(path)[start:]: int(info["size"]) for path, info in found.items()}

    def children(self, prefix: str) -> list[str]:
        """Return the names directly in a folder."""
        try:
            found = self._asked(
                "list", prefix, lambda: self.fs.ls(self._key(prefix), detail=False)
            )
        except (FileNotFoundError, NotADirectoryError):
            return []
        below = self._key(prefix) + "/"  # some tools leave an object named like the folder
        return [name for path in found if (name := str(path).rstrip("/").removeprefix(below))]

    def delete(self, path: str) -> None:
        """Delete an object."""
        with contextlib.suppress(FileNotFoundError):
            self._asked("delete", path, lambda: self.fs.rm_file(self._key(path)))

    # ------------------------------------------------------------------------- create-only writes

    def _put_new(self, path: str, data: bytes) -> None:
        def ask() -> None:
            try:
                self.fs.pipe_file(self._key(path), data, mode="create")
            except Exception as error:
                # s3fs knows this answer by a detail that not every server gives.
                if _status(error) == 412 and not isinstance(error, FileExistsError):
                    raise FileExistsError(self._key(path)) from None
                raise

        try:
            self._asked("write", path, ask)
        except FileNotFoundError as error:
            raise self._refused("write to", error) from None

    def _creates_only(self) -> bool:
        """Tell whether the server refuses to create an object twice, by trying it once."""
        place = (getattr(self.fs, "_fs_token", None), self.root.partition("/")[0])
        if place not in _CREATES_ONLY:
            probe = f".{secrets.token_hex(8)}{self._partial}"
            # The bytes differ, so that nothing here takes the second for the first repeated.
            self._put_new(probe, b"1")
            try:
                self._put_new(probe, b"2")
            except FileExistsError:
                _CREATES_ONLY[place] = True
            else:
                _CREATES_ONLY[place] = False
            finally:
                self.delete(probe)
        if not _CREATES_ONLY[place] and os.environ.get(SINGLE_WRITER) != "1":
            raise UnusableStore(
                f"{self._url} is on a server that ignores create-only writes (If-None-Match), so "
                "two processes could write one run; use a server that has them (AWS S3, MinIO, "
                f"Azure, Google), or set {SINGLE_WRITER}=1 if you see to it that only one process "
                "writes"
            )
        return _CREATES_ONLY[place]

    # ---------------------------------------------------------------------------------- requests

    def _key(self, path: str) -> str:
        return f"{self.root}/{path}".rstrip("/")

    def _asked(self, verb: str, path: str, ask: Callable[[], _Answer]) -> _Answer:
        """Do a request, repeat it while that may help, and say clearly that it failed."""
        began = time.monotonic()
        attempt = 0
        while True:
            try:
                return ask()
            except _ANSWERS:
                raise
            except Exception as error:  # each cloud library has exceptions of its own
                late = time.monotonic() - began > _PATIENCE
                if not _may_pass(error) or attempt == _REPEATS or late:
                    raise self._failure(verb, path, error) from None
            time.sleep(0.1 * 2**attempt)
            attempt += 1

    def _failure(self, verb: str, path: str, error: Exception) -> Exception:
        """Make the exception to raise; not from the library's, whose text may hold secrets."""
        if isinstance(error, UnusableStore):
            return error
        if isinstance(error, PermissionError) or _status(error) in (401, 403):
            return self._refused("write to" if verb in ("write", "delete") else "read", error)
        if _names(error) & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
            return self._refused("write to" if verb in ("write", "delete") else "read", error)
        place = f"{self._url}/{path}".rstrip("/")
        return StoreFailed(
            f"cannot {verb} {place} ({self._shown(error)}); see whether the server can be reached "
            "(network, endpoint); what was written stays, and the same command resumes"
        )

    def _refused(self, verb: str, error: Exception) -> UnusableStore:
        return UnusableStore(
            f"cannot {verb} {self._url} ({self._shown(error)}); check the bucket's name, its "
            "permissions and the credentials"
        )

    def _shown(self, error: Exception) -> str:
        text = " ".join(str(error).split())
        return without_secrets(f"{type(error).__name__}: {text}", self._options)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that a library's exception tells of."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(source, "status_code", None) or getattr(source, "status", None)
        if isinstance(status, int):
            return status
    return None


def _may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed a moment later."""
    status = _status(error)
    if status is not None:
        # 409: another create-only write of the same object is under way.
        return status in (408, 409, 429) or status >= 500
    return isinstance(error, (TimeoutError, ConnectionError)) or bool(_names(error) & _CONNECTION)
