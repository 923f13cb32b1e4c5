"""Ids of many observations: read once by a process, not once by each shard."""

from pathlib import Path

import numpy as np
import pytest

from storage_schemas import observations as module
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import ObservationBlock, Observations, write_observations

SAMPLES = 50


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    objects = ObjectStore(str(tmp_path))
    rng = np.random.default_rng(0)
    block = ObservationBlock(
        sample=rng.permutation(SAMPLES) + 1000,
        holdout=rng.uniform(size=SAMPLES) < 0.3,
        y=rng.normal(size=(SAMPLES, 3)).astype(np.float32),
    )
    write_observations(objects, [block], x_shape=(3,), units="1", source="noise", attributes={})
    return objects


def ids_read(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, times: int) -> int:
    """Open the observations so often; count how often their ids are read."""
    asked: list[str] = []
    read = ObjectStore.read

    def counted(self: ObjectStore, path: str) -> bytes:
        asked.append(path)
        return read(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "read", counted)
        for _ in range(times):
            Observations(store, "train")
    return sum(path.endswith("sample/c/0") for path in asked)


def test_the_ids_of_many_are_read_once(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_indexes", {})
    few = {split: Observations(store, split) for split in ("train", "holdout", None)}
    assert ids_read(store, monkeypatch, 3) == 3
    monkeypatch.setattr(module, "_FEW", SAMPLES - 1)
    assert ids_read(store, monkeypatch, 3) == 1
    for split, expected in few.items():
        for _ in range(2):
            found = Observations(store, split)
            np.testing.assert_array_equal(found.sample_ids, expected.sample_ids)
            np.testing.assert_array_equal(found.y(), expected.y())
    with pytest.raises(ValueError, match="read-only"):
        Observations(store, "train").sample_ids[0] = 3


def test_only_some_are_kept(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_indexes", {})
    monkeypatch.setattr(module, "_FEW", 0)
    monkeypatch.setattr(module, "_INDEXES", 2)
    for split in ("train", "holdout", None, "train"):
        Observations(store, split)
    assert len(module._indexes) == 2
