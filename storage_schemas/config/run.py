"""The whole config."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from storage_schemas._base import Record, Steps
from storage_schemas.config.channel import ChannelConfig, CustomChannel, RandomMatrixChannel
from storage_schemas.config.data import DataConfig
from storage_schemas.config.em import (
    EStepConfig,
    GaussianStart,
    JointPrior,
    MMPSConfig,
    MMPSStart,
    ModelStart,
    MStepConfig,
    PriorConfig,
    StartConfig,
    UnconditionalPrior,
)
from storage_schemas.config.evaluation import EvaluationConfig, FrechetDistance
from storage_schemas.config.model import (
    BetaTime,
    CustomNetwork,
    MlpNetwork,
    NetworkConfig,
    ScheduleConfig,
    TimeConfig,
    VELogLinear,
)
from storage_schemas.config.runner import LocalRunner, RunnerConfig
from storage_schemas.config.stop import BudgetStop, StopConfig
from storage_schemas.config.trackers import TrackerConfig

__all__ = ["RunConfig"]


class RunConfig(Record):
    """Everything that determines a run."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Name of the run: lower-case letters, digits, dashes and underscores."""
    description: str = ""
    """One line for people."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The seed from which every random number of the run is derived."""
    iterations: Steps
    """EM iterations."""
    method: Literal["diffem", "em-mmps", "clean"] = "diffem"
    """DiffEM (a conditional model is the posterior), or EM-MMPS (an unconditional model, with
    moment-matching posterior sampling; linear channels with Gaussian noise). `clean` is neither,
    but a ceiling for benchmarks: the same network learns from the clean samples themselves."""
    data: DataConfig
    """Where the observations come from."""
    channel: ChannelConfig
    """The corruption Q(y | x)."""
    condition: Literal["observation", "gaussian_mean", "gaussian_posterior"] = "observation"
    """What the network sees: the observation with its operator, or also the posterior mean under
    the Gaussian prior of the start (not in the paper; for operators that are hard to invert), or
    the mean and the spread of that posterior, with the denoiser built around it, so that the
    network learns what is not Gaussian (not in the paper; for vectors and small images)."""
    network: NetworkConfig
    """The network inside the denoiser."""
    schedule: ScheduleConfig = VELogLinear()
    """Noise level as a function of time."""
    time: TimeConfig = BetaTime()
    """Distribution of the time at which the denoiser is trained."""
    start: StartConfig = GaussianStart()
    """What makes the first reconstructions."""
    e_step: EStepConfig = EStepConfig()
    """How reconstructions are drawn."""
    m_step: MStepConfig
    """How the model is refined on them."""
    mmps: MMPSConfig = MMPSConfig()
    """Posterior sampling of EM-MMPS, for it and for a warm start by it."""
    prior: PriorConfig | None = None
    """A model of clean data alone; none by default."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured after each iteration."""
    stop: StopConfig = BudgetStop()
    """When the run ends before its last iteration; by default it does not."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network; weights, losses and sampler states stay float32."""
    runner: RunnerConfig = LocalRunner()
    """Where the work is done."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Who is told of each iteration beside the run itself; nobody by default."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        problems = (
            self._channel_problem(),
            self._network_problem(),
            self._distance_problem(),
            self._sampler_problem(),
            self._method_problem(),
            self._stop_problem(),
        )
        for problem in problems:
            if problem is not None:
                raise ValueError(problem)
        return self

    def _channel_problem(self) -> str | None:
        vectors = len(self.data.x_shape) == 1
        if isinstance(self.channel, CustomChannel):
            return None
        if vectors == isinstance(self.channel, RandomMatrixChannel):
            return None
        known = "'random_matrix' or 'custom'" if vectors else "any but 'random_matrix'"
        return (
            f"channel.kind {self.channel.kind!r} does not fit data.kind {self.data.kind!r}, whose "
            f"samples have shape {self.data.x_shape}; take {known}"
        )

    def _network_problem(self) -> str | None:
        vectors = len(self.data.x_shape) == 1
        if isinstance(self.network, CustomNetwork):
            return None
        if vectors == isinstance(self.network, MlpNetwork):
            return None
        known = "'mlp' or 'custom'" if vectors else "'unet', 'diffusers' or 'custom'"
        return (
            f"network.kind {self.network.kind!r} does not fit data.kind {self.data.kind!r}, whose "
            f"samples have shape {self.data.x_shape}; take {known}"
        )

    def _distance_problem(self) -> str | None:
        distance = self.evaluation.distance
        if isinstance(distance, FrechetDistance) and not self.data.labelled:
            return (
                "evaluation.distance.kind 'frechet_classifier' needs labelled images but "
                f"data.kind is {self.data.kind!r}; take another distance"
            )
        return None

    def _sampler_problem(self) -> str | None:
        sampler = self.e_step.sampler
        high = sampler.sigma_start or self.schedule.sigma_max
        low = sampler.sigma_end or self.schedule.sigma_min
        if low >= high:
            return (
                f"e_step.sampler goes from noise level {high} to {low}, but noise must fall; set "
                "sigma_start above sigma_end"
            )
        annealing = self.e_step.annealing
        if annealing is not None and annealing.first > sampler.steps:
            return (
                f"e_step.annealing.first is {annealing.first} but e_step.sampler.steps is "
                f"{sampler.steps}; annealing begins with fewer steps"
            )
        return None

    def _method_problem(self) -> str | None:
        mmps = self.method == "em-mmps"
        if self.method == "clean" and isinstance(self.start, MMPSStart):
            return (
                "start.kind is 'mmps' but method is 'clean', whose network learns from clean "
                "samples from its first iteration on; take another start"
            )
        if mmps and isinstance(self.start, MMPSStart):
            return (
                "start.kind is 'mmps' but method is 'em-mmps', which is that from its first "
                "iteration on; take another start"
            )
        if mmps and self.condition != "observation":
            return (
                f"condition is {self.condition!r} but method is 'em-mmps', whose network sees no "
                "condition; leave it out"
            )
        if mmps and self.m_step.recorruption == "fixed":
            return (
                "m_step.recorruption is 'fixed' but method is 'em-mmps', whose M-step corrupts "
                "nothing; leave it out"
            )
        if isinstance(self.start, ModelStart) and self.m_step.first_steps is not None:
            return (
                "m_step.first_steps is set but start.kind is 'model', whose network goes on "
                "learning; leave it out"
            )
        if mmps and isinstance(self.prior, JointPrior):
            return (
                "prior.kind is 'joint' but method is 'em-mmps', whose model is the prior already; "
                "leave prior out, or take 'unconditional'"
            )
        gaussian = isinstance(self.start, (GaussianStart, MMPSStart))
        if self.condition == "gaussian_posterior" and isinstance(self.prior, JointPrior):
            return (
                "prior.kind is 'joint' but condition is 'gaussian_posterior', around which the "
                "denoiser is built, so that it cannot be dropped; take 'unconditional'"
            )
        if self.condition != "observation" and not gaussian:
            return (
                f"condition is {self.condition!r} but start.kind {self.start.kind!r} fits no "
                "Gaussian prior; take start.kind 'gaussian' or 'mmps'"
            )
        if isinstance(self.start, MMPSStart) and self.start.laps >= self.iterations:
            return (
                f"start.laps is {self.start.laps} but there are {self.iterations} iterations, so "
                "that none would be DiffEM; raise iterations, or set method: em-mmps"
            )
        validation, rate = self.m_step.validation, self.m_step.learning_rate
        if validation is not None and validation.patience is not None and rate.over == "run":
            return (
                "m_step.validation.patience may end an M-step early, but "
                "m_step.learning_rate.over is 'run', which counts on all its steps; take "
                "'iteration', or leave patience out"
            )
        if isinstance(self.prior, UnconditionalPrior) and self.prior.learning_rate.over == "run":
            return (
                "prior.learning_rate.over is 'run' but the prior is trained once, after the run; "
                "take 'iteration'"
            )
        if self.m_step.augmentation is not None and self.m_step.recorruption == "fixed":
            return (
                "m_step.augmentation is set but m_step.recorruption is 'fixed', under which "
                "observations would no longer belong to the images; take 'fresh'"
            )
        return None

    def _stop_problem(self) -> str | None:
        if isinstance(self.stop, BudgetStop) or self.stop.monitor == "divergence":
            return None
        kinds = [monitor.kind for monitor in self.evaluation.monitors]
        if self.stop.monitor not in kinds:
            return (
                f"stop.monitor is {self.stop.monitor!r} but evaluation.monitors measures "
                f"{', '.join(kinds) or 'nothing'}; add {{kind: {self.stop.monitor}}} to it"
            )
        return None

    def identity(self) -> dict[str, Any]:
        """Return the part of the config that determines the run's numbers, as JSON-able data."""
        data = self.model_dump(mode="json", exclude={"description", "runner", "stop", "trackers"})
        if self.m_step.learning_rate.over != "run":
            del data["iterations"]
        del data["m_step"]["checkpoint_seconds"]
        if not self.evaluation.metrics:  # as before there were any
            del data["evaluation"]["metrics"]
        return data

    def is_mmps(self, iteration: int) -> bool:
        """Tell whether an iteration's model is unconditional, to be sampled from by MMPS."""
        warm = isinstance(self.start, MMPSStart) and iteration < self.start.laps
        return self.method == "em-mmps" or warm

    @property
    def digest(self) -> str:
        """SHA-256 of `identity()` in canonical JSON, in hexadecimal."""
        text = json.dumps(
            self.identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True
        )
        return hashlib.sha256(text.encode()).hexdigest()
