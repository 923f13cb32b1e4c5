"""What `diffem bench core`, `e-step` and `m-step` measure and print."""

import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diffem_core import Denoiser, DiffusionPosterior
from pipelines import build
from pipelines.bench import speed_tables, timing
from pipelines.bench.core import CoreBenchmark, call_flops, rate_beside
from pipelines.bench.e_step import EStepBenchmark
from pipelines.bench.reference import references
from pipelines.cli import app

CPU = torch.device("cpu")


def denoiser_of(number: int) -> tuple[Denoiser, torch.Tensor, torch.Tensor]:
    config = references(None)[number].config
    channel = build.build_channel(config.channel, config.data.x_shape)
    denoiser = build.build_denoiser(config, channel, device=CPU)
    x = torch.zeros(1, *channel.x_shape)
    condition = torch.zeros(1, channel.condition_channels, *channel.x_shape[1:])
    return denoiser.eval(), x, condition


@pytest.mark.parametrize(("number", "known"), [(0, 19.45), (1, 0.631)])
def test_the_reference_networks_cost_what_is_known_of_them(number: int, known: float) -> None:
    denoiser, x, condition = denoiser_of(number)
    # The known ones see three bands less of a mask: 0.1 % of the arithmetic of the small one.
    assert call_flops(denoiser, x, condition) / 1e9 == pytest.approx(known, rel=3e-3)


def test_works_are_measured_in_turns() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    taken = timing.in_turns(
        {"a": lambda: work("a", 0.02), "b": lambda: work("b", 0.04)}, CPU, seconds=0.0, least=3
    )
    assert calls[-6:] == ["a", "b"] * 3
    assert [len(taken[name]) for name in "ab"] == [3, 3]
    assert timing.median(taken["b"]) > timing.median(taken["a"]) >= 0.02


def test_a_rate_stands_beside_the_convolution_in_the_same_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = {"own": [1.0, 5.0, 3.0], "float32": [2.0, 4.0, 8.0], "work": [2.0, 2.0, 6.0]}
    monkeypatch.setattr("pipelines.bench.core.in_turns", lambda *a, **k: turns)
    one, rate, ratio, plain = rate_beside(lambda: None, 6e9, CPU, "bfloat16", seconds=1.0)
    convolution = 2 * 32 * 1024 * 128 * 128 * 9
    assert (one, rate) == (2.0, 3.0)
    # The middle one of the turns' ratios 1/2, 5/2, 1/2, not the ratio 3/2 of the middle times.
    assert ratio == pytest.approx(6e9 / convolution / 2)
    assert plain == pytest.approx(convolution / 4.0 / 1e9)


def small_config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "tiny",
                "iterations": 1,
                "data": {"kind": "digits"},
                "channel": {"kind": "random_mask", "keep": 0.5, "noise_std": 0.4},
                "network": {
                    "kind": "unet",
                    "channels": [8],
                    "blocks": [1],
                    "attention": {},
                    "embedding": 8,
                },
                "e_step": {"sampler": {"kind": "ddpm", "steps": 3}, "batch_size": 4},
                "m_step": {"steps": 1, "batch_size": 4},
                "runner": {"device": "cpu", "threads": 1},
            }
        )
    )
    return str(path)


@pytest.mark.parametrize("command", ["core", "e-step", "m-step"])
def test_a_config_is_measured_and_told_as_json_or_as_a_table(command: str, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    arguments = ["bench", command, "--config", config, "--seconds", "0"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["device"] == "processor"
    for speed in told["speeds"]:
        assert (speed["network"], speed["batch"]) == ("tiny", 4)
        assert speed["images_s"] > 0
        assert 0 < speed["of_ceiling"] < 1
        assert speed["against_official"] is None
        assert 30 < speed["peak_mb"] < 20_000
    if command == "core":
        found = CoreBenchmark.model_validate(told)
        assert min(found.ceilings.model_dump().values()) > 0.1
        kinds = {(speed.work, speed.precision) for speed in found.speeds}
        assert len(kinds) == 4
    if command == "e-step":
        (speed,) = told["speeds"]
        assert speed["image_calls_s"] == pytest.approx(3 * speed["images_s"])
        assert 0 < speed["noise"] < 1
    if command == "m-step":
        assert told["speeds"][0]["waiting"] < 0.5
        shown = CliRunner().invoke(app, arguments)
        assert "ms/step" in shown.stdout
        assert "tiny" in shown.stdout


def test_batches_are_compared_beside_the_ceiling(tmp_path: Path) -> None:
    arguments = ("bench", "e-step", "--config", small_config(tmp_path), "--seconds", "0")
    result = CliRunner().invoke(app, [*arguments, "--batch", "3", "--batch", "40", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [speed["batch"] for speed in told["speeds"]] == [3, 40]
    found = EStepBenchmark.model_validate(told)
    first, second = found.speeds
    # The second was measured while the machine did something else as well.
    both = (
        first.model_copy(update={"of_ceiling": 0.3, "images_s": 100.0}),
        second.model_copy(update={"of_ceiling": 0.5, "images_s": 80.0}),
    )
    (line,) = speed_tables._fastest(found.model_copy(update={"speeds": both}))
    assert line == ("tiny, float32: fastest in batches of 40; --set e_step.batch_size=40")
    assert speed_tables._fastest(found.model_copy(update={"speeds": (first,)})) == []


def test_a_batch_without_memory_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(DiffusionPosterior, "sample", sample)
    arguments = ("bench", "e-step", "--config", small_config(tmp_path), "--seconds", "0")
    result = CliRunner().invoke(app, [*arguments, "--batch", "3"])
    assert result.exit_code == 2
    assert "has no memory for batches of 3; give smaller ones" in result.stderr


def test_overrides_need_a_config() -> None:
    result = CliRunner().invoke(app, ["bench", "core", "--set", "precision=bfloat16"])
    assert result.exit_code == 2
    assert "none was given; add --config CONFIG" in result.stderr
