"""Parses the arguments of verbs. Errors are reported like every other mistake: as a `UserError` with a fix."""

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
    """Return whether `word`, the first after a verb, is the path of a run and not an override or a flag. (Directories of sweep
    trials have `=` in their names.)"""
    # Not `Path.is_file`, which raises if a word is too long for a file name.
    if is_configuration_file(word):
        return False
    return os.path.isfile(os.path.join(word, "run.yaml")) or ("=" not in word and not word.startswith(("-", "~", "+")))


def is_configuration_file(word: str) -> bool:
    """Return whether a word of the command line is the name of a configuration file (`config/plain_file.py`)."""
    return "=" not in word and not word.startswith("-") and word.endswith((".yaml", ".yml"))


def refuse_place(path: Path, force: bool, tables: Collection[str] = ()) -> None:
    """Raise UserError if answers cannot be written to `path`. tables: suffixes of the table formats that can be written."""
    if path.suffix.lower() in TABLES and path.suffix.lower() not in tables:
        fix = f"--output {path.with_suffix('.jsonl')}; pandas.read_json(FILE, lines=True) makes a table of it"
        reason = f"answers are written as JSON lines, not as {path.suffix.lower().removeprefix('.')}"
        raise UserError(Problem("--output", reason, fix, str(path)))
    if path.is_dir():
        raise UserError(Problem("--output", "is a folder", f"--output {path / 'answers.jsonl'}", str(path)))
    if path.exists() and not force:
        raise UserError(Problem("--output", "exists already", "give another file, or --force to replace it", str(path)))
    if path.parent != Path() and not path.parent.is_dir():
        raise UserError(Problem("--output", "there is no such folder", f"mkdir -p {path.parent}", str(path)))


class _ParserCaptured(Exception):
    """Aborts a verb, and carries the parser that it was about to use."""

    def __init__(self, parser: VerbParser):
        self.parser = parser


_is_capturing: ContextVar[bool] = ContextVar("is_capturing", default=False)


def parser_of(verb: Callable[[list[str]], int], argv: list[str]) -> VerbParser | None:
    """Return the parser that `verb` would parse `argv` with; None if it does not use a `VerbParser`."""
    token = _is_capturing.set(True)
    try:
        verb(argv)
    except _ParserCaptured as captured:
        return captured.parser
    finally:
        _is_capturing.reset(token)
    return None


class VerbParser(argparse.ArgumentParser):
    """An `argparse` parser that raises `UserError` with what to type instead, which can also be printed as JSON."""

    _words: Sequence[str] = ()
    """The words of the command line after `prog`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if _is_capturing.get():
            raise _ParserCaptured(self)
        self._words = self._words or list(
            args or ()
        )  # intermixed parsing calls this twice, the second time with a part
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Since Python 3.13, argparse does not call `parse_known_args` here.
        if _is_capturing.get():
            raise _ParserCaptured(self)
        self._words = list(args or ())
        return super().parse_known_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Translate argparse's `message` into a UserError, and raise it."""
        if missing := re.search(r"the following arguments are required: (.+)", message):
            names = [name for name in missing[1].split(", ") if name != "KEY=VALUE"]  # overrides are optional
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
