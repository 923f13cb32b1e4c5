"""What a run is going to do, before it does anything: shards, network calls, bytes, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import assert_never

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from pipelines import build
from pipelines.check import check_config
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

__all__ = ["Plan", "make_plan", "print_plan"]

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
    drawn = work_of(config.evaluation, holdout=holdout, others=training)
    condition = channel.condition_channels * math.prod(x_shape[1:])
    return Plan(
        training=training,
        holdout=holdout,
        shards=math.ceil(training / config.e_step.shard_size),
        parameters=parameters,
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


def print_plan(config: RunConfig, url: str) -> None:
    """Print the resolved config and the plan; write nothing.

    Raises:
        ValueError: If the config does not fit the data, the machine, or the run at `url`.
    """
    plan = make_plan(config)
    console = Console()
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, title="Plan", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    trained, sampled = plan.prior_calls
    for name, value in (
        ("EM iterations", f"{config.iterations}"),
        ("observations: training, held out", f"{plan.training:,}, {plan.holdout:,}"),
        ("shards per E-step", f"{plan.shards}"),
        ("weights of the network", f"{plan.parameters:,}"),
        ("network calls: all E-steps (forward; EM-MMPS: and backward)", f"{plan.e_step_calls:,}"),
        ("network calls: all M-steps (forward and backward)", f"{plan.m_step_calls:,}"),
        ("network calls: prior (training, samples)", f"{trained:,}, {sampled:,}"),
        ("network calls: all evaluations", f"{plan.evaluation_calls * config.iterations:,}"),
        ("bytes: observations, uncompressed", _bytes(plan.observation_bytes)),
        (
            "bytes: iterations, uncompressed",
            _bytes(plan.iteration_bytes * config.iterations),
        ),
        ("memory: E-step, activations not counted", _bytes(plan.e_step_memory)),
        ("memory: M-step, activations not counted", _bytes(plan.m_step_memory)),
        ("where", _where(config, url)),
    ):
        table.add_row(name, value)
    console.print(table)


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
