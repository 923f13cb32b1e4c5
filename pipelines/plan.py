"""What a run is going to do, before it does anything: shards, network calls, and their cost."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import assert_never

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from pipelines import build
from pipelines.check import check_config
from pipelines.costs import Forecast, advice, forecast, network_flops, rehearse
from pipelines.costs.forecast import workers_note
from pipelines.costs.rehearsal import POOL, workers_of
from pipelines.evaluation import work_of
from pipelines.ingest.stored import stored_seal
from pipelines.sources import load_clean_samples
from storage_schemas.config import (
    JointPrior,
    ModelStart,
    RunConfig,
    StoreData,
    UnconditionalPrior,
)
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.run_store import RunStore

__all__ = ["Plan", "estimate", "make_plan", "print_plan"]

_FLOAT = 4
_WIDTHS = {"float32": 4, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Amounts of work of a whole run, before compression and without what is done already."""

    training: int
    """Observations of the training split."""
    holdout: int
    """Held-out observations."""
    shards: int
    """E-step shards per iteration."""
    parameters: int
    """Weights of the network."""
    flops: int | None
    """Floating-point operations of one network call for one sample; None if it is the user's
    own."""
    x_size: int
    """Numbers in a clean sample."""
    calls: int
    """Network calls per sample of an evaluation."""
    evaluated: int
    """Samples that an evaluation draws."""
    e_step_calls: int
    """Network calls (forward, per sample) of all E-steps; the first one has none."""
    m_step_calls: int
    """Network calls (forward and backward, per sample) of all M-steps."""
    evaluation_calls: int
    """Network calls of an evaluation."""
    prior_calls: tuple[int, int]
    """Network calls of the prior: in its training, and for its samples."""
    observation_bytes: int
    """Bytes of the observations, with parameters and clean samples."""
    iteration_bytes: int
    """Bytes of an iteration: reconstructions and model."""
    e_step_memory: int
    """Bytes of model and batch in an E-step, activations not counted."""
    m_step_memory: int
    """Bytes of reconstructions, weights, gradients, average and moments in an M-step."""


def make_plan(config: RunConfig) -> Plan:
    """Count the work of a run.

    Arguments:
        config: The config.

    Returns:
        The amounts.

    Raises:
        ValueError: If the config does not fit the data or the machine.
    """
    check_config(config)
    samples, holdout, truth = _amounts(config)
    x_shape = config.data.x_shape
    device = build.build_device(config.runner)
    channel = build.build_channel(config.channel, x_shape)
    channel = build.build_conditioning_channel(config, channel, build.stand_in_prior(channel))
    conditional = not config.is_mmps(config.iterations - 1)
    denoiser = build.build_denoiser(config, channel, device=device, conditional=conditional)
    parameters = sum(p.numel() for p in denoiser.parameters())
    training = samples - holdout
    x_size, y_size = math.prod(x_shape), math.prod(channel.y_shape)
    params_size = sum(math.prod(shape) for shape in channel.params_spec.values())
    calls = build.network_calls(config.e_step.sampler)
    drawn = work_of(config.evaluation, holdout=holdout, others=min(training, POOL))
    condition = channel.condition_channels * math.prod(x_shape[1:])
    return Plan(
        training=training,
        holdout=holdout,
        shards=math.ceil(training / config.e_step.shard_size),
        parameters=parameters,
        flops=network_flops(config, channel, conditional=conditional),
        x_size=x_size,
        calls=calls,
        evaluated=drawn,
        e_step_calls=sum(
            round(training * config.e_step.refresh)
            * build.network_calls(build.sampler_of(config.e_step, k))
            for k in range(0 if isinstance(config.start, ModelStart) else 1, config.iterations)
        ),
        m_step_calls=sum(build.m_step_length(config, k) for k in range(config.iterations))
        * config.m_step.batch_size,
        evaluation_calls=drawn * calls,
        prior_calls=_prior_calls(config, calls),
        observation_bytes=samples * (truth * x_size + y_size + params_size) * _FLOAT,
        iteration_bytes=training * x_size * _WIDTHS[config.e_step.stored_as] + parameters * _FLOAT,
        e_step_memory=(parameters + config.e_step.batch_size * (3 * x_size + condition)) * _FLOAT,
        m_step_memory=(5 * parameters + training * x_size) * _FLOAT,
    )


def _prior_calls(config: RunConfig, calls: int) -> tuple[int, int]:
    """Count the network calls of the prior's training and of its samples."""
    match config.prior:
        case None:
            return 0, 0
        case UnconditionalPrior() as prior:
            return prior.steps * prior.batch_size, prior.samples * calls
        case JointPrior() as prior:
            return 0, prior.samples * calls
    assert_never(config.prior)


def _amounts(config: RunConfig) -> tuple[int, int, bool]:
    """Return how many samples there are, how many held out, and whether clean ones are known."""
    if isinstance(config.data, StoreData):
        seal = stored_seal(config.data)
        return seal.samples, seal.holdout, seal.truth
    return len(load_clean_samples(config.data, seed=0).x), config.data.holdout, True


def print_plan(
    config: RunConfig, url: str, *, calibrate: bool = True, as_json: bool = False
) -> None:
    """Print the resolved config, the plan and what it costs; nothing is written that stays.

    Arguments:
        config: The config.
        url: Where the run lives, or is to live.
        calibrate: Measure this machine for some seconds, to tell seconds, memory and bytes.
        as_json: Print one JSON object to standard output instead.

    Raises:
        ValueError: If the config does not fit the data, the machine, or the run at `url`.
    """
    plan = make_plan(config)
    where = _where(config, url)
    found = estimate(config, plan) if calibrate else None
    hints = () if found is None else advice(config, plan, found)
    if as_json:
        told = {
            "config": config.model_dump(mode="json"),
            "plan": asdict(plan),
            "cost": None if found is None else found.model_dump(mode="json"),
            "advice": list(hints),
            "where": where,
        }
        print(json.dumps(told, indent=2, allow_nan=False))
        return
    console = Console()
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    _print_amounts(console, config, plan, where)
    if found is not None:
        _print_costs(console, config, found)
    for line in hints:
        console.print(f"cheaper: {line}", highlight=False, markup=False, soft_wrap=True)


def estimate(config: RunConfig, plan: Plan) -> Forecast:
    """Measure this machine for some seconds, and predict what a run costs.

    Arguments:
        config: The config.
        plan: Its amounts, by `make_plan`.
    """
    workers = workers_of(config, build.build_device(config.runner))
    return forecast(config, plan, rehearse(config), workers=workers)


def _print_amounts(console: Console, config: RunConfig, plan: Plan, where: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="Plan", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    trained, sampled = plan.prior_calls
    arithmetic = "not known" if plan.flops is None else f"{plan.flops / 1e9:,.3g} GFLOP"
    for name, value in (
        ("EM iterations", f"{config.iterations}"),
        ("observations: training, held out", f"{plan.training:,}, {plan.holdout:,}"),
        ("shards per E-step", f"{plan.shards}"),
        ("weights of the network", f"{plan.parameters:,}"),
        ("a network call for one sample", arithmetic),
        ("network calls: all E-steps (forward; EM-MMPS: and backward)", f"{plan.e_step_calls:,}"),
        ("network calls: all M-steps (forward and backward)", f"{plan.m_step_calls:,}"),
        ("network calls: prior (training, samples)", f"{trained:,}, {sampled:,}"),
        ("network calls: all evaluations", f"{plan.evaluation_calls * config.iterations:,}"),
        ("bytes: observations, uncompressed", _bytes(plan.observation_bytes)),
        ("bytes: iterations, uncompressed", _bytes(plan.iteration_bytes * config.iterations)),
        ("memory: E-step, activations not counted", _bytes(plan.e_step_memory)),
        ("memory: M-step, activations not counted", _bytes(plan.m_step_memory)),
        ("where", where),
    ):
        table.add_row(name, value)
    console.print(table)


def _print_costs(console: Console, config: RunConfig, found: Forecast) -> None:
    rates = found.rates
    threads = f"{rates.threads} thread{'s' * (rates.threads > 1)}"
    title = f"Cost on this machine as it is now ({rates.device}, {threads})"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("stage", "time", "share", "memory", "stored"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for cost in found.stages:
        share = f"{cost.seconds / found.seconds:.0%}"
        table.add_row(
            cost.stage, _duration(cost.seconds), share, _bytes(cost.memory), _bytes(cost.stored)
        )
    table.add_section()
    table.add_row(
        "the whole run",
        _duration(found.seconds),
        "100%",
        _bytes(found.memory),
        _bytes(found.stored),
    )
    console.print(table)
    last = found.last_iteration
    parts = ", ".join(
        f"{name} {_duration(last[key])}"
        for name, key in (("E-step", "e_step"), ("M-step", "m_step"), ("evaluation", "evaluate"))
    )
    notes = [f"last iteration: {parts}", f"measured in {rates.seconds:.1f} s"]
    if note := workers_note(config, found.workers):
        notes.append(note)
    networks = (rates.conditional, rates.unconditional)
    if any(network is not None and network.extrapolated for network in networks):
        notes.append("smaller batches were measured than those of the config")
    console.print("; ".join(notes), highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    for unit, size in (("min", 60), ("h", 3600), ("days", 86_400)):
        if seconds < 100 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds / (365.25 * 86_400):,.1f} years"


def _where(config: RunConfig, url: str) -> str:
    """Say whether the run is new, goes on, or is another one."""
    objects = ObjectStore(url)
    if not objects.exists("run.json"):
        return f"{redact_url(url)} (new)"
    store = RunStore.open(objects)
    if store.config.digest != config.digest:
        RunStore.create(objects, config)  # refuses, with the difference
    return f"{redact_url(url)} (goes on after {len(store.completed())} iterations)"


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"
