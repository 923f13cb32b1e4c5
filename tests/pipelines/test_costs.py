"""What a dry run says that a run costs: rates, what the plan makes of them, and advice."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from pipelines import build
from pipelines.cli import app
from pipelines.config_io import load_config
from pipelines.costs import Affine, NetworkRates, Rates, advice, forecast, measuring, network_flops
from pipelines.costs.forecast import PER_ITERATION, PER_SHARD, STARTING
from pipelines.costs.rehearsal import rehearse
from pipelines.plan import Plan, make_plan
from storage_schemas.config import RunConfig
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import ObservationBlock, write_observations
from tests.conftest import TINY

PAPER = sorted(Path("deploy/experiments").glob("paper_*.yaml"))

NETWORK = NetworkRates(
    call=Affine(fixed=0.01, each=0.001),
    sample=0.0005,
    step=Affine(fixed=0.02, each=0.002),
    warm_up=0.5,
    sampling_bytes=1_000,
    training_bytes=2_000,
    extrapolated=False,
)
RATES = Rates(
    device="cpu",
    threads=1,
    seconds=1.0,
    contention=1.0,
    load=0.1,
    observe=0.001,
    fit_round=Affine(fixed=0.1, each=0.01),
    fit_first=Affine(fixed=0.03, each=0.0002),
    start_draw=0.003,
    shard=0.05,
    training=0.2,
    checkpoint=0.1,
    judge_first=3.0,
    judge=0.7,
    commit=0.04,
    conditional=NETWORK,
    unconditional=NETWORK.model_copy(update={"call": Affine(fixed=0.0, each=0.01)}),
    base_bytes=10_000,
    fit_bytes=500,
    judge_bytes=700,
    observation_bytes=100.0,
    reconstruction_bytes=40.0,
    evaluation_bytes=30,
)


def tiny(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({**TINY, **changes})


def test_samples_are_drawn_in_batches_and_the_last_is_smaller() -> None:
    # 2 batches of 32 and one of 5, 3 calls each.
    expected = 69 * 0.0005 + 3 * (3 * 0.01 + 69 * 0.001)
    assert NETWORK.draw(69, 32, 3) == pytest.approx(expected)
    assert NETWORK.draw(0, 32, 3) == 0


def test_costs_are_amounts_times_rates() -> None:
    config = tiny()
    found = forecast(config, make_plan(config), RATES)
    evaluated = 2 * 40 + 64
    draw_evaluation = NETWORK.draw(evaluated, 32, 3)
    shards = 4 * NETWORK.draw(50, 32, 3)
    step = 12 * (0.02 + 16 * 0.002)
    expected = {
        "starting Prefect and PyTorch": STARTING,
        "observations": 0.1 + 240 * 0.001,
        "start": 4 * (0.1 + 200 * 0.01) + 0.03 + 200 * 0.0002 + evaluated * 0.003 + 3.0,
        "E-steps": 2 * 4 * 0.05 + 200 * 0.003 + shards,
        "M-steps": 2 * (step + 0.2) + 0.5,  # a process warms up once
        "evaluations": 2 * (draw_evaluation + 0.7),
        "flow runs and commits": 2 * (0.04 + PER_ITERATION + 4 * PER_SHARD),
    }
    assert {s.stage: s.seconds for s in found.stages} == pytest.approx(expected)
    assert found.seconds == pytest.approx(sum(expected.values()))
    assert found.stage("observations").stored == 240 * 100
    assert found.stored == sum(stage.stored for stage in found.stages)
    assert found.memory == max(stage.memory for stage in found.stages)
    both = forecast(config, make_plan(config), RATES, workers=2)
    assert both.stage("E-steps").seconds == pytest.approx(expected["E-steps"] / 2)
    assert both.stage("M-steps").seconds == pytest.approx(expected["M-steps"])


def test_a_busy_machine_delays_what_is_not_rehearsed_too() -> None:
    config = tiny()
    busy = forecast(config, make_plan(config), RATES.model_copy(update={"contention": 3.0}))
    assert busy.stage("starting Prefect and PyTorch").seconds == 3 * STARTING
    assert busy.stage("E-steps") == forecast(config, make_plan(config), RATES).stage("E-steps")


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"e_step": {**TINY["e_step"], "sampler": {"kind": "heun", "steps": 9}}}, "E-steps"),
        ({"method": "em-mmps"}, "E-steps"),
        ({"start": {"kind": "gaussian", "iterations": 8}}, "start"),
        ({"m_step": {**TINY["m_step"], "first_steps": 40}}, "M-steps"),
        ({"m_step": {**TINY["m_step"], "batch_size": 64}}, "M-steps"),
        ({"evaluation": {**TINY["evaluation"], "draws": 9}}, "evaluations"),
        ({"iterations": 3}, "flow runs and commits"),
    ],
)
def test_what_a_config_asks_more_of_costs_more(changes: dict[str, Any], stage: str) -> None:
    before, after = (
        forecast(config, make_plan(config), RATES) for config in (tiny(), tiny(**changes))
    )
    assert after.stage(stage).seconds > 1.2 * before.stage(stage).seconds


def test_lazy_and_annealed_e_steps_cost_less() -> None:
    e_step = {**TINY["e_step"], "sampler": {"kind": "ddpm", "steps": 16}}
    costs = [
        forecast(config, make_plan(config), RATES).last_iteration["e_step"]
        for config in (
            tiny(e_step=e_step),
            tiny(e_step={**e_step, "refresh": 0.5}),
            tiny(e_step={**e_step, "annealing": {"first": 2, "iterations": 10}}),
        )
    ]
    assert costs[1] < 0.7 * costs[0]
    assert costs[2] < 0.4 * costs[0]


def test_a_prior_is_a_stage_of_its_own() -> None:
    config = tiny(prior={"kind": "unconditional", "steps": 100, "batch_size": 8, "samples": 32})
    cost = forecast(config, make_plan(config), RATES).stage("prior")
    network = RATES.unconditional
    assert network is not None
    steps = 100 * network.step(8) + RATES.training
    assert cost.seconds == pytest.approx(steps + network.draw(32, 32, 3) + RATES.judge)


def test_advice_names_what_stands_out_and_nothing_else() -> None:
    config = tiny()
    plan = make_plan(config)
    quiet = RATES.model_copy(update={"judge": 0.0})
    assert advice(config, plan, forecast(config, plan, quiet)) == ()
    slow = RATES.model_copy(update={"judge": 50.0})
    (line,) = advice(config, plan, forecast(config, plan, slow))
    assert line.startswith("evaluations take 79%")
    assert "evaluation.monitors (7 of them)" in line
    many = tiny(e_step={**TINY["e_step"], "sampler": {"kind": "ddpm", "steps": 256}}, iterations=9)
    lines = advice(many, make_plan(many), forecast(many, make_plan(many), RATES))
    assert any(line.startswith("256 network calls per sample") for line in lines)
    clumsy = RATES.model_copy(update={"shard": 5.0})
    lines = advice(config, plan, forecast(config, plan, clumsy))
    assert any("raise e_step.shard_size" in line for line in lines)


def test_arithmetic_is_counted_without_doing_any() -> None:
    config = tiny()
    channel = build.build_channel(config.channel, config.data.x_shape)
    counted = network_flops(config, channel)
    assert counted is not None
    # The convolutions alone: 3 x 3 from image and condition to 8, two in each of 2 blocks, to 1.
    first = 1 + channel.condition_channels
    least = 2 * 64 * 9 * 8 * (first + 2 * 2 * 8)
    assert least < counted < 3 * least
    unconditional = network_flops(config, channel, conditional=False)
    assert unconditional == counted - 2 * 64 * 9 * 8 * channel.condition_channels
    custom = tiny(network={"kind": "custom", "target": "torch.nn:Identity"})
    assert network_flops(custom, channel) is None


def test_the_peak_is_what_was_taken_inside() -> None:
    # In a process of its own: what other tests have left may be given back meanwhile.
    program = (
        "import numpy as np, torch\n"
        "from pipelines.costs.peaks import peak_memory\n"
        "with peak_memory(torch.device('cpu')) as full:\n"
        "    block = np.ones(8_000_000)\n"
        "    del block\n"
        "with peak_memory(torch.device('cpu')) as empty:\n"
        "    pass\n"
        "print(full.bytes, empty.bytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    full, empty = map(int, done.stdout.split())
    assert 60e6 < full < 120e6
    assert empty < 20e6


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment only."""
    monkeypatch.setattr(measuring, "BUDGET", 0.02)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "em-mmps"},
        {"start": {"kind": "mmps", "laps": 1, "gaussian": {"iterations": 2}}},
        {
            "start": {"kind": "pseudo_inverse"},
            "prior": {"kind": "unconditional", "steps": 5, "batch_size": 8, "samples": 16},
        },
        {"e_step": {**TINY["e_step"], "annealing": {"first": 1}, "refresh": 0.5}},
    ],
    ids=["diffem", "em-mmps", "warm", "prior", "annealed"],
)
def test_a_rehearsal_measures_every_network_of_the_run(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    rates = rehearse(config)
    plan = make_plan(config)
    found = forecast(config, plan, rates)
    assert 0 < found.seconds < 600
    for network in (rates.conditional, rates.unconditional):
        if network is not None:
            assert network.call(32) > 0
            assert network.step(16) > 0
    wanted = {not config.is_mmps(k) for k in range(2)} | ({False} if config.prior else set())
    assert {rates.conditional is not None, rates.unconditional is not None} == (
        {True} if wanted == {True, False} else {True, False}
    )
    assert rates.reconstruction_bytes == pytest.approx(64 * 4, rel=0.5)
    assert rates.base_bytes > 50e6


@pytest.mark.usefixtures("hasty")
def test_a_dry_run_tells_the_cost_and_leaves_nothing(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    store = ["--store", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["run", str(tiny_config), *store, "--dry-run"])
    assert result.exit_code == 0, result.output
    for words in ("the whole run", "E-steps", "flow runs and commits", "last iteration: E-step"):
        assert words in result.stdout
    assert list(tmp_path.iterdir()) == []
    result = CliRunner().invoke(app, ["run", str(tiny_config), *store, "--dry-run", "--json"])
    told = json.loads(result.stdout)
    assert told["plan"]["shards"] == 4
    assert told["cost"]["seconds"] == pytest.approx(
        sum(stage["seconds"] for stage in told["cost"]["stages"])
    )
    assert told["where"].endswith("(new)")
    assert list(tmp_path.iterdir()) == []


def test_without_calibration_nothing_is_measured(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.plan.rehearse", lambda _: pytest.fail("measured"))
    options = ["--store", str(tmp_path / "run"), "--dry-run", "--no-calibration"]
    result = CliRunner().invoke(app, ["run", str(tiny_config), *options])
    assert result.exit_code == 0, result.output
    assert "shards per E-step" in result.stdout
    assert "the whole run" not in result.stdout
    result = CliRunner().invoke(app, ["run", str(tiny_config), *options, "--json"])
    assert json.loads(result.stdout)["cost"] is None


def test_json_is_of_dry_runs(tiny_config: Path, tmp_path: Path) -> None:
    options = ["--store", str(tmp_path / "run"), "--json"]
    result = CliRunner().invoke(app, ["run", str(tiny_config), *options])
    assert result.exit_code == 2
    assert "--json goes with --dry-run" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_settings_can_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data that stand in for the user's own."""
    config = load_config(str(path))
    monkeypatch.chdir(tmp_path)
    if config.data.kind == "store":
        _write_some(config, samples=12)
    plan = make_plan(config)
    assert plan.flops is not None
    assert (plan.training, plan.holdout) == (
        (8, 4) if config.data.kind == "store" else (65_536, 1024)
    )
    expected = {"paper-manifold": 4096, "paper-celeba-mask50": 64}
    assert plan.calls == expected.get(config.name, 256)
    assert config.m_step.steps * config.m_step.batch_size == pytest.approx(
        {"paper-manifold": 1024, "paper-celeba-mask50": 64}.get(config.name, 256)
        * {"paper-manifold": 65_536, "paper-celeba-mask50": 202_599}.get(config.name, 50_000),
        rel=1e-3,
    )


def _write_some(config: RunConfig, *, samples: int) -> None:
    """Write observations of white noise where the config looks for them."""
    channel = build.build_channel(config.channel, config.data.x_shape)
    generator = torch.Generator().manual_seed(0)
    x = 128 + 32 * torch.randn(samples, *channel.x_shape, generator=generator)
    params = channel.draw_params(samples, generator=generator)
    block = ObservationBlock(
        sample=np.arange(samples),
        holdout=np.arange(samples) < 4,
        y=channel.corrupt(x, params, generator=generator).numpy(),
        params={name: value.numpy() for name, value in params.items()},
    )
    assert config.data.kind == "store"
    write_observations(
        ObjectStore(config.data.url),
        [block],
        x_shape=channel.x_shape,
        units="1",
        source="noise",
        attributes={},
    )


def test_the_paper_files_state_their_costs_and_where_they_differ() -> None:
    assert len(PAPER) == 4
    for path in PAPER:
        text = path.read_text()
        assert "FLOP" in text
        assert "Not the same" in text or "NOT THE PAPER'S" in text
        assert yaml.safe_load(text)["name"] == path.stem.replace("_", "-")


def test_plans_of_a_large_run_stay_numbers() -> None:
    config = tiny()
    plan: Plan = replace(make_plan(config), training=10**8, shards=math.ceil(10**8 / 64))
    large = tiny(iterations=1)
    found = forecast(large, plan, RATES)
    assert found.stored > 10**8 * RATES.reconstruction_bytes
