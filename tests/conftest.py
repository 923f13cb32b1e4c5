"""What tests share: a quiet Prefect with a server of its own, and a run small enough for tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines.prefect_settings import apply_defaults

apply_defaults()
if "PYTEST_XDIST_WORKER" in os.environ:  # Tests side by side share the processor.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = {
    "name": "tiny",
    "iterations": 2,
    "data": {"kind": "digits", "holdout": 40, "limit": 240},
    "channel": {"kind": "random_mask", "keep": 0.5, "noise_std": 0.4},
    "network": {
        "kind": "unet",
        "channels": [8],
        "blocks": [1],
        "attention": {},
        "embedding": 8,
        "dropout": 0.1,
    },
    "start": {"kind": "gaussian", "iterations": 4},
    "e_step": {
        "sampler": {"kind": "dpm_solver", "steps": 3},
        "shard_size": 64,
        "batch_size": 32,
    },
    "m_step": {"steps": 12, "batch_size": 16, "ema_decay": 0.9},
    "evaluation": {"draws": 2, "reconstructions": 64, "distance": {"kind": "frechet_classifier"}},
    "runner": {"kind": "local", "device": "cpu", "threads": 1},
}
"""A whole run in about two seconds: 200 observations in 4 shards, 2 iterations."""


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny run's config."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """Run flows of this process on a server and a database of their own."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=60),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
