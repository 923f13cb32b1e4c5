"""The stopping rule on planted histories: when it stops, which iteration was best, and why."""

import pytest

from diffem_core import BudgetRule, FloorRule, PlateauRule, Point, decide
from diffem_core.stopping import StopRule

ERROR = 0.02


def history(
    *values: float | None, floor: float | None = 0.1, error: float | None = ERROR
) -> list[Point]:
    return [
        Point(iteration=k, value=value, standard_error=error, floor=floor, floor_error=error)
        for k, value in enumerate(values)
    ]


PLATEAU = PlateauRule(monitor="divergence", patience=3, errors=1.0)
DEFAULT = PlateauRule(monitor="divergence")
FLOOR = FloorRule(monitor="divergence", confirm=2)

CASES: dict[str, tuple[list[Point], StopRule, bool, int, str]] = {
    # name: history, rule, stops, best, words
    "falling": (history(0.9, 0.7, 0.5, 0.4, 0.3), PLATEAU, False, 4, "the last one"),
    "plateau": (history(0.9, 0.5, 0.3, 0.3, 0.3, 0.3), PLATEAU, True, 2, "3 iterations after it"),
    "plateau, not long enough": (
        history(0.9, 0.5, 0.3, 0.3, 0.3),
        PLATEAU,
        False,
        2,
        "3 would end the run",
    ),
    "noisy plateau: within its error, though lower": (
        history(0.9, 0.5, 0.3, 0.31, 0.29, 0.285),
        PLATEAU,
        True,
        2,
        "a standard error",
    ),
    "lower by more than half an error, which is enough by default": (
        history(0.9, 0.5, 0.3, 0.31, 0.295, 0.285),
        DEFAULT,
        False,
        5,
        "the last one",
    ),
    "lower by less than half an error": (
        history(0.9, 0.5, 0.3, 0.31, 0.292, 0.295),
        DEFAULT,
        True,
        2,
        "0.5 standard errors",
    ),
    "noisy plateau, then an improvement": (
        history(0.9, 0.5, 0.3, 0.31, 0.29, 0.25),
        PLATEAU,
        False,
        5,
        "the last one",
    ),
    "slow fall, each step less than its error": (
        history(0.9, 0.885, 0.87, 0.855, 0.84, 0.825),
        PLATEAU,
        False,
        4,
        "1 iteration after it",
    ),
    "rising after a minimum": (
        history(0.9, 0.4, 0.3, 0.35, 0.45, 0.6),
        PLATEAU,
        True,
        2,
        "best in iteration 2",
    ),
    "one outlier upwards": (history(0.9, 0.5, 1.4, 0.4, 0.3), PLATEAU, False, 4, "the last one"),
    "one outlier downwards is the best there is": (
        history(0.9, 0.5, 0.1, 0.45, 0.4, 0.35),
        PLATEAU,
        True,
        2,
        "best in iteration 2",
    ),
    "too short": (history(0.9, 0.9), PLATEAU, False, 0, "3 would end the run"),
    "a single iteration": (history(0.9), PLATEAU, False, 0, "the last one"),
    "missing values do not count as patience": (
        history(0.9, 0.3, None, None, None, 0.3),
        PLATEAU,
        False,
        1,
        "1 iteration after it",
    ),
    "no value at all": (history(None, None), PLATEAU, False, 1, "has no values"),
    "without an error every improvement counts": (
        history(0.3, 0.299, 0.298, 0.297, 0.296, error=None),
        PLATEAU,
        False,
        4,
        "the last one",
    ),
    "higher is better": (
        history(0.5, 0.7, 0.6, 0.6, 0.6, floor=None),
        PlateauRule(monitor="accuracy", patience=3, better="higher"),
        True,
        1,
        "accuracy",
    ),
    "iterations that are done in any case": (
        history(0.3, 0.3, 0.3, 0.3, 0.3),
        PlateauRule(monitor="divergence", patience=3, after=6),
        False,
        0,
        "6 iterations are done in any case",
    ),
    "at the floor from the start": (
        history(0.11, 0.1, 0.12),
        FLOOR,
        False,
        2,
        "it has never seen a difference",
    ),
    "a plateau at the floor, there from the start": (
        history(0.11, 0.11, 0.12, 0.12, 0.11),
        PLATEAU,
        False,
        4,
        "at its floor (0.11 ± 0.02, floor 0.1), where it sees no difference",
    ),
    "a plateau at the floor, reached on the way": (
        history(0.9, 0.5, 0.11, 0.12, 0.11, 0.11),
        PLATEAU,
        False,
        5,
        "a plateau there ends nothing",
    ),
    # Its error and the floor's together: 0.1 + sqrt(2) x 0.02 = 0.128.
    "a plateau just above the floor": (
        history(0.9, 0.5, 0.13, 0.13, 0.13, 0.13),
        PLATEAU,
        True,
        2,
        "best in iteration 2",
    ),
    "up from the floor again: the last one there was the best": (
        history(0.9, 0.12, 0.1, 0.11, 0.3, 0.31, 0.3),
        PLATEAU,
        True,
        3,
        "best in iteration 3",
    ),
    "at the floor once": (
        history(0.9, 0.5, 0.11),
        FLOOR,
        False,
        2,
        "2 iterations there would end",
    ),
    "at the floor, twice": (history(0.9, 0.5, 0.11, 0.125), FLOOR, True, 2, "iteration 2"),
    # Its error and the floor's together: 0.1 + sqrt(2) x 0.02 = 0.128.
    "above the floor by more than both errors": (
        history(0.9, 0.5, 0.13, 0.13),
        FLOOR,
        False,
        2,
        "its floor is 0.1",
    ),
    "below the floor is at it": (history(0.9, 0.05, 0.06), FLOOR, True, 1, "iteration 1"),
    "left the floor again": (history(0.9, 0.11, 0.3), FLOOR, False, 1, "its floor is 0.1"),
    "no floor": (history(0.9, 0.5, floor=None), FLOOR, False, 1, "has no floor"),
    "missing at the floor": (history(0.9, 0.11, None, 0.11), FLOOR, True, 1, "2 iterations"),
    "budget": (history(0.9, 0.1, 0.5), BudgetRule(), False, 2, "every iteration is done"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_planted_history_gets_its_verdict(name: str) -> None:
    points, rule, stop, best, words = CASES[name]
    decision = decide(points, rule)
    assert (decision.stop, decision.best) == (stop, best), decision
    assert words in decision.reason


def test_the_verdict_names_numbers_with_their_errors() -> None:
    reason = decide(history(0.9, 0.5, 0.3, 0.31, 0.32, 0.33), PLATEAU).reason
    assert "divergence was best in iteration 2 (0.3 ± 0.02)" in reason
    assert "the last: 0.33 ± 0.02" in reason


def test_more_errors_and_more_patience_are_harder_to_please() -> None:
    points = history(0.9, 0.5, 0.47, 0.44, 0.41)
    assert decide(points, PlateauRule(monitor="d", errors=1.0)).best == 4
    assert decide(points, PlateauRule(monitor="d", errors=3.0)).best == 4
    assert decide(points, PlateauRule(monitor="d", errors=5.0)).best == 1
    assert decide(points, PlateauRule(monitor="d", errors=5.0, patience=3)).stop
    assert not decide(points, PlateauRule(monitor="d", errors=5.0, patience=4)).stop


@pytest.mark.parametrize(
    ("points", "rule", "message"),
    [
        ([], PLATEAU, "received no iteration"),
        (history(0.5, 0.4)[::-1], PLATEAU, "give them in order"),
        (history(0.5), PlateauRule(monitor="d", patience=0), "patience 0"),
        (history(0.5), FloorRule(monitor="d", confirm=0), "confirm 0"),
        (history(0.5), PlateauRule(monitor="d", errors=-1.0), "errors -1"),
    ],
)
def test_nonsense_is_refused(points: list[Point], rule: StopRule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decide(points, rule)
