"""No text of a report lies over another one, at any width, light or dark: measured in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dstune.report import command
from tests.support.browser import probe
from tests.support.runs import DATA, RESULT, full_run, metrics_rows, write_run_directory, write_sweep_directory

pytestmark = pytest.mark.slow

WIDTHS = (360, 400, 1000, 1600)
WIDE_FONT = '<style>* { font-family: "DejaVu Sans", Verdana, sans-serif !important; }</style>'
"""What a machine without the fonts that the page asks for may show in their place: every word is wider."""

OVERLAPS = """
    for (const closed of document.querySelectorAll("details")) closed.open = true;
    const boxes = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const clipped = (box, element) => {
        let {left, right, top, bottom} = box;
        for (let at = element; at && at !== document.body; at = at.parentElement) {
            const style = getComputedStyle(at);
            if (style.visibility === "hidden" || style.display === "none") return null;
            if (style.overflowX !== "visible" || style.overflowY !== "visible") {
                const own = at.getBoundingClientRect();
                left = Math.max(left, own.left); right = Math.min(right, own.right);
                top = Math.max(top, own.top); bottom = Math.min(bottom, own.bottom);
            }
        }
        return {left, right, top, bottom};
    };
    for (let node; (node = walker.nextNode());) {
        if (!node.textContent.trim() || ["SCRIPT", "STYLE"].includes(node.parentElement.tagName)) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        for (const rect of range.getClientRects()) {
            const box = clipped(rect, node.parentElement);
            if (!box) continue;
            const inset = (box.bottom - box.top) * 0.2;  // what a font leaves above and below its letters
            const text = node.textContent.trim().slice(0, 40);
            boxes.push({...box, top: box.top + inset, bottom: box.bottom - inset, text, node});
        }
    }
    found.boxes = boxes.length;
    found.overlaps = [];
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
        const a = boxes[i], b = boxes[j];
        if (a.node === b.node) continue;
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1.5 && down > 1.5) found.overlaps.push(`${a.text} / ${b.text}`);
    }
    found.wide = document.documentElement.scrollWidth;
"""


def trial(number: int, loss: float, **more: Any) -> dict[str, Any]:
    values = {
        "optimizer.lr": 10.0 ** -(2 + number % 5),
        "method.rank": 2 ** (2 + number % 4),
        "trainer.global_batch_size": (8, 32, 128)[number % 3],
        "data.clean.near_threshold": round(0.5 + number / 37, 4),
        "schedule": ("cosine", "warmup_stable_decay", "slanted_triangular")[number % 3],
    }
    return {"name": f"{number:03d}-x", "number": number, "values": values, "objective": {"loss": loss}, **more}


def pages(folder: Path) -> dict[str, Path]:
    """A report of each kind, with everything that it can have."""
    overfitting = {"overfitting": {"gap": 0.123456, "training_loss": 1.23456}}
    numbers = {
        "tokens": 1_234_567_890,
        "seconds": 3e5,
        "tokens_per_second": 123456.7,
        "peak_memory_gib": 1234.56,
        "world_size": 1024,
    }
    confusion = {"confusion": [[12345, 2, 3, 4]] * 4, "labels": ["a long label of a class", "b", "c", "d"]}
    full_run(folder / "one", result={**RESULT, **numbers, **overfitting, **confusion}, data_report=DATA)
    for number in range(10):
        write_run_directory(
            folder / "several" / str(number), name=f"{number}-run-with-a-name", lr=1e-5 * (number + 1), result=RESULT
        )
    trials = [trial(number, 1.5 + number / 7, files={"metrics": metrics_rows(40)}) for number in range(24)]
    trials[3] |= {"status": "pruned", "reason": "pruned (asha) at step 10"}
    trials[5] |= {"status": "failed", "reason": "not finite " * 20, "run": False}
    write_sweep_directory(folder / "sweep", trials)
    for name in ("one", "several", "sweep"):
        assert command.main([str(folder / name)]) == 0
    return {name: folder / name / "report.html" for name in ("one", "several", "sweep")}


def in_wide_font(page: Path) -> Path:
    """A copy of `page` whose fonts are missing."""
    html = page.read_text(encoding="utf-8")
    copy = page.with_name("wide.html")
    copy.write_text(html.replace("</head>", f"{WIDE_FONT}</head>", 1), encoding="utf-8")
    assert WIDE_FONT in copy.read_text(encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pages(tmp_path_factory.mktemp("reports"))


@pytest.mark.parametrize("shown", ["light", "dark", "wide font"])
@pytest.mark.parametrize("name", ["one", "several", "sweep"])
def test_no_text_lies_over_another(written: dict[str, Path], tmp_path: Path, name: str, shown: str) -> None:
    page = in_wide_font(written[name]) if shown == "wide font" else written[name]
    faults = {}
    for width in WIDTHS:
        profile = tmp_path / str(width)
        profile.mkdir()
        found = probe(page, OVERLAPS, profile, width=width, height=2000, dark=shown == "dark")
        assert found["errors"] == []
        assert found["boxes"] > 50
        if found["overlaps"] or found["wide"] > width:
            faults[width] = (found["wide"], found["overlaps"][:12])
    assert faults == {}


def test_the_probe_sees_an_overlap(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = "".join(f"<p>word {number}</p>" for number in range(60))
    page.write_text(
        f"<html><style></style><body>{words}<p style='margin-top:-1.6em'>over it</p></body></html>", encoding="utf-8"
    )
    assert probe(page, OVERLAPS, tmp_path, width=400)["overlaps"] == ["word 59 / over it"]
