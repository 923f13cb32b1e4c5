"""How fast this machine does the parts of a run, and how large they are: what a rehearsal finds.

A batch of n samples costs one call of the network f + n s seconds, and a sampler of k calls

    n g + k (f + n s)

where g is what a sample costs once (its generator, its condition).
"""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from storage_schemas._base import Record

__all__ = ["Affine", "NetworkRates", "Rates"]


class Affine(Record):
    """Seconds that grow with the number of samples in a batch."""

    fixed: NonNegativeFloat
    """Seconds whatever the number."""
    each: NonNegativeFloat
    """Seconds for each sample."""

    def __call__(self, samples: float) -> float:
        """Return the seconds of so many samples."""
        return self.fixed + self.each * samples


class NetworkRates(Record):
    """What a network does, as it is sampled from and as it is trained."""

    call: Affine
    """One call in a sampler; for EM-MMPS with its conjugate gradients."""
    sample: NonNegativeFloat
    """Seconds that a sample costs once, whatever the number of calls."""
    step: Affine
    """One gradient step."""
    warm_up: NonNegativeFloat
    """Seconds that the first batch and the first step of a process take longer."""
    sampling_bytes: NonNegativeInt
    """Memory that a batch of an E-step takes at its peak."""
    training_bytes: NonNegativeInt
    """Memory that a gradient step takes at its peak: weights, moments, activations."""
    extrapolated: bool
    """Whether smaller batches were measured than those of the config."""

    def draw(self, samples: int, batch_size: int, calls: int) -> float:
        """Return the seconds in which samples are drawn in batches."""
        whole, rest = divmod(samples, batch_size)
        sizes = [batch_size] * whole + [rest] * bool(rest)
        return sum(n * self.sample + calls * self.call(n) for n in sizes)


class Rates(Record):
    """What a rehearsal has measured. Seconds, bytes."""

    device: str
    """Where networks are computed."""
    threads: PositiveInt
    """Threads of the processor."""
    seconds: PositiveFloat
    """How long it took to measure all this."""
    contention: PositiveFloat
    """Seconds on the clock for each second that this process was given a processor: 1 on a machine
    that does nothing else."""
    load: NonNegativeFloat
    """Loading data that ships inside packages."""
    observe: NonNegativeFloat
    """Corrupting (or copying) and writing one observation."""
    fit_round: Affine
    """One round of the Gaussian start, by observations; none for other starts."""
    fit_first: Affine
    """What its first round takes more."""
    start_draw: NonNegativeFloat
    """One sample from the start's posterior."""
    shard: NonNegativeFloat
    """A shard beside its samples: opening the run, reading, building, writing."""
    training: NonNegativeFloat
    """An M-step beside its gradient steps."""
    checkpoint: NonNegativeFloat
    """Writing an M-step's state."""
    judge_first: NonNegativeFloat
    """The start's evaluation beside its samples: with classifier, floors, the first picture."""
    judge: NonNegativeFloat
    """Every other evaluation beside its samples."""
    commit: NonNegativeFloat
    """Layout and commit of an iteration."""
    conditional: NetworkRates | None
    """The network of DiffEM."""
    unconditional: NetworkRates | None
    """The network of EM-MMPS, of a warm start by it, and of an unconditional prior."""
    base_bytes: PositiveInt
    """Memory of the process before anything is computed."""
    fit_bytes: NonNegativeInt
    """Memory that fitting the start takes at its peak."""
    judge_bytes: NonNegativeInt
    """Memory that an evaluation takes at its peak."""
    observation_bytes: PositiveFloat
    """Bytes of one observation as it is stored."""
    reconstruction_bytes: PositiveFloat
    """Bytes of one reconstruction as it is stored."""
    evaluation_bytes: NonNegativeInt
    """Bytes of metrics, picture and manifests of an iteration."""
