import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from storage_schemas.config import LocalRunner, MStepConfig
from storage_schemas.documents import encode_json, write_json
from storage_schemas.errors import (
    ConfigMismatch,
    DamageError,
    IncompleteError,
    NotARun,
    SchemaMismatch,
    UnusableStore,
)
from storage_schemas.iteration_store import IterationStore
from storage_schemas.lease import RunLease
from storage_schemas.objects import ObjectStore
from storage_schemas.provenance import collect_provenance
from storage_schemas.run_store import RunStore, config_differences
from storage_schemas.verify import verify
from tests.storage.tiny_run import (
    PROVENANCE,
    draw,
    lay_out,
    make_config,
    make_metrics,
    make_stage,
    results,
    resume_iteration,
    resume_run,
)


def test_a_run_of_a_version_with_other_fields_is_refused_with_a_reason(tmp_path: Path) -> None:
    store = RunStore.create(str(tmp_path / "run"), make_config(), PROVENANCE)
    older = store.manifest.model_copy(update={"config_digest": "0" * 64})
    write_json(store.objects, "run.json", older)
    with pytest.raises(SchemaMismatch, match="made by version 0, whose configs had other fields"):
        RunStore.create(store.url, make_config(), PROVENANCE)


def test_a_run_is_created_once_and_opened_again(any_url: str) -> None:
    created = RunStore.create(any_url, make_config(), PROVENANCE)
    assert created.config == make_config()
    assert created.manifest.config_digest == make_config().digest
    assert RunStore.create(any_url, make_config()).manifest == created.manifest
    assert RunStore.open(any_url).manifest == created.manifest
    assert created.completed() == []
    assert created.parent_digest(0) is None


def test_another_config_is_refused_with_the_difference(any_url: str) -> None:
    RunStore.create(any_url, make_config(), PROVENANCE)
    before = ObjectStore(any_url).read("run.json")
    other = make_config(seed=1, m_step=MStepConfig(steps=20, first_steps=5))
    with pytest.raises(ConfigMismatch) as error:
        RunStore.create(any_url, other)
    assert error.value.differences == (
        "seed: 0 -> 1",
        "m_step.steps: 10 -> 20",
        "m_step.first_steps: null -> 5",
    )
    for line in (*error.value.differences, "another --store or name", "delete the run"):
        assert line in str(error.value)
    assert ObjectStore(any_url).read("run.json") == before


def test_a_change_that_changes_no_number_is_stored(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    RunStore.create(url, make_config(), PROVENANCE)
    wanted = make_config(iterations=9, runner=LocalRunner(threads=1), description="longer")
    assert RunStore.create(url, wanted).config == wanted
    stored = RunStore.open(url).manifest
    assert stored.config == wanted
    assert stored.provenance == PROVENANCE


def test_a_run_that_is_being_written_keeps_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "run")
    RunStore.create(url, make_config(), PROVENANCE)
    with RunLease(ObjectStore(url)):
        assert RunStore.create(url, make_config(iterations=3)).config.iterations == 3
        monkeypatch.setattr("storage_schemas.lease.os.getpid", lambda: 1)  # as another process
        RunStore.create(url, make_config(iterations=9))
        assert RunStore.open(url).config.iterations == 3


def test_what_is_not_a_run_is_refused(any_url: str, tmp_path: Path) -> None:
    with pytest.raises(NotARun, match=r"is not a run: it has no run\.json; give the folder"):
        RunStore.open(any_url)
    ObjectStore(any_url).write("thesis.tex", b"")
    with pytest.raises(NotARun, match=r"not empty and not a run: it holds thesis\.tex"):
        RunStore.create(any_url, make_config())
    assert ObjectStore(any_url).list() == ["thesis.tex"]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotARun, match="is a file, not a run"):
        RunStore.open(str(file))
    with pytest.raises(NotARun, match="is a file, not a run"):
        RunStore.create(str(file), make_config())


def test_a_lease_alone_does_not_make_a_folder_foreign(tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path / "run"))
    with RunLease(objects):
        RunStore.create(objects, make_config(), PROVENANCE)


def test_an_unwritable_store_is_the_callers_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((UnusableStore, NotARun), match=r"Not a directory|is a file"):
        RunStore.create(str(tmp_path / "file" / "run"), make_config())
    with pytest.raises(UnusableStore, match="cannot write /proc/diffem"):
        RunStore.create("/proc/diffem/run", make_config())


def test_a_newer_run_asks_for_a_newer_version(tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path))
    manifest = RunStore.create(objects, make_config(), PROVENANCE).manifest
    newer = manifest.model_copy(update={"schema_version": 2})
    objects.write("run.json", encode_json(newer))
    for use in (RunStore.open, lambda o: RunStore.create(o, make_config())):
        with pytest.raises(SchemaMismatch, match="install a newer diffem"):
            use(objects)


def test_a_damaged_run_manifest_is_written_anew_with_the_same_config_only(
    complete_run: RunStore,
) -> None:
    objects, whole = complete_run.objects, complete_run.objects.read("run.json")
    objects.write("run.json", whole[:100])
    with pytest.raises(DamageError, match=r"run\.json"):
        RunStore.open(objects)
    with pytest.raises(DamageError, match=r"run\.json: is damaged, and the run was computed with"):
        RunStore.create(objects, make_config(seed=5))
    assert objects.read("run.json") == whole[:100]
    assert len(RunStore.create(objects, make_config(), PROVENANCE).completed()) == 2


def test_differences_name_leaves() -> None:
    stored = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    given = {"a": {"b": 1, "c": [1, 3]}, "e": "x"}
    assert config_differences(stored, given) == [
        "a.c: [1, 2] -> [1, 3]",
        "d: null -> (absent)",
        'e: (absent) -> "x"',
    ]


def test_the_chain_of_completed_iterations(complete_run: RunStore) -> None:
    manifests = complete_run.completed()
    assert [manifest.iteration for manifest in manifests] == [0, 1]
    start = complete_run.start().manifest()
    assert start is not None
    seal = complete_run.observations_manifest()
    assert seal is not None
    assert start.parent_digest == seal.data_digest
    assert manifests[0].parent_digest == start.model_digest
    assert manifests[1].parent_digest == manifests[0].model_digest
    assert complete_run.parent_digest(1) == manifests[0].model_digest
    assert complete_run.iteration_numbers() == [0, 1]
    complete_run.objects.delete("iterations/000/iteration.json")
    assert complete_run.completed() == []


def test_a_commit_names_every_object_with_its_checksum(complete_run: RunStore) -> None:
    folder = complete_run.iteration(0)
    manifest = folder.manifest()
    assert manifest is not None
    listed = set(complete_run.objects.list(folder.prefix))
    assert {folder.path(name) for name in manifest.objects} == listed - {
        folder.path("iteration.json")
    }
    assert manifest.model_digest == manifest.objects["model.safetensors"].sha256
    assert manifest.metrics == make_metrics(0)
    assert [*manifest.stages] == ["m_step", "evaluate"]


def test_an_unfinished_iteration_cannot_be_committed(tmp_path: Path) -> None:
    store = resume_run(str(tmp_path / "run"))
    folder = lay_out(store, 2)
    for shard in (0, 2):
        draw(folder, shard)
    with pytest.raises(IncompleteError, match=r"1 shards have yet to be drawn \(1\)"):
        folder.commit(metrics=None, stages={})
    draw(folder, 1)
    with pytest.raises(IncompleteError, match=r"model\.safetensors is missing"):
        folder.commit(metrics=None, stages={})
    assert folder.manifest() is None
    folder.write_checkpoint({"w": np.ones(3)}, {"step": 3})
    folder.write_tensors("model", {"w": np.ones(3)})
    folder.commit(metrics=None, stages={})
    assert folder.read_checkpoint() is None


def test_committing_twice_is_harmless_and_never_changes_results(complete_run: RunStore) -> None:
    folder = complete_run.iteration(0)
    before = folder.manifest()
    assert resume_iteration(complete_run, 0) == before
    draw(folder, 1)
    assert folder.commit(metrics=make_metrics(0), stages={}) == before
    with pytest.raises(DamageError, match="another result than the one committed"):
        folder.write_shard(1, np.ones((16, 1, 4, 4)), seed=1, seconds=0.0)
    folder.write_tensors("model", {"w": np.ones(3)})
    with pytest.raises(DamageError, match=r"committed with other results \(model.safetensors\)"):
        folder.commit(metrics=make_metrics(0), stages={})


def test_two_runs_have_the_same_results(tmp_path: Path, memory_url: str) -> None:
    one, two = resume_run(str(tmp_path / "a")), resume_run(memory_url)
    assert results(one.objects) == results(two.objects)
    assert len(results(one.objects)) > 30


def test_a_stage_counts_only_with_its_objects_and_its_parent(complete_run: RunStore) -> None:
    folder = complete_run.iteration(0)
    digest = folder.reconstructions_digest()
    assert folder.stage("m_step", parent_digest=digest) is not None
    assert folder.stage("m_step", parent_digest="0" * 64) is None
    assert folder.stage("other") is None
    data = folder.read_bytes("model.safetensors")
    folder.write_bytes("model.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    assert folder.stage("m_step") is None
    assert folder.stage("m_step", checksum=False) is not None
    folder.write_bytes("model.safetensors", data[:-1])
    assert folder.stage("m_step", checksum=False) is None
    folder.write_bytes("model.safetensors", data)
    record = folder.read_bytes("stages/m_step.json")
    folder.write_bytes("stages/m_step.json", record[:50])
    assert folder.stage("m_step") is None


def test_tensors_are_checked_at_every_reading(complete_run: RunStore) -> None:
    folder = complete_run.iteration(0)
    digest = complete_run.parent_digest(1)
    arrays, note = folder.read_tensors("model", digest=digest)
    assert (arrays["w"].shape, note) == ((1, 4, 4), {"iteration": 0})
    with pytest.raises(DamageError, match="does not have the digest 000"):
        folder.read_tensors("model", digest="0" * 64)
    data = folder.read_bytes("model.safetensors")
    folder.write_bytes("model.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    for expected in (digest, None):
        with pytest.raises(DamageError, match=r"model\.safetensors: does not"):
            folder.read_tensors("model", digest=expected)
    folder.objects.delete(folder.path("model.safetensors"))
    with pytest.raises(DamageError, match="is missing"):
        folder.read_tensors("model")


def test_a_checkpoint_only_saves_time(complete_run: RunStore) -> None:
    folder = complete_run.iteration(5)
    assert folder.read_checkpoint() is None
    folder.write_checkpoint({"w": np.arange(3.0)}, {"step": 7})
    found = folder.read_checkpoint()
    assert found is not None
    assert found[1] == {"step": 7}
    data = folder.read_bytes("checkpoint/state.safetensors")
    folder.write_bytes("checkpoint/state.safetensors", data[:-3])
    assert folder.read_checkpoint() is None


def test_another_model_takes_back_the_commits_that_followed(complete_run: RunStore) -> None:
    """A recomputed iteration 0 with another result: iteration 1 is computed anew, not kept."""
    folder = complete_run.iteration(0)
    complete_run.objects.delete(folder.path("iteration.json"))
    folder.write_tensors("model", {"w": np.ones(3)})
    record = folder.write_tensors("model", {"w": np.ones(3)})
    parent = folder.reconstructions_digest()
    folder.write_stage(
        make_stage("m_step", parent_digest=parent, objects={"model.safetensors": record})
    )
    resume_iteration(complete_run, 0)
    assert [manifest.iteration for manifest in complete_run.completed()] == [0]
    [fault] = verify(complete_run).damaged
    assert fault.path == "iterations/001/iteration.json"
    assert fault.problem == "was computed from another model than the one before it"
    resume_iteration(complete_run, 1)
    assert [manifest.iteration for manifest in complete_run.completed()] == [0, 1]
    assert complete_run.completed()[1].parent_digest == record.sha256
    assert complete_run.tidy().ok


def test_status_needs_neither_zarr_nor_xarray(complete_run: RunStore) -> None:
    code = f"""
import json, sys
from storage_schemas.lease import read_lease
from storage_schemas.provenance import collect_provenance
from storage_schemas.run_store import RunStore
store = RunStore.open({complete_run.url!r})
print(json.dumps([m.metrics.numbers() for m in store.completed()]))
read_lease(store.objects), store.iteration(0).shards(), store.observations_manifest()
assert not {{"zarr", "xarray", "torch", "fsspec", "safetensors"}} & set(sys.modules), sys.modules
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(shown) == [
        {"psnr": 20.0, "distance": None},
        {"psnr": 21.0, "distance": None},
    ]


def test_the_provenance_names_commit_and_packages() -> None:
    found = collect_provenance()
    assert found.packages["zarr"] == zarr.__version__
    assert found.packages["numpy"] == np.__version__
    head = ["git", "rev-parse", "--short=12", "HEAD"]
    shown = subprocess.run(head, capture_output=True, text=True, cwd=Path(__file__).parent)
    if shown.returncode:
        pytest.skip("not a git checkout")
    assert found.code_version.removesuffix(".dirty").endswith(f"+{shown.stdout.strip()}")


def test_an_iteration_counts_from_zero(tmp_path: Any) -> None:
    store = RunStore.create(str(tmp_path / "run"), make_config(), PROVENANCE)
    with pytest.raises(ValueError, match="iterations count from 0"):
        IterationStore(store.objects, store.manifest, -1)
