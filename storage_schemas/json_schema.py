"""JSON Schema of the run config, with which editors complete and check the YAML files.

    # yaml-language-server: $schema=../run-config.schema.json

The descriptions are the attribute docstrings of `config`.
"""

from __future__ import annotations

import json

from storage_schemas.config import RunConfig

__all__ = ["run_config_schema"]


def run_config_schema() -> str:
    """Return the JSON Schema (draft 2020-12) of a run config, as text that ends in a new line."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
