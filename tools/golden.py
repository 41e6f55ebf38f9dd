#!/usr/bin/env python3
"""Write tests/data/golden/problems.txt: what is said of each configuration in tools/wrong_configurations.txt.

usage: tools/golden.py (`make golden`)

The wording of errors is reviewed as the diff of that file, and tests/unit/test_golden.py fails where it is not up to date.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstune.core.errors import Problem

HOME = Path(__file__).resolve().parents[1]
WRONG = HOME / "tools" / "wrong_configurations.txt"
GOLDEN = HOME / "tests" / "data" / "golden" / "problems.txt"


def render() -> str:
    return "\n".join("\n".join(entry) for entry in entries()) + "\n"


def entries() -> Iterator[list[str]]:
    """Yield a command line and the problems that it has, a list of lines each."""
    with empty_folder():
        for line in command_lines():
            problems = [str(problem) for problem in problems_of(shlex.split(line))] or ["accepted"]
            yield [f"$ dstune train {line}", *(f"  {text}".replace("\n", "\n  ") for text in problems)]


def command_lines() -> list[str]:
    return [line for line in WRONG.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def problems_of(words: Sequence[str]) -> list[Problem]:
    """Return the problems for which `dstune train` refuses its words; empty if it accepts them."""
    from dstune import UserError
    from dstune.config.compose import compose
    from dstune.config.validate import validate

    try:
        validate(compose(list(words)).config)
    except UserError as error:
        return error.problems
    return []


@contextmanager
def empty_folder() -> Iterator[None]:
    """Work in an empty folder, with a home that is the same on every machine, since some fixes name a place in it."""
    folder_before, home = Path.cwd(), os.environ.get("HOME", "")
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        os.environ["HOME"] = "/home/user"
        try:
            yield
        finally:
            os.chdir(folder_before)
            os.environ["HOME"] = home


if __name__ == "__main__":
    sys.path.insert(0, str(HOME))
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(render(), encoding="utf-8")
    print(f"{GOLDEN.relative_to(HOME)}: {GOLDEN.read_text(encoding='utf-8').count('$ dstune')} command lines")
