"""The tutorial, followed in an empty folder: every file that it has one save, every command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from storage_schemas.run_store import RunStore

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", Path("deploy/tutorial.md").read_text(), re.DOTALL)
SMALL = (
    "--set iterations=1 --set m_step.steps=30 --set m_step.first_steps=200 --set prior.samples=32 "
    "--set evaluation.reconstructions=64 --set runner.threads=1"
)
"""What makes the run small; nothing else of the tutorial is changed."""


def shims(folder: Path) -> None:
    """Put `diffem` and `python` of this environment into a folder."""
    folder.mkdir()
    for name, command in (("python", ""), ("diffem", "-m pipelines.cli")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (folder / name).chmod(0o755)


def test_the_tutorial_has_the_files_that_its_commands_read() -> None:
    saved = [code.splitlines()[0].removeprefix("# ") for kind, code in BLOCKS if kind != "sh"]
    assert [name for name in saved if re.fullmatch(r"\w+\.(py|yaml)", name)] == [
        *("corrupt.py", "photos.yaml", "compare.py", "elsewhere.py")
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("skimage") is None, reason="needs scikit-image: pip install 'diffem[demo]'"
)
def test_the_tutorial_goes_from_a_folder_of_images_to_a_model_elsewhere(tmp_path: Path) -> None:
    work, home = tmp_path / "work", tmp_path / "prefect"
    work.mkdir()
    shims(tmp_path / "bin")
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {
        "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}",
        "PYTHONPATH": str(Path.cwd()),
        "PREFECT_HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    told = ""
    for kind, code in BLOCKS:
        if kind in ("python", "yaml"):
            (work / code.splitlines()[0].removeprefix("# ")).write_text(code)
        if kind != "sh":
            continue
        script = re.sub(r"^diffem run photos.yaml", rf"\g<0> {SMALL}", code, flags=re.MULTILINE)
        done = subprocess.run(
            ["sh", "-ec", script], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{script}\n{done.stderr}"
        told += done.stdout + done.stderr
    assert RunStore.open(str(work / "runs/photos")).observations().truth() is None
    assert "Identifiable: every direction of x is observed" in told
    assert "do not look like" not in told
    assert (work / "runs/photos/report.html").stat().st_size > 10_000
    restored = xr.open_zarr(work / "restored/draws.zarr")
    assert dict(restored.sizes) == {"sample": 384, "draw": 8, "channel": 1, "y": 16, "x": 16}
    with Image.open(work / "samples.png") as picture:
        assert np.asarray(picture).std() > 0
    # However short the run: the mean of draws is nearer to the truth than the noisy images.
    (mean,) = re.findall(r"mean of 8: ([\d.]+)", told)
    assert float(mean) < 40
    (elsewhere,) = re.findall(r"\(8, 1, 16, 16\)\D+([\d.]+) grey levels from the truth", told)
    # A draw of a model that has hardly learned; one that was fed the wrong condition is noise
    # around grey, some 70 levels off and more.
    assert float(elsewhere) < 60
