import multiprocessing
import os
import pickle
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from storage_schemas import remote_objects
from storage_schemas.errors import (
    ConfigMismatch,
    DamageError,
    LayoutMismatch,
    NoSpace,
    StorageError,
    StoreFailed,
    UnusableStore,
)
from storage_schemas.objects import ObjectStore, redact_url


def test_objects_come_back_and_are_listed(any_url: str) -> None:
    objects = ObjectStore(any_url)
    assert objects.list() == []
    assert objects.children("a") == []
    objects.write("a/b/one", b"1")
    objects.write("a/two", b"22")
    objects.write("a/two", b"222")
    assert objects.read("a/two") == b"222"
    assert objects.sizes() == {"a/b/one": 1, "a/two": 3}
    assert objects.list("a/b") == ["a/b/one"]
    assert objects.children() == ["a"]
    assert objects.children("a") == ["b", "two"]
    assert (objects.size("a/two"), objects.size("a"), objects.size("nothing")) == (3, None, None)
    assert objects.read_many(["a/two", "nothing"]) == {"a/two": b"222"}
    objects.delete("a/two")
    objects.delete("a/two")
    assert not objects.exists("a/two")
    with pytest.raises(FileNotFoundError):
        objects.read("a/two")
    objects.delete_folder("a")
    assert objects.list() == []


def test_create_never_replaces(any_url: str) -> None:
    objects = ObjectStore(any_url)
    objects.create("a/b", b"first")
    with pytest.raises(FileExistsError):
        objects.create("a/b", b"second")
    assert objects.read("a/b") == b"first"
    assert objects.partials() == []


@pytest.mark.parametrize(
    ("url", "stored"),
    [("a/b//", "a/b"), ("/", "/"), ("memory://", "memory://"), ("s3://b/c/", "s3://b/c")],
)
def test_urls_lose_their_last_slash(url: str, stored: str) -> None:
    assert ObjectStore(url).url == stored


def test_an_empty_url_is_refused() -> None:
    with pytest.raises(UnusableStore, match="the URL is empty"):
        ObjectStore("")


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../../b"])
def test_paths_stay_in_the_store(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relative to the store"):
        ObjectStore(str(tmp_path)).write(path, b"")


def test_partial_files_are_no_objects(tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path))
    objects.write("a/b", b"1")
    (tmp_path / "a" / ".b.0123.partial").write_bytes(b"torn")
    assert objects.list() == ["a/b"]
    assert objects.children("a") == ["b"]
    assert objects.partials() == ["a/.b.0123.partial"]
    objects.sweep()
    assert objects.partials() == []
    assert objects.list() == ["a/b"]


def test_a_failed_write_leaves_the_old_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = ObjectStore(str(tmp_path))
    objects.write("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        NoSpace, match=r"No space left on device: .*/a'; [0-9.]+ MB are free.*room"
    ):
        objects.write("a", b"new")
    assert objects.read("a") == b"old"
    assert objects.partials() == []


def test_an_object_is_synced_before_and_after_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File, then rename, then folder: else a power cut leaves an empty file under the name."""
    events: list[str] = []
    target = tmp_path / "object"
    real = os.fsync

    def recorded(descriptor: int) -> None:
        name = "file" if os.path.isfile(f"/proc/self/fd/{descriptor}") else "folder"  # noqa: PTH113
        events.append(f"{name} {'placed' if target.exists() else 'absent'}")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    ObjectStore(str(tmp_path)).write("object", b"1")
    assert events == ["file absent", "folder placed"]


def test_a_file_in_the_way_is_the_callers_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for use in (ObjectStore.write, ObjectStore.create):
        with pytest.raises(UnusableStore, match="Not a directory; choose another --store"):
            use(ObjectStore(str(tmp_path / "file" / "run")), "run.json", b"")


def test_a_read_only_file_system_is_the_callers_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied; choose another --store"):
        ObjectStore(str(tmp_path)).write("a", b"")


def test_an_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(UnusableStore, match=r"'s4'.*known are local paths and .*memory.*s3"):
        ObjectStore("s4://bucket/run")


def test_replacing_an_object_leaves_those_who_read_the_old_one_alone(tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path))
    objects.write("a", b"old")
    with (tmp_path / "a").open("rb") as reader:
        objects.write("a", b"new")
        assert reader.read() == b"old"
    assert objects.read("a") == b"new"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://me:hunter2@host/run", r"ftp://\*\*\*@host/run holds a password"),
        ("s3://AKIA:hun/ter2+x@bucket/run", r"s3://\*\*\*@bucket/run holds a password"),
        ("az://c/run?sv=1&sig=hunter2", r"az://c/run\?\*\*\* holds a query or fragment"),
        ("memory://c/run#hunter2", r"memory://c/run\?\*\*\* holds a query or fragment"),
    ],
)
def test_secrets_in_urls_are_refused_and_not_shown(url: str, shown: str) -> None:
    with pytest.raises(UnusableStore, match=shown) as error:
        ObjectStore(url)
    assert "hun" not in str(error.value)


def test_storage_options_are_neither_shown_nor_passed_on() -> None:
    objects = ObjectStore("memory://a", {"token": "hunter2"})
    assert "hunter2" not in repr(objects)
    with pytest.raises(TypeError, match="storage options") as error:
        pickle.dumps(objects)
    assert "hunter2" not in str(error.value)
    assert pickle.loads(pickle.dumps(ObjectStore("memory://a"))).url == "memory://a"


@pytest.mark.parametrize(
    "error",
    [
        DamageError("path", "problem"),
        ConfigMismatch.at("url", ["a: 1 -> 2"]),
        LayoutMismatch.at("path", {"a": (1, 2)}),
        UnusableStore("message"),
    ],
)
def test_errors_reach_other_processes(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/run", "s3://***@bucket/run"),
        ("s3://key:sec/ret+@bucket/run", "s3://***@bucket/run"),
        ("s3://bucket/run@2", "s3://bucket/run@2"),
        ("https://host/run?sig=secret#secret", "https://host/run?***"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("/a/b@c?d", "/a/b@c?d"),
    ],
)
def test_secrets_in_urls_are_not_shown(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def _create(path: str, name: bytes, barrier: Barrier, queue: "Queue[bool]") -> None:
    objects = ObjectStore(path)
    for attempt in range(10):
        barrier.wait()
        try:
            objects.create(str(attempt), name)
            queue.put(True)
        except FileExistsError:
            queue.put(False)


def test_of_many_processes_one_creates(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    barrier, queue = context.Barrier(4), context.Queue()
    workers = [
        context.Process(target=_create, args=(str(tmp_path), b"%d" % n * 100, barrier, queue))
        for n in range(4)
    ]
    for worker in workers:
        worker.start()
    created = [queue.get(timeout=60) for _ in range(40)]
    for worker in workers:
        worker.join()
    assert sum(created) == 10
    objects = ObjectStore(str(tmp_path))
    for name in objects.list():
        content = objects.read(name)
        assert (len(content), len(set(content))) == (100, 1)


@pytest.mark.parametrize("status", [500, 503, 409, None])
def test_a_request_that_may_succeed_later_is_repeated(
    status: int | None, memory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = ObjectStore(memory_url)
    objects.write("a", b"1")
    monkeypatch.setattr(remote_objects.time, "sleep", lambda _: None)
    fails = Failing(objects, 4, _answer(status))
    assert (objects.read("a"), fails.left) == (b"1", 0)
    fails.left = 5
    with pytest.raises(StoreFailed, match=rf"cannot read {memory_url}/a \(.*same command resumes"):
        objects.read("a")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_request_is_not_repeated(status: int, memory_url: str) -> None:
    objects = ObjectStore(memory_url)
    fails = Failing(objects, 2, _answer(status))
    with pytest.raises(UnusableStore, match="permissions and the credentials"):
        objects.read("a")
    assert fails.left == 1


def test_messages_of_libraries_are_shown_without_secrets(
    memory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "planted-token")
    connection = "AccountName=a;AccountKey=planted-account-key=="
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA0123456789")
    text = (
        "planted-token http://me:planted/password@host/x?sig=planted-signature "
        "planted-account-key== planted-option AKIA0123456789"
    )
    objects = ObjectStore(memory_url, {"client_kwargs": {"aws_secret": "planted-option"}})
    Failing(objects, 1, ValueError(text))
    with pytest.raises(StoreFailed) as failed:
        objects.read("a")
    assert "planted" not in str(failed.value)
    assert "AKIA0123456789" in str(failed.value), "which key was used helps to find the mistake"
    assert failed.value.__cause__ is None
    assert failed.value.__suppress_context__, "logs show causes too"


class Failing:
    """Stand between a store and its file system, which other tests share; let readings fail."""

    def __init__(self, objects: ObjectStore, times: int, error: Exception) -> None:
        self.left = times
        self._error = error
        self._fs = objects._backend.fs  # type: ignore[attr-defined]
        objects._backend.fs = self  # type: ignore[attr-defined]

    def cat_file(self, path: str) -> bytes:
        if self.left:
            self.left -= 1
            raise self._error
        content: bytes = self._fs.cat_file(path)
        return content

    def __getattr__(self, name: str) -> object:
        return getattr(self._fs, name)


def _answer(status: int | None) -> Exception:
    """What s3fs raises: an OSError whose cause is botocore's error."""
    if status is None:
        return ConnectionResetError("reset")
    cause = Exception()
    cause.response = {"ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
    error = PermissionError("no") if status == 403 else OSError(5, "answered")
    error.__cause__ = cause
    return error
