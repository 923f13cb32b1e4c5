"""Runs that follow a store which grows: what comes later is learned from, from an iteration on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diffem_core.e_step import refreshed
from diffem_core.seeds import derive_seed
from pipelines import stages
from pipelines.config_io import load_config
from pipelines.ingest.request import IngestRequest
from pipelines.ingest.write import ingest
from pipelines.launch import prepare_run
from pipelines.stages.training import split_rows
from storage_schemas.config import ValidationConfig
from storage_schemas.generations import GrownObservations
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import repair, verify
from storage_schemas.xarray_view import open_run
from tests.conftest import TINY

FIRST, HOLDOUT, SECOND, THIRD = 60, 20, 37, 24


class Store:
    """A store that `diffem ingest` wrote, and that grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = folder / "store"
        self.parts = 0
        self.add(FIRST)

    def add(self, count: int, *, seed: int | None = None) -> None:
        rng = np.random.default_rng(self.parts if seed is None else seed)
        mask = (rng.random((count, 1, 8, 8)) < 0.5).astype(np.float32)
        y = rng.uniform(0, 16, mask.shape).astype(np.float32) * mask
        self.folder.mkdir(exist_ok=True, parents=True)
        source = self.folder / f"part{self.parts}.npz"
        np.savez(source, y=y, mask=mask)
        append = self.parts > 0
        ingest(
            IngestRequest(
                source=str(source),
                url=str(self.url),
                y="y",
                params={"mask": "mask"},
                holdout=HOLDOUT,
                append=append,
            )
        )
        self.parts += 1


def create(tmp_path: Path, store: Store, name: str = "run", **changes: Any) -> str:
    data = {
        "kind": "store",
        "url": str(store.url),
        "x_shape": [1, 8, 8],
        "value_range": [0, 16],
        "follow": True,
    }
    config = {
        **TINY,
        "iterations": 3,
        "data": data,
        "start": {"kind": "gaussian", "iterations": 2},
        "m_step": {"steps": 2, "batch_size": 16, "ema_decay": 0.9},
        "evaluation": {"draws": 2, "reconstructions": 32, "preview": 0},
        "e_step": {**TINY["e_step"], "shard_size": 16},
        **changes,
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return prepare_run(load_config(str(path)), str(tmp_path / name), take_over=False).url


def lay_out(url: str, iteration: int) -> dict[str, Any]:
    stages.follow_observations(url)
    return stages.lay_out_iteration(url, iteration)


def shards(url: str, iteration: int, count: int | None = None) -> None:
    plan = lay_out(url, iteration)
    for shard in range(plan["shards"])[:count]:
        stages.e_step_shard(url, iteration, shard, plan["config_digest"], plan["parent_digest"])


def finish(url: str, iteration: int) -> None:
    shards(url, iteration)
    digest = RunStore.open(url).config.digest
    learned = stages.reconstructions_digest(url, iteration)
    stages.refine_model(url, iteration, digest, learned)
    stages.evaluate_iteration(url, iteration, digest, stages.model_digest(url, iteration))
    stages.commit_iteration(url, iteration, 0)


def prepare(url: str) -> None:
    """What the flow does first, also when it resumes."""
    stages.recover(url)
    stages.prepare_observations(url)
    stages.fit_start(url)


def run_all(url: str, before: dict[int, Callable[[], None]] | None = None) -> None:
    prepare(url)
    for iteration in range(stages.first_unfinished_iteration(url), 3):
        (before or {}).get(iteration, lambda: None)()
        finish(url, iteration)


def samples(url: str) -> list[int]:
    return [manifest.samples for manifest in RunStore.open(url).completed()]


def results(url: str) -> dict[str, str]:
    store, found = RunStore.open(url), {}
    for manifest in store.completed():
        for path, record in manifest.objects.items():
            if path.endswith((".safetensors", "metrics.json")) or "/x_hat/c/" in path:
                found[f"{manifest.iteration}/{path}"] = record.sha256
    return found


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Store]:
    """A run that was not disturbed; its store grew before iterations 1 and 2."""
    folder = tmp_path_factory.mktemp("grown")
    store = Store(folder / "data")
    url = create(folder, store)
    run_all(url, {1: lambda: store.add(SECOND), 2: lambda: store.add(THIRD)})
    return url, store


def test_what_is_added_is_learned_from_at_the_next_iteration(grown: tuple[str, Store]) -> None:
    url, store = grown
    base = FIRST - HOLDOUT
    assert samples(url) == [base, base + SECOND, base + SECOND + THIRD]
    run = RunStore.open(url)
    seals = run.generations()
    assert [(s.samples, s.holdout, s.from_iteration) for s in seals] == [
        (FIRST, HOLDOUT, 0),
        (SECOND, 0, 1),
        (THIRD, 0, 2),
    ]
    source = GrownObservations(ObjectStore(str(store.url)), "train")
    np.testing.assert_array_equal(run.training(2).y(), source.y())
    np.testing.assert_array_equal(run.training(2).sample_ids, source.sample_ids)
    np.testing.assert_array_equal(run.iteration(2).sample_ids(), source.sample_ids)
    # Nothing that is judged by has changed: the start, the held-out ones, the training ones.
    assert len(run.observations("holdout")) == HOLDOUT
    assert len(run.observations("train")) == base
    stages_of = [manifest.stages["evaluate"].units for manifest in run.completed()]
    assert len(set(stages_of)) == 1
    assert verify(run).ok
    tree = open_run(url)
    assert tree["iterations/002"].sizes["sample"] == base + SECOND + THIRD
    assert tree["generations/002"].sizes["sample"] == THIRD


@pytest.mark.parametrize("moment", ["copying", "sealed", "laid out", "half drawn", "drawn"])
def test_a_run_that_is_killed_ends_with_the_same_bytes(
    moment: str, grown: tuple[str, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "data")
    url = create(tmp_path, store)
    prepare(url)
    finish(url, 0)
    store.add(SECOND)
    match moment:
        case "copying":
            with monkeypatch.context() as patched:
                patched.setattr("storage_schemas.observations.create_json", _killed)
                with pytest.raises(KeyboardInterrupt):
                    stages.follow_observations(url)
            assert len(RunStore.open(url).generations()) == 1
            assert verify(RunStore.open(url)).ok
        case "sealed":
            stages.follow_observations(url)
        case "laid out":
            lay_out(url, 1)
        case "half drawn":
            shards(url, 1, 3)
        case "drawn":
            shards(url, 1)
    run_all(url, {2: lambda: store.add(THIRD)})
    assert results(url) == results(grown[0])


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_iteration_keeps_what_it_was_laid_out_with(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    url = create(tmp_path, store)
    prepare(url)
    shards(url, 0, 1)
    store.add(SECOND)
    run_all(url)
    base = FIRST - HOLDOUT
    assert samples(url) == [base, base + SECOND, base + SECOND]
    assert [seal.from_iteration for seal in RunStore.open(url).generations()] == [0, 1]


def test_new_observations_are_drawn_where_others_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    e_step = {**TINY["e_step"], "shard_size": 16, "refresh": 0.25}
    url = create(tmp_path, store, e_step=e_step)
    prepare(url)
    finish(url, 0)
    store.add(SECOND)
    shards(url, 1)
    run = RunStore.open(url)
    first, second = (run.iteration(k).read_reconstructions() for k in (0, 1))
    base = FIRST - HOLDOUT
    assert len(second) == base + SECOND
    assert np.isfinite(second).all()
    turns = refreshed(
        run.iteration(1).sample_ids()[:base].tolist(),
        iteration=1,
        fraction=0.25,
        seed=derive_seed(run.config.seed, "refresh"),
    ).numpy()
    assert 0 < turns.sum() < base
    kept = (first == second[:base]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(kept, ~turns)
    # All of the new ones are draws: none is what the array held before it was written.
    assert (second[base:].std(axis=(1, 2, 3)) > 0).all()
    assert len(np.unique(second[base:], axis=0)) == SECOND


def gone(store: Store) -> None:
    shutil.rmtree(store.url / "generations" / "001")


def all_gone(store: Store) -> None:
    shutil.rmtree(store.url)


def others(store: Store) -> None:
    gone(store)
    store.parts = 1
    store.add(SECOND, seed=99)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone, "its generation 1, which this run learned from, are gone"),
        (others, "its generation 1, which this run learned from, are others now"),
        (all_gone, "holds no complete observations"),
    ],
)
def test_a_store_that_no_longer_holds_what_was_learned_from_is_refused(
    change: Callable[[Store], None], message: str, tmp_path: Path
) -> None:
    store = Store(tmp_path / "data")
    url = create(tmp_path, store)
    stages.prepare_observations(url)
    store.add(SECOND)
    assert stages.follow_observations(url)["added"] == SECOND
    before = RunStore.open(url).generations()
    change(store)
    with pytest.raises(ValueError, match=message):
        stages.follow_observations(url)
    assert RunStore.open(url).generations() == before


SHARD = "generations/001/observations.zarr/observation/c/0/0/0/0"
SEAL = "generations/001/observations.json"


@pytest.mark.parametrize("damage", ["object", "missing object", "seal", "missing seal", "all"])
def test_damage_is_named_and_repaired(
    damage: str, grown: tuple[str, Store], tmp_path: Path
) -> None:
    url = str(tmp_path / "run")
    shutil.copytree(grown[0], url)
    run, folder = RunStore.open(url), Path(url)
    healthy = run.generations()
    match damage:
        case "object":
            data = bytearray((folder / SHARD).read_bytes())
            data[len(data) // 2] ^= 1
            (folder / SHARD).write_bytes(data)
        case "missing object":
            (folder / SHARD).unlink()
        case "seal":
            (folder / SEAL).write_text("{}")
        case "missing seal":
            (folder / SEAL).unlink()
        case "all":
            shutil.rmtree(folder / "generations")
    report = verify(run)
    named = {fault.path for fault in [*report.missing, *report.damaged]}
    assert (SHARD if "object" in damage else SEAL) in named
    repair(run, report)
    stages.prepare_observations(url)
    assert verify(run).ok
    again = run.generations()
    assert [(s.data_digest, s.from_iteration, s.copied) for s in again] == [
        (s.data_digest, s.from_iteration, s.copied) for s in healthy
    ]


def test_what_is_lost_here_and_there_is_said(grown: tuple[str, Store], tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    shutil.copytree(grown[0], url)
    shutil.rmtree(Path(url) / "generations")
    moved = grown[1].url.rename(tmp_path / "moved")
    try:
        with pytest.raises(ValueError, match="holds no complete observations"):
            stages.prepare_observations(url)
    finally:
        moved.rename(grown[1].url)


def test_runs_that_do_not_follow_take_what_is_there_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    store.add(SECOND)
    data = {"kind": "store", "url": str(store.url), "x_shape": [1, 8, 8], "value_range": [0, 16]}
    url = create(tmp_path, store, data=data)
    stages.prepare_observations(url)
    assert len(RunStore.open(url).observations("train")) == FIRST - HOLDOUT + SECOND
    store.add(THIRD)
    assert stages.follow_observations(url) == {}
    assert len(RunStore.open(url).training(0)) == FIRST - HOLDOUT + SECOND
    # Repaired from what it was copied from, although the store holds more now.
    run = RunStore.open(url)
    seal = run.observations_manifest()
    for path in (Path(url) / "observations.zarr/observation").rglob("0"):
        if path.is_file():
            path.unlink()
    stages.prepare_observations(url)
    assert verify(run).ok
    assert run.observations_manifest() == seal


def test_the_seal_of_the_first_observations_can_be_lost(
    grown: tuple[str, Store], tmp_path: Path
) -> None:
    url = str(tmp_path / "run")
    shutil.copytree(grown[0], url)
    run = RunStore.open(url)
    healthy = [(s.data_digest, s.copied) for s in run.generations()]
    (Path(url) / "observations.json").unlink()
    stages.recover(url)
    stages.prepare_observations(url)
    assert verify(run).ok
    assert [(s.data_digest, s.copied) for s in run.generations()] == healthy


def test_what_is_kept_out_of_m_steps_stays_out_when_observations_come() -> None:
    config = ValidationConfig(fraction=0.2)
    ids = list(range(150))
    _, before = split_rows(ids[:100], config, seed=3)
    learned, kept = split_rows(ids, config, seed=3, sizes=[100, 50])
    assert set(before) == {row for row in kept if row < 100}
    assert len(kept) == 30
    np.testing.assert_array_equal(np.sort(np.concatenate([learned, kept])), ids)


def test_the_digest_knows_whether_a_run_follows(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    url = create(tmp_path, store)
    config = RunStore.open(url).config
    data = config.data.model_copy(update={"follow": False})
    assert config.model_copy(update={"data": data}).digest != config.digest
