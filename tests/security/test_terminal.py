"""Nothing from rows, templates, files of runs or host names commands the terminal."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dstune import cli
from dstune.core.errors import Problem, UserError
from dstune.core.text import one_line, visible, visible_but_colours
from dstune.tracking.console import Activities, Console

ATTACKS = [
    "\x1b[2J",
    "\x1b]0;owned\x07",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x9b2J",
    "a\bb",
    "\x1b[8mconcealed\x1b[0m",
    "\u202egpj.exe",
    "\u2066x\u2069",
    "\u200bx",
    "\x00",
    "\x7f",
]


def harmless(text: str) -> bool:
    return not any(character in text for character in "\x1b\x9b\x07\x08\x00\x7f\u202e\u2066\u2069\u200b")


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_of_others_is_made_visible(attack: str) -> None:
    assert harmless(visible(attack))
    assert harmless(str(Problem(f"rows.jsonl:{attack}", attack, attack, attack)))
    assert harmless(str(UserError(Problem("x", f"reason {attack}"))))
    assert harmless(visible_but_colours(attack).replace("\x1b[0m", ""))


def test_line_feeds_tabs_and_own_colours_stay() -> None:
    assert visible("a\n\tb\u00e4\u4e2d\U0001f600") == "a\n\tb\u00e4\u4e2d\U0001f600"
    assert visible_but_colours("\x1b[32mok\x1b[0m 1/2\r") == "\x1b[32mok\x1b[0m 1/2\r"
    assert one_line("a\nb") == "a\\nb"


@pytest.mark.parametrize("attack", ATTACKS)
def test_status_and_runs_show_a_prepared_result(
    attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").write_text("config: {}\n")
    (run / "result.json").write_text(json.dumps({"status": f"completed{attack}", "reason": attack}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    cli.main(["status", str(run)])
    cli.main(["runs", str(tmp_path)])
    captured = capsys.readouterr()
    assert harmless((captured.out + captured.err).replace("\x1b[0m", ""))  # the end of a colour


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_command_line_itself_is_repeated_harmlessly(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", f"model.{attack}=1", "--cfg", "job"])
    cli.main([attack])
    captured = capsys.readouterr()
    assert harmless(captured.out + captured.err)


def test_what_a_package_below_reports_passes_through_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def verb(arguments: list[str]) -> int:
        Activities(Console()).emit(logging.LogRecord("dstune", logging.WARNING, "", 0, "label \x1b[2J", (), None))
        return 0

    monkeypatch.setattr(cli, "run", verb)
    assert cli.main(["anything"]) == 0
    assert "label \\x1b[2J" in capsys.readouterr().out
