"""DiffEM beside its baselines and its ceiling: what is compared, and who sees the truth."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines import stages
from pipelines.compare import contenders
from pipelines.compare.contenders import Contender, LeftOut
from pipelines.compare.numbers import Comparison, Outcome, collect
from pipelines.compare.table import as_markdown, cell_text
from pipelines.config_io import load_config
from pipelines.export.card import _method
from pipelines.stages.bench import Bench
from pipelines.stages.ceiling import clean_samples
from pipelines.status import CEILING, read_status
from storage_schemas.config import RunConfig
from storage_schemas.metrics import Metric
from storage_schemas.observations import Observations
from storage_schemas.run_store import RunStore
from tests.command_line import diffem, refused
from tests.conftest import TINY

ALL = ("diffem", "em-mmps", "gaussian", "clean")


def config_with(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(TINY | changes)


def found(config: RunConfig, *methods: Any, seeds: Any = (0,)) -> dict[str, Contender]:
    chosen, _ = contenders(config, methods or ALL, seeds)
    return {f"{one.method}-{one.seed}": one for one in chosen}


# --- what is compared


def test_contenders_differ_in_method_and_seed_alone() -> None:
    config = config_with()
    by = found(config, seeds=(0, 7))
    assert {*by} == {f"{method}-{seed}" for method in ALL for seed in (0, 7)}
    for name in ("diffem-7", "em-mmps-7", "clean-7"):
        one = by[name]
        assert one.folder == name
        expected = config.model_dump() | {"method": one.method, "seed": 7}
        assert one.config.model_dump() == expected
    # The Gaussian posterior is the start of any of these runs: it needs none of its own.
    gaussian = by["gaussian-7"]
    assert (gaussian.folder, gaussian.start_only) == ("diffem-7", True)
    assert gaussian.config == by["diffem-7"].config
    assert found(config, "gaussian", "clean")["gaussian-0"].folder == "clean-0"
    assert found(config, "gaussian")["gaussian-0"].folder == "diffem-0"


def test_what_a_method_does_not_know_is_left_out_of_its_config() -> None:
    config = config_with(
        condition="gaussian_mean",
        start={"kind": "mmps", "laps": 1, "gaussian": {"iterations": 3}},
        prior={"kind": "joint"},
    )
    by = found(config)
    assert by["diffem-0"].config.start.kind == "mmps"
    for name in ("em-mmps-0", "clean-0"):
        assert by[name].config.start == config.start.gaussian  # type: ignore[union-attr]
    assert by["em-mmps-0"].config.condition == "observation"
    assert by["em-mmps-0"].config.prior is None
    assert by["clean-0"].config.condition == "gaussian_mean"
    assert by["clean-0"].config.prior == config.prior


def left(config: RunConfig, *methods: Any) -> dict[str, str]:
    return {item.method: item.reason for item in contenders(config, methods or ALL, (0,))[1]}


def test_a_channel_that_is_not_linear_leaves_out_what_needs_one_and_says_so() -> None:
    jpeg = config_with(
        channel={"kind": "jpeg", "quality": 30, "low": 0, "high": 16},
        start={"kind": "pseudo_inverse"},
        evaluation={"draws": 2},
    )
    out = left(jpeg)
    assert {*out} == {"em-mmps", "gaussian"}
    assert all("needs a linear channel with Gaussian noise" in reason for reason in out.values())
    with pytest.raises(ValueError, match=r"nothing is left to compare.*em-mmps.*linear"):
        contenders(jpeg, ("em-mmps",), (0,))


def test_a_start_that_is_not_gaussian_makes_the_gaussian_a_run_of_its_own() -> None:
    by = found(config_with(start={"kind": "pseudo_inverse"}))
    gaussian = by["gaussian-0"]
    assert gaussian.folder == "gaussian-0"
    assert gaussian.config.start.kind == "gaussian"
    assert by["diffem-0"].config.start.kind == "pseudo_inverse"


def test_without_clean_samples_there_is_no_ceiling(tmp_path: Path) -> None:
    source = tmp_path / "y.npz"
    rng = np.random.default_rng(0)
    y, mask = rng.normal(size=(40, 1, 8, 8)), rng.random((40, 1, 8, 8)) < 0.5
    np.savez(source, y=y.astype(np.float32), mask=mask.astype(np.float32))
    store = tmp_path / "store"
    made = diffem("ingest", source, store, "--y", "y", "--param", "mask", "--holdout", 8)
    assert made.exit_code == 0, made.output
    data = {"kind": "store", "url": str(store), "x_shape": [1, 8, 8], "value_range": [0, 16]}
    out = left(config_with(data=data, evaluation={"draws": 2}))
    assert {*out} == {"clean"}
    assert "come without clean samples" in out["clean"]


def test_mistakes_are_told_before_anything_is_written(tiny_config: Path, tmp_path: Path) -> None:
    for option, expected in (
        (("--methods", "diffem,gan"), "unknown gan; known are diffem, em-mmps"),
        (("--seeds", "0,-1"), "give whole numbers from 0"),
        (("--json", "--markdown"), "give one"),
    ):
        store = tmp_path / "none"
        assert expected in refused("compare", tiny_config, "--store", store, *option)
        assert not store.exists()


# --- the numbers


def outcome(method: Any, seed: int, **values: float | None) -> Outcome:
    metrics = {
        name: Metric(value=value, long_name=name if value is not None else "not known: no weights")
        for name, value in values.items()
    }
    return Outcome(
        method=method,
        seed=seed,
        run=f"/runs/{method}-{seed}",
        iteration=1,
        model_digest="0" * 64,
        gradient_steps=100,
        seconds=3.0 + seed,
        metrics=metrics,
        references={"a_floor": Metric(value=0.5 + seed, long_name="floor")},
    )


def small_comparison() -> Comparison:
    outcomes = [
        *(outcome("diffem", seed, a=1.0 + seed, b=None) for seed in (0, 1, 2)),
        *(outcome("clean", seed, a=4.0 - seed, b=float(seed)) for seed in (0, 1, 2)),
    ]
    reason = LeftOut(method="em-mmps", reason="the channel is not linear")
    return collect("tiny", "/runs", (0, 1, 2), outcomes, [reason], ("diffem", "em-mmps", "clean"))


def test_a_cell_is_mean_spread_and_paired_difference() -> None:
    rows = {row.metric: row for row in small_comparison().rows}
    first, second = rows["a"].cells["diffem"], rows["a"].cells["clean"]
    assert (first.mean, first.spread, first.values) == (2.0, 1.0, (1.0, 2.0, 3.0))
    assert (second.mean, second.spread) == (3.0, 1.0)
    # Differences 3, 1, -1: seeds move both, each its own way.
    assert (second.difference, second.difference_spread) == (1.0, 2.0)
    assert first.difference is None
    reference = rows["a"].reference
    assert reference is not None
    assert reference.mean == 1.5
    missing = rows["b"].cells["diffem"]
    assert (missing.mean, missing.spread, missing.reason) == (None, None, "not known: no weights")


def test_the_table_says_who_is_missing_and_why_and_that_the_ceiling_is_one() -> None:
    text = as_markdown(small_comparison())
    lines = text.splitlines()
    assert lines[0] == "| metric | DiffEM | clean samples (ceiling) | floor, clean |"
    assert "| a | 2.0 ± 1.0 | 3.0 ± 1.0 | 1.5 ± 1.0 |" in lines
    assert "| b | - | 1.0 ± 1.0 |  |" in lines
    assert "| gradient steps | 100 | 100 |  |" in lines
    assert "EM-MMPS is left out: the channel is not linear." in lines
    assert "b: not known: no weights." in lines
    assert any(line.startswith("The ceiling learned from clean samples") for line in lines)
    assert "nan" not in text.lower()


def test_a_value_that_some_seeds_lack_says_of_how_many_it_is() -> None:
    outcomes = [outcome("diffem", 0, a=1.0), outcome("diffem", 1, a=None)]
    comparison = collect("tiny", "/runs", (0, 1), outcomes, [], ("diffem",))
    assert cell_text(comparison.rows[0].cells["diffem"]) == "1.000 (1 of 2)"


# --- nobody else sees the truth


def small_run(url: Path, method: str) -> RunStore:
    """Bring a tiny run to its end by its stages, without Prefect."""
    config = config_with(
        method=method,
        iterations=2,
        data={"kind": "digits", "holdout": 30, "limit": 110},
        m_step={"steps": 6, "batch_size": 16, "ema_decay": 0.5},
        evaluation={"draws": 2, "reconstructions": 16, "preview": 0, "monitors": []},
    )
    store = RunStore.create(str(url), config)
    run = str(url)
    stages.prepare_observations(run)
    stages.fit_start(run)
    for k in range(config.iterations):
        plan = stages.lay_out_iteration(run, k)
        for shard in range(plan["shards"]):
            stages.e_step_shard(run, k, shard, plan["config_digest"], plan["parent_digest"])
        digest = stages.reconstructions_digest(run, k)
        stages.refine_model(run, k, plan["config_digest"], digest)
        stages.evaluate_iteration(run, k, plan["config_digest"], stages.model_digest(run, k))
        stages.commit_iteration(run, k, 0)
    return RunStore.open(str(store.url))


@pytest.fixture
def other_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every reader of clean samples find them upside down."""
    plain = Observations.truth

    def upside_down(self: Observations, rows: Any = None) -> NDArray[Any] | None:
        x = plain(self, rows)
        return None if x is None else np.ascontiguousarray(x[..., ::-1, :])

    monkeypatch.setattr(Observations, "truth", upside_down)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunStore]:
    folder = tmp_path_factory.mktemp("compared")
    return {method: small_run(folder / method, method) for method in ("diffem", "clean")}


def models(store: RunStore) -> list[str]:
    return [manifest.model_digest for manifest in store.completed()]


@pytest.mark.usefixtures("other_truth")
def test_only_the_ceiling_learns_from_the_truth(runs: dict[str, RunStore], tmp_path: Path) -> None:
    again = {method: small_run(tmp_path / method, method) for method in runs}
    assert models(again["diffem"]) == models(runs["diffem"])
    assert models(again["clean"])[0] != models(runs["clean"])[0]
    # The other truth was really seen: by the evaluation.
    before, after = (s.completed()[-1].metrics for s in (runs["diffem"], again["diffem"]))
    assert before is not None
    assert after is not None
    assert before.values["psnr_mean"] != after.values["psnr_mean"]
    assert before.values["divergence"] == after.values["divergence"]


def test_the_ceiling_stores_and_learns_from_the_clean_samples(runs: dict[str, RunStore]) -> None:
    store = runs["clean"]
    x = store.observations("train").truth()
    assert x is not None
    for k in (0, 1):
        np.testing.assert_array_equal(store.iteration(k).read_reconstructions(), x)
    assert models(store)[0] != models(store)[1]
    assert models(store)[0] != models(runs["diffem"])[0]
    # Observations, start and what is held out are the same for both.
    assert store.start().manifest() is not None
    ours, theirs = (run.start().manifest() for run in (store, runs["diffem"]))
    assert ours is not None
    assert theirs is not None
    assert ours.model_digest == theirs.model_digest
    assert ours.metrics == theirs.metrics


def test_the_door_to_the_truth_is_shut_for_other_methods(runs: dict[str, RunStore]) -> None:
    bench = Bench.open(runs["diffem"].url)
    with pytest.raises(RuntimeError, match=r"method is 'diffem'.*only method 'clean' may read"):
        clean_samples(bench, 0, slice(0, 4))


def test_no_other_stage_asks_for_clean_samples() -> None:
    """Read the sources: evaluation and ceiling call `truth`, nothing else before a model does."""
    askers = set()
    for folder in ("pipelines/stages", "pipelines/build", "pipelines/using", "pipelines/runners"):
        for path in Path(folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr == "truth":
                    askers.add(path.name)
    # `observations` copies a store, truth and all, into the run, before anything is learned.
    assert askers == {"judge.py", "ceiling.py", "observations.py"}


def test_a_ceiling_says_that_it_is_one_wherever_it_is_met(runs: dict[str, RunStore]) -> None:
    from pipelines.report import read_report, render_report

    store = runs["clean"]
    status = read_status(store)
    assert status.method == "clean"
    assert read_status(runs["diffem"]).method == "diffem"
    page = render_report(read_report(store))
    assert page.count(CEILING.capitalize()) == 1
    assert "Trained on clean samples" not in render_report(read_report(runs["diffem"]))
    assert store.iteration(0).read_tensors("model")[1]["kind"] == (
        "conditional denoiser of clean samples"
    )
    attributes = json.loads(store.objects.read("iterations/000/reconstructions.zarr/zarr.json"))[
        "attributes"
    ]
    assert attributes["method"] == "clean"
    assert "not reconstructions" in attributes["title"]
    assert "trained on clean samples" in _method("clean")
    assert "clean" not in _method("diffem")
    assert store.config.digest != runs["diffem"].config.digest


def test_a_warm_start_by_em_mmps_is_refused_for_the_ceiling() -> None:
    with pytest.raises(ValueError, match=r"method is 'clean'.*take another start"):
        config_with(method="clean", start={"kind": "mmps", "laps": 1})


# --- the whole thing


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_comparison_goes_on_where_it_ended_and_is_one_json_object(
    tiny_config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "compared"
    command = (
        *("compare", tiny_config, "--store", folder, "--seeds", "0"),
        *("--methods", "diffem,gaussian,clean", "--set", "iterations=1", "--json"),
    )
    first = diffem(*command)
    assert first.exit_code == 0, first.output
    comparison = Comparison.model_validate_json(first.stdout)
    assert [one.method for one in comparison.outcomes] == ["diffem", "gaussian", "clean"]
    # An ordinary run: the same config there is found complete.
    config = load_config(str(tiny_config), ["method=clean", "seed=0", "iterations=1"])
    assert RunStore.open(str(folder / "clean-0")).config == config
    again = diffem(*command)
    assert again.stdout == first.stdout
    assert again.stderr.count("found complete") == 3
    (folder / "clean-0" / "iterations/000/iteration.json").unlink()
    repaired = diffem(*command)
    assert repaired.stderr.count("found complete") == 2
    rows = json.loads(repaired.stdout)["rows"]
    assert rows == json.loads(first.stdout)["rows"]
