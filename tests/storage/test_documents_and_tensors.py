import json
import subprocess
import sys
from typing import Any, Literal

import numpy as np
import pytest

from storage_schemas import config, lease, manifests, metrics, migrations
from storage_schemas._base import Record
from storage_schemas.documents import decode_json, encode_json
from storage_schemas.errors import DamageError, SchemaMismatch
from storage_schemas.json_schema import run_config_schema
from storage_schemas.manifests import Provenance
from storage_schemas.metrics import Metrics
from storage_schemas.tensors import decode_tensors, encode_tensors
from tests.storage.tiny_run import PROVENANCE, make_metrics


def test_a_document_comes_back() -> None:
    metrics = make_metrics(1)
    assert decode_json(encode_json(metrics), Metrics, path="m.json") == metrics


def test_every_flipped_bit_of_a_document_is_found_or_without_effect() -> None:
    document = encode_json(PROVENANCE)
    harmless = 0
    for position in range(8 * len(document)):
        changed = bytearray(document)
        changed[position // 8] ^= 1 << position % 8
        try:
            assert decode_json(bytes(changed), Provenance, path="p.json") == PROVENANCE
            harmless += 1  # white space became other white space
        except DamageError:
            pass
    assert harmless < 20


@pytest.mark.parametrize("length", [0, 1, 50])
def test_a_truncated_document_is_found(length: int) -> None:
    with pytest.raises(DamageError, match=r"p\.json: is not JSON"):
        decode_json(encode_json(PROVENANCE)[:length], Provenance, path="p.json")


def test_a_document_edited_by_hand_is_found() -> None:
    changed = encode_json(PROVENANCE).replace(b'"3"', b'"4"')
    with pytest.raises(DamageError, match="edited by hand"):
        decode_json(changed, Provenance, path="p.json")


def test_a_newer_document_asks_for_a_newer_version() -> None:
    class Newer(Metrics):
        schema_version: int = 2  # type: ignore[assignment]

    document = encode_json(Newer(values={}))
    with pytest.raises(SchemaMismatch, match=r"schema version 2 but .* reads up to 1; install"):
        decode_json(document, Metrics, path="m.json")


class Second(Record):
    """A model whose field `size` was called `length` in version 1."""

    schema_version: Literal[2] = 2
    size: int


def test_an_older_document_is_migrated(monkeypatch: pytest.MonkeyPatch) -> None:
    class First(Record):
        schema_version: Literal[1] = 1
        length: int

    def renamed(kind: str, data: dict[str, Any]) -> dict[str, Any]:
        assert kind == "Second"
        return {"size": data["length"]}

    document = encode_json(First(length=3))
    with pytest.raises(SchemaMismatch, match="does not hold what this version of diffem expects"):
        decode_json(document, Second, path="s.json")
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", 2)
    monkeypatch.setitem(migrations.MIGRATIONS, 1, renamed)
    assert decode_json(document, Second, path="s.json") == Second(size=3)
    assert decode_json(encode_json(Second(size=4)), Second, path="s.json") == Second(size=4)


def test_every_stored_model_has_the_present_version() -> None:
    """A model left behind, or a version without a migration that leads to it, is noticed."""
    models = {
        value
        for module in (config, lease, manifests, metrics)
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Record)
        and "schema_version" in value.model_fields
    }
    assert len(models) > 8
    for model in models:
        assert model.model_fields["schema_version"].default == migrations.SCHEMA_VERSION
    assert [*migrations.MIGRATIONS] == [*range(1, migrations.SCHEMA_VERSION)]


def test_the_schema_of_the_config_describes_every_field() -> None:
    schema = json.loads(run_config_schema())
    assert schema["$schema"].endswith("2020-12/schema")
    # JsonValue is whatever a class of deepinv or of the user's own takes as an argument.
    named = {name: d for name, d in schema["$defs"].items() if name != "JsonValue"}
    definitions = [schema, *named.values()]
    assert len(definitions) > 15
    for definition in definitions:
        assert definition["additionalProperties"] is False
        for name, field in definition["properties"].items():
            # A part of the config is described by its model.
            described = "description" in field or "$ref" in field or "oneOf" in field
            assert described or name in ("kind", "over"), (definition["title"], name)
        assert definition["description"]


ARRAYS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "step": np.array(7),
    "none": np.zeros((0, 3), np.float64),
    "flags": np.array([True, False]),
    "halves": np.array([0.5], np.float16),
}
NOTE = {"b": [1, 2], "a": {"c": "é"}}


def test_tensors_come_back() -> None:
    arrays, note = decode_tensors(encode_tensors(ARRAYS, NOTE), path="t")
    assert note == NOTE
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        np.testing.assert_array_equal(arrays[name], array)


def test_tensors_that_are_not_contiguous_come_back() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    arrays, _ = decode_tensors(encode_tensors({"w": array}), path="t")
    np.testing.assert_array_equal(arrays["w"], array)


def test_every_flipped_bit_of_a_tensor_file_is_found_or_without_effect() -> None:
    data = encode_tensors(ARRAYS, NOTE)
    for position in range(8 * len(data)):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        try:
            arrays, note = decode_tensors(bytes(changed), path="t")
        except DamageError:
            continue
        assert note == NOTE
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].dtype == array.dtype


def test_every_truncation_of_a_tensor_file_is_found() -> None:
    data = encode_tensors(ARRAYS, NOTE)
    for length in range(len(data)):
        with pytest.raises(DamageError):
            decode_tensors(data[:length], path="t")


def test_equal_tensors_give_equal_bytes_in_every_process() -> None:
    """safetensors itself writes several metadata keys in an order that changes by process."""
    code = """
import hashlib, numpy as np
from storage_schemas.tensors import encode_tensors
data = encode_tensors({"b": np.ones(3), "a": np.zeros(2)}, {f"key{i}": i for i in range(20)})
print(hashlib.sha256(data).hexdigest())
"""
    run = [sys.executable, "-c", code]
    digests = {
        subprocess.run(run, capture_output=True, text=True, check=True).stdout for _ in range(3)
    }
    assert len(digests) == 1


def test_other_safetensors_readers_open_the_file() -> None:
    from safetensors.numpy import load

    np.testing.assert_array_equal(load(encode_tensors(ARRAYS, NOTE))["w"], ARRAYS["w"])


def test_a_foreign_safetensors_file_is_refused() -> None:
    from safetensors.numpy import save

    with pytest.raises(DamageError, match="is not a tensor file of this package"):
        decode_tensors(save({"w": np.ones(2)}, metadata={"format": "pt"}), path="t")


def test_metrics_refuse_what_is_not_finite() -> None:
    document = json.loads(encode_json(make_metrics(0)))
    document["values"]["psnr"]["value"] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        Metrics.model_validate({"values": document["values"]})
