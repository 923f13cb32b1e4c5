"""The run that the tests of `pipelines.using` and `pipelines.export` use: tiny, with a prior."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.using.run import Run, open_run
from tests.pipelines.test_run import make_run, results_of

PRIOR = "prior={kind: unconditional, steps: 12, batch_size: 16, samples: 32}"


@pytest.fixture(scope="module")
def used(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, prefect_server: None
) -> Iterator[Path]:
    """A finished run with a prior. Using it changes nothing in it."""
    url = tmp_path_factory.mktemp("used") / "tiny"
    make_run(url, tiny_config, PRIOR)
    before = results_of(url)
    yield url
    assert results_of(url) == before


@pytest.fixture
def run(used: Path) -> Run:
    return open_run(str(used))


def observed(run: Run, count: int, split: Any = "holdout") -> dict[str, np.ndarray]:
    """Observations of the run, as somebody would bring them."""
    observations = run.store.observations(split)
    rows = slice(0, count)
    return {"y": observations.y(rows), "mask": observations.params(rows)["mask"]}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
