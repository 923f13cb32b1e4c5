"""Second moments: which pairs of directions are ever observed together.

The covariance of x leaves its mark on observations through A S A' alone. Two covariances that
differ by a symmetric D are told apart by none of the operators if and only if

    <D, E[P D P]> = E|A D A'|^2 = 0,        P = A' A

so that second moments are identifiable where T: D -> E[P D P] has no null space. Where A selects
entries, T is diagonal: its entries are the probabilities that a pair is seen in one observation.
Where all P_i commute (blurs, k-space masks, subsets of one basis) it is E[p_j p_k] on pairs of
their common eigenvectors. In few dimensions it is written down for any operators.

Entries (directions) that no observation sees are left out here: their pairs are lost with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffem_core.identifiability.normals import Normals, chunks

__all__ = [
    "Pairs",
    "pairs_in_window",
    "pairs_of_commuting",
    "pairs_of_few",
    "pairs_of_selection",
    "seen_together_by_shift",
]

_NEVER = 1e-4  # E[p_j p_k] below this part of E p_j E p_k: together by rounding only.
_FLOOR = 1e-6  # Part of the largest eigenvalue of T below which rounding may be all of one.
_FEW = 64
_WINDOW_VALUES = 2**25  # Of the P_i of a window, each D x 64.
_WHOLE = 4096  # Entries up to which all pairs are counted.


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is known of pairs."""

    count: int
    """Pairs that were examined (combinations of pairs, for `few`)."""
    unseen: int
    """How many of them no observation sees together (no observation tells from others)."""
    least: float
    """Least probability that a pair is seen in one observation, of pairs that are; for `commuting`
    and `few` the least E[p_j p_k] as a part of the greatest."""
    kind: str
    """`selection`, `commuting` or `few`."""
    whole: bool
    """Whether all entries were examined, or a part of them."""
    settled: bool
    """Whether the second half of the operators saw none of the pairs that the first did not."""
    examples: tuple[tuple[int, int], ...] = ()
    """Some entries that are never seen together, for `selection`."""

    @property
    def unseen_share(self) -> float:
        """Part of the examined pairs that are never seen."""
        return self.unseen / self.count if self.count else 0.0


def pairs_of_selection(seen: Tensor, *, generator: torch.Generator) -> Pairs:
    """Count how often pairs of entries are seen together.

    Of more than 4,096 entries, 4,096 are examined: half of them next to each other (from the
    middle of x), half drawn at random.

    Arguments:
        seen: Which entries n observations see, of shape (n, D).
        generator: Source of the choice.

    Returns:
        The counts, over pairs of different entries that are both seen by some observation.
    """
    size = seen.shape[1]
    index = torch.arange(size)
    if size > _WHOLE:
        middle = torch.arange((size - _WHOLE // 2) // 2, (size + _WHOLE // 2) // 2)
        others = torch.randperm(size, generator=generator)[: _WHOLE // 2]
        index = torch.unique(torch.cat([middle, others]))
    index = index[seen[:, index].any(0)]
    half = len(seen) // 2
    first, second = (_together(part[:, index]) for part in (seen[:half], seen[half:]))
    together = first + second
    above = torch.ones_like(together, dtype=torch.bool).triu(1)
    never = above & (together == 0)
    unseen = int(never.sum())
    by_first = int((above & (first == 0)).sum())
    found = together[above & (together > 0)]
    examples = index[never.nonzero()[:5]].tolist() if unseen else []
    return Pairs(
        count=int(above.sum()),
        unseen=unseen,
        least=float(found.min()) / len(seen) if len(found) else math.nan,
        kind="selection",
        whole=size <= _WHOLE,
        settled=by_first == unseen,
        examples=tuple((int(a), int(b)) for a, b in examples),
    )


def seen_together_by_shift(seen: Tensor) -> Tensor:
    """Compute how often two pixels at a given shift are seen together, for all shifts.

    Arguments:
        seen: Which pixels n observations see, of shape (n, H, W).

    Returns:
        Probabilities of shape (2 H - 1, 2 W - 1), over places and observations, shift 0 in the
        middle.
    """
    height, width = seen.shape[1:]
    frame = (2 * height - 1, 2 * width - 1)
    counts = torch.zeros(frame, dtype=torch.float64)
    step = max(1, 2**20 // math.prod(frame))
    for start in range(0, len(seen), step):
        spectrum = torch.fft.rfft2(seen[start : start + step].float(), s=frame)
        counts += torch.fft.irfft2(spectrum.abs().square(), s=frame).double().sum(0)
    rows = height - torch.arange(1 - height, height).abs()
    columns = width - torch.arange(1 - width, width).abs()
    places = rows[:, None] * columns[None, :]
    shifted = torch.roll(counts.round(), (height - 1, width - 1), dims=(0, 1))
    return (shifted / places / len(seen)).clamp(0, 1)


def pairs_of_commuting(p: Tensor, floor: float) -> Pairs:
    """Compare E[p_j p_k] with E p_j E p_k, for operators with common eigenvectors.

    Arguments:
        p: Eigenvalues of n operators, of shape (n, D).
        floor: Means of p up to this count as never observed.
    """
    p = p[:, p.mean(0) > floor]
    half = len(p) // 2
    first, second = (part.mT @ part for part in (p[:half], p[half:]))
    together = (first + second) / len(p)
    mean = p.mean(0)
    independent = mean.unsqueeze(1) * mean
    above = torch.ones_like(together, dtype=torch.bool).triu(1)
    never = above & (together <= _NEVER * independent)
    by_first = above & (first / max(half, 1) <= _NEVER * independent)
    found = together[above & ~never]
    greatest = float(together.max()) if together.numel() else math.nan
    return Pairs(
        count=int(above.sum()),
        unseen=int(never.sum()),
        least=float(found.min()) / greatest if len(found) else math.nan,
        kind="commuting",
        whole=True,
        settled=bool((by_first == never).all()),
    )


def pairs_of_few(normals: Normals, directions: Tensor) -> Pairs:
    """Write T down on the symmetric matrices over some directions, and count its null space.

    Arguments:
        normals: The P_i of n observations.
        directions: Orthonormal, of shape (D, R), R of at most 64.
    """
    size = directions.shape[1]
    a, b = torch.triu_indices(size, size)
    half = max(1, normals.count // 2)
    values = _eigenvalues(normals, directions, a, b)
    floor = _FLOOR * float(values.max())
    unseen = int((values <= floor).sum())
    settled = True
    if unseen and normals.count > 1:
        before = _eigenvalues(normals.take(slice(0, half)), directions, a, b)
        settled = int((before <= _FLOOR * float(before.max())).sum()) == unseen
    found = values[values > floor]
    return Pairs(
        count=len(a),
        unseen=unseen,
        least=float(found.min() / values.max()) if len(found) else math.nan,
        kind="few",
        whole=True,
        settled=settled,
    )


def pairs_in_window(normals: Normals, x_shape: tuple[int, ...]) -> Pairs | None:
    """Look at the pairs of 64 entries in the middle of x (8 x 8 pixels of the first band).

    T of the window is a principal submatrix of T: what is lost there is lost.

    Arguments:
        normals: The P_i of n observations.
        x_shape: Shape of x.

    Returns:
        What was found, or None where it would change with more operators.
    """
    window = torch.zeros(x_shape, dtype=torch.bool)
    if len(x_shape) == 3:
        top, left = (max(0, side // 2 - 4) for side in x_shape[1:])
        window[0, top : top + 8, left : left + 8] = True
    else:
        window[:_FEW] = True
    index = window.flatten().nonzero().squeeze(1)
    unit = torch.zeros(normals.size, len(index), dtype=torch.float64)
    unit[index, torch.arange(len(index))] = 1.0
    most = max(16, _WINDOW_VALUES // (len(index) * normals.size))
    if normals.count > most:
        normals = normals.take(torch.linspace(0, normals.count - 1, most).round().long())
    pairs = pairs_of_few(normals, unit)
    return replace(pairs, whole=False) if pairs.settled else None


def _together(seen: Tensor) -> Tensor:
    counted = seen.float()
    return counted.mT @ counted


def _eigenvalues(normals: Normals, directions: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the eigenvalues of T on symmetric matrices over the directions."""
    size = directions.shape[1]
    gram = torch.zeros(len(a), len(a), dtype=torch.float64)
    for p in _projected(normals, directions):
        entries = p[:, a, b]
        gram += entries.mT @ entries
    gram /= normals.count
    # With E_ab the unit symmetric matrices, <E_ab, P E_cd P> is made of P_ac P_bd + P_ad P_bc.
    place = torch.zeros(size, size, dtype=torch.int64)
    place[a, b] = place[b, a] = torch.arange(len(a))
    straight = gram[place[a[:, None], a], place[b[:, None], b]]
    crossed = gram[place[a[:, None], b], place[b[:, None], a]]
    norm = torch.where(a == b, 0.5, math.sqrt(0.5)).double()
    t = (straight + crossed) * norm.unsqueeze(1) * norm
    values: Tensor = torch.linalg.eigvalsh(t * 2)
    return values


def _projected(normals: Normals, directions: Tensor) -> Iterator[Tensor]:
    for rows in chunks(normals, directions.shape[1]):
        yield directions.mT @ normals.apply(rows, directions)
