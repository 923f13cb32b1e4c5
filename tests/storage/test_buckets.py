"""A run in a bucket, on every object store that can be started here: see `servers`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from storage_schemas.errors import ConfigMismatch, NotARun, UnusableStore
from storage_schemas.lease import LeaseHeld, LeaseLost, RunLease
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import repair, verify
from storage_schemas.xarray_view import open_run
from tests.storage.servers import SINGLE_WRITER, Server, forget_connections
from tests.storage.tiny_run import draw, lay_out, make_config, make_x_hat, results, resume_run


def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket: str, tmp_path: Path) -> None:
    store = resume_run(bucket)
    local = resume_run(f"{tmp_path}/run")
    assert results(store.objects) == results(local.objects)
    assert verify(bucket).ok
    assert len(RunStore.open(bucket).completed()) == 2
    x_hat = open_run(bucket)["iterations/001/x_hat"]
    np.testing.assert_array_equal(x_hat, make_x_hat(1, 0, 40))
    with pytest.raises(ConfigMismatch, match="seed: 0 -> 1"):
        RunStore.create(bucket, make_config(seed=1))


def test_damage_in_a_bucket_is_named_and_repaired(bucket: str) -> None:
    store = resume_run(bucket)
    expected = results(store.objects)
    store.objects.delete("iterations/000/reconstructions.zarr/x_hat/c/1/0/0/0")
    store.objects.write("iterations/001/model.safetensors", b"torn")
    model = store.objects.read("start/model.safetensors")
    store.objects.write("start/model.safetensors", model[:-1] + bytes([model[-1] ^ 1]))
    report = verify(bucket)
    assert [f.path for f in report.missing] == [
        "iterations/000/reconstructions.zarr/x_hat/c/1/0/0/0"
    ]
    assert {f.path for f in report.damaged} == {
        "iterations/001/model.safetensors",
        "start/model.safetensors",
    }
    repair(store, report)
    assert results(resume_run(bucket).objects) == expected
    assert verify(bucket).ok


def test_an_interrupted_run_in_a_bucket_is_resumed(bucket: str, tmp_path: Path) -> None:
    store = resume_run(bucket)
    expected = results(store.objects)
    drawn = store.objects.read("iterations/001/shards/00001.json")
    store.prior().clear()
    store.objects.delete_folder("iterations/001")
    draw(lay_out(store, 1), 1)
    assert [f.path for f in verify(bucket).unfinished] == ["iterations/001"]
    assert results(resume_run(bucket).objects) == expected
    again = store.objects.read("iterations/001/shards/00001.json")
    assert len(again) == len(drawn)


def test_objects_in_a_bucket(server: Server, bucket: str) -> None:
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
    assert objects.partials() == []
    assert (objects.size("a/b"), objects.size("a/d")) == (5, None)
    if server.kind != "s3rver":  # it keeps objects as files, and answers 500 for a folder
        assert objects.size("a") is None
    assert objects.read_many(["a/b", "a/d"]) == {"a/b": b"first"}
    with pytest.raises(FileNotFoundError):
        objects.read("a/d")
    objects.delete("a/b")
    objects.delete("a/b")
    assert objects.list() == ["a/c"]
    objects.delete_folder("a")
    assert objects.list() == []


def test_a_lease_in_a_bucket(bucket: str) -> None:
    objects = ObjectStore(bucket)
    with RunLease(objects, owner="first") as first:
        with pytest.raises(LeaseHeld, match="written by first"):
            RunLease(objects).acquire()
        with RunLease(objects, take_over=True) as second:
            with pytest.raises(LeaseLost):
                first.check()
            second.check()


def test_another_process_opens_the_run_by_its_url(bucket: str) -> None:
    resume_run(bucket)
    code = "import sys; from storage_schemas.verify import verify; print(verify(sys.argv[1]).ok)"
    run = [sys.executable, "-c", code, bucket]
    assert subprocess.run(run, capture_output=True, text=True, timeout=60).stdout == "True\n"


def test_a_bucket_that_is_not_there_is_the_callers_mistake(server: Server) -> None:
    nowhere = server.bucket.replace("runs", "nothing") + "/run"
    with pytest.raises(UnusableStore, match=rf"cannot write to {nowhere} .*check the bucket"):
        RunStore.create(nowhere, make_config())
    with pytest.raises(NotARun):
        RunStore.open(nowhere)


def test_a_server_without_create_only_writes_is_refused_until_accepted(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3rver answers 200 to a second create-only write: two holders of one lease."""
    monkeypatch.delenv(SINGLE_WRITER, raising=False)
    forget_connections()
    objects = ObjectStore(bucket)
    if server.atomic:
        RunStore.create(objects, make_config())
        return
    with pytest.raises(UnusableStore, match=rf"two processes could write.*{SINGLE_WRITER}=1"):
        RunStore.create(objects, make_config())
    with pytest.raises(UnusableStore, match=SINGLE_WRITER):
        RunLease(objects).acquire()
    assert objects.list() == [], "what was tried is removed"
    assert objects.partials() == []
    monkeypatch.setenv(SINGLE_WRITER, "1")
    objects.create("after", b"1")
    with pytest.raises(FileExistsError):
        objects.create("after", b"1")
