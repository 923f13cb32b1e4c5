"""What people may write into a config, and what they are told when it is wrong."""

import re
from pathlib import Path

import pytest
import yaml

from pipelines.config_io import ConfigError, load_config, parse_override
from storage_schemas.config import RunConfig
from storage_schemas.json_schema import run_config_schema

EXPERIMENTS = sorted(Path("deploy/experiments").glob("*.yaml"))
DIGITS = "deploy/experiments/digits.yaml"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_ready_experiments_are_valid_and_named_after_their_file(path: Path) -> None:
    assert load_config(str(path)).name == path.stem.replace("_", "-")


def test_the_schema_for_editors_is_the_one_of_the_code() -> None:
    stored = Path("deploy/run-config.schema.json").read_text()
    assert stored == run_config_schema(), (
        "write run_config_schema() to deploy/run-config.schema.json"
    )


def test_overrides_replace_values_in_order() -> None:
    config = load_config(DIGITS, ["m_step.steps=7", "m_step.steps=8", "runner.device=cpu"])
    assert config.m_step.steps == 8
    assert config.runner.device == "cpu"


def test_an_override_keeps_the_equals_signs_of_its_value() -> None:
    assert parse_override("description=a=b") == (["description"], "a=b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds nothing"),
        ("- a\n- b\n", "holds a list"),
        ("a: [1, 2\n", "not valid YAML"),
        ("name: x\n", "iterations: missing"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_the_reason(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no config at nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("m_step.stepz=3", r"m_step\.stepz: unknown key"),
        ("m_step.steps=many", r"m_step\.steps: received 'many'"),
        ("m_step.steps=0", r"m_step\.steps: received 0"),
        ("channel.keep=1.5", r"channel\.keep: received 1\.5"),
        ("channel.keep=.nan", r"channel\.keep"),
        ("channel.kind=fog", r"channel: .*fog"),
        ("network.kind=mlp", r"network\.channels: unknown"),
        ("schedule.sigma_min=1000", "noise must grow"),
        ("e_step.sampler.sigma_end=1000", "noise must fall"),
        ("name=Digits!", r"name: received 'Digits!'"),
        ("name.sub=1", "goes below 'name'"),
        ("steps", "expects key.sub=value"),
        ("a..b=1", "expects key.sub=value"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(DIGITS, [override])


def test_the_digest_ignores_what_changes_no_number() -> None:
    config = load_config(DIGITS)
    base = load_config(DIGITS, ["m_step.learning_rate={kind: constant, value: 1e-3}"])
    assert base.digest != config.digest
    for override in [
        "runner.threads=1",
        "description=other",
        "m_step.checkpoint_seconds=1",
        "iterations=99",
    ]:
        same = load_config(
            DIGITS, ["m_step.learning_rate={kind: constant, value: 1e-3}", override]
        )
        assert same.digest == base.digest, override


def test_the_digest_knows_the_iterations_when_the_learning_rate_spans_them() -> None:
    rate = "m_step.learning_rate={kind: cosine, value: 1e-3, over: run}"
    assert (
        load_config(DIGITS, [rate, "iterations=3"]).digest
        != load_config(DIGITS, [rate, "iterations=4"]).digest
    )


def test_a_config_survives_the_way_through_json_and_yaml() -> None:
    config = load_config(DIGITS)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert (
        RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
        == config
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("start={kind: model, url: 's3://AKIA:ab/hidden-secret@bucket/m'}", "a password"),
        ("start={kind: model, url: 's3://b/m.safetensors?sig=hidden-secret'}", "a query"),
        (
            "data={kind: store, url: 's3://AKIA:ab/hidden-secret@b/d', x_shape: [1, 8, 8], "
            "value_range: [0, 16]}",
            "a password",
        ),
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_shown(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        load_config("deploy/experiments/digits.yaml", [override])
    assert "hidden-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("start={kind: gaussian, rank: 0}", "start.rank"),
        ("runner.workers=0", "runner.workers"),
        ("runner={kind: ray, workers: 2}", "runner.workers"),
        ("e_step.sampler.steps=0", "e_step.sampler.steps"),
    ],
)
def test_an_offending_field_is_named_by_its_path_in_the_file(override: str, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"\n  {re.escape(path)}: "):
        load_config(DIGITS, [override])
