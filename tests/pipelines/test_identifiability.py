"""`diffem check`: what a config's channel, a store or a run shows of x, in words, numbers and
pictures."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from diffem_core import Channel, PhysicsChannel, RandomMask
from pipelines.config_io import load_config
from pipelines.stages import fit_start, prepare_observations
from storage_schemas.run_store import RunStore
from tests import command_line
from tests.command_line import diffem, json_of
from tests.conftest import TINY

COUNT = 120
UNKNOWN_TRUTH = {"draws": 2}


def report_of(*arguments: object) -> dict[str, Any]:
    """Check, and return the report: the exit status is 0 whatever the verdict."""
    return json_of("check", *arguments)


def refused(*arguments: object) -> str:
    message = command_line.refused("check", *arguments)
    assert message.startswith("diffem: ")
    return message


def config_file(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


class LeftOrRight(RandomMask):
    """Shows either the left or the right half, never both."""

    def __init__(self, x_shape: tuple[int, ...]) -> None:
        super().__init__(x_shape, keep=1.0, noise_std=0.4)

    def draw_params(self, n: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        left = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        half = torch.arange(8).reshape(1, 1, 1, 8) < 4
        return {"mask": (left == half).float().expand(-1, 1, 8, 8).contiguous()}


BLOCKS = {"kind": "super_resolution", "factor": 2, "noise_std": 0.4}
SENSING = {"kind": "compressed_sensing", "measurements": 32, "noise_std": 0.4}
CASES: dict[str, tuple[dict[str, object], str, str]] = {
    # name: (channel, verdict, what the advice names)
    "mask": (TINY["channel"], "identifiable", ""),  # type: ignore[dict-item]
    "blur": (
        {"kind": "gaussian_blur", "sigma": 1.2, "noise_std": 0.4},
        "not",
        "channel.sigma: [0.4, 1.2]",
    ),
    "blurs": (
        {"kind": "gaussian_blur", "sigma": [0.3, 1.2], "noise_std": 0.4},
        "identifiable",
        "",
    ),
    "fixed blocks": ({**BLOCKS, "shifts": False}, "not", "channel.shifts: true"),
    "blocks": (BLOCKS, "partly", "blocks of more than one size"),
    "fixed projections": ({**SENSING, "fixed": True}, "not", "channel.fixed: false"),
    "projections": (SENSING, "identifiable", ""),
    "halves": (
        {"kind": "custom", "target": f"{__name__}:LeftOrRight"},
        "partly",
        "any two entries are sometimes seen together",
    ),
    "blur of deepinv": (
        {
            "kind": "deepinv",
            "physics": "BlurFFT",
            "arguments": {"filter": {"name": "gaussian_blur", "sigma": 2.0}},
            "noise": {"name": "GaussianNoise", "arguments": {"sigma": 0.4}},
        },
        "not",
        "channel.generator",
    ),
    "rounding": (
        {"kind": "quantization", "low": 0, "high": 16, "levels": 5},
        "undetermined",
        "channel.noise_std",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_config_gets_its_verdict_and_the_advice_that_fits(name: str, tmp_path: Path) -> None:
    channel, verdict, advice = CASES[name]
    start = {"kind": "pseudo_inverse"} if channel["kind"] == "quantization" else TINY["start"]
    report = report_of(config_file(tmp_path, channel=channel, start=start), "--samples", 128)
    assert report["verdict"] == verdict, report
    words = {"identifiable": "Identifiable", "partly": "Partly", "not": "Not identifiable"}
    assert report["summary"].startswith(words.get(verdict, "Cannot be told"))
    assert advice in " ".join(report["advice"])
    assert bool(report["advice"]) == (verdict != "identifiable")
    assert (report["observations"], report["size"], report["prior"]) == (200, 64, "stand_in")


def test_rare_operators_are_drawn_until_the_answer_is_settled(tmp_path: Path) -> None:
    channel = {"kind": "random_mask", "keep": 0.08, "noise_std": 0.4}
    report = report_of(config_file(tmp_path, channel=channel), "--samples", 16)
    assert report["settled"]
    assert report["operators"] > 16
    assert report["verdict"] == "identifiable"


def ingested(tmp_path: Path, *, hidden: bool, keep: float = 0.5) -> Path:
    """Ingest observations behind masks of one's own, of which no clean sample is known."""
    rng = np.random.default_rng(0)
    mask = (rng.random((COUNT, 1, 8, 8)) < keep).astype(np.float32)
    if hidden:
        mask[:, :, 2, 3] = 0
    y = rng.uniform(0, 16, mask.shape).astype(np.float32) * mask
    source, url = tmp_path / "masked.npz", tmp_path / "store"
    np.savez(source, y=y, mask=mask)
    result = diffem("ingest", source, url, "--y", "y", "--param", "mask", "--holdout", "20")
    assert result.exit_code == 0, result.output
    return url


def store_data(url: Path) -> dict[str, object]:
    return {"kind": "store", "url": str(url), "x_shape": [1, 8, 8], "value_range": [0, 16]}


def test_the_masks_of_a_store_are_judged_and_the_pixel_named(tmp_path: Path) -> None:
    data = store_data(ingested(tmp_path, hidden=True))
    channel = {"kind": "random_mask", "keep": 0.5, "noise_std": 0.4, "operators": "observed"}
    path = config_file(tmp_path, data=data, channel=channel, evaluation=UNKNOWN_TRUTH)
    report = report_of(path)
    assert (report["verdict"], report["operators_from"]) == ("partly", "observations")
    assert (report["never_seen"], report["operators"]) == ([[0, 2, 3]], 100)
    text = " ".join(report["findings"])
    assert "pixel (row, column) (2, 3)" in text
    assert "Crop away" in " ".join(report["advice"])
    shown = diffem("check", path)
    assert shown.exit_code == 0
    assert "Partly identifiable" in shown.stdout
    assert "(2, 3)" in shown.stdout


def test_masks_that_are_not_those_of_the_m_step_are_noticed(tmp_path: Path) -> None:
    data = store_data(ingested(tmp_path, hidden=False, keep=0.3))
    channel = {"kind": "random_mask", "keep": 0.6, "noise_std": 0.4}
    common: dict[str, object] = {"data": data, "evaluation": UNKNOWN_TRUTH}
    wrong = report_of(config_file(tmp_path, channel=channel, **common))
    assert "channel.operators: observed" in " ".join(wrong["advice"])
    assert wrong["seen_once"] == pytest.approx(0.3, abs=0.03)
    right = report_of(config_file(tmp_path, channel={**channel, "keep": 0.3}, **common))
    assert right["advice"] == []


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose start is fitted."""
    folder = tmp_path_factory.mktemp("begun")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    url = folder / "run"
    RunStore.create(str(url), load_config(str(config)))
    prepare_observations(str(url))
    fit_start(str(url))
    return url


def test_a_run_is_judged_by_its_own_observations_and_start(begun: Path) -> None:
    before = sorted(begun.rglob("*"))
    report = report_of(begun)
    assert (report["prior"], report["operators_from"]) == ("gaussian_start", "observations")
    masks = RunStore.open(str(begun)).observations("train").params()["mask"]
    assert report["operators"] == len(masks) == 200
    assert report["seen_once"] == pytest.approx(float(masks.mean()))
    assert report["verdict"] == "identifiable"
    assert sorted(begun.rglob("*")) == before, "nothing is written"
    # The start's variance per pixel is that of digits: far from even.
    assert report["signal_to_noise"] is not None


def test_mistakes_end_with_one_message(begun: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path)
    assert "no config at" in refused("nowhere.yaml")
    assert "is not a run" in refused(tmp_path)
    assert "what it is" in refused(begun, "--set", "seed=1")
    assert "at least 2" in refused(config, "--samples", 1)
    # What cannot be built is refused as `diffem run` refuses it.
    assert "give a divisor" in refused(
        config, "--set", "channel={kind: super_resolution, factor: 3, noise_std: 0.1}"
    )
    jpeg = "channel={kind: jpeg, quality: 50, low: 0, high: 16}"
    assert "needs a linear channel" in refused(config, "--set", jpeg)
    url = tmp_path / "new"
    RunStore.create(str(url), load_config(str(config)))
    assert "no observations yet" in refused(url)


@pytest.mark.parametrize("kind", ["image", "vector", "colour", "rounding"])
def test_pictures_are_drawn_where_they_are_asked_for(kind: str, tmp_path: Path) -> None:
    changes: dict[str, dict[str, object]] = {
        "image": {"channel": BLOCKS},
        "vector": {
            "data": {"kind": "manifold", "samples": 400, "holdout": 100},
            "channel": {"kind": "random_matrix", "rows": 2, "noise_std": 0.01},
            "network": {"kind": "mlp", "hidden": [8], "embedding": 8},
            "evaluation": {"draws": 2, "distance": {"kind": "sinkhorn", "samples": 100}},
        },
        "colour": {
            "data": {"kind": "photos", "samples": 200, "size": 8, "holdout": 40},
            "channel": {"kind": "denoising", "noise_std": 20.0},
            "evaluation": {"draws": 2, "distance": {"kind": "sliced_wasserstein"}},
        },
        "rounding": {
            "channel": {"kind": "quantization", "low": 0, "high": 16, "levels": 5},
            "start": {"kind": "pseudo_inverse"},
        },
    }
    folder = tmp_path / "pictures"
    config = config_file(tmp_path, **changes[kind])
    report = report_of(config, "--samples", 64, "--pictures", folder)
    assert report["pictures"] == ["tiny-identifiability.png"]
    assert [path.name for path in folder.iterdir()] == report["pictures"]
    image = Image.open(io.BytesIO((folder / report["pictures"][0]).read_bytes()))
    assert image.format == "PNG"
    assert image.size[0] > 1500
    assert len(image.convert("RGB").getcolors(2**24) or []) > 100, "something is drawn"


def test_a_channel_of_ones_own_is_a_channel(tmp_path: Path) -> None:
    assert issubclass(LeftOrRight, Channel)
    assert not issubclass(LeftOrRight, PhysicsChannel)
    shown = diffem("check", config_file(tmp_path, channel=CASES["halves"][0]))
    assert "never seen in one observation" in " ".join(shown.stdout.split())
