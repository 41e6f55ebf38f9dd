"""The pages of a cycle and of a monitor: what is on them, and that no text lies over another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dstune.cli import main
from dstune.cycle.ledger import Ledger
from dstune.cycle.page import write_page
from dstune.cycle.registry import Registry
from dstune.grading.verdicts import Comparison, decide
from tests.support import topics
from tests.support.boxes import SHOWN, overlaps
from tests.support.pages import Page
from tests.support.served_runs import save_run

ALIAS = "assistant-of-the-customer-service"


def write_cycles(folder: Path, count: int) -> Path:
    """A ledger and a registry after so many cycles, with long names and reasons."""
    folder.mkdir()
    ledger, registry = Ledger(folder), Registry.read(folder)
    entry = {"run": "/runs/a", "digest": "0123456789abcdef" * 2, "parent": None, "status": "current", "cycle": 0}
    registry.versions["v1"] = entry
    registry.share(ALIAS, 0.1)
    generator = np.random.default_rng(0)
    for cycle in range(1, count + 1):
        version = f"v{cycle + 1}"
        ledger.note(cycle, "collect", "trains", f"{1234567 * cycle:,} new rows from version v{cycle}")
        gates = []
        for name in ("validation", "new rows", "/data/frozen/test-sets/of-the-year.jsonl", 'validation: topic="<b>"'):
            scores = (generator.random((2, 400)) < 0.8).astype(float)
            gates += [vars(result) for result in decide([Comparison(name, scores[0], scores[1], 0.02)], 0.025, 4)]
        failed = [gate["name"] for gate in gates if gate["verdict"] == "worse"]
        ledger.note(cycle, "judge", "failed", f"worse on {', '.join(failed)}", current=f"v{cycle}", gates=gates)
        registry.versions[version] = entry | {"status": "challenger", "cycle": cycle, "parent": f"v{cycle}"}
        registry.share(ALIAS, 0.1)
        ledger.note(cycle, "register", "challenges", "10% of the traffic; a person promotes it")
        if cycle < count:
            registry.promote(ALIAS)
            ledger.append(
                cycle, "promote", version, "read fifty answers " * 6, by="a.long-name@an-organization.example"
            )
    registry.versions["v2"]["holds_forgotten"] = True
    registry.write()
    return write_page(folder, ALIAS)


def test_the_page_says_what_the_ledger_says(tmp_path: Path) -> None:
    page = write_cycles(tmp_path / "cycle", 3)
    assert page.stat().st_mode & 0o077 == 0
    text = Page(page.read_text()).text
    assert f"Versions of {ALIAS} current v3 challenger v4 3 cycles" in text
    assert 'validation: topic="<b>"' in text and "<b>" not in page.read_text()
    assert "read fifty answers" in text and "holds deleted rows" in text
    assert text.count("of-the-year.jsonl") >= 2  # the gates' table, and a chart
    empty = write_page(tmp_path, ALIAS)
    assert "Gates" not in empty.read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    rows = topics.write(folder / "rows.jsonl", topics.reviews("films", 300, 0))
    model = topics.save_encoder(folder / "model")
    run = save_run(folder / "run", model, rows, "task=classification", labels=topics.LABELS)
    live = [row | {"created": 1767225600 + 60 * at} for at, row in enumerate(topics.reviews("films", 200, 1))]
    live += [row | {"created": 1767300000 + 60 * at} for at, row in enumerate(topics.reviews("hotels", 200, 2))]
    topics.write(folder / "live.jsonl", live)
    for checks in ("0.05", "0.04"):
        words = ["--data", str(folder / "live.jsonl"), "--alpha", checks, "--json"]
        assert main(["monitor", str(run), *words]) == 0
        topics.write(folder / "live.jsonl", live[1:])
    assert json.loads((run / "monitor" / "monitor.json").read_text())["verdict"] == "drift"
    return {"monitor": run / "monitor" / "report.html", "ledger": write_cycles(folder / "cycle", 8)}


@pytest.mark.slow
@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("name", ["monitor", "ledger"])
def test_no_text_lies_over_another(pages: dict[str, Path], tmp_path: Path, name: str, shown: str) -> None:
    assert overlaps(pages[name], tmp_path, shown) == {}
