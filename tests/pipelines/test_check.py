"""A config that cannot run is refused before anything is written, with the remedy."""

from pathlib import Path

import pytest
import torch
import yaml

from diffem_core.channel import Channel
from diffem_core.physics_channels import denoising
from pipelines.check import check_config
from pipelines.config_io import ConfigError, load_config
from pipelines.launch import prepare_run
from tests.conftest import TINY

JPEG = {"kind": "jpeg", "quality": 50, "low": 0.0, "high": 16.0}
SENSING = {"kind": "compressed_sensing", "measurements": 32, "noise_std": 0.4}


def a_function(x: int) -> int:
    return x


def a_channel_of_another_shape(x_shape: tuple[int, ...]) -> Channel:
    return denoising((1, 4, 4), noise_std=1.0)


class SmallerNetwork(torch.nn.Module):
    def __init__(self, x_shape: tuple[int, ...], condition_channels: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(x_shape[0], x_shape[0], 3)

    def forward(
        self, x: torch.Tensor, c_noise: torch.Tensor, condition: torch.Tensor | None
    ) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


CASES = {
    "unknown channel": ({"channel": {"kind": "blurr"}}, "random_mask"),
    "unknown sampler": ({"e_step": {"sampler": {"kind": "euler", "steps": 3}}}, "dpm_solver"),
    "unknown physics": ({"channel": {"kind": "deepinv", "physics": "Blurring"}}, "BlurFFT"),
    "unknown generator": (
        {"channel": {"kind": "deepinv", "physics": "MRI", "generator": {"name": "Lines"}}},
        "GaussianMaskGenerator",
    ),
    "a network for vectors": ({"network": {"kind": "mlp"}}, "'unet', 'diffusers' or 'custom'"),
    "a channel for vectors": ({"channel": {"kind": "random_matrix"}}, "any but 'random_matrix'"),
    "MRI of real images": (
        {"channel": {"kind": "mri", "acceleration": 2, "center": 0.25, "noise_std": 0.1}},
        "two bands",
    ),
    "blocks that do not fit": (
        {"channel": {"kind": "super_resolution", "factor": 3, "noise_std": 0.1}},
        "give a divisor of both",
    ),
    "too many measurements": (
        {"channel": {**SENSING, "measurements": 65}},
        "give 1 to 64",
    ),
    "Gaussian start of JPEG": ({"channel": JPEG}, "needs a linear channel"),
    "EM-MMPS of JPEG": (
        {"channel": JPEG, "method": "em-mmps", "start": {"kind": "pseudo_inverse"}},
        "set method: diffem",
    ),
    "EM-MMPS warm start of EM-MMPS": (
        {"method": "em-mmps", "start": {"kind": "mmps", "laps": 1}},
        "take another start",
    ),
    "nothing but warm start": ({"start": {"kind": "mmps", "laps": 2}}, "set method: em-mmps"),
    "joint prior of EM-MMPS": (
        {"method": "em-mmps", "prior": {"kind": "joint"}},
        "leave prior out",
    ),
    "more components than entries": (
        {"method": "em-mmps", "mmps": {"covariance": "cov_x", "rank": 64}},
        "give 1 to 63",
    ),
    "sigma reversed": (
        {"schedule": {"kind": "ve_karras", "sigma_min": 10, "sigma_max": 1}},
        "swap them",
    ),
    "times outside the schedule": (
        {"time": {"kind": "log_normal", "mean": 60.0, "std": 0.1}},
        "move the mean into it",
    ),
    "no steps": ({"e_step": {"sampler": {"kind": "ddim", "steps": 0}}}, "greater than 0"),
    "colours of grey images": (
        {"m_step": {"steps": 1, "augmentation": {"hue": 0.1}}},
        "hue and saturation need 3 bands",
    ),
    "changed images, fixed observations": (
        {"m_step": {"steps": 1, "augmentation": {}, "recorruption": "fixed"}},
        "take 'fresh'",
    ),
    "a module that is not there": (
        {"channel": {"kind": "custom", "target": "no_such_module:Channel"}},
        "cannot be imported",
    ),
    "a class that is not there": (
        {"channel": {"kind": "custom", "target": "diffem_core.channel:RandomMusk"}},
        "RandomMask",
    ),
    "arguments that it does not take": (
        {
            "channel": {
                "kind": "custom",
                "target": "diffem_core.physics_channels:denoising",
                "arguments": {"noise": 1},
            }
        },
        "which it does not take",
    ),
    "a channel that is none": (
        {"channel": {"kind": "custom", "target": f"{__name__}:a_function"}},
        "no diffem_core.Channel",
    ),
    "a channel of another shape": (
        {"channel": {"kind": "custom", "target": f"{__name__}:a_channel_of_another_shape"}},
        r"samples of shape \(1, 4, 4\) but the data's have \(1, 8, 8\)",
    ),
    "a network of another shape": (
        {"network": {"kind": "custom", "target": f"{__name__}:SmallerNetwork"}},
        r"shape \(1, 1, 6, 6\) for samples of shape \(1, 1, 8, 8\)",
    ),
    "no operators to resample": (
        {
            "channel": {
                "kind": "super_resolution",
                "shifts": False,
                "noise_std": 0.1,
                "operators": "observed",
            }
        },
        "set channel.operators: drawn",
    ),
    "a rank that is too large": (
        {"start": {"kind": "gaussian", "rank": 500}},
        "give 1 to 64, or None",
    ),
    "a covariance that is too large": (
        {
            "data": {"kind": "mnist5k", "holdout": 40, "limit": 240},
            "channel": {**SENSING, "measurements": 300},
        },
        "set rank",
    ),
    "components of a warm start": (
        {
            "start": {"kind": "mmps", "laps": 1},
            "mmps": {"covariance": "cov_x", "rank": 64},
        },
        "give 1 to 63",
    ),
    "conditions of EM-MMPS": (
        {"method": "em-mmps", "condition": "gaussian_mean"},
        "whose network sees no condition",
    ),
    "corruptions of EM-MMPS": (
        {"method": "em-mmps", "m_step": {"steps": 1, "recorruption": "fixed"}},
        "corrupts nothing",
    ),
    "a condition without its prior": (
        {"condition": "gaussian_mean", "start": {"kind": "pseudo_inverse"}},
        "take start.kind 'gaussian' or 'mmps'",
    ),
    "a condition that cannot be dropped": (
        {"condition": "gaussian_posterior", "prior": {"kind": "joint"}},
        "cannot be dropped; take 'unconditional'",
    ),
    "annealing upwards": (
        {"e_step": {"sampler": {"kind": "ddim", "steps": 3}, "annealing": {"first": 4}}},
        "begins with fewer steps",
    ),
    "stopping early, and counting on all steps": (
        {
            "m_step": {
                "steps": 5,
                "validation": {"patience": 1},
                "learning_rate": {"kind": "linear", "over": "run"},
            }
        },
        "leave patience out",
    ),
    "a prior's rate over the run": (
        {
            "prior": {
                "kind": "unconditional",
                "steps": 1,
                "learning_rate": {"kind": "linear", "over": "run"},
            }
        },
        "trained once",
    ),
    "a start that is not there": (
        {"start": {"kind": "model", "url": "no/such/model.safetensors"}},
        "there is no model at",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    changes, message = CASES[case]
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    with pytest.raises((ConfigError, ValueError), match=message):
        prepare_run(load_config(str(path)), str(run), take_over=False)
    assert not run.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel": SENSING},
        {"channel": {**SENSING, "fixed": True}},
        {"channel": JPEG, "start": {"kind": "pseudo_inverse"}},
        {"channel": {"kind": "poisson", "gain": 1.0}, "start": {"kind": "pseudo_inverse"}},
        {"method": "em-mmps", "mmps": {"covariance": "cov_x"}},
        {"prior": {"kind": "joint"}, "start": {"kind": "mmps", "laps": 1}},
        {"channel": {**TINY["channel"], "operators": "observed"}},
        {"precision": "bfloat16"},
        {"condition": "gaussian_posterior"},
    ],
)
def test_others_are_not(changes: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    check_config(load_config(str(path)))


@pytest.mark.parametrize("path", sorted(Path("deploy/experiments").glob("*.yaml")), ids=str)
def test_every_ready_experiment_can_run(path: Path) -> None:
    config = load_config(str(path))
    if config.data.kind == "store":
        pytest.skip("for data of one's own: see test_costs.py")
    check_config(config)
