"""When to stop the recursion, and which iteration was the best, by a monitor and its uncertainty.

The theory says that KL(P*_Y || pi_Y^(k)) does not rise: what is learned does not get worse, up to
errors of learning and sampling. A monitor in observation space follows it with noise, so that a
later iteration counts as better only where it improves by more than its standard error:

    plateau    stop after `patience` iterations none of which was better than the best
    floor      stop where the monitor fell to its floor and stayed there, `confirm` times in a row
    budget     never stop before the last iteration

What is compared is the best so far, not the iteration before: a slow fall adds up. At its floor a
monitor sees no difference any more, though there may be one: a plateau there is no reason to stop,
all iterations there are alike, and the last of them, which has learned most, is the best. One that
was at its floor from the start has never seen anything, and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

__all__ = ["BudgetRule", "Decision", "FloorRule", "PlateauRule", "Point", "StopRule", "decide"]

_BLIND_ERRORS = 1.0  # Standard errors, of monitor and floor together, within which it is blind.


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a monitor said of an iteration.

    Arguments:
        iteration: EM iteration, from 0.
        value: The monitor; None where it is not known.
        standard_error: Its standard error; None counts as 0.
        floor: Its value between two sets of real observations; None where it has none.
        floor_error: The standard error of the floor; None counts as 0.
    """

    iteration: int
    value: float | None
    standard_error: float | None = None
    floor: float | None = None
    floor_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetRule:
    """Do all iterations; the last one is the best."""


@dataclass(frozen=True, kw_only=True)
class PlateauRule:
    """Stop when nothing has improved for a while, and the monitor would see it.

    Arguments:
        monitor: Name of the monitor, for words.
        patience: Iterations without an improvement, at least 1; those without a value do not
            count.
        errors: Standard errors by which an iteration has to be better than the best.
        after: Iterations that are done in any case.
        better: Which direction is an improvement.
    """

    monitor: str
    patience: int = 3
    errors: float = 0.5
    after: int = 0
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True, kw_only=True)
class FloorRule:
    """Stop when the monitor is at its floor: corrupted reconstructions look like observations.

    Arguments:
        monitor: Name of the monitor, for words.
        confirm: Iterations in a row that have to be there, at least 1.
        errors: Standard errors (of the monitor and the floor together) within which it is there.
        after: Iterations that are done in any case.
        better: Which direction is an improvement.
    """

    monitor: str
    confirm: int = 2
    errors: float = 1.0
    after: int = 0
    better: Literal["lower", "higher"] = "lower"


StopRule = BudgetRule | PlateauRule | FloorRule


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether to stop.

    Arguments:
        stop: Whether.
        best: The best iteration so far.
        reason: Why, in words.
    """

    stop: bool
    best: int
    reason: str


def decide(history: Sequence[Point], rule: StopRule) -> Decision:
    """Decide whether to stop after the last iteration of a history.

    Arguments:
        history: What the monitor said of each iteration so far, in order, at least one.
        rule: The rule.

    Returns:
        The decision, which depends on nothing else: the same history gives the same one. The best
        iteration is the last that was better, by more than its error, than the best before it. Of
        those at the floor a plateau rule takes the last, a floor rule the first; and both take the
        last one of all where the monitor has no values, or sees nothing.

    Raises:
        ValueError: There is no iteration, they are not in order, or a number is out of range.
    """
    if not history:
        raise ValueError("decide received no iteration; ask after the first one")
    iterations = [point.iteration for point in history]
    if iterations != sorted(set(iterations)):
        raise ValueError(f"decide received the iterations {iterations}; give them in order")
    last = history[-1].iteration
    match rule:
        case BudgetRule():
            return Decision(stop=False, best=last, reason="every iteration is done")
        case PlateauRule():
            _require(rule.patience, "patience", rule.errors)
        case FloorRule():
            _require(rule.confirm, "confirm", rule.errors)
        case _:
            assert_never(rule)
    known = [point for point in history if point.value is not None]
    if not known:
        reason = f"{rule.monitor} has no values, so that nothing can be decided by it"
        return Decision(stop=False, best=last, reason=reason)
    best = _best(known, rule)
    if isinstance(rule, PlateauRule):
        decision = _plateau(known, best, rule)
    else:
        decision = _floor(known, best, rule)
    if decision.stop and len(history) < rule.after:
        reason = f"{decision.reason}; but {rule.after} iterations are done in any case"
        return Decision(stop=False, best=decision.best, reason=reason)
    return decision


def _require(count: int, name: str, errors: float) -> None:
    if count < 1 or not errors >= 0:
        raise ValueError(
            f"decide received {name} {count} and errors {errors}; give at least 1 and at least 0"
        )


def _best(known: Sequence[Point], rule: PlateauRule | FloorRule) -> Point:
    best = known[0]
    for point in known[1:]:
        if _gain(best, point, rule) > rule.errors * (point.standard_error or 0.0):
            best = point
    return best


def _gain(before: Point, after: Point, rule: PlateauRule | FloorRule) -> float:
    assert before.value is not None
    assert after.value is not None
    gain = before.value - after.value
    return gain if rule.better == "lower" else -gain


def _plateau(known: Sequence[Point], best: Point, rule: PlateauRule) -> Decision:
    last = known[-1]
    if _at_floor(last, rule, _BLIND_ERRORS):
        reason = (
            f"{rule.monitor} is at its floor ({_told(last)}, floor {last.floor:.4g}), where it "
            "sees no difference: a plateau there ends nothing; another monitor may see one, or a "
            "floor rule ends the run"
        )
        return Decision(stop=False, best=last.iteration, reason=reason)
    if _at_floor(best, rule, _BLIND_ERRORS):
        best = [point for point in known if _at_floor(point, rule, _BLIND_ERRORS)][-1]
    since = len(known) - 1 - known.index(best)
    what = f"{rule.monitor} was best in iteration {best.iteration} ({_told(best)})"
    if since == 0:
        reason = f"{what}, the last one"
    elif since < rule.patience:
        reason = (
            f"{what}; {_iterations(since)} after it did not improve by more than "
            f"{_errors(rule.errors)}, {rule.patience} would end the run"
        )
    else:
        reason = (
            f"{what}; {_iterations(since)} after it did not improve by more than "
            f"{_errors(rule.errors)} (the last: {_told(last)})"
        )
    return Decision(stop=since >= rule.patience, best=best.iteration, reason=reason)


def _floor(known: Sequence[Point], best: Point, rule: FloorRule) -> Decision:
    if all(point.floor is None for point in known):
        reason = f"{rule.monitor} has no floor, so that nothing can be decided by it"
        return Decision(stop=False, best=best.iteration, reason=reason)
    there = 0
    for point in reversed(known):
        if not _at_floor(point, rule, rule.errors):
            break
        there += 1
    last = known[-1]
    if there == len(known):
        reason = (
            f"{rule.monitor} is at its floor from the start ({_told(last)}, floor "
            f"{last.floor:.4g}): it has never seen a difference, and ends nothing; take another "
            "monitor"
        )
        return Decision(stop=False, best=last.iteration, reason=reason)
    if there == 0:
        floor = "unknown" if last.floor is None else f"{last.floor:.4g}"
        reason = f"{rule.monitor} is at {_told(last)}, its floor is {floor}"
        return Decision(stop=False, best=best.iteration, reason=reason)
    first = known[-there]
    what = (
        f"{rule.monitor} came within {_errors(rule.errors)} of its floor ({first.floor:.4g}) in "
        f"iteration {first.iteration} ({_told(first)})"
    )
    if there < rule.confirm:
        reason = f"{what}; {_iterations(rule.confirm)} there would end the run"
        return Decision(stop=False, best=first.iteration, reason=reason)
    reason = f"{what} and stayed there for {_iterations(there)}"
    return Decision(stop=True, best=first.iteration, reason=reason)


def _at_floor(point: Point, rule: PlateauRule | FloorRule, errors: float) -> bool:
    if point.floor is None or point.value is None:
        return False
    above = point.value - point.floor if rule.better == "lower" else point.floor - point.value
    error = math.hypot(point.standard_error or 0.0, point.floor_error or 0.0)
    return above <= errors * error


def _told(point: Point) -> str:
    error = "" if point.standard_error is None else f" ± {point.standard_error:.2g}"
    return f"{point.value:.4g}{error}"


def _errors(errors: float) -> str:
    return "a standard error" if errors == 1 else f"{errors:g} standard errors"


def _iterations(count: int) -> str:
    return "1 iteration" if count == 1 else f"{count} iterations"
