"""Seconds, memory and bytes of every stage of a run, from its plan and from measured rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from pipelines import build
from pipelines.costs.rates import NetworkRates, Rates
from storage_schemas._base import Record
from storage_schemas.config import (
    GaussianStart,
    JointPrior,
    LocalRunner,
    MMPSStart,
    ModelStart,
    RunConfig,
    UnconditionalPrior,
)

if TYPE_CHECKING:
    from pipelines.plan import Plan

__all__ = ["Forecast", "StageCost", "forecast"]

STARTING = 10.0
"""Seconds from the command to the first stage; on 2 cores 11.4 with the embedded server, and 7.5
with one that is there."""
PER_ITERATION = 0.6
"""Seconds of an iteration's flow run, its tasks and its artifacts."""
PER_SHARD = 0.01
"""Seconds of a task run: 9.4 ms on the embedded server, 7 to 15 ms on one of its own."""
PREFECT_BYTES = 150 * 2**20
"""Memory that Prefect takes in the process of a run, beside its server."""
PER_SHARD_BYTES = 17_000
"""Memory that Prefect keeps of each task run until the flow run ends: 16 MB for 1,000."""
MANIFEST_BYTES = 750
"""Bytes of a shard's manifest, and of its line in the iteration's."""


class StageCost(Record):
    """What one kind of stage costs in the whole run."""

    stage: str
    """Its name."""
    seconds: NonNegativeFloat
    """Seconds on the clock."""
    memory: NonNegativeInt
    """Peak memory of the process that does it, in bytes; of the GPU where there is one."""
    stored: NonNegativeInt
    """Bytes that it leaves in the store, compressed."""


class Forecast(Record):
    """What a run costs."""

    rates: Rates
    """What was measured here."""
    workers: PositiveInt
    """Shards that are worked on side by side."""
    stages: tuple[StageCost, ...]
    """Costs by stage, in order."""
    first_iteration: dict[str, NonNegativeFloat]
    """Seconds of the first iteration's stages, as `diffem status` tells them."""
    last_iteration: dict[str, NonNegativeFloat]
    """Seconds of the last iteration's stages."""
    draws: NonNegativeFloat
    """Seconds of all evaluations in which samples are drawn for them."""
    seconds: NonNegativeFloat
    """The whole run."""
    memory: NonNegativeInt
    """The largest peak."""
    stored: NonNegativeInt
    """The whole run, compressed."""

    def stage(self, name: str) -> StageCost:
        """Return the cost of a stage by its name."""
        return next(stage for stage in self.stages if stage.stage == name)


def forecast(config: RunConfig, plan: Plan, rates: Rates, *, workers: int = 1) -> Forecast:
    """Predict what a run costs, from its beginning.

    Arguments:
        config: The config.
        plan: Its amounts.
        rates: What was measured.
        workers: Shards that are worked on side by side.
    """
    costs = _Costs(config, plan, rates)
    iterations = [costs.iteration(k) for k in range(config.iterations)]
    base = rates.base_bytes + PREFECT_BYTES
    samples = plan.training + plan.holdout
    trained = plan.training * plan.x_size * 4
    kept = min(trained, round(config.runner.memory_gb * 2**30))
    model = plan.parameters * 4
    networks = [n for n in (rates.conditional, rates.unconditional) if n is not None]
    sampling = max((network.sampling_bytes for network in networks), default=0)
    training = max((network.training_bytes for network in networks), default=0)
    shard = 2 * min(config.e_step.shard_size, plan.training) * plan.x_size * 4
    tasks = plan.shards * PER_SHARD_BYTES
    if rates.device != "cpu":  # What a GPU holds is told; the rest lies in the machine's memory.
        base = kept = shard = tasks = 0
    stored = rates.observation_bytes * samples
    shards = sum(n["e_step"] for n in iterations) / workers
    stages = [
        _cost("starting Prefect and PyTorch", STARTING * rates.contention, base, 0),
        _cost("observations", costs.observations(), base, stored),
        _cost(
            "start",
            costs.start(),
            base + max(rates.fit_bytes, rates.judge_bytes),
            rates.evaluation_bytes + costs.start_model_bytes(),
        ),
        _cost(
            "E-steps",
            shards,
            base + sampling + shard + tasks,
            config.iterations
            * (plan.training * rates.reconstruction_bytes + plan.shards * MANIFEST_BYTES),
        ),
        _cost(
            "M-steps",
            sum(n["m_step"] for n in iterations),
            base + training + kept,
            config.iterations * model,
        ),
        _cost(
            "evaluations",
            sum(n["evaluate"] for n in iterations),
            base + max(sampling, rates.judge_bytes),
            config.iterations * rates.evaluation_bytes,
        ),
        _cost("flow runs and commits", sum(costs.beside() for _ in iterations), base, 0),
    ]
    if config.prior is not None:
        size = model + config.prior.samples * plan.x_size * 4
        stages.append(_cost("prior", costs.prior(), base + training + kept, size))
    return Forecast(
        rates=rates,
        workers=workers,
        stages=tuple(stages),
        first_iteration=iterations[0],
        last_iteration=iterations[-1],
        draws=sum(costs.draws(k) for k in range(config.iterations)),
        seconds=sum(stage.seconds for stage in stages),
        memory=max(stage.memory for stage in stages),
        stored=sum(stage.stored for stage in stages),
    )


def _cost(stage: str, seconds: float, memory: float, stored: float) -> StageCost:
    return StageCost(stage=stage, seconds=seconds, memory=round(memory), stored=round(stored))


class _Costs:
    """Seconds of the parts of a run, one process after the other."""

    def __init__(self, config: RunConfig, plan: Plan, rates: Rates) -> None:
        self.config = config
        self.plan = plan
        self.rates = rates
        self._warmed: set[str] = set()

    def observations(self) -> float:
        samples = self.plan.training + self.plan.holdout
        return self.rates.load + samples * self.rates.observe

    def start(self) -> float:
        start, rates = self.config.start, self.rates
        gaussian = start.gaussian if isinstance(start, MMPSStart) else start
        fitting = 0.0
        if isinstance(gaussian, GaussianStart):
            given = min(gaussian.samples, self.plan.training)
            fitting = gaussian.iterations * rates.fit_round(given) + rates.fit_first(given)
        return fitting + self._drawn(self.plan.evaluated, -1) + rates.judge_first

    def start_model_bytes(self) -> int:
        start, size = self.config.start, self.plan.x_size
        gaussian = start.gaussian if isinstance(start, MMPSStart) else start
        if isinstance(gaussian, GaussianStart):
            return 8 * size * (2 + min(gaussian.rank or size, size))
        return 4 * self.plan.parameters if isinstance(start, ModelStart) else 0

    def iteration(self, k: int) -> dict[str, float]:
        """Return the seconds of an iteration's stages, shards one after the other."""
        return {
            "e_step": self._e_step(k),
            "m_step": self._m_step(k),
            "evaluate": self.draws(k) + self.rates.judge,
        }

    def draws(self, k: int) -> float:
        """Return the seconds of an iteration's evaluation in which samples are drawn."""
        return self._drawn(self.plan.evaluated, k)

    def beside(self) -> float:
        prefect = PER_ITERATION + self.plan.shards * PER_SHARD
        return self.rates.commit + prefect * self.rates.contention

    def prior(self) -> float:
        prior, rates = self.config.prior, self.rates
        seconds = rates.judge
        match prior:
            case UnconditionalPrior():
                assert rates.unconditional is not None
                seconds += prior.steps * rates.unconditional.step(prior.batch_size)
                seconds += rates.training
                network: NetworkRates | None = rates.unconditional
            case JointPrior():
                network = rates.conditional
            case _:
                return 0.0
        assert network is not None
        batch, calls = self.config.e_step.batch_size, self.plan.calls
        return seconds + network.draw(prior.samples, batch, calls)

    def _e_step(self, k: int) -> float:
        config, plan = self.config, self.plan
        shards = plan.shards * self.rates.shard
        if config.method == "clean":
            return shards  # Nothing is drawn: clean samples stand for reconstructions.
        refreshed = round(plan.training * (config.e_step.refresh if k else 1.0))
        return shards + sum(
            self._drawn(rows, k - 1, of_shard=True) for rows in self._shards(refreshed)
        )

    def _shards(self, samples: int) -> Iterator[int]:
        """Yield how many samples are drawn in each shard."""
        whole, rest = divmod(samples, self.plan.shards)
        for shard in range(self.plan.shards):
            yield whole + (shard < rest)

    def _drawn(self, samples: int, model: int, *, of_shard: bool = False) -> float:
        """Return the seconds of drawing from an iteration's model; -1 is the start's."""
        config, rates = self.config, self.rates
        modelled = isinstance(config.start, ModelStart)
        if model < 0 and not modelled:
            return samples * rates.start_draw
        network = self._network(max(model, 0))
        k = model + 1
        sampler = build.sampler_of(config.e_step, k if of_shard else None)
        return network.draw(samples, config.e_step.batch_size, build.network_calls(sampler))

    def _m_step(self, k: int) -> float:
        config, network = self.config, self._network(k)
        length = build.m_step_length(config, k)
        seconds = length * network.step(config.m_step.batch_size) + self.rates.training
        checkpoints = int(seconds / config.m_step.checkpoint_seconds)
        warming = 0.0
        name = "unconditional" if config.is_mmps(k) else "conditional"
        if name not in self._warmed:
            self._warmed.add(name)
            warming = network.warm_up
        return seconds + checkpoints * self.rates.checkpoint + warming

    def _network(self, k: int) -> NetworkRates:
        rates = self.rates
        network = rates.unconditional if self.config.is_mmps(k) else rates.conditional
        assert network is not None, "every network of the run is rehearsed"
        return network


def workers_note(config: RunConfig, workers: int) -> str:
    """Say for how many workers the seconds are."""
    if isinstance(config.runner, LocalRunner):
        return "" if workers == 1 else f"{workers} shards side by side"
    return "on this machine, shards one after the other; a cluster divides the E-steps"
