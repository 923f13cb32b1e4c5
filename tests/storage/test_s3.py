"""A run in a bucket: moto's S3 server on loopback, a process of its own."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from zarr.core.sync import _get_loop

from storage_schemas.errors import ConfigMismatch, NotARun, UnusableStore
from storage_schemas.lease import LeaseHeld, LeaseLost, RunLease
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from storage_schemas.xarray_view import open_run
from tests.storage.tiny_run import make_config, make_x_hat, results, resume_run

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def runs(server: str) -> Iterator[str]:
    """A bucket, reached as users reach one: endpoint and credentials from the environment."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("runs")
        yield "s3://runs"
        # Without it the sessions warn that they were not closed, in whatever test comes then.
        for file_system in s3fs.S3FileSystem._cache.values():
            if file_system._s3 is not None:
                loop = _get_loop() if file_system.asynchronous else file_system.loop
                file_system.close_session(loop, file_system._s3creator)
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(runs: str, request: pytest.FixtureRequest) -> str:
    """A place of its own for each test."""
    return f"{runs}/{request.node.name}"


def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket: str, tmp_path: object) -> None:
    store = resume_run(bucket)
    local = resume_run(f"{tmp_path}/run")
    assert results(store.objects) == results(local.objects)
    assert verify(bucket).ok
    assert len(RunStore.open(bucket).completed()) == 2
    x_hat = open_run(bucket)["iterations/001/x_hat"]
    np.testing.assert_array_equal(x_hat, make_x_hat(1, 0, 40))
    store.objects.delete("iterations/000/reconstructions.zarr/x_hat/c/1/0/0/0")
    store.objects.write("iterations/001/model.safetensors", b"torn")
    report = verify(bucket)
    assert (len(report.missing), len(report.damaged)) == (1, 1)
    assert results(resume_run(bucket).objects) == results(local.objects)
    with pytest.raises(ConfigMismatch, match="seed: 0 -> 1"):
        RunStore.create(bucket, make_config(seed=1))


def test_objects_in_a_bucket(bucket: str) -> None:
    objects = ObjectStore(bucket)
    with pytest.raises(NotARun):
        RunStore.open(bucket)
    objects.create("a/b", b"first")
    with pytest.raises(FileExistsError):
        objects.create("a/b", b"second")
    assert objects.read("a/b") == b"first"
    ObjectStore(bucket).write("a/c", b"22")
    assert objects.sizes() == {"a/b": 5, "a/c": 2}
    assert objects.children() == ["a"]
    assert objects.children("a") == ["b", "c"]
    assert objects.read_many(["a/b", "a/d"]) == {"a/b": b"first"}
    objects.delete("a/b")
    objects.delete("a/b")
    assert objects.list() == ["a/c"]


def test_a_lease_in_a_bucket(bucket: str) -> None:
    objects = ObjectStore(bucket)
    with RunLease(objects, owner="first") as first:
        with pytest.raises(LeaseHeld, match="written by first"):
            RunLease(objects).acquire()
        with RunLease(objects, take_over=True) as second:
            with pytest.raises(LeaseLost):
                first.check()
            second.check()


def test_a_bucket_that_is_not_there_is_the_callers_mistake(bucket: str) -> None:
    with pytest.raises(
        UnusableStore, match=r"cannot write to s3://nothing/run .*check the bucket"
    ):
        RunStore.create("s3://nothing/run", make_config())
    with pytest.raises(NotARun):
        RunStore.open("s3://nothing/run")
