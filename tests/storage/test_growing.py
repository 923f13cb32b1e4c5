"""A store of observations that grows: what is sealed stays, what is added counts when sealed."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.ingest.request import IngestRequest
from pipelines.ingest.write import ingest
from storage_schemas.errors import IncompleteError
from storage_schemas.generations import GrownObservations, generation_store, read_generations
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import Observations, write_observations
from tests import command_line
from tests.command_line import json_of
from tests.storage.tiny_run import X_SHAPE, make_block

FIRST, SECOND, THIRD = 50, 30, 21
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 8 rows, so that every generation has several objects and a short last one."""
    monkeypatch.setattr("storage_schemas.layout.OBSERVATION_CHUNK_ROWS", 4)
    monkeypatch.setattr("storage_schemas.layout.OBSERVATION_CHUNKS_PER_SHARD", 2)


def succeeded(*arguments: object) -> dict[str, Any]:
    return json_of("ingest", *arguments)


def refused(*arguments: object) -> str:
    return command_line.refused("ingest", *arguments)


def arrays(count: int, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    mask = (rng.random((count, 1, 8, 8)) < 0.5).astype(np.float32)
    y = rng.uniform(0, 16, mask.shape).astype(np.float32) * mask
    return {"y": y, "mask": mask, "label": rng.integers(0, 10, count)}


def as_npz(path: Path, given: Arrays) -> Path:
    np.savez(path, **given)
    return path


ROLES = ("--y", "y", "--param", "mask", "--label", "label")


def ingested(folder: Path, *seeds_and_counts: tuple[int, int]) -> tuple[Path, list[Arrays]]:
    """A store of several generations, and what is in each."""
    url, parts = folder / "store", []
    for number, (seed, count) in enumerate(seeds_and_counts):
        parts.append(arrays(count, seed))
        source = as_npz(folder / f"part{number}.npz", parts[-1])
        more = ["--append"] if number else ["--holdout", "10"]
        succeeded(source, url, *ROLES, *more)
    return url, parts


def files(url: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(url)): path.read_bytes()
        for path in url.rglob("*")
        if path.is_file() and "lease" not in path.parts
    }


def test_generations_are_read_as_one(any_url: str) -> None:
    objects = ObjectStore(any_url)
    with pytest.raises(IncompleteError):
        GrownObservations(objects)
    bounds = [0, FIRST, FIRST + SECOND, FIRST + SECOND + THIRD]
    everything = make_block(0, bounds[-1])
    sample = np.arange(bounds[-1])
    holdout = everything.holdout & (sample < FIRST)
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        block = make_block(start, stop)
        object.__setattr__(block, "sample", sample[start:stop])
        object.__setattr__(block, "holdout", holdout[start:stop])
        write_observations(
            generation_store(objects, number),
            [block],
            x_shape=X_SHAPE,
            units="1",
            source="test",
            attributes={},
        )
    assert [seal.samples for seal in read_generations(objects)] == [FIRST, SECOND, THIRD]
    rng = np.random.default_rng(0)
    for split, chosen in [(None, sample >= 0), ("train", ~holdout), ("holdout", holdout)]:
        read = GrownObservations(objects, split)  # type: ignore[arg-type]
        assert len(read) == sum(read.sizes) == chosen.sum()
        assert len(read.sizes) == 3
        np.testing.assert_array_equal(read.sample_ids, sample[chosen])
        rows = rng.permutation(len(read))[:20]
        for given in (None, slice(3, len(read) - 3), rows, rows[:0]):
            index = slice(None) if given is None else given
            np.testing.assert_array_equal(read.y(given), everything.y[chosen][index])
            mask = read.params(given)["mask"]
            np.testing.assert_array_equal(mask, everything.params["mask"][chosen][index])
            assert everything.x is not None
            np.testing.assert_array_equal(read.truth(given), everything.x[chosen][index])
    two = GrownObservations(objects, "train", 2)
    np.testing.assert_array_equal(two.sample_ids, sample[: bounds[2]][~holdout[: bounds[2]]])


def test_what_is_added_is_there_and_what_was_there_is_untouched(tmp_path: Path) -> None:
    url, [first] = ingested(tmp_path, (0, FIRST))
    before = files(url)
    old = Observations(ObjectStore(str(url)))
    second = arrays(SECOND, 1)
    summary = succeeded(as_npz(tmp_path / "more.npz", second), url, *ROLES, "--append")
    assert (summary["samples"], summary["holdout"]) == (FIRST + SECOND, 10)
    assert {path: data for path, data in files(url).items() if path in before} == before
    np.testing.assert_array_equal(old.y(), first["y"])  # a reader from before goes on
    read = GrownObservations(ObjectStore(str(url)))
    np.testing.assert_array_equal(read.sample_ids, np.arange(FIRST + SECOND))
    for name, found in [("y", read.y()), ("mask", read.params()["mask"])]:
        np.testing.assert_array_equal(found, np.concatenate([first[name], second[name]]))
    assert len(GrownObservations(ObjectStore(str(url)), "holdout")) == 10


def test_the_same_twice_is_added_once(tmp_path: Path) -> None:
    url, _ = ingested(tmp_path, (0, FIRST), (1, SECOND))
    before = files(url)
    summary = succeeded(tmp_path / "part1.npz", url, *ROLES, "--append")
    assert summary["complete_before"]
    assert summary["samples"] == FIRST + SECOND
    assert files(url) == before
    as_npz(tmp_path / "part1.npz", arrays(SECOND, 2))  # others under the same name
    summary = succeeded(tmp_path / "part1.npz", url, *ROLES, "--append")
    assert not summary["complete_before"]
    assert summary["samples"] == FIRST + 2 * SECOND


def without(name: str) -> Callable[[Arrays], Arrays]:
    return lambda given: {key: value for key, value in given.items() if key != name}


def larger(given: Arrays) -> Arrays:
    return {"y": given["y"].repeat(2, axis=2), "mask": given["mask"], "label": given["label"]}


def not_finite(given: Arrays) -> Arrays:
    y = given["y"].copy()
    y[17, 0, 3, 3] = np.nan
    return {**given, "y": y}


OTHERS: dict[str, tuple[Callable[[Arrays], Arrays], list[str], str]] = {
    "a shape": (larger, [*ROLES], "y_shape: "),
    "no parameter": (without("mask"), ["--y", "y", "--label", "label"], "parameters: {'mask'"),
    "no classes": (without("label"), [*ROLES[:4]], "classes: True -> False"),
    "units": (lambda given: given, [*ROLES, "--units", "K"], "units: 1 -> K"),
    "NaN": (not_finite, [*ROLES], "NaN"),
    "a range": (lambda given: given, [*ROLES, "--range", "0", "1"], "range"),
    "a holdout": (lambda given: given, [*ROLES, "--holdout", "3"], "--holdout is given but"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_are_refused_and_leave_nothing(case: str, tmp_path: Path) -> None:
    change, roles, message = OTHERS[case]
    url, _ = ingested(tmp_path, (0, FIRST))
    before = files(url)
    source = as_npz(tmp_path / "other.npz", change(arrays(SECOND, 1)))
    assert message in refused(source, url, *roles, "--append")
    assert files(url) == before


def test_there_must_be_something_to_add_to(tmp_path: Path) -> None:
    source = as_npz(tmp_path / "data.npz", arrays(FIRST, 0))
    message = refused(source, tmp_path / "nothing", *ROLES, "--append")
    assert "holds no complete observations to add to" in message
    assert not (tmp_path / "nothing").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing that handles errors sees it."""


@pytest.mark.parametrize("after", [1, 4, 9, 12, 15])
def test_an_append_that_is_killed_changes_nothing_and_goes_on(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
    other, _ = ingested(tmp_path / "undisturbed", (0, FIRST), (1, SECOND))
    url, _ = ingested(tmp_path / "killed", (0, FIRST))
    source = as_npz(tmp_path / "killed" / "part1.npz", arrays(SECOND, 1))
    request = IngestRequest(
        source=str(source),
        url=str(url),
        y="y",
        params={"mask": "mask"},
        label="label",
        append=True,
    )
    writes = iter(range(10_000))

    def counting(method: Callable[..., None]) -> Callable[..., None]:
        def write(self: ObjectStore, path: str, data: bytes) -> None:
            if "lease" not in path and next(writes) == after:
                raise Killed
            method(self, path, data)

        return write

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "write", counting(ObjectStore.write))
        patched.setattr(ObjectStore, "create", counting(ObjectStore.create))
        with pytest.raises(Killed):
            ingest(request)
    assert len(GrownObservations(ObjectStore(str(url)))) == FIRST
    assert succeeded(source, url, *ROLES, "--append")["samples"] == FIRST + SECOND
    ours, theirs = (_numbers(u) for u in (url, other))
    assert ours == theirs


def _numbers(url: Path) -> dict[str, bytes]:
    """Everything but the group's attributes, which name the source, and times."""
    return {
        path: data
        for path, data in files(url).items()
        if ".zarr/" in path and not path.endswith("observations.zarr/zarr.json")
    }


def test_added_samples_are_corrupted_by_noise_of_their_own(tmp_path: Path) -> None:
    source, url = tmp_path / "clean.npz", tmp_path / "store"
    np.savez(source, x=np.full((40, 1, 8, 8), 8.0, np.float32))
    config = tmp_path / "config.yaml"
    config.write_text(Path("deploy/experiments/digits.yaml").read_text())
    roles = ("--x", "x", "--corrupt", config)
    succeeded(source, url, *roles, "--holdout", "5")
    source.rename(tmp_path / "again.npz")  # the same clean samples, seen once more
    succeeded(tmp_path / "again.npz", url, *roles, "--append")
    y = GrownObservations(ObjectStore(str(url))).y()
    assert y.shape == (80, 1, 8, 8)
    # Noise on half of the pixels, independently: 64 pixels agree with probability below 1e-19
    # (both hidden: 1/4 each).
    assert not (y[:40] == y[40:]).all(axis=(1, 2, 3)).any()
