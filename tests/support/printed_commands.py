"""Finds commands of dstune in what it prints and in its own texts, and checks them as far as the composition of a configuration."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from dstune.config.validate import validate
from dstune.core.verb import VERBS
from dstune.launch import plan, train
from dstune.show import command as show
from dstune.sweep import command as sweep

FILLED = "FILLED-IN"
"""Stands for what a text fills in when it is printed."""
_WORD = re.compile(
    rf"--?[a-z][\w-]*(=\S+)?|[A-Z][A-Z_.:/|@]*|\S*{FILLED}\S*|'?[\w.]+=\S+|[\d,]+|'\.\.\.'|[a-z]+://\S+|\.|[\w/-]+\.(yaml|jsonl)"
)
"""A word of a command, other than those of the sentence around it."""


def printed(text: str) -> list[list[str]]:
    """Return the words of each command in the output of a verb: `dstune ...` to the end of a line, or of its backticks."""
    commands = []
    for line in text.splitlines():
        for quoted, plain in re.findall(r"`dstune ([^`]+)`|(?:^|[\s:])dstune (\S.*)", line):
            command = (quoted or plain).partition("  #")[0].strip()
            if (quoted or plain).split()[0] in VERBS:
                commands.append(shlex.split(command))
    return commands


def in_texts_of(package: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield place and words of each command in the strings of a package, docstrings aside. What is filled in is FILLED."""
    for file in sorted(package.rglob("*.py")):
        for line, text in _strings(ast.parse(file.read_text(encoding="utf-8"))):
            for name, rest in re.findall(r"dstune ([a-z][a-z-]*)(?![\w-])((?:[ ][^`\n]*)?)", text):
                if name in VERBS:
                    yield f"{file.relative_to(package.parent)}:{line}", [name, *_words_of_command(rest)]


def _words_of_command(text: str) -> Iterator[str]:
    for word in text.replace("data show", "show").split():
        bare = word.rstrip(",;:)") if word == "." else word.rstrip(",;:.)") or word
        if bare != "..." and not _WORD.fullmatch(bare):
            return
        if bare != "...":
            yield bare.replace("'", "")
        if bare != word:
            return


def _strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string that is not a docstring; of parts of an f-string only the whole."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else FILLED for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def check(words: Sequence[str]) -> None:
    """Raise UserError, or SystemExit, if dstune refuses this command before it does its work.

    words: the verb and what follows it. Files and runs that they name exist.
    """
    verb, *rest = words
    if verb == "data":
        assert rest.pop(0) == "show", words
        _, rest = show._parse(rest)  # its own flags
    if verb in ("train", "data"):
        if {"-m", "--multirun"} & set(rest):
            sweep.parse(rest)
            return
        command = train.parse(rest)
        if command.flags.shows:
            return
        validate(train.configuration(command).config)
    elif verb == "plan":
        plan.configuration(plan.parse(rest))
    else:
        parser = VERBS[verb]().parser()
        assert parser is not None, words
        parser.parse_intermixed_args(rest)
