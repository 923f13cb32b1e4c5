"""Object stores on loopback: moto and s3rver speak S3, azurite speaks Azure's blobs.

moto comes with `diffem[test]`. s3rver and azurite are Node programs: `make servers` puts them into
`tests/node_modules`; `DIFFEM_NODE_MODULES` names another folder. What is not there is skipped.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.subprocesses import free_port, running
from storage_schemas import remote_objects
from storage_schemas.remote_objects import SINGLE_WRITER

KINDS = ("moto", "s3rver", "azurite")


@dataclass(frozen=True)
class Server:
    """An object store that runs."""

    kind: str
    endpoint: str
    """`http://127.0.0.1:PORT`."""
    environment: dict[str, str]
    """What a process needs to reach it, by a URL alone."""
    bucket: str
    """URL of the bucket `runs`, which exists."""
    pid: int

    @property
    def atomic(self) -> bool:
        """Whether it has create-only writes: s3rver ignores `If-None-Match`."""
        return self.kind != "s3rver"

    def url(self, path: str) -> str:
        return f"{self.bucket}/{path}"


def s3_environment(endpoint: str, key: str = "test", secret: str = "test") -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def object_store(kind: str, folder: Path) -> Iterator[Server]:
    """Start a server, with a bucket `runs`, and stop it by its process id on leaving."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command, environment = _COMMANDS[kind](port, folder)
    # A server must not inherit the credentials of whatever this machine uses.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "AZURE_"))}
    clean["AZURITE_ACCOUNTS"] = f"{AZURITE_ACCOUNT}:{azurite_key()}"
    log = folder / f"{kind}.log"
    with running(command, log=log, environment=clean, folder=folder) as process:
        deadline = time.monotonic() + 60
        while not _answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{kind} did not answer within 60 s"
            time.sleep(0.05)
        scheme = "az" if kind == "azurite" else "s3"
        server = Server(kind, endpoint, environment, f"{scheme}://runs", process.pid)
        _make_bucket(server)
        yield server


@contextlib.contextmanager
def reached(server: Server) -> Iterator[None]:
    """Reach a server as users do: endpoint and credentials from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("AWS_", "AZURE_", "FSSPEC_"))]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        if not server.atomic:
            patch.setenv(SINGLE_WRITER, "1")
        forget_connections()
        try:
            yield
        finally:
            forget_connections()


def forget_connections() -> None:
    """Close the sessions of all file systems: without it they warn in whatever test comes then."""
    remote_objects._CREATES_ONLY.clear()
    if "s3fs" in sys.modules:
        import s3fs
        from zarr.core.sync import _get_loop

        for file_system in s3fs.S3FileSystem._cache.values():
            if file_system._s3 is not None:
                loop = _get_loop() if file_system.asynchronous else file_system.loop
                file_system.close_session(loop, file_system._s3creator)
        s3fs.S3FileSystem.clear_instance_cache()
    if "adlfs" in sys.modules:
        import adlfs
        from fsspec.asyn import sync
        from zarr.core.sync import _get_loop

        for file_system in adlfs.AzureBlobFileSystem._cache.values():
            sync(file_system.loop or _get_loop(), file_system.service_client.close)
        adlfs.AzureBlobFileSystem.clear_instance_cache()


def require_server(kind: str) -> None:
    """Skip the test if a server, or the library that speaks to it, is not installed."""
    library = "adlfs" if kind == "azurite" else "s3fs"
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed; pip install 'diffem[test,azure]'")
    if kind == "moto":
        pytest.importorskip("moto.server", reason="moto is not installed; diffem[test] has it")
        return
    if shutil.which("node") is None:
        pytest.skip(f"{kind} needs Node.js, which is not installed")
    if not (node_modules() / kind).is_dir():
        pytest.skip(f"{kind} is not in {node_modules()}; make servers installs it there")


def node_modules() -> Path:
    default = Path(__file__).parents[1] / "node_modules"
    return Path(os.environ.get("DIFFEM_NODE_MODULES") or default)


# -------------------------------------------------------------------------------------- the three


def _moto(port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    return command, s3_environment(f"http://127.0.0.1:{port}")


def _s3rver(port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    program = str(node_modules() / "s3rver" / "bin" / "s3rver.js")
    places = ["--address", "127.0.0.1", "--port", str(port), "--directory", str(folder / "s3")]
    command = ["node", program, *places, "--silent", "--configure-bucket", "runs"]
    # Its one account; the keys are in its documentation.
    return command, s3_environment(f"http://127.0.0.1:{port}", "S3RVER", "S3RVER")


def _azurite(port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    program = str(node_modules() / "azurite" / "dist" / "src" / "blob" / "main.js")
    places = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    quiet = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--inMemoryPersistence"]
    command = ["node", program, *places[:4], *quiet]
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName={AZURITE_ACCOUNT};AccountKey={azurite_key()};"
        f"BlobEndpoint=http://127.0.0.1:{port}/{AZURITE_ACCOUNT};"
    )
    return command, {"AZURE_STORAGE_CONNECTION_STRING": connection}


AZURITE_ACCOUNT = "devstoreaccount1"


def azurite_key() -> str:
    """A key of ours: azurite takes accounts from its environment."""
    return base64.b64encode(b"diffem tests: not a secret".ljust(64, b".")).decode()


_COMMANDS = {"moto": _moto, "s3rver": _s3rver, "azurite": _azurite}


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _make_bucket(server: Server) -> None:
    import fsspec

    with reached(server):
        file_system = fsspec.filesystem(server.bucket.partition("://")[0])
        if not file_system.exists("runs"):
            file_system.mkdir("runs")
