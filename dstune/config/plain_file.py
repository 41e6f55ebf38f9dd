"""A configuration file on the command line: `dstune train my.yaml`.

Each top-level name is a group with its choice (`method: lora`), a section (`optimizer: {lr: 1e-4}`) or both
(`method: {name: lora, rank: 8}`), or a dotted key (`optimizer.lr: 1e-4`). The file is turned into overrides in front of those of
the command, so no other code has to know about it. An experiment (`defaults:`, `# @package _global_`) is read in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from dstune.config.convert import yaml_problem
from dstune.config.names import classes_of, is_section, nearest, sections, type_hints
from dstune.config.overrides import key_of, quoted
from dstune.config.schema import CHOICES
from dstune.config.words import packaged_choices
from dstune.core import parsing, places
from dstune.core.arguments import is_configuration_file
from dstune.core.errors import Problem, UserError

MAX_BYTES = 2**18
MAX_VALUES = 2_000
"""Limit for one file, because Hydra reads a list in quadratic time. The values of an anchor count again for each alias."""
NAME = "name"
"""The key that names the choice in a section with choices."""
_IN_A_NAME = re.compile(r"[\w/\\+.$%*@?| ()\[\]{}:=,-]+", re.ASCII)
"""Names in a mapping that Hydra's grammar can express, some of them with a backslash."""


def expand(words: Sequence[str]) -> list[str]:
    """Return the words of a command with the configuration file among them replaced by its overrides.

    An override of the command replaces one with the same key in the file. Problems with the file's overrides name their line
    (`core/places.py`).

    Raises:
        UserError: there are two files, or the file cannot be read or is not a configuration; lists all problems in it.
    """
    files = [word for word in words if is_configuration_file(word)]
    if not files:
        return list(words)
    if len(files) > 1:
        fix = f"dstune train {files[0]} key=value ..."
        raise UserError(Problem("command line", "only one configuration file can be given", fix, " ".join(files)))
    command_overrides = [word for word in words if word not in files]
    command_keys = {key_of(word) for word in command_overrides}
    file_overrides = [
        (text, place) for text, place in read_overrides(Path(files[0])) if key_of(text) not in command_keys
    ]
    places.remember({key_of(text): place for text, place in file_overrides})
    return [*(text for text, _ in file_overrides), *command_overrides]


def read_overrides(file: Path) -> list[tuple[str, str]]:
    """Return the overrides that a configuration file means, choices of groups first, each with its `FILE:LINE`.

    Raises:
        UserError: the file cannot be read, is not a mapping, is too large, or contains something that no override can express.
    """
    content, lines = _read(file)
    return _sorted(_Reader(str(file), lines), content)


def overrides_of(content: Mapping[str, Any], where: str) -> list[str]:
    """Return the overrides that the content of such a file means. where: its place in problems. Raises UserError."""
    return [text for text, _ in _sorted(_Reader(where, {}), content)]


def _sorted(reader: _Reader, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    overrides = list(reader.overrides(content))
    if reader.problems:
        raise UserError(reader.problems)
    return sorted(overrides, key=lambda entry: "." in key_of(entry[0]))


def _read(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    where = str(file)
    try:
        text = parsing.read_file(file, MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        similar = nearest(file.name, (path.name for path in Path(file.parent).glob("*.y*ml")))
        fix = f"did you mean {file.with_name(similar)}?" if similar else "`dstune init DATA` writes one for your rows"
        raise UserError(Problem("command line", "there is no such configuration file", fix, where)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise UserError(Problem(where, f"cannot be read: {reason}", "give a YAML file of keys and values")) from None
    try:
        content, lines = parsing.parse_yaml_lines(text, MAX_VALUES)
    except yaml.YAMLError as error:
        raise UserError(yaml_problem(error, where)) from None
    if (package := re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)) and package[1] != "_global_":
        fix = "--config-dir FOLDER, with the file in FOLDER/GROUP/, which GROUP=NAME chooses"
        raise UserError(Problem(where, f"this file is a choice of a group (@package {package[1]})", fix))
    if not isinstance(content, dict) or not content:
        fix = "write `model: qwen3_4b`, `method: lora`, `data: {train: rows.jsonl}`, ..., a line each"
        raise UserError(Problem(where, "this is no configuration: expected names with values", fix))
    return content, lines


class _Reader:
    """Turns the content of one file into overrides."""

    def __init__(self, file: str, lines: Mapping[tuple[str, ...], int]):
        self._file = file
        self._lines = lines
        self._groups = packaged_choices().keys() | set(CHOICES)
        self.problems: list[Problem] = []

    def overrides(self, content: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
        for name, value in content.items():
            path = (str(name),)
            if name == "defaults":
                yield from self._choices(value)
            elif name in sections() and isinstance(value, Mapping):
                yield from self._section(str(name), value, path)
            else:
                yield from self._override(str(name), value, path)

    def _choices(self, defaults: Any) -> Iterator[tuple[str, str]]:
        """Yield the choices in the defaults list of an experiment."""
        for entry in defaults if isinstance(defaults, list) else [defaults]:
            if entry == "_self_":
                continue
            if isinstance(entry, str) and "/" not in entry.removeprefix("/experiment/"):
                group, choice = "experiment", entry.removeprefix("/experiment/")
            elif isinstance(entry, Mapping) and len(entry) == 1:
                ((group, choice),) = entry.items()
                group = str(group).removeprefix("override ").strip().removeprefix("/")
            else:
                group, choice = "", entry
            if group not in self._groups:
                fix = (
                    "--config-dir FOLDER experiment=NAME, with the file as FOLDER/experiment/NAME.yaml, takes any list"
                )
                self._refuse(
                    ("defaults",), "only choices of groups are allowed in the defaults of this file", fix, str(entry)
                )
                continue
            yield from self._override(group, choice, ("defaults",))

    def _section(self, key: str, value: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        for name, part in value.items():
            inside = (*path, str(name))
            if name == NAME and len(path) == 1 and key in self._groups:
                yield from self._override(key, part, inside)
            elif isinstance(part, Mapping) and self._is_section(inside):
                yield from self._section(f"{key}.{name}", part, inside)
            else:
                yield from self._override(f"{key}.{name}", part, inside)

    @staticmethod
    def _is_section(path: Sequence[str]) -> bool:
        """Return whether `path` is a section inside a section (`trainer.early_stopping`), in any of the choices."""
        for cls in classes_of(path[0]).values():
            hint: Any = cls
            for name in path[1:]:
                hint = type_hints(hint).get(name) if is_section(hint) else None
            if is_section(hint):
                return True
        return False

    def _override(self, key: str, value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if not re.fullmatch(r"[\w.@/-]+", key, re.ASCII):
            self._refuse(path, "this is no name of a key", "for example trainer.max_steps: 100", "")
            return
        try:
            text = literal(value)
        except ValueError as error:
            self._refuse(path, str(error), "write a text, a number, a list or a mapping", "")
            return
        if "." not in key and isinstance(value, str):
            text = (
                value if re.fullmatch(r"[\w./:-]+", value, re.ASCII) else text
            )  # the name of a choice needs no quotes
        yield f"{key}={text}", self._place(path)

    def _place(self, path: tuple[str, ...]) -> str:
        line = self._lines.get(path)
        return f"{self._file}:{line}" if line else self._file

    def _refuse(self, path: tuple[str, ...], reason: str, fix: str, value: str) -> None:
        self.problems.append(Problem(f"{self._place(path)}: {'.'.join(path)}", reason, fix, value))


def literal(value: Any) -> str:
    """Write a value of YAML or Python in Hydra's grammar.

    Raises:
        ValueError: the grammar cannot express it.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, date)):
        text = str(value)
        # Without quotes, as in Hydra's own files, unless the grammar would read the text differently.
        is_plain = re.fullmatch(r"[A-Za-z_][\w./-]*", text, re.ASCII) and not _is_reserved(text)
        return text if is_plain else quoted(text)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(literal(part) for part in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_name(name)}:{literal(part)}" for name, part in value.items()) + "}"
    raise ValueError(f"a configuration cannot contain a value of type {type(value).__name__}")


def _is_reserved(text: str) -> bool:
    """Return whether Hydra or YAML reads `text` as a null, a truth value or a number."""
    return text.lower() in ("null", "true", "false", "inf", "nan", "yes", "no", "on", "off")


def _name(name: Any) -> str:
    text = str(name)
    if isinstance(name, bool) or not _IN_A_NAME.fullmatch(text) or text != text.strip():
        raise ValueError(f"the name {text!r:.40} has characters that are not allowed in keys")
    return re.sub(r"([\\()\[\]{}:=, ])", r"\\\1", text)
