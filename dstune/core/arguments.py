"""The parser of the verbs that take arguments of their own: its complaints are those of every other mistake."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from dstune.core.errors import Problem, UserError

TABLES = (".csv", ".tsv", ".parquet", ".xlsx")


def is_path(word: str) -> bool:
    """Return whether the first word behind a verb is the PATH of a run, not an override or a flag. The directory of a sweep's
    trial has `=` in its name."""
    # Not by `Path.is_file`, which raises for a word that is too long for a name.
    if is_configuration_file(word):
        return False
    return os.path.isfile(os.path.join(word, "run.yaml")) or ("=" not in word and not word.startswith(("-", "~", "+")))


def is_configuration_file(word: str) -> bool:
    """Return whether a word of the command line is the name of a configuration file (`config/plain_file.py`)."""
    return "=" not in word and not word.startswith("-") and word.endswith((".yaml", ".yml"))


def refuse_place(path: Path, force: bool, tables: Collection[str] = ()) -> None:
    """Raises UserError where answers cannot be put. tables: endings of tables that can be written."""
    if path.suffix.lower() in TABLES and path.suffix.lower() not in tables:
        fix = f"--output {path.with_suffix('.jsonl')}; pandas.read_json(FILE, lines=True) makes a table of it"
        raise UserError(
            Problem("--output", "answers are written as JSON lines, which this is no name for", fix, str(path))
        )
    if path.is_dir():
        raise UserError(Problem("--output", "is a folder", f"--output {path / 'answers.jsonl'}", str(path)))
    if path.exists() and not force:
        raise UserError(Problem("--output", "exists already", "give another file, or --force to replace it", str(path)))
    if path.parent != Path() and not path.parent.is_dir():
        raise UserError(Problem("--output", "there is no such folder", f"mkdir -p {path.parent}", str(path)))


class _FoundParser(Exception):
    """Leaves a verb with the parser that it was about to use."""

    def __init__(self, parser: VerbParser):
        self.parser = parser


_looking: ContextVar[bool] = ContextVar("looking", default=False)


def parser_of(verb: Callable[[list[str]], int], argv: list[str]) -> VerbParser | None:
    """Return the parser that `verb` would read `argv` with; None where it reads it by other means."""
    token = _looking.set(True)
    try:
        verb(argv)
    except _FoundParser as found:
        return found.parser
    finally:
        _looking.reset(token)
    return None


class VerbParser(argparse.ArgumentParser):
    """`argparse` whose errors are a `UserError` with what to type instead, also as JSON."""

    _words: Sequence[str] = ()
    """The words of the command, behind `prog`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if _looking.get():
            raise _FoundParser(self)
        self._words = self._words or list(args or ())  # two passes read an intermixed command, the second a part of it
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Since Python 3.13 it does not come by `parse_known_args`.
        if _looking.get():
            raise _FoundParser(self)
        self._words = list(args or ())
        return super().parse_known_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        if missing := re.search(r"the following arguments are required: (.+)", message):
            names = [name for name in missing[1].split(", ") if name != "KEY=VALUE"]  # of which there may be none
            fix = f"{self.prog} {shlex.join(self._words)}".strip()
            raise UserError(Problem(", ".join(names), "this is missing", f"{fix} {' '.join(names)}"))
        if unknown := re.search(r"unrecognized arguments: (.+)", message):
            word = unknown[1].split()[0]
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
            fix = f"did you mean {near[0]}?" if near else f"`{self.prog} --help` explains what it takes"
            raise UserError(Problem("command line", "this verb has no such argument", fix, unknown[1]))
        if choice := re.search(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.+)\)$", message):
            choices = [text.strip(" '\"") for text in choice[3].split(",")]
            near = difflib.get_close_matches(choice[2], choices, n=1)
            fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(choices)}"
            raise UserError(Problem(choice[1], "there is no such choice", fix, choice[2]))
        raise UserError(Problem("command line", message, f"`{self.prog} --help` explains what it takes"))
