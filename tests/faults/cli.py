"""The tiny run from the command line, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from storage_schemas.run_store import RunStore


def run_command(config: Path, url: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", "run", str(config), "--store", url, *more]


def run_tiny(
    config: Path, url: str, environment: dict[str, str], *more: str, status: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        run_command(config, url, *more),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, done.stderr
    return done


def results_at(url: str) -> dict[str, str]:
    """Checksums of everything that a run computed, by path."""
    store = RunStore.open(url)
    found = {}
    for folder, manifest in (
        ("start", store.start().manifest()),
        *((f"iterations/{m.iteration:03d}", m) for m in store.completed()),
    ):
        assert manifest is not None
        for path, record in manifest.objects.items():
            if path.endswith((".safetensors", "metrics.json")) or ".zarr/" in path:
                found[f"{folder}/{path}"] = record.sha256
    assert len(store.completed()) == store.config.iterations
    return found
