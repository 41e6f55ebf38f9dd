"""Pages about runs, checks and versions whose names, texts and files are a stranger's."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from dstune.api.run import Report
from dstune.cli import main
from dstune.cycle.page import write_page
from tests.support.pages import Page
from tests.support.runs import HOSTILE, full_run, write_run_directory

TURNED = "\u202e\u2066\u200b\x9b2J\ufeff"
"""Turns the text after it, hides in it, or begins an escape in one byte."""
SECRET = "planted-in-a-private-file"


def command_on(run: Path) -> str:
    """The command as a browser copies it."""
    assert main(["report", str(run)]) == 0
    (text,) = re.findall(r'<pre class="command">(dstune train.*?)</pre>', (run / "report.html").read_text(), re.DOTALL)
    return html.unescape(text)


def test_the_command_on_a_page_runs_nothing_else(tmp_path: Path) -> None:
    """Whoever copies it into a shell gets the arguments of the run, and what looks like one command is one."""
    overrides = [
        "optimizer.lr=1; touch ran", "run.name=a\ntouch ran", "run.name=$(touch ran)`touch ran`", "x='&& touch ran",
        "data.columns={a: b}", "#", "> ran", "tracking.notes=a\x03\x1b[201~touch ran",
    ]  # fmt: skip
    run = write_run_directory(tmp_path / "run", overrides=overrides)
    command = command_on(run)
    arguments = f"""dstune() {{ printf '%s\\0' "$@"; }}\n{command}"""
    done = subprocess.run(["bash", "-c", arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")[:-1]
    assert words[:-1] == ["train", *overrides[:-1]]
    assert words[-1] == "tracking.notes=a\u2403\u241b[201~touch ran"
    assert not (tmp_path / "ran").exists()


def test_text_on_a_page_is_not_turned(tmp_path: Path) -> None:
    run = full_run(
        tmp_path / "run",
        name=f"name{TURNED}",
        overrides=[f"run.name={TURNED}a"],
        samples=[{"step": 0, "prompt": TURNED, "reference": TURNED, "answer": TURNED}],
        environment={"devices": [TURNED], "packages": {TURNED: TURNED}},
    )
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert not set(TURNED) & set(text) - set("2J")
    assert text.count("\\u202e\\u2066\\u200b\\x9b2J\\ufeff") > 5


@pytest.mark.parametrize("name", ["samples.jsonl", "metrics.jsonl", "rollouts/step-1.jsonl", "rollouts", "run.yaml"])
def test_a_page_shows_no_file_outside_of_a_strangers_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lies in the folder of whoever made the run, and they choose what it shows."""
    run = write_run_directory(tmp_path / "run")
    (run / "run.yaml").write_text("format: 3\nconfig: {run: {name: theirs}}\n")  # signed by nobody
    private = tmp_path / "private"
    (private / "rollouts").mkdir(parents=True)
    (private / "metrics.jsonl").write_text(json.dumps({"step": 1, SECRET: 1.0}) + "\n")
    (private / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": SECRET, "answer": SECRET}) + "\n")
    (private / "run.yaml").write_text(f"format: 3\nconfig: {{run: {{name: {SECRET}}}}}\n")
    answer = {"prompt": 0, "question": SECRET, "text": SECRET, "rewards": {"r": 1.0}, "ended": True}
    (private / "rollouts" / "step-1.jsonl").write_text(json.dumps(answer) + "\n")
    if name != "rollouts":
        (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(private / name)
    assert main(["report", str(run)]) == 2
    assert not (run / "report.html").exists()
    said = capsys.readouterr().err
    assert f"{run / name}" in said and "--trust links" in said
    assert main(["report", str(run), "--trust", "links"]) == 0
    assert SECRET in (run / "report.html").read_text()


def test_links_of_a_users_run_are_followed(tmp_path: Path) -> None:
    """Signed by this user, who made the link; and links within a run lead nowhere else."""
    run = write_run_directory(tmp_path / "run")
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": SECRET, "answer": "a"}) + "\n")
    (run / "samples.jsonl").unlink(missing_ok=True)
    (run / "samples.jsonl").symlink_to(tmp_path / "samples.jsonl")
    assert main(["report", str(run)]) == 0
    assert SECRET in (run / "report.html").read_text()
    (run / "run.yaml").write_text("format: 3\nconfig: {run: {name: theirs}}\n")
    (tmp_path / "samples.jsonl").rename(run / "all.jsonl")
    (run / "samples.jsonl").unlink()
    (run / "samples.jsonl").symlink_to(run / "all.jsonl")
    assert main(["report", str(run)]) == 0


def test_a_pipe_among_the_answers_of_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run_directory(tmp_path / "run")
    (run / "rollouts").mkdir()
    os.mkfifo(run / "rollouts" / "step-1.jsonl")
    assert main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert "step-1.jsonl" in said and "--output" not in said


def test_a_page_in_a_notebook_has_no_origin(tmp_path: Path) -> None:
    """Whoever can write to the folder may replace it; a script of theirs in the notebook could run code in its kernel."""
    (tmp_path / "report.html").write_text('"><script>parent.document</script>')
    (frame,) = [
        attributes
        for tag, attributes in Page(Report(tmp_path / "report.html")._repr_html_()).elements
        if tag == "iframe"
    ]
    assert frame["sandbox"] == "allow-scripts"
    assert frame["srcdoc"] == '"><script>parent.document</script>'


def test_the_page_of_a_cycle_has_no_markup_of_others(tmp_path: Path) -> None:
    """Keys of clients, values of rows and reasons that quote them stand on it."""
    text = f"{HOSTILE}{TURNED}"
    entry = {"run": text, "digest": text, "parent": text, "status": "current", "cycle": 1}
    registry = {"versions": {text: entry, f"{text}2": entry | {"status": text}}, "aliases": {text: {text: 1.0}}}
    (tmp_path / "registry.json").write_text(json.dumps(registry))
    gate = {
        "name": text, "rows": 30, "current": 0.5, "candidate": 0.5, "low": 0.0, "high": 0.1, "margin": 0.02,
        "verdict": text, "reason": text, "is_set": True, "rows_needed": None,
    }  # fmt: skip
    reasons = dict.fromkeys(("decision", "reason", "time", "by", "current"), text)
    lines = [{"cycle": cycle, "step": "judge", "gates": [gate]} | reasons for cycle in (1, 2)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = Page(write_page(tmp_path, text).read_text())
    assert len([tag for tag, _ in shown.elements if tag == "script"]) == 1
    assert not [tag for tag, _ in shown.elements if tag == "img"]
    assert not list(shown.having("onerror"))
    assert not set(TURNED + "\x1b") & set(shown.html) - set("2J")
    assert "{{ 7*7 }}" in shown.text and "alert(1)" in shown.text
    for plot in shown.having("data-hover"):
        json.loads(str(plot["data-hover"]))
    assert list(shown.having("data-hover"))
