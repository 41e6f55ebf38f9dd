"""The parser of the verbs that take arguments of their own: its complaints are those of every other mistake."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path
from typing import NoReturn

from dstune.errors import Problem, UserError


def is_path(word: str) -> bool:
    """Whether the first word behind a verb is the PATH of a run, not an override or a flag. The directory of a sweep's trial
    has `=` in its name."""
    return Path(word, "run.yaml").is_file() or ("=" not in word and not word.startswith(("-", "~", "+")))


class VerbParser(argparse.ArgumentParser):
    """`argparse` whose errors are a `UserError` with what to type instead, also as JSON."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        if missing := re.search(r"the following arguments are required: (.+)", message):
            raise UserError(Problem(missing[1], "this is missing", f"{self.prog} {missing[1].replace(', ', ' ')}"))
        if unknown := re.search(r"unrecognized arguments: (.+)", message):
            given = unknown[1].split()[0]
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(given.partition("=")[0], flags, n=1)
            fix = f"did you mean {near[0]}?" if near else f"`{self.prog} --help` explains what it takes"
            raise UserError(Problem("command line", "this verb has no such argument", fix, unknown[1]))
        raise UserError(Problem("command line", message, f"`{self.prog} --help` explains what it takes"))
