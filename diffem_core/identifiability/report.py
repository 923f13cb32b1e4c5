"""What an identifiability analysis found, and the verdict that its numbers allow.

The spectrum of H = E[A' A] comes as levels h_k with two measures: the share of the directions of x
and the share of x's variance that lie at each. A direction is

    hidden      h <= 1e-6 of the greatest (0.02 where A was linearized): no observation sees it
    drowned     seen, but n observations cannot tell its variance s^2 from that of the noise:

                    n < 2 / E[(q / (1 + q))^2],     q_i = p_i s^2 / sigma^2

                which is where the Cramer-Rao bound on s^2 from n observations with noise variances
                sigma^2 / p_i reaches s^4

and otherwise observed. What is hidden or drowned is lost: no method learns it from these
observations alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffem_core.identifiability.pairs import Pairs

__all__ = ["Identifiability", "Method", "Verdict"]

Verdict = Literal["identifiable", "partly", "not", "undetermined"]
Method = Literal["selection", "dense", "frequencies", "randomized", "linearized", "none"]

_ATTENUATED = 0.5
_SMOOTH = 1.5


@dataclass(frozen=True, kw_only=True)
class Identifiability:
    """What a batch of operators lets one know of x."""

    size: int
    """Entries D of x."""
    operators: int
    """Operators that were looked at."""
    observations: int
    """Observations n that there are, or will be, to learn from."""
    method: Method
    """How H was looked at: exactly, for operators that select entries (`selection`) or in few
    dimensions (`dense`); frequency by frequency, where H is a convolution (`frequencies`); by
    Lanczos' recursion from random vectors (`randomized`); around some samples, for operators that
    are not linear (`linearized`); not at all (`none`)."""
    fixed: bool
    """Whether the operator is the same for all samples."""
    roughness: float
    """By how much the mean square of the response's secants grows as their step shrinks 32 times:
    1 for whatever is smooth or linear."""
    level: Tensor
    """Levels h_k of the spectrum of H, greatest first."""
    share: Tensor
    """Share of the directions at each level; adds up to 1."""
    energy: Tensor
    """Share of x's variance under the prior at each level; adds up to 1."""
    needed: Tensor
    """Observations that tell the variance at each level from that of the noise."""
    floor: float
    """Level up to which directions count as hidden."""
    error: float
    """Standard error of the shares, at most; 0 where they are exact."""
    settled: bool
    """Whether the second half of the operators saw nothing that the first half did not."""
    seen_once: float | None
    """Share of the directions that one observation sees, on average."""
    entries: Tensor | None
    """H_jj for each entry of x, of shape x_shape."""
    entries_error: float
    """Relative standard error of `entries` and `frequencies`, at most, where all operators show an
    entry alike (`normals` says what else); 0 where they are exact."""
    frequencies: Tensor | None
    """The diagonal of F H F*, of shape (H, W), zero frequency in the middle; None for vectors."""
    lost_variance: Tensor | None
    """Variance of each entry under the prior that lies in lost directions, of shape x_shape; None
    where directions were not looked at one by one."""
    prior_variance: Tensor
    """Variance of each entry under the prior, of shape x_shape."""
    never_seen: Tensor
    """Entries of x that no operator sees, as rows of indices (k, len(x_shape))."""
    pairs: Pairs | None
    """Second moments; None where they were not examined."""
    together: Tensor | None
    """How often two pixels at a shift are seen together, of shape (2 H - 1, 2 W - 1); for
    operators that select pixels of images only."""
    noise_std: float
    """Standard deviation of the noise, in the data's units."""
    noise_simulated: bool
    """Whether it was measured on simulated observations, not known."""

    @property
    def hidden_share(self) -> float:
        """Share of the directions that no observation sees."""
        return float(self.share[self.level <= self.floor].sum())

    @property
    def drowned_share(self) -> float:
        """Share of the directions that are seen, but lost in the noise."""
        return float(self.share[self._drowned].sum())

    @property
    def hidden_energy(self) -> float:
        """Share of x's variance, under the prior, in hidden directions."""
        return float(self.energy[self.level <= self.floor].sum())

    @property
    def drowned_energy(self) -> float:
        """Share of x's variance, under the prior, in drowned directions."""
        return float(self.energy[self._drowned].sum())

    @property
    def signal_to_noise(self) -> float:
        """What one observation knows of a direction, on average, in the prior's precisions.

        (1/D) sum_j h_j s_j^2 / sigma^2; infinite without noise.
        """
        signal = float((self.level * self.energy).sum() * self.prior_variance.mean())
        return signal / self.noise_std**2 if self.noise_std else math.inf

    @property
    def rank(self) -> int:
        """Number of directions that are not hidden (rounded, where shares are estimates)."""
        return round((1 - self.hidden_share) * self.size)

    @property
    def smooth(self) -> bool:
        """Whether the response to small changes of x is what its secants say."""
        return self.method != "none" and self.roughness < _SMOOTH

    @property
    def anything_hidden(self) -> bool:
        """Whether directions are hidden, beyond the error of their share."""
        return self.hidden_share > 3 * self.error or len(self.never_seen) > 0

    @property
    def anything_drowned(self) -> bool:
        """Whether directions are drowned, beyond the error of their share."""
        return self.drowned_share > 3 * self.error

    @property
    def drowned_by_operator(self) -> bool:
        """Whether the operator weakens directions that are lost in the noise."""
        weak = self._drowned & (self.level < _ATTENUATED * self.level.max())
        return float(self.share[weak].sum()) > 3 * self.error

    @property
    def verdict(self) -> Verdict:
        """Tell whether first and second moments of x can be learned.

        - `undetermined`: the channel is not smooth, or more operators would see more;
        - `identifiable`: nothing is lost, and no pair was found that is never seen together;
        - `not`: the operator is the same for all samples and hides directions, or weakens them
          until they are lost in the noise; or half of the directions or of the variance is lost;
        - `partly`: anything between.
        """
        if not self.smooth:
            return "undetermined"
        lost = self.hidden_share + self.drowned_share
        energy = self.hidden_energy + self.drowned_energy
        if self.settled:
            if self.fixed and (self.anything_hidden or self.drowned_by_operator):
                return "not"
            if max(lost, energy) >= 0.5:
                return "not"
            if self.anything_hidden or self.anything_drowned:
                return "partly"
        else:
            return "undetermined"
        if self.pairs is not None and self.pairs.unseen:
            return "partly" if self.pairs.settled else "undetermined"
        return "identifiable"

    @property
    def _drowned(self) -> Tensor:
        return (self.level > self.floor) & (self.needed > self.observations)
