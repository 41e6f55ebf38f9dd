"""docs/chat-models.md: its tables are those of the benchmark."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

TEMPLATES = os.environ.get("DSTUNE_TEST_TEMPLATES", "")
"""A folder of clones, as `benchmarks/chat_models.py` wants them."""


def test_every_model_has_its_row_and_its_source():
    from chat_models import LIST, PAGE, block_of, sources_table

    page = PAGE.read_text(encoding="utf-8")
    assert block_of(page, "sources") == sources_table()
    entries = json.loads(LIST.read_text(encoding="utf-8"))
    rows = [line.split(" | ")[0].removeprefix("| ") for line in block_of(page, "models") if line.startswith("| ")]
    assert rows[2:] == [entry["model"] for entry in entries]
    assert sum(entry["of_forty"] for entry in entries) == 40
    assert all(len(of["sha256"]) == 64 for entry in entries for of in (entry, entry.get("without_tools", entry)))


@pytest.mark.ci
def test_the_table_of_packaged_templates_is_current_and_nothing_is_wrong():
    from chat_models import PAGE, block_of, packaged_models, table

    lines, wrong, _ = table(list(packaged_models()))
    assert not wrong
    assert block_of(PAGE.read_text(encoding="utf-8"), "packaged") == lines


@pytest.mark.slow
@pytest.mark.skipif(not TEMPLATES, reason="set DSTUNE_TEST_TEMPLATES to a folder of clones (benchmarks/chat_models.py)")
def test_the_table_of_models_is_current_and_nothing_is_wrong():
    from chat_models import PAGE, block_of, counts_table, models, table

    lines, wrong, counts = table(list(models(Path(TEMPLATES))))
    assert not wrong
    page = PAGE.read_text(encoding="utf-8")
    assert block_of(page, "models") == lines
    assert block_of(page, "counts") == counts_table(counts)
