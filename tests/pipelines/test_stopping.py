"""The stop config reaches the rule, and the rule what a run has committed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import build
from pipelines.config_io import ConfigError, load_config
from pipelines.stages import decide_stop
from storage_schemas.config import BudgetStop, FloorStop, PlateauStop, RunConfig, StopConfig
from storage_schemas.manifests import IterationManifest
from storage_schemas.metrics import Metric, Metrics
from storage_schemas.run_store import RunStore

DIGITS = "deploy/experiments/digits.yaml"


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (PlateauStop(), {"monitor": "energy"}),
        (PlateauStop(), {"patience": 5}),
        (PlateauStop(), {"errors": 2.0}),
        (PlateauStop(), {"after": 4}),
        (FloorStop(), {"monitor": "energy"}),
        (FloorStop(), {"confirm": 5}),
        (FloorStop(), {"errors": 2.0}),
        (FloorStop(), {"after": 4}),
    ],
)
def test_every_field_reaches_the_rule(config: StopConfig, change: Mapping[str, object]) -> None:
    rule = build.build_stop_rule(config)
    other = build.build_stop_rule(config.model_copy(update=dict(change)))
    changed = {name: getattr(other, name) for name in change}
    assert changed == dict(change)
    assert changed != {name: getattr(rule, name) for name in change}
    assert other != rule


def test_stopping_changes_no_number_of_an_iteration() -> None:
    base = load_config(DIGITS)
    assert base.stop == BudgetStop()
    other = load_config(DIGITS, ["stop={kind: plateau, monitor: energy, patience: 2}"])
    assert other.stop == PlateauStop(monitor="energy", patience=2)
    assert other.digest == base.digest


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stop={kind: plateau, monitor: mmd}"], "add {kind: mmd} to it"),
        (["stop={kind: plateau, monitor: accuracy}"], r"stop\.monitor: received"),
        (["stop={kind: never}"], "stop: .*never"),
        (["stop={kind: plateau, patience: 0}"], r"stop\.patience: received 0"),
        (["evaluation.monitors=[{kind: energy}, {kind: energy}]"], "energy more than once"),
        (["evaluation.monitors=[{kind: guess}]"], "guess"),
        (["evaluation.monitors=[{kind: energy, permutations: 5}]"], "permutations"),
        (["evaluation.monitors=[{kind: frechet, features: nonsense}]"], "features"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DIGITS, overrides)


def test_a_monitor_that_is_measured_may_stop_the_run() -> None:
    overrides = ["stop={kind: floor, monitor: mmd}", "evaluation.monitors=[{kind: mmd}]"]
    assert load_config(DIGITS, overrides).stop == FloorStop(monitor="mmd")


class Recorded:
    """A run of which only the committed metrics are there."""

    def __init__(self, config: RunConfig, metrics: list[dict[str, Metric]]) -> None:
        self.config = config
        self.metrics = metrics

    def completed(self) -> list[IterationManifest]:
        return [
            IterationManifest.model_construct(iteration=k, metrics=Metrics(values=values))
            for k, values in enumerate(self.metrics)
        ]


def metric(value: float | None) -> Metric:
    return Metric(value=value, standard_error=0.01, long_name="")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ({"kind": "budget"}, (False, 5)),
        ({"kind": "plateau"}, (True, 2)),
        ({"kind": "plateau", "patience": 4}, (False, 2)),
        ({"kind": "plateau", "monitor": "energy"}, (False, 5)),
        ({"kind": "plateau", "monitor": "frechet"}, (False, 5)),
        ({"kind": "floor"}, (False, 2)),
        ({"kind": "floor", "monitor": "frechet"}, (True, 4)),
        ({"kind": "floor", "monitor": "energy"}, (False, 5)),
        ({"kind": "plateau", "monitor": "classifier"}, (False, 5)),
    ],
    ids=str,
)
def test_the_decision_is_that_of_the_committed_metrics(
    monkeypatch: pytest.MonkeyPatch, stop: dict[str, Any], expected: tuple[bool, int]
) -> None:
    data = yaml.safe_load(Path(DIGITS).read_text()) | {"stop": stop}
    values = [0.9, 0.5, 0.3, 0.305, 0.3, 0.298]
    floors = [0.1, 0.1, 0.1, 0.1, 0.3, 0.3]
    metrics = [
        {
            "divergence": metric(values[k]),
            "divergence_floor": metric(0.1),
            "frechet": metric(values[k]),
            "frechet_floor": metric(floors[k]),
            "energy": metric(1.0 - 0.1 * k),
        }
        for k in range(6)
    ]
    run = Recorded(RunConfig.model_validate(data), metrics)
    monkeypatch.setattr(RunStore, "open", lambda _: run)
    decision = decide_stop("somewhere")
    assert (decision["stop"], decision["best"]) == expected, decision
    assert decision["reason"]
    run.metrics = []
    none = decide_stop("somewhere")
    assert none == {"stop": False, "best": -1, "reason": "no iteration is complete"}
