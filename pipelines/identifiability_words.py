"""An identifiability analysis in sentences: the verdict, what was found, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from diffem_core.identifiability import Identifiability
from storage_schemas.config import (
    CompressedSensingChannel,
    DeepinvChannel,
    GaussianBlurChannel,
    JpegChannel,
    MriChannel,
    QuantizationChannel,
    RandomMaskChannel,
    RunConfig,
    StoreData,
    SuperResolutionChannel,
)

__all__ = ["advice_on", "findings_of", "summary_of"]

_NAMED = 8


def summary_of(found: Identifiability) -> str:
    """Say the verdict in one sentence."""
    match found.verdict:
        case "identifiable":
            pairs = "" if found.pairs is None else ", and every examined pair together"
            return f"Identifiable: every direction of x is observed{pairs}."
        case "not" if found.fixed:
            return f"Not identifiable: every sample has the same operator, and it {_lost(found)}."
        case "not":
            return f"Not identifiable: the observations together {_lost(found, plural=True)}."
        case "partly" if found.anything_hidden or found.anything_drowned:
            more = ""
            if found.pairs is not None and found.pairs.unseen:
                more = f"; besides, {_unseen(found)}"
            return (
                "Partly identifiable: the observations together "
                f"{_lost(found, plural=True)}{more}."
            )
        case "partly":
            return (
                "Partly identifiable: every direction of x is observed, but "
                f"{_unseen(found)}: correlations among them cannot be learned."
            )
        case _:
            return f"Cannot be told: {_untold(found)}."


def findings_of(found: Identifiability, *, prior: str, operators_from: str) -> tuple[str, ...]:
    """Say what was found, a sentence each.

    Arguments:
        found: The analysis.
        prior: `gaussian_start` or `stand_in`.
        operators_from: `observations`, `channel` or `none`.
    """
    return tuple(_findings(found, prior, operators_from))


def advice_on(
    found: Identifiability, config: RunConfig, drawn_coverage: tuple[float, float] | None
) -> tuple[str, ...]:
    """Say what to change, a sentence each; nothing where all is well.

    Arguments:
        found: The analysis.
        config: The config.
        drawn_coverage: The share of entries that masks of the M-step show, and its standard error,
            where the observations have masks of their own.
    """
    return tuple(_advice(found, config, drawn_coverage))


def _findings(found: Identifiability, prior: str, operators_from: str) -> Iterator[str]:
    source = {
        "observations": f"{found.operators:,} operators of the observations",
        "channel": f"{found.operators:,} operators drawn from the channel",
        "none": "the channel's one operator",
    }[operators_from]
    if found.method == "none":
        yield f"x has {found.size:,} entries, too many to linearize a channel that is not linear."
        return
    if found.method == "linearized":
        yield (
            "The channel is not linear: it was linearized by finite differences around "
            f"{found.operators} draws of the prior."
        )
    elif found.fixed:
        yield "The operator is the same for all samples: nothing varies that could fill gaps."
    else:
        yield f"The operator varies between samples ({source})."
    if found.seen_once is not None:
        yield (
            f"One observation sees {_percent(found.seen_once)} of the {found.size:,} directions "
            f"of x; all together see {_percent(1 - found.hidden_share)}{_margin(found)}."
        )
    if found.hidden_share > 0 or len(found.never_seen):
        yield (
            f"Hidden directions hold {_percent(found.hidden_energy)} of x's variance under "
            f"{_prior(prior)}."
        )
    if len(found.never_seen):
        yield f"Never seen: {_places(found)}."
    yield from _frequencies(found)
    yield from _noise(found, prior)
    yield from _pairs(found)
    if not found.smooth and found.method == "linearized":
        yield (
            "The response is a staircase, not a slope: its secants grow "
            f"{found.roughness:.3g} times as the step shrinks 32 times. What differs by less than "
            "a step of it leaves the same observation."
        )
    if prior == "gaussian_start" and found.hidden_energy > 0:
        yield (
            "Along hidden directions the fitted start says what its fit began with, not what the "
            "data do."
        )


def _noise(found: Identifiability, prior: str) -> Iterator[str]:
    if not found.noise_std:
        yield "There is no noise."
        return
    how = " (measured on simulated observations)" if found.noise_simulated else ""
    times = (
        f"{found.signal_to_noise:,.0f}"
        if found.signal_to_noise >= 100
        else (f"{found.signal_to_noise:.2g}")
    )
    ratio = 10 * math.log10(found.signal_to_noise) if found.signal_to_noise > 0 else -math.inf
    yield (
        f"Noise: {found.noise_std:.3g}{how} per measurement; on average one observation knows a "
        f"direction {times} times as well as {_prior(prior)} ({ratio:.0f} dB)."
    )
    seen = (found.level > found.floor) & (found.share > 0)
    if not bool(seen.any()):
        return
    needed = float(found.needed[seen].max())
    if found.drowned_share > 0:
        yield (
            f"{_percent(found.drowned_share)} of the directions ({_percent(found.drowned_energy)} "
            f"of the variance) drown in the noise: {found.observations:,} observations do not "
            "tell their variance from it."
        )
    elif math.isfinite(needed):
        yield (
            f"The least observed direction needs about {max(2, round(needed)):,} observations for "
            f"its variance to stand out from the noise; there are {found.observations:,}."
        )


def _pairs(found: Identifiability) -> Iterator[str]:
    pairs = found.pairs
    if pairs is None:
        if not found.fixed and found.method in {"dense", "frequencies", "randomized"}:
            yield "Second moments (pairs of directions) could not be examined at this size."
        return
    part = "" if pairs.whole else " among a part of the entries"
    match pairs.kind:
        case "selection" if pairs.unseen:
            first = ", ".join(
                f"{_place(found, a)} with {_place(found, b)}" for a, b in pairs.examples[:2]
            )
            yield (
                f"{pairs.unseen:,} of {pairs.count:,} pairs of entries{part} are never seen in "
                f"one observation, {first} for example: their correlation leaves no trace."
            )
        case "selection" if pairs.count:
            yield (
                f"All {pairs.count:,} pairs of entries{part} are seen together: the rarest in "
                f"{pairs.least:.3g} of the observations, about "
                f"{pairs.least * found.observations:,.0f} of {found.observations:,}."
            )
        case "commuting" if pairs.unseen:
            yield (
                f"{pairs.unseen:,} of {pairs.count:,} pairs of directions are never in one "
                "observation: their correlation leaves no trace."
            )
        case "commuting":
            yield f"All {pairs.count:,} pairs of directions are seen together."
        case "few" if pairs.unseen:
            where = "" if pairs.whole else " of a window of 64 entries in the middle"
            yield (
                f"Of the {pairs.count:,} numbers in a covariance{where}, {pairs.unseen:,} "
                "combinations are in no observation: different covariances look the same."
            )
        case "few":
            where = "" if pairs.whole else " of a window of 64 entries in the middle"
            yield f"All {pairs.count:,} numbers in a covariance{where} leave their mark."
        case _:
            return


def _frequencies(found: Identifiability) -> Iterator[str]:
    power = found.frequencies
    if power is None or found.method == "selection":
        return
    hidden = power <= found.floor
    if not bool(hidden.any()) or bool(hidden.all()):
        return
    height, width = power.shape
    rows = torch.fft.fftshift(torch.fft.fftfreq(height)).abs()[:, None].expand_as(power)
    columns = torch.fft.fftshift(torch.fft.fftfreq(width)).abs()[None].expand_as(power)
    radius = (rows.square() + columns.square()).sqrt()[hidden]
    yield (
        f"{int(hidden.sum()):,} of {hidden.numel():,} spatial frequencies are in no observation, "
        f"from {float(radius.min()):.2f} to {float(radius.max()):.2f} cycles per pixel."
    )


def _advice(
    found: Identifiability, config: RunConfig, drawn_coverage: tuple[float, float] | None
) -> Iterator[str]:
    channel = config.channel
    if drawn_coverage is not None and found.seen_once is not None:
        share, error = drawn_coverage
        if abs(share - found.seen_once) > 0.02 + 4 * error:
            yield (
                f"The observations' masks show {_percent(found.seen_once)} of the entries but "
                f"those that the M-step draws {_percent(share)}: set channel.operators: observed"
                + (
                    f", or channel.keep: {found.seen_once:.2g}."
                    if isinstance(channel, RandomMaskChannel)
                    else "."
                )
            )
    if found.verdict == "identifiable":
        return
    if not found.settled or (found.pairs and found.pairs.unseen and not found.pairs.settled):
        yield "Look at more operators: --samples 4096, or more observations of the store."
        return
    lost = found.anything_hidden or found.anything_drowned
    yield from _advice_of_kind(found, config)
    if len(found.never_seen):
        yield (
            "Crop away or ignore what is never seen, or observe with operators that show it: "
            "reconstructions keep there what the start put there."
        )
    elif lost and isinstance(config.data, StoreData):
        yield (
            "A config describes the instrument and does not change it: only new observations show "
            "what these hide."
        )
    if found.anything_drowned and found.noise_std and not found.drowned_by_operator:
        yield "Collect more observations, or less noisy ones: what drowns is in them, but weak."
    if not lost and found.pairs is not None and found.pairs.unseen:
        yield (
            "Let operators differ more, so that any two entries are sometimes seen together; "
            "until then believe single entries, not how they go together."
        )


def _advice_of_kind(found: Identifiability, config: RunConfig) -> Iterator[str]:
    channel = config.channel
    match channel:
        case SuperResolutionChannel(shifts=False):
            yield (
                "If the instrument moves between samples, set channel.shifts: true; that shows "
                "more, though not what averages over whole blocks cancel in every position."
            )
        case SuperResolutionChannel():
            smaller = "a smaller channel.factor, or " if channel.factor > 2 else ""
            yield (
                f"Averages over {channel.factor} x {channel.factor} pixels cancel some detail in "
                f"every position, and there are only {channel.factor**2} positions: {smaller}"
                "blocks of more than one size (channel.kind: custom) would show more. Until then "
                "the finest detail is the start's and the network's guess."
            )
        case GaussianBlurChannel():
            if found.fixed:
                low = channel.sigma if isinstance(channel.sigma, float | int) else channel.sigma[0]
                yield (
                    "If the blur varies between samples, say so: channel.sigma: "
                    f"[{low / 3:.2g}, {low:.2g}]; sharper samples then show what this width hides."
                )
            else:
                yield "Sharper samples (a smaller lower end of channel.sigma) would show more."
        case CompressedSensingChannel(fixed=True):
            yield (
                "Project each sample on coefficients of its own: channel.fixed: false. Or take "
                f"channel.measurements: {found.size}, which is all of them."
            )
        case MriChannel():
            yield (
                "Measure other lines in different samples, a larger channel.center, or a smaller "
                "channel.acceleration."
            )
        case DeepinvChannel(generator=None) if found.fixed:
            yield "Give channel.generator, so that each sample has an operator of its own."
        case QuantizationChannel():
            yield (
                "Noise before the rounding (channel.noise_std of half a level or more) makes the "
                "average observation a smooth function of x; more channel.levels show more."
            )
        case JpegChannel():
            yield (
                "A higher channel.quality loses less. What JPEG rounds away is the same for all "
                "samples: it can be guessed from the start and the network, not learned."
            )
        case _:
            if found.fixed and (found.anything_hidden or found.drowned_by_operator):
                yield (
                    "Let the operator vary between samples (parameters of its own for each): EM "
                    "learns from what one sample hides and another shows."
                )


def _lost(found: Identifiability, *, plural: bool = False) -> str:
    """Say what is lost, as a predicate of the operator, or of the observations."""
    hides, leaves = ("hide", "leave") if plural else ("hides", "leaves")
    parts = []
    if found.anything_hidden:
        hidden = found.size - found.rank
        count = f"{hidden:,} of {found.size:,}" if hidden else "some"
        parts.append(
            f"{hides} {count} directions of x ({_percent(found.hidden_energy)} of its variance)"
        )
    if found.anything_drowned:
        verb = f"{leaves} another" if parts else leaves
        parts.append(
            f"{verb} {_percent(found.drowned_share)} of the directions "
            f"({_percent(found.drowned_energy)} of its variance) under the noise"
        )
    return " and ".join(parts) or f"{hides} too much of x"


def _unseen(found: Identifiability) -> str:
    pairs = found.pairs
    assert pairs is not None
    if pairs.kind == "few":
        return (
            f"{_percent(pairs.unseen_share)} of the combinations in its covariance are in no "
            "observation"
        )
    return f"{_percent(pairs.unseen_share)} of its pairs are never seen together"


def _untold(found: Identifiability) -> str:
    if found.method == "none":
        return "the channel is not linear and x too large to linearize it"
    if not found.smooth:
        return (
            "the channel rounds, so that small differences leave the same observation; coarse "
            f"ones show in {found.rank:,} of {found.size:,} directions"
        )
    if not found.settled:
        return (
            f"{found.operators:,} operators see {found.rank:,} of {found.size:,} directions, and "
            "more of them would see more"
        )
    pairs = found.pairs
    assert pairs is not None
    return (
        f"{pairs.unseen:,} of {pairs.count:,} pairs are not seen together by {found.operators:,} "
        "operators, and more of them would see more"
    )


def _places(found: Identifiability) -> str:
    rows = found.never_seen.tolist()
    if found.never_seen.shape[1] == 3:
        # All bands of a pixel together read better as a pixel.
        pixels = sorted({(row[1], row[2]) for row in rows})
        named = ", ".join(f"({r}, {c})" for r, c in pixels[:_NAMED])
        noun = (
            "pixel (row, column)" if len(pixels) == 1 else f"{len(pixels):,} pixels (row, column)"
        )
        return f"{noun} {named}{', ...' if len(pixels) > _NAMED else ''}"
    named = ", ".join(str(row[0]) for row in rows[:_NAMED])
    return f"{len(rows):,} entries, {named}{', ...' if len(rows) > _NAMED else ''}"


def _place(found: Identifiability, entry: int) -> str:
    shape = found.prior_variance.shape
    if len(shape) != 3:
        return f"entry {entry}"
    pixel = entry % (shape[1] * shape[2])
    return f"pixel ({pixel // shape[2]}, {pixel % shape[2]})"


def _prior(prior: str) -> str:
    return "the fitted Gaussian start" if prior == "gaussian_start" else "a stand-in prior"


def _margin(found: Identifiability) -> str:
    return f" (give or take {_percent(3 * found.error)})" if found.error else ""


def _percent(share: float) -> str:
    value = 100 * share
    if 0 < value < 0.1:
        return "less than 0.1 %"
    if 99.9 < value < 100:
        return "more than 99.9 %"
    return f"{value:.1f} %" if value < 99.95 and value % 1 > 0.05 else f"{value:.0f} %"
