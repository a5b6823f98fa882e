"""The JSON Schema of an experiment file, generated from its typed definition."""

from __future__ import annotations

from typing import Any

from pipeline.experiment import Experiment


def experiment_schema() -> dict[str, Any]:
    """The schema in Draft-07, which editors read; its descriptions are the docstrings of the definition."""
    schema = Experiment.model_json_schema(ref_template="#/definitions/{model}")
    definitions = schema.pop("$defs")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Experiment",
        **{key: _draft_07(part) for key, part in schema.items() if key != "title"},
        "definitions": {name: _draft_07(definition) for name, definition in definitions.items()},
    }


def _draft_07(schema: Any) -> Any:
    """The same for a reader of Draft-07, which ignores what stands beside a `$ref`.

    Generated titles go, and so do sections as defaults: an editor would offer to write every key out.
    """
    if isinstance(schema, list):
        return [_draft_07(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {
        key: _draft_07(part)
        for key, part in schema.items()
        if not (key == "title" and isinstance(part, str)) and not (key == "default" and isinstance(part, dict))
    }
    if "patternProperties" in plain:
        plain["additionalProperties"] = False  # a name that does not match is refused, not ignored
    if "$ref" in plain and len(plain) > 1:
        return {"allOf": [{"$ref": plain.pop("$ref")}], **plain}
    return plain
