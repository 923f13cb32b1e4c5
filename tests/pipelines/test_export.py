"""Exported models: loaded by their own tools, in a process without this package, and compared."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffem_core.denoiser import Denoiser
from diffem_core.grids import log_linear_grid
from diffem_core.networks.unet import UNet
from diffem_core.noise import SampleNoise
from diffem_core.samplers import ddim
from pipelines.export import graph
from pipelines.export.subject import Subject, choose_subject
from pipelines.using.run import Run, open_run
from storage_schemas.run_store import RunStore
from tests.command_line import diffem
from tests.pipelines.test_run import make_run
from tests.pipelines.used_run import bytes_of, run, used  # noqa: F401

pytestmark = pytest.mark.usefixtures("prefect_server")

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime: pip install 'diffem[export]'",
)
needs_diffusers = pytest.mark.skipif(
    find_spec("diffusers") is None, reason="needs diffusers: pip install 'diffem[hub]'"
)

ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffem_core", "storage_schemas", "pipelines"):
            raise ImportError(name + " is not to be needed")
sys.meta_path.insert(0, Blocked())
import numpy as np
given = dict(np.load("given.npz"))
"""


def exported(url: object, out: Path, *arguments: object) -> dict[str, Any]:
    result = diffem("export", url, out, *arguments, "--json")
    assert result.exit_code == 0, result.output
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


def alone(folder: Path, code: str, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Run code in the folder, in a process that cannot import this package."""
    np.savez(folder / "given.npz", **{k: np.asarray(v) for k, v in given.items()})
    script = f"{ALONE}\n{code}\nnp.savez('result.npz', **result)"
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(folder / ".hf")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "result.npz"))


def card_code(folder: Path) -> str:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]


def example(subject: Subject, n: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("x_t", "sigma_t", "condition")
    shapes = [argument.shape for argument in subject.example(n)]
    found = {
        name: torch.randn(shape, generator=generator)
        for name, shape in zip(names, shapes, strict=False)
    }
    return found | {"sigma_t": torch.tensor([0.01, 1.0, 50.0])}


def estimates(subject: Subject, given: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(subject.denoiser(*given.values()))


@pytest.mark.parametrize("what", ["posterior", "prior"])
def test_torch_export_computes_the_same_without_this_package(
    run: Run,  # noqa: F811
    tmp_path: Path,
    what: Any,
) -> None:
    exported(run.url, tmp_path / "out", "--format", "torch-export", "--what", what)
    subject = choose_subject(run, what)
    given = example(subject)
    code = (
        "import torch\n"
        "model = torch.export.load('model.pt2').module()\n"
        "names = [n for n in ('x_t', 'sigma_t', 'condition') if n in given]\n"
        "tensors = [torch.from_numpy(given[n]) for n in names]\n"
        "result = {'x_hat': model(*tensors).detach().numpy()}\n"
        f"exec({card_code(tmp_path / 'out')!r})\n"
        "result['x'] = x.detach().numpy()\n"
    )
    result = alone(tmp_path / "out", code, given)
    # Float32 sums in another order, on values of a few units.
    np.testing.assert_allclose(result["x_hat"], estimates(subject, given), atol=1e-5)
    assert result["x"].shape == (4, 1, 8, 8)


@needs_onnx
@pytest.mark.parametrize("what", ["posterior", "prior"])
def test_onnx_computes_the_same_in_its_own_runtime(
    run: Run,  # noqa: F811
    tmp_path: Path,
    what: Any,
) -> None:
    exported(run.url, tmp_path / "out", "--format", "onnx", "--what", what)
    subject = choose_subject(run, what)
    given = example(subject)
    code = (
        f"exec({card_code(tmp_path / 'out')!r})\n"
        "result = {'x_hat': session.run(None, given)[0], 'x': x.numpy()}\n"
    )
    result = alone(tmp_path / "out", code, given)
    # Another implementation of convolutions and exponentials: relative errors of 1e-6 or so.
    np.testing.assert_allclose(result["x_hat"], estimates(subject, given), atol=1e-4)
    assert result["x"].shape == (4, 1, 8, 8)


@pytest.fixture(scope="module")
def around(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, prefect_server: None
) -> Path:
    """A run whose denoiser is built around the Gaussian posterior."""
    url = tmp_path_factory.mktemp("around") / "tiny"
    make_run(url, tiny_config, "condition=gaussian_posterior", "iterations=1")
    return url


@pytest.mark.parametrize("format_", ["torch-export", pytest.param("onnx", marks=needs_onnx)])
def test_a_denoiser_around_the_gaussian_posterior_computes_the_same_elsewhere(
    around: Path, tmp_path: Path, format_: str
) -> None:
    exported(around, tmp_path / "out", "--format", format_)
    subject = choose_subject(open_run(str(around)), "posterior")
    given = example(subject)
    given["condition"] = given["condition"].abs() + 0.1  # standard deviations are among it
    code = (
        "import torch\n"
        "model = torch.export.load('model.pt2').module()\n"
        "tensors = [torch.from_numpy(given[n]) for n in ('x_t', 'sigma_t', 'condition')]\n"
        "result = {'x_hat': model(*tensors).detach().numpy()}\n"
        if format_ == "torch-export"
        else f"exec({card_code(tmp_path / 'out')!r})\n"
        "result = {'x_hat': session.run(None, given)[0]}\n"
    )
    result = alone(tmp_path / "out", code, given)
    assert np.isfinite(result["x_hat"]).all()
    np.testing.assert_allclose(result["x_hat"], estimates(subject, given), atol=1e-4)
    with np.errstate(all="ignore"):  # and the preconditioning is really in it
        assert not np.allclose(result["x_hat"], given["x_t"], atol=0.1)


def test_safetensors_hold_the_weights_and_the_config_builds_the_denoiser(
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    summary = exported(run.url, out, "--license", "cc-by-4.0")
    assert summary["format"] == "safetensors"
    digest = run.iterations[-1].model_digest
    config = json.loads((out / "config.json").read_text())
    assert config["files"]["model.safetensors"]["sha256"] == digest
    result = alone(out, f"exec({card_code(out)!r})\nresult = weights", {})
    network = config["network"]
    assert sum(array.size for array in result.values()) == network["parameters"]
    # Nothing but what config.json says goes into the network and its preconditioning.
    [channels] = config["x"]["shape"][:1]
    built = Denoiser(
        UNet(
            in_channels=channels,
            condition_channels=config["condition"]["shape"][0],
            out_channels=channels,
            channels=network["channels"],
            blocks=network["blocks"],
            embedding=network["embedding"],
            dropout=network["dropout"],
        ),
        sigma_data=config["denoiser"]["sigma_data"],
    ).eval()
    built.load_state_dict({name: torch.from_numpy(array) for name, array in result.items()})
    subject = choose_subject(run, "posterior")
    given = example(subject)
    with torch.no_grad():
        np.testing.assert_allclose(built(*given.values()), estimates(subject, given), atol=1e-5)
    assert (config["x"]["center"], config["x"]["scale"]) == (8.0, 0.25)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    psnr = run.iterations[-1].metrics.values["psnr_mean"].value  # type: ignore[union-attr]
    for text in ("240 observations", "`random_mask`", "keep: 0.5", f"| {psnr:.4g} |"):
        assert text in card


@pytest.mark.parametrize(
    "format_", ["safetensors", "torch-export", pytest.param("onnx", marks=needs_onnx)]
)
def test_equal_models_give_equal_bytes_without_paths(
    run: Run,  # noqa: F811
    tmp_path: Path,
    format_: str,
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    command = [sys.executable, "-m", "pipelines.cli", "export", run.url]
    subprocess.run([*command, str(first), "--format", format_], check=True, capture_output=True)
    exported(run.url, second, "--format", format_)
    assert bytes_of(first) == bytes_of(second)
    for name, data in bytes_of(first).items():
        for path in (str(tmp_path), os.path.dirname(graph.__file__), sys.prefix, run.url):  # noqa: PTH120
            assert path.encode() not in data, name
    assert exported(run.url, first, "--format", format_)["complete_before"]


@needs_diffusers
def test_diffusers_loads_and_runs_its_pipeline_without_this_package(
    tiny_config: Path, tmp_path: Path
) -> None:
    network = (
        "network={kind: diffusers, arguments: {block_out_channels: [8, 16], layers_per_block: 1, "
        "norm_num_groups: 4, down_block_types: [DownBlock2D, DownBlock2D], up_block_types: "
        "[UpBlock2D, UpBlock2D]}}"
    )
    make_run(tmp_path / "run", tiny_config, network, "iterations=1")
    out = tmp_path / "out"
    exported(tmp_path / "run", out, "--format", "diffusers")
    run = open_run(str(tmp_path / "run"))  # noqa: F811
    subject = choose_subject(run, "posterior")
    given = example(subject)
    code = (
        f"exec({card_code(out)!r})\n"
        "from torch import from_numpy as t\n"
        "s = t(given['sigma_t']).reshape(-1, 1, 1, 1)\n"
        "entry = torch.cat([t(given['x_t']) / (s**2 + 1).sqrt(), t(given['condition'])], 1)\n"
        "F = unet(entry, s.flatten().log()).sample\n"
        "x_hat = t(given['x_t']) / (s**2 + 1) + s / (s**2 + 1).sqrt() * F\n"
        "drawn = pipeline(t(given['condition']), latents=t(given['x_t']), num_inference_steps=5)\n"
        "result = {'x_hat': x_hat.detach().numpy(), 'drawn': drawn.numpy(), 'x': x.numpy()}\n"
    )
    result = alone(out, code, given)
    np.testing.assert_allclose(result["x_hat"], estimates(subject, given), atol=1e-5)
    # The pipeline is DDIM on the run's grid, from the same noise.
    schedule = run.config.schedule
    sigmas = log_linear_grid(schedule.sigma_max, schedule.sigma_min, 5)
    with torch.no_grad():
        drawn = ddim(
            lambda x, sigma: subject.denoiser(x, sigma, given["condition"]),
            sigmas=sigmas,
            noise=SampleNoise([0, 1, 2]),
            shape=(1, 8, 8),
            x_start=given["x_t"] * float(sigmas[0]),
        )
    # Five steps in float32 that begin at noise levels of 100, in grey levels (4 per unit).
    np.testing.assert_allclose(result["drawn"], run.bench.scaling.to_data(drawn), atol=1e-2)
    assert result["x"].shape == (4, 1, 8, 8)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*arguments: object) -> str:
        result = diffem("export", *arguments)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        return str(result.stderr)

    out = tmp_path / "out"
    assert "network.kind is 'unet'" in refused(run.url, out, "--format", "diffusers")
    assert "give one of safetensors" in refused(run.url, out, "--format", "pickle")
    assert "give one of posterior, prior" in refused(run.url, out, "--what", "start")
    assert "complete iterations 0 to 1" in refused(run.url, out, "--iteration", 7)
    assert "made after the last one" in refused(run.url, out, "--what", "prior", "--iteration", 0)
    assert "--license is 'a: b'" in refused(run.url, out, "--license", "a: b")
    assert "is not a run" in refused(tmp_path, out)
    monkeypatch.setattr(graph, "_ONNX_PACKAGES", ("no_such_package",))
    message = refused(run.url, out, "--format", "onnx")
    assert "pip install 'diffem[export]'" in message
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("")
    assert "holds something else (thesis.tex)" in refused(run.url, out)
    assert os.listdir(out) == ["thesis.tex"]  # noqa: PTH208


def test_a_damaged_model_is_not_exported(run: Run, tmp_path: Path) -> None:  # noqa: F811
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run.url, copy)
    model = copy / "iterations/001/model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    assert RunStore.open(str(copy)).completed()
    result = diffem("export", copy, tmp_path / "out")
    assert result.exit_code == 1
    assert "does not have the digest" in result.stderr
    assert not (tmp_path / "out").exists()
