"""A run on a GPU: repeated or killed in the middle, it ends with the same bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from storage_schemas.verify import verify
from tests.faults.cli import results_at
from tests.faults.test_kill import MOMENTS, environment, finish, running

__all__ = ["environment"]

OVERRIDES = (
    "runner.device=cuda",
    "network.channels=[32,64]",
    "network.blocks=[1,1]",
    "network.attention={1: 4}",
)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, environment: dict[str, str]
) -> dict[str, str]:
    url = tmp_path_factory.mktemp("runs") / "tiny"
    finish(tiny_config, url, environment, *OVERRIDES)
    return results_at(str(url))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_runs_have_the_same_bytes(
    precision: str, tmp_path: Path, tiny_config: Path, environment: dict[str, str]
) -> None:
    for name in ("one", "two"):
        finish(tiny_config, tmp_path / name, environment, *OVERRIDES, f"precision={precision}")
    assert results_at(str(tmp_path / "one")) == results_at(str(tmp_path / "two"))


@pytest.mark.parametrize("moment", ["E-step", "M-step"])
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    moment: str,
    tmp_path: Path,
    tiny_config: Path,
    environment: dict[str, str],
    undisturbed: dict[str, str],
) -> None:
    url = tmp_path / "run"
    until: Callable[[Path], bool] = MOMENTS[moment]
    with running(tiny_config, url, environment, *OVERRIDES, until=until):
        pass
    finish(tiny_config, url, environment, *OVERRIDES)
    assert results_at(str(url)) == undisturbed
    assert verify(str(url)).ok
