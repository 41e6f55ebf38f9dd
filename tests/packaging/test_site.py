"""The site has every page once, and its list for language models names pages that are there."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import jsonschema
import pytest

DOCS = Path(__file__).parents[2] / "docs"
PARTS = ("start", "how-to", "reference", "explanation")


def pages_in(index: Path) -> list[str]:
    """Pages of the toctrees of `index`, as paths below docs/ without their ending."""
    trees = re.findall(r"```{toctree}\n(.*?)```", index.read_text(encoding="utf-8"), re.DOTALL)
    names = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    named = [os.path.relpath(index.parent / name, DOCS) for name in names]
    files = [file for name in named for file in sorted(DOCS.glob(f"{name}.md"))]
    return [str(file.relative_to(DOCS).with_suffix("")) for file in files]


def test_every_page_is_in_one_part() -> None:
    assert pages_in(DOCS / "index.md") == [f"{part}/index" for part in PARTS]
    named = Counter(page for part in PARTS for page in pages_in(DOCS / part / "index.md"))
    written = {str(file.relative_to(DOCS).with_suffix("")) for file in DOCS.rglob("*.md")}
    assert set(named) | {"index", *(f"{part}/index" for part in PARTS)} == written
    assert [page for page, count in named.items() if count > 1] == []


def test_the_list_for_language_models_names_pages() -> None:
    named = re.findall(r"\]\(([^)]+)\.html\)", (DOCS / "llms.txt").read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [name for name in named if not (DOCS / f"{name}.md").is_file()] == []


def test_every_schema_is_one_and_refuses_another_file() -> None:
    schemas = [json.loads(file.read_text(encoding="utf-8")) for file in (DOCS / "reference" / "schemas").glob("*.json")]
    assert len(schemas) == 8
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
        assert all(definition.get("description") for definition in schema["properties"].values()), schema["title"]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({}, schema)
