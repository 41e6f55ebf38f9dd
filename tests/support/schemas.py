"""The files of a run held against the JSON schemas that the reference publishes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

FOLDER = Path(__file__).parents[2] / "docs" / "reference" / "schemas"


def documents_of(run_dir: Path) -> Iterator[tuple[str, Path, Any]]:
    """Name of the schema, file and content of everything in a run that has a schema."""
    for name in ("result", "environment", "data-report", "launch", "safety"):
        file = run_dir / f"{name.replace('-', '_')}.json"
        if file.is_file():
            yield name, file, json.loads(file.read_text())
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        yield "metrics-row", run_dir / "metrics.jsonl", json.loads(line)
    for file in run_dir.glob("checkpoints/step-*/*"):
        name = {"state.json": "checkpoint-state", "COMMITTED": "committed"}.get(file.name)
        if name is not None:
            yield name, file, json.loads(file.read_text())


def validate_files(run_dir: Path) -> set[str]:
    """Hold every file against its schema, and return the names of the schemas. Raises jsonschema.ValidationError."""
    validators = {
        file.name.removesuffix(".schema.json"): jsonschema.Draft202012Validator(json.loads(file.read_text()))
        for file in FOLDER.glob("*.json")
    }
    names = set()
    for name, _, content in documents_of(run_dir):
        validators[name].validate(content)
        names.add(name)
    return names
