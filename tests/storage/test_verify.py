from pathlib import Path

import numpy as np
import pytest

from storage_schemas.documents import write_json
from storage_schemas.lease import RunLease
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import VerifyReport, repair, verify
from tests.storage.tiny_run import draw, lay_out, make_blocks, results, resume_run


def faults(report: VerifyReport) -> set[str]:
    return {fault.path for fault in (*report.missing, *report.damaged, *report.orphaned)}


def contents(objects: ObjectStore) -> dict[str, bytes]:
    return objects.read_many(path for path in objects.list() if not path.startswith("lease/"))


def test_a_whole_run_is_whole(complete_run: RunStore) -> None:
    seen: dict[str, int] = {}
    report = verify(complete_run, on_object=seen.__setitem__)
    assert report == VerifyReport(objects=report.objects, bytes=report.bytes)
    assert report.ok
    assert report.objects == len(seen) >= 50
    assert sum(seen.values()) == report.bytes
    assert verify(complete_run, quick=True) == report
    assert verify(complete_run.url).ok


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    position = int(rng.integers(8 * len(data)))
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def test_every_missing_and_every_truncated_object_is_named(complete_run: RunStore) -> None:
    objects = complete_run.objects
    whole = contents(objects)
    for path, data in whole.items():
        if path != "run.json":
            objects.delete(path)
            report = verify(objects, quick=True)
            assert path in faults(report) or path == "prior/prior.json"
        objects.write(path, data[: len(data) // 2])
        assert path in faults(verify(objects, quick=True))
        objects.write(path, data)
    assert verify(objects).ok


def test_the_last_commit_alone_can_be_missing_without_fault(complete_run: RunStore) -> None:
    complete_run.objects.delete("prior/prior.json")
    report = verify(complete_run)
    assert report.ok
    assert [fault.path for fault in report.unfinished] == ["prior"]
    complete_run.prior().clear()
    complete_run.objects.delete("iterations/001/iteration.json")
    report = verify(complete_run)
    assert report.ok
    assert [fault.path for fault in report.unfinished] == ["iterations/001"]


def test_a_prior_follows_from_the_iteration_that_it_names(complete_run: RunStore) -> None:
    objects = complete_run.objects
    objects.delete("iterations/001/iteration.json")
    assert faults(verify(complete_run)) == {"iterations/001/iteration.json"}
    resume_run(objects)
    committed = complete_run.prior().manifest()
    assert committed is not None
    other = committed.model_copy(update={"parent_digest": "0" * 64})
    write_json(objects, "prior/prior.json", other)
    assert faults(verify(complete_run)) == {"prior/prior.json"}
    other = committed.model_copy(update={"config_digest": "0" * 64})
    write_json(objects, "prior/prior.json", other)
    assert faults(verify(complete_run)) == {"prior/prior.json"}


def test_flipped_bits_are_named(complete_run: RunStore) -> None:
    """Five rounds with a bit of every object that a manifest names flipped: over 200."""
    objects = complete_run.objects
    whole = contents(objects)
    commits = ("run.json", "observations.json", "/start.json", "/iteration.json", "/prior.json")
    named = {path: data for path, data in whole.items() if not path.endswith(commits)}
    rng = np.random.default_rng(0)
    for _ in range(5):
        for path, data in named.items():
            objects.write(path, flipped(data, rng))
        assert faults(verify(objects)) == {*named}
    assert 5 * len(named) > 200


def test_flipped_bits_of_commits_are_named_or_without_effect(complete_run: RunStore) -> None:
    objects = complete_run.objects
    rng = np.random.default_rng(0)
    for path in (
        "run.json",
        "observations.json",
        "start/start.json",
        "iterations/000/iteration.json",
        "prior/prior.json",
    ):
        whole = objects.read(path)
        for _ in range(5):
            data = flipped(whole, rng)
            objects.write(path, data)
            if path not in faults(verify(objects, quick=True)):  # other white space
                assert b"".join(data.split()) == b"".join(whole.split())
        objects.write(path, whole)


def test_one_random_fault_at_a_time_is_named_and_repaired(complete_run: RunStore) -> None:
    """240 faults, one by one, over every kind of object; every eighth is repaired by resuming.

    A bit flipped, a tail lost, a tail of zeros (as after a power cut), a byte too many, and for
    what is not a document another object of the run under the name.
    """
    objects = complete_run.objects
    whole, expected = contents(objects), results(objects)
    rng = np.random.default_rng(1)
    paths, hit = [*whole], set()
    for number in range(240):
        path = paths[number % len(paths)]
        data = whole[path]
        cut = int(rng.integers(len(data)))
        damaged = [
            flipped(data, rng),
            data[:cut],
            data[:cut] + bytes(len(data) - cut),
            data + b"0",
            whole[paths[(number + 1) % len(paths)]],
        ][int(rng.integers(4 if path.endswith(".json") else 5))]
        if damaged == data or b"".join(damaged.split()) == b"".join(data.split()):
            continue  # zeros over zeros; white space in JSON
        objects.write(path, damaged)
        report = verify(objects)
        assert path in faults(report), (path, len(data), len(damaged))
        hit.add(path)
        if number % 8 == 0 and path != "run.json":
            repair(complete_run, report)
            resume_run(objects)
            assert results(objects) == expected, path
            assert verify(objects).ok
            whole = contents(objects)  # commits hold times
        else:
            objects.write(path, data)
    assert hit == {*paths}


def test_what_is_lost_or_torn_is_repaired_to_the_same_bytes(complete_run: RunStore) -> None:
    """Every second object is deleted, the others torn, one by one: resuming makes it good."""
    objects = complete_run.objects
    whole, expected = contents(objects), results(objects)
    for number, (path, data) in enumerate(whole.items()):
        if number % 2 and path != "run.json":
            objects.delete(path)
        else:
            objects.write(path, data[: len(data) // 2])
        store = resume_run(objects)
        assert results(objects) == expected, path
        assert verify(store).ok, path


@pytest.mark.parametrize(
    "path",
    [
        "observations.zarr/zarr.json",
        "observations.zarr/truth/clean/c/0/0/0/0",
        "start/model.safetensors",
        "iterations/000/reconstructions.zarr/zarr.json",
        "iterations/000/reconstructions.zarr/x_hat/zarr.json",
        "iterations/000/reconstructions.zarr/x_hat/c/1/0/0/0",
        "iterations/000/model.safetensors",
        "iterations/001/metrics.json",
        "iterations/001/preview.png",
        "prior/model.safetensors",
        "prior/metrics.json",
    ],
)
def test_a_flipped_bit_is_repaired_after_a_full_verification(
    path: str, complete_run: RunStore
) -> None:
    objects = complete_run.objects
    expected = results(objects)
    data = objects.read(path)
    middle = len(data) // 2
    objects.write(path, data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :])
    assert path in repair(complete_run, verify(complete_run))
    resume_run(objects)
    assert results(objects) == expected
    assert verify(complete_run).ok


def test_repair_touches_nothing_else(complete_run: RunStore) -> None:
    objects = complete_run.objects
    before = contents(objects)
    path = "iterations/000/reconstructions.zarr/x_hat/c/1/0/0/0"
    objects.write(path, b"torn")
    deleted = repair(complete_run, verify(complete_run))
    assert sorted(deleted) == ["iterations/000/iteration.json", path]
    assert {p: d for p, d in before.items() if p not in deleted} == contents(objects)
    assert complete_run.iteration(0).missing_shards() == [1]


def test_strays_are_orphaned_and_removed_but_not_peoples_own_files(
    complete_run: RunStore,
) -> None:
    objects = complete_run.objects
    for path in ("iterations/001/old.npy", "start/x", "observations.zarr/y/c/0", "report.html"):
        objects.write(path, b"1")
    assert objects.local_path is not None
    (objects.local_path / "iterations" / "001" / ".model.12.partial").write_bytes(b"torn")
    report = verify(complete_run)
    assert [fault.path for fault in report.orphaned] == [
        "iterations/001/old.npy",
        "observations.zarr/y/c/0",
        "start/x",
        "iterations/001/.model.12.partial",
    ]
    assert (report.missing, report.damaged) == ((), ())
    complete_run.tidy()
    assert verify(complete_run).ok
    assert objects.exists("report.html")
    assert complete_run.completed()[1].iteration == 1


def test_an_iteration_that_goes_on_is_no_fault(complete_run: RunStore) -> None:
    folder = lay_out(complete_run, 2)
    draw(folder, 1)
    folder.write_checkpoint({"w": np.ones(3)}, {"step": 1})
    assert complete_run.objects.local_path is not None
    partial = complete_run.objects.local_path / "iterations" / "002" / ".a.1.partial"
    with RunLease(complete_run.objects):
        partial.write_bytes(b"")
        assert [f.path for f in verify(complete_run).orphaned] == [
            partial.relative_to(complete_run.objects.local_path).as_posix()
        ]
    partial.unlink()
    report = verify(complete_run)
    assert report.ok
    assert [fault.path for fault in report.unfinished] == ["iterations/002"]
    manifest = folder.shard(1)
    assert manifest is not None
    complete_run.objects.write(folder.path(manifest.path), b"torn")
    assert faults(verify(complete_run)) == {folder.path(manifest.path)}


def test_the_chain_of_digests_is_checked(complete_run: RunStore, tmp_path: Path) -> None:
    other = RunStore.create(str(tmp_path / "other"), complete_run.config)
    other.write_observations([next(make_blocks())], x_shape=(1, 4, 4))
    assert other.objects.local_path is not None
    for path in other.objects.list("observations.zarr"):
        complete_run.objects.write(path, other.objects.read(path))
    complete_run.objects.delete_folder("observations.zarr")
    for path in (*other.objects.list("observations.zarr"), "observations.json"):
        complete_run.objects.write(path, other.objects.read(path))
    [fault] = verify(complete_run).damaged
    assert (fault.path, fault.problem) == (
        "start/start.json",
        "was computed from other observations",
    )


def test_a_missing_iteration_in_the_middle_is_named(complete_run: RunStore) -> None:
    complete_run.objects.delete_folder("iterations/000")
    assert faults(verify(complete_run)) == {"iterations/000/iteration.json"}


@pytest.mark.parametrize("quick", [False, True])
def test_a_run_without_anything_is_whole(quick: bool, tmp_path: Path) -> None:
    from tests.storage.tiny_run import make_config

    assert verify(RunStore.create(str(tmp_path), make_config()), quick=quick).ok
