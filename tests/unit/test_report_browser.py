"""The report in a real browser: no errors, no page wider than a phone, light and dark, values under the pointer."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstune.report import command
from dstune.show.facts import Preview, Repeated, Row
from dstune.show.page import page
from dstune.show.segments import Segment
from tests.support.browser import probe
from tests.support.runs import DATA, HOSTILE, RESULT, full_run, write_run_directory

LONG = "long" * 60
CONFUSION = {"confusion": [[12345, 2, 3, 4]] * 4, "labels": [LONG, "b", "c", "d"]}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a long word everywhere a user can put one."""
    folder = tmp_path_factory.mktemp("one")
    data = {"train": {**DATA["train"], "sources": {LONG: {"rows": 10**9, "tokens": 10**12, "targets": 10**12}}}}
    run = full_run(
        folder / "run",
        name=LONG,
        overrides=[f"data.train={LONG}"],
        samples=[{"step": 0, "prompt": LONG, "reference": HOSTILE, "answer": LONG}],
        data_report=data,
        result={**RESULT, **CONFUSION, "status": "failed", "reason": LONG},
    )
    assert command.main([str(run)]) == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    for number in range(10):
        write_run_directory(folder / str(number), name=f"{number}-{LONG}", lr=1e-5 * (number + 1), result=RESULT)
    assert command.main([str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pieces = [Segment("<s>", 1, False, True), Segment(LONG * 3, 9, True, False), Segment(HOSTILE, 3, False, False)]
    row = Row(0, 13, 9, None, LONG, pieces)
    data = {"max_length": 128, "packing": True}
    preview = Preview(
        "m", "chat", "train", 1, [row], DATA["train"], data, [Repeated(3, LONG)], answers=[Repeated(2, HOSTILE)]
    )
    target = tmp_path_factory.mktemp("rows") / "rows.html"
    target.write_text(page(preview), encoding="utf-8")
    return target


LOOK = """
    const style = getComputedStyle(document.body);
    Object.assign(found, {
        wide: document.documentElement.scrollWidth, window: innerWidth,
        paper: style.backgroundColor, ink: style.color, button: document.getElementById("theme").textContent,
        clipped: [...document.querySelectorAll(".figures dd, .title, h1, h2")]
            .filter((e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflow === "hidden").length,
    });
    document.getElementById("theme").click();
    found.other = getComputedStyle(document.body).backgroundColor;
"""


@pytest.mark.parametrize("name", ["one", "several", "rows"])
def test_a_phone(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found = probe(request.getfixturevalue(name), LOOK, tmp_path, width=390, height=844)
    assert found["errors"] == []
    assert found["window"] == 390
    assert found["wide"] <= 390, "the page scrolls sideways"
    assert found["clipped"] == 0


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_dark_and_light(one: Path, tmp_path: Path) -> None:
    (tmp_path / "light").mkdir()
    (tmp_path / "dark").mkdir()
    light = probe(one, LOOK, tmp_path / "light")
    dark = probe(one, LOOK, tmp_path / "dark", dark=True)
    assert light["errors"] == dark["errors"] == []
    assert brightness(light["paper"]) > 700 > 200 > brightness(light["ink"])
    assert brightness(dark["paper"]) < 100 < 600 < brightness(dark["ink"])
    assert (light["button"], dark["button"]) == ("Dark", "Light")
    assert (light["other"], dark["other"]) == (dark["paper"], light["paper"]), "the button changes sides"


def test_values_under_the_pointer(one: Path, tmp_path: Path) -> None:
    script = """
        const plot = document.querySelector(".plot");
        const box = plot.getBoundingClientRect();
        const at = (share) => ({bubbles: true, clientX: box.left + share * box.width, clientY: box.top + 5});
        plot.dispatchEvent(new PointerEvent("pointermove", at(0.5)));
        found.tip = plot.querySelector(".tip").innerText.split(/\\s*\\n\\s*/);
        found.tips = document.querySelectorAll(".tip").length;
        found.hairs = document.querySelectorAll(".hair").length;
        found.plots = document.querySelectorAll(".plot").length;
        plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
        found.next = plot.querySelector(".tip b").textContent;
        plot.dispatchEvent(new PointerEvent("pointerleave"));
        found.left = document.querySelectorAll(".tip, .hair").length;
    """
    found = probe(one, script, tmp_path)
    assert found["errors"] == []
    assert found["tip"][0] == "step 20"
    assert "held-out" in found["tip"]
    assert found["tip"][found["tip"].index("held-out") + 1] == "2.468"  # 2.1 + 1 / e
    assert found["tips"] == 1
    assert found["hairs"] == found["plots"] > 4, "the same step in every chart"
    assert found["next"] == "step 21"
    assert found["left"] == 0


def test_curves_without_scripts(one: Path, tmp_path: Path) -> None:
    """Every curve has a size on the screen, and lies inside of its plot."""
    script = """
        found.outside = [...document.querySelectorAll(".plot path")].filter((path) => {
            const line = path.getBoundingClientRect(), plot = path.closest(".plot").getBoundingClientRect();
            return line.width < plot.width / 4 || line.top < plot.top - 2 || line.bottom > plot.bottom + 2
                || line.left < plot.left - 2 || line.right > plot.right + 2;
        }).length;
        found.paths = document.querySelectorAll(".plot path").length;
    """
    html = one.read_text(encoding="utf-8")
    start = html.rindex("<script>")
    bare = tmp_path / "bare.html"
    bare.write_text(html[:start] + html[html.index("</script>", start) + len("</script>") :], encoding="utf-8")
    found = probe(bare, script, tmp_path)
    assert found["errors"] == []
    assert found["paths"] > 6
    assert found["outside"] == 0
