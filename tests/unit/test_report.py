"""The report: what stands on the page, from directories of runs that were written by hand."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from dstune import cli
from dstune.report import command, numbers
from dstune.report.charts import Line, draw
from dstune.report.run_files import find_runs, read
from dstune.report.series import Series, collect, smoothed, thinned
from tests.support.pages import Page
from tests.support.runs import DATA, HOSTILE, RESULT, full_run, metrics_rows, write_run_directory


def page_of(*runs: Path, target: Path | None = None) -> Page:
    target = target or runs[0] / "report.html"
    assert command.main([*map(str, runs), "--output", str(target)]) == 0
    return Page(target.read_text(encoding="utf-8"))


def test_a_page_has_everything_of_a_run(tmp_path: Path) -> None:
    page = page_of(full_run(tmp_path / "run", name="my-run", overrides=["optimizer.lr=1e-4"]))
    for expected in (
        "my-run completed",
        "2 \u00d7 NVIDIA H100, 2 ranks",
        "held-out loss 2.235 from 3.100, \u221228 %",
        "best held-out loss 2.235 at step 40",
        "40 0.400 epochs",
        "512.5",
        "3.25 GiB",
        "1 min 35 s",
        "prompt Hey before Hello! How can I help? after not much in the data hey whats up",
        "rows read 1,000",
        "bad rows left out 3",
        "removed by cleaning 87 8.7 %",
        "longer than max_length 90 10.0 %",
        "targets 25,000 25.0 % of the tokens",
        "packing efficiency 97.3 %",
        "chat 600 70,000",
        "my.jsonl:17 hello again",
        "torch 2.13.0",
        "1,000 (10 trained)",
    ):
        assert expected in page.text, expected


def test_few_held_out_rows_are_counted_beside_their_metrics(tmp_path: Path) -> None:
    few = page_of(full_run(tmp_path / "few", result={**RESULT, "held_out_rows": 12}))
    assert "held-out rows 12 so few say little" in few.text
    enough = page_of(full_run(tmp_path / "enough", result={**RESULT, "held_out_rows": 20}))
    assert "held-out rows" not in enough.text


def test_every_metric_is_plotted_once(tmp_path: Path) -> None:
    rows = [*metrics_rows(40), {"step": 40, "eval/accuracy": 0.5, "reward/mean": 1.25}]
    page = page_of(full_run(tmp_path / "run", metrics=rows))
    plotted = [name for chart in page.having("data-metric") for name in str(chart["data-metric"]).split()]
    logged = {name for row in rows for name in row} - {"step", "epoch", "tokens", "step_seconds", "eval/seconds"}
    assert sorted(plotted) == sorted(logged)


def test_the_drawn_values_are_those_logged(tmp_path: Path) -> None:
    page = page_of(write_run_directory(tmp_path / "run"))
    lines = [json.loads(str(plot["data-hover"]))["lines"] for plot in page.having("data-hover")]
    raw, smooth, held_out = lines[0]
    rows = metrics_rows(40)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert raw["steps"] == list(losses)
    assert [float(text) for text in raw["text"]] == pytest.approx(list(losses.values()), rel=1e-3)
    assert held_out["steps"] == [0, 10, 20, 30, 40]
    # Higher values stand further up; the smoothed curve sways less than what it is made of.
    assert held_out["top"] == sorted(held_out["top"])
    sway = [sum(abs(a - b) for a, b in zip(line["top"][20:], line["top"][21:], strict=False)) for line in (raw, smooth)]
    assert sway[1] < sway[0] / 3


def test_nothing_comes_from_outside(tmp_path: Path) -> None:
    page = page_of(full_run(tmp_path / "a"), full_run(tmp_path / "b"), target=tmp_path / "report.html")
    for attributes in (attributes for _, attributes in page.elements):
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith("#") or target == "data:,", (name, target)
    styles = re.search(r"<style>(.*?)</style>", page.html, re.DOTALL)[1]
    script = re.search(r"<script>(.*?)</script>", page.html, re.DOTALL)[1]
    assert "url(" not in styles
    assert "@import" not in styles
    assert not re.search(r"fetch|XMLHttp|import\(|WebSocket|https?:", script)
    assert "default-src 'none'" in page.html


def test_hostile_text_is_text(tmp_path: Path) -> None:
    rows = [{**row, HOSTILE: 1.0} for row in metrics_rows(3)]
    sample = {"step": 0, "prompt": HOSTILE, "reference": HOSTILE, "answer": HOSTILE}
    data = {"train": {**DATA["train"], "sources": {HOSTILE: {HOSTILE: 1}}, "clean": {HOSTILE: {"removed": 1}}}}
    run = full_run(
        tmp_path / "run",
        name=HOSTILE.replace("/", "|"),
        overrides=[f"run.name={HOSTILE}"],
        metrics=rows,
        samples=[sample],
        data_report=data,
        environment={"devices": [HOSTILE], "packages": {HOSTILE: HOSTILE}, "launches": [{"step": 1, "time": HOSTILE}]},
        result={**RESULT, "reason": HOSTILE, "confusion": [[1, 0], [0, 1]], "labels": [HOSTILE, "b"]},
    )
    for page in (page_of(run), page_of(run, full_run(tmp_path / "b"), target=tmp_path / "both.html")):
        assert len([tag for tag, _ in page.elements if tag == "script"]) == 1
        assert not [tag for tag, _ in page.elements if tag == "img"]
        assert not list(page.having("onerror"))
        assert "\x1b" not in page.html
        assert "{{ 7*7 }}" in page.text


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    rows = metrics_rows(10)
    rows[5]["loss"] = None
    rows[7]["eval/other"] = None
    page = page_of(write_run_directory(tmp_path / "run", metrics=rows))
    chart = next(iter(page.having("data-hover")))
    hover = json.loads(str(chart["data-hover"]))["lines"][0]
    assert hover["text"].count("not finite") == hover["top"].count(None) == 1
    path = next(attributes["d"] for tag, attributes in page.elements if tag == "path")
    assert str(path).count("M") == 2
    assert "1 not finite" in page.text
    assert "eval/other" not in page.text, "a metric that was never finite has no curve"


def test_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    run = write_run_directory(tmp_path / "run", name="dead", metrics=[])
    (run / "metrics.jsonl").unlink()
    page = page_of(run)
    for expected in ("dead ended", "the run was killed", "Nothing was logged", "No data report", "No environment"):
        assert expected in page.text


@pytest.mark.parametrize(
    ("launch", "text"),
    [
        ({"host": "login", "jobs": ["17", "18"]}, "far elsewhere"),
        ({"host": "another"}, "far elsewhere"),
        ({"host": socket.gethostname(), "jobs": []}, "far ended"),
    ],
)
def test_a_run_that_cannot_be_seen_from_here_is_not_called_ended(tmp_path: Path, launch: dict, text: str) -> None:
    run = write_run_directory(tmp_path / "run", name="far")
    (run / "launch.json").write_text(json.dumps({"pid": 1, "started": 0.0, "processes": 2, **launch}))
    page = page_of(run)
    assert text in page.text
    assert ("SLURM job 18" in page.text) is bool(launch.get("jobs"))


def test_a_run_that_was_killed_reports_what_there_is(tmp_path: Path) -> None:
    run = write_run_directory(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 41, "loss": 2.')
    (run / "environment.json").write_text("{ torn")
    page = page_of(run)
    assert "ended" in page.text
    assert "40 0.400 epochs" in page.text
    assert "500" in page.text, "tokens per second from the rows"
    assert "1 min 25 s" in page.text, "40 steps of 2 s and 5 evaluations of 1 s"


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    slow = [{**row, "eval/loss": row["eval/loss"] + 1} if "eval/loss" in row else row for row in metrics_rows(40)]
    first = full_run(tmp_path / "sweep" / "a", name="a", lr=1e-4)
    second = full_run(tmp_path / "sweep" / "b", name="b", lr=3e-4, metrics=slow)
    (tmp_path / "sweep" / "notes.txt").write_text("no run")
    page = page_of(tmp_path / "sweep")
    assert "2 runs side by side" in page.text
    assert "optimizer.lr 0.0001 0.0003" in page.text
    assert not re.search(r"run\.(dir|name)", page.text), "what differs between any two runs is no difference"
    charts = {str(chart["data-metric"]) for chart in page.having("data-metric")}
    assert {"loss", "eval/loss"} <= charts
    for plot in page.having("data-hover"):
        assert [line["label"] for line in json.loads(str(plot["data-hover"]))["lines"]] == ["a", "b"]
    best = [index for index, cell in enumerate(page.classed("can")) if "best" in str(cell["class"])]
    assert best[0] == 0, "the lower held-out loss"
    assert find_runs([tmp_path / "sweep", first]) == [first, second], "a run that is named twice counts once"


def test_the_configuration_shows_what_was_given(tmp_path: Path) -> None:
    run = write_run_directory(tmp_path / "run", lr=5e-4, overrides=["experiment=chat_lora", "optimizer.lr=5e-4"])
    text = (run / "run.yaml").read_text().replace("entity: null", "entity: ${oc.env:TEAM}")
    (run / "run.yaml").write_text(text)
    page = page_of(run)
    given = [found for found in page.classed("given") if "title" in found]
    assert [found["title"].startswith("Peak learning rate;") for found in given] == [True]
    assert "dstune train experiment=chat_lora optimizer.lr=5e-4" in page.text
    assert "entity ${oc.env:TEAM} (read from the environment)" in page.text


def test_secrets_are_shown_by_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "hf_0123456789")
    page = page_of(full_run(tmp_path / "run", result={**RESULT, "reason": "no access with hf_0123456789"}))
    assert "hf_0123456789" not in page.html
    assert "no access with ${oc.env:HUB_TOKEN}" in page.text


def test_tables_of_slices_and_swapped_terms(tmp_path: Path) -> None:
    values = {"<i>a</i>": {"accuracy": 0.5, "rows": 12}, "b": {"accuracy": 0.875, "rows": 1200}}
    swaps = {"rows": 3, "flips": 1, "flip_rate": 1 / 3, "by_term": {"he -> she": {"rows": 3, "flips": 1}}}
    result = {
        **RESULT,
        "by_type": {"LOC": {"precision": 0.25, "support": 4.0}},
        "slices": {"source": {"metric": "accuracy", "worst": "<i>a</i>", "gap": 0.375, "values": values}},
        "counterfactual": swaps,
    }
    page = page_of(full_run(tmp_path / "run", result=result))
    assert "By type precision support LOC 0.2500 4" in page.text
    assert "By source By accuracy the worst is <i>a</i>, 0.3750 from the best." in page.text
    assert "b 0.8750 1,200" in page.text
    assert "rows flips flip rate all 3 1 0.3333 he -> she 3 1" in page.text


def test_a_confusion_matrix(tmp_path: Path) -> None:
    result = {**RESULT, "confusion": [[8, 2], [1, 9]], "labels": ["no", "yes"]}
    page = page_of(full_run(tmp_path / "run", result=result))
    assert "no yes recall no 8 2 80.0 % yes 1 9 90.0 % precision 88.9 % 81.8 %" in page.text


def test_resumes_are_marked(tmp_path: Path) -> None:
    page = page_of(full_run(tmp_path / "run"))
    marks = {str(mark["title"]) for mark in page.classed("resume") if "title" in mark}
    assert marks == {"resumed at step 20, later"}


@pytest.mark.parametrize("kind", ["absent", "empty", "file"])
def test_what_is_no_run_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run_directory(tmp_path / "runs" / "real")
    monkeypatch.chdir(tmp_path)
    path = {"absent": tmp_path / "gone", "empty": tmp_path / "empty", "file": run / "metrics.jsonl"}[kind]
    (tmp_path / "empty").mkdir()
    for verb in ("report", "runs"):
        assert cli.main([verb, str(path)]) == 2
        error = capsys.readouterr().err
        fix = re.search(r"fix: give (.*)", error)
        assert fix, error
        assert cli.main([verb, fix[1]]) == 0, "the fix works as it is typed"


def test_where_the_page_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [write_run_directory(tmp_path / "sweep" / name) for name in "ab"]
    for given, target in (
        ([runs[0]], runs[0] / "report.html"),
        ([tmp_path / "sweep"], tmp_path / "sweep" / "report.html"),
        (runs, Path("report.html")),
    ):
        assert command.main([*map(str, given), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["report"] == str(target)
        assert target.is_file()
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_report_that_fails_costs_the_run_nothing(tmp_path: Path) -> None:
    messages: list[str] = []
    command.leave_behind(tmp_path / "no-run", messages.append)
    assert len(messages) == 1
    assert "no report.html was written" in messages[0]


# -- curves and numbers -----------------------------------------------------------------------------------------------


def test_smoothing_against_hand_arithmetic() -> None:
    series = Series((1, 2, 3, 4), (4.0, 8.0, None, 2.0))
    # span 3: weights fall by half; (8 + 4/2) / (1 + 1/2) = 6.667, (2 + 8/2 + 4/4) / (1 + 1/2 + 1/4) = 4
    assert smoothed(series, 3).values == pytest.approx((4.0, 20 / 3, None, 4.0))


def test_thinning_keeps_every_spike() -> None:
    values = [float(step % 7) for step in range(100_000)]
    values[41_234], values[77_777] = 1e6, -1e6
    series = Series(tuple(range(100_000)), tuple(values))
    thin = thinned(series, 600)
    assert len(thin.steps) <= 602
    assert {1e6, -1e6} <= set(thin.values)
    assert (thin.steps[0], thin.steps[-1]) == (0, 99_999)
    assert thinned(thin, 700) is thin


def test_a_step_logged_twice_keeps_the_last() -> None:
    found = collect(
        [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 3.0, "skipped": "overflow"}]
    )
    assert found == {"loss": Series((1, 2), (5.0, 3.0))}


def test_positions_in_a_chart() -> None:
    line = Line("a", Series((0, 5, 10), (1.0, 2.0, 3.0)), 0)
    chart = draw("A", [line], (0, 10))
    # From 1 to 3 with 6% of room on both sides: 1 stands at 0.12 of 2.24.
    assert [y for _, y in chart.lines[0]["dots"]] == pytest.approx([100 - 12 / 2.24, 50, 12 / 2.24], abs=0.01)
    assert [x for x, _ in chart.lines[0]["dots"]] == [0, 50, 100]
    assert [label for _, label in chart.y_ticks] == ["1.0", "1.5", "2.0", "2.5", "3.0"]


def test_a_wide_range_is_logarithmic() -> None:
    chart = draw("A", [Line("a", Series((1, 2), (1e-3, 1e3)), 0)], (1, 2))
    assert chart.note == "logarithmic"
    assert [label for _, label in chart.y_ticks] == ["0.00100", "0.0100", "0.100", "1", "10", "100", "1,000"][::2]


@pytest.mark.parametrize("values", [(0.0,), (5.0, 5.0), (0.0, 0.0), (-3.0, -3.0), (1e-12, 2e-12), (1e300, -1e300)])
def test_any_values_can_be_drawn(values: tuple[float, ...]) -> None:
    for from_zero in (False, True):
        steps = tuple(range(len(values)))
        chart = draw("A", [Line("a", Series(steps, values), 0)], (0, max(steps)), from_zero=from_zero)
        assert all(0 <= y <= 100 for _, y in chart.lines[0]["dots"])
        assert chart.y_ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.46511, "3.465"),
        (0.78213, "0.7821"),
        (12345.6, "12,346"),
        (1.5e-5, "1.5e\u22125"),
        (-2.0, "\u22122"),
        (None, numbers.NONE),
        (float("nan"), numbers.NONE),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (48, "48 s"), (186, "3 min 6 s"), (7500, "2 h 5 min"), (273600, "3 d 4 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


def test_reading_follows_no_reference(tmp_path: Path) -> None:
    run = write_run_directory(tmp_path / "run")
    (run / "run.yaml").write_text((run / "run.yaml").read_text().replace("entity: null", "entity: ${oc.env:NOT_SET}"))
    assert read(run).config["tracking"]["wandb"]["entity"] == "${oc.env:NOT_SET}"
