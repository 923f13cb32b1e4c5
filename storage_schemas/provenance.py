"""By what a run is made: versions of code, Python and packages, without importing any of them."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from storage_schemas.manifests import Provenance

__all__ = ["collect_provenance"]

_PACKAGES = (
    "deepinv",
    "fsspec",
    "numcodecs",
    "numpy",
    "pot",
    "prefect",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "scipy",
    "torch",
    "xarray",
    "zarr",
)


def collect_provenance() -> Provenance:
    """Return by what a run would be made here and now."""
    return Provenance(
        code_version=_code_version(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: version for name in _PACKAGES if (version := _version(name))},
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _code_version() -> str:
    """Return the installed version and, in a checkout, `+` the commit (`.dirty` if it differs)."""
    version = _version("diffem") or "unknown"
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return version
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=.dirty", "--abbrev=12", "--exclude=*"],
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{described.stdout.strip()}"
