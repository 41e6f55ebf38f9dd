"""Reads the file of another tool, and recognizes the tool."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import yaml

from dstune.config.convert import load
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_yaml, read_file
from dstune.importing import axolotl, llama_factory, ms_swift, trl

TOOLS: dict[str, ModuleType] = {
    "axolotl": axolotl,
    "llama-factory": llama_factory,
    "ms-swift": ms_swift,
    "trl": trl,
}
"""The order in which tools are tried: TRL's keys are a subset of LLaMA-Factory's."""


class Variable(str):
    """A word with a shell variable, whose value the script does not necessarily set."""


FLAG = re.compile(r"use_|do_|load_in_|bf16|fp16|tf32|(packing|gradient_checkpointing|group_by_length|push_to_hub)$")
"""Arguments without a value: a variable after one is not its value."""
MARK = "\0"
"""Stands for a `$` that the shell would replace, since `shlex` does not say what was quoted."""
TRAINER_KEY = "trainer"
"""The key under which `of_command` gives the trainer that the command or its script is named after."""
EXPANDED = r"\$(?=[\w{(@*])"
QUOTED = re.compile(rf"""\\.|"(?:\\.|[^"\\])*"|'[^']*'|(?<=\S)\#|#.*|{EXPANDED}""")


def read(path: Path) -> dict[str, Any]:
    """Return the keys of a YAML file, or of the command line in a shell script.

    Raises:
        UserError: the file cannot be read, or contains neither.
    """
    text = _text_of(path, "FILE")
    if path.suffix == ".sh" or text.lstrip().startswith(("accelerate ", "trl ", "torchrun ", "python ", "swift ")):
        return _with_configuration(of_command(text, str(path)), path)
    return _mapping(text, str(path))


def _mapping(text: str, where: str) -> dict[str, Any]:
    """Return the keys of a YAML text. Raises UserError."""
    content = load(text, where)
    if not isinstance(content, dict):
        raise UserError(Problem("FILE", "this is no configuration (a mapping of keys)", "give a YAML file", where))
    return {str(key): value for key, value in content.items()}


def _with_configuration(arguments: dict[str, Any], script: Path) -> dict[str, Any]:
    """Return the arguments of `trl NAME --config FILE` with the keys of FILE; the arguments take precedence. FILE may be relative
    to the working directory or the script's folder.

    Raises:
        UserError: the file cannot be read, or contains no keys.
    """
    name = arguments.get("config")
    if not isinstance(name, str) or isinstance(name, Variable) or TRAINER_KEY not in arguments:
        return arguments
    file = next((base / name for base in (Path(), script.parent) if (base / name).is_file()), Path(name))
    keys = _mapping(_text_of(file, "--config"), str(file))
    return {**keys, **{key: value for key, value in arguments.items() if key != "config"}}


def _text_of(path: Path, where: str) -> str:
    """Return the text of a file. Raises UserError."""
    try:
        return read_file(path).decode("utf-8")
    except OSError as error:
        raise UserError(Problem(where, f"cannot be read: {error.strerror}", "give a YAML file", str(path))) from None
    except UnicodeDecodeError:
        raise UserError(Problem(where, "this is not text", "give a YAML file", str(path))) from None


def of_command(text: str, where: str) -> dict[str, Any]:
    """Return the arguments of the training command in a script: `--key value`, `--key=value`, `--flag`, `--list a b`.

    Raises:
        UserError: no command in it has such arguments.
    """
    lines = text.replace("\\\n", " ").splitlines()
    try:
        commands = [shlex.split(QUOTED.sub(_marked, line), comments=True) for line in lines]
    except ValueError as error:
        raise UserError(Problem("FILE", f"this is no shell script: {error}", value=where)) from None
    words = max(commands, key=lambda command: sum(word.startswith("--") for word in command), default=[])
    value_by_key: dict[str, Any] = {}
    key = ""
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_").replace(MARK, "$")
            value_by_key[key] = _value(value) if equals else True
        # The script follows accelerate's own arguments, and the shell's arguments follow all others.
        elif key and not word.endswith((".py", f"{MARK}@", f"{MARK}*", "[@]}", "[*]}")):
            value_before, next_value = value_by_key[key], _value(word)
            if isinstance(next_value, Variable) and (value_before is not True or FLAG.match(key)):
                value_by_key[next_value] = next_value  # further arguments, whatever they are
                key = ""
                continue
            value_by_key[key] = (
                next_value
                if value_before is True
                else [*(value_before if isinstance(value_before, list) else [value_before]), next_value]
            )
        else:
            key = ""
    if not value_by_key:
        raise UserError(Problem("FILE", "no command in it has arguments", "give a YAML file or a command", where))
    if trainer := _trainer_name(words):
        value_by_key = {TRAINER_KEY: trainer, **value_by_key}
    return {**_of_swift(words), **value_by_key}


def _of_swift(words: Sequence[str]) -> dict[str, Any]:
    """Return the kind of training in `swift KIND`, and what the variables in front of it say of images and ranks; empty for other
    commands."""
    for at, (word, following) in enumerate(pairwise(words)):
        if PurePath(word).name == ms_swift.COMMAND and re.fullmatch(r"[a-z]+", following):
            variables = (before.split("=", 1) for before in words[:at] if re.match(r"[A-Z_]+=", before))
            named = {{"NPROC_PER_NODE": "num_processes"}.get(name, name): _value(value) for name, value in variables}
            return {ms_swift.COMMAND: following, **{key: named[key] for key in named.keys() & ms_swift.TABLE.keys()}}
    return {}


def _trainer_name(words: Sequence[str]) -> str | None:
    """Return the trainer of TRL in `trl NAME`, `.../NAME.py` or `-m trl.scripts.NAME`, or None."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if PurePath(word).name == "trl" and re.fullmatch(r"\w[\w-]*", following):
            return following.replace("-", "_")
        module = following if word == "-m" else ""
        if word.endswith(".py") or ".scripts." in module:
            stem = module.rsplit(".", 1)[-1] or PurePath(word).stem
            return trl.trainer_in(stem.replace("-", "_"))
    return None


def _marked(quoted: re.Match[str]) -> str:
    text = quoted[0]
    if text == "$":
        return MARK
    if text == "#":  # `#` starts no comment inside a word, which `shlex` does not know
        return "\\#"
    return re.sub(rf"(\\.)|{EXPANDED}", lambda match: match[1] or MARK, text) if text.startswith('"') else text


def has_variable(value: Any) -> bool:
    return any(isinstance(part, Variable) for part in (value if isinstance(value, list) else [value]))


def _value(word: str) -> Any:
    if MARK in word:
        return Variable(word.replace(MARK, "$"))
    try:
        value = parse_yaml(word)
    except yaml.YAMLError:
        return word
    return value if isinstance(value, (bool, int, float, list, dict)) else word


def tool_of(raw: dict[str, Any], tool_name: str | None, where: str) -> str:
    """Return the name of the tool that these keys belong to.

    Raises:
        UserError: no tool has these keys, or `tool_name` is not a known tool.
    """
    if tool_name is not None:
        if tool_name not in TOOLS:
            raise UserError(Problem("--from", "there is no such tool", f"one of {', '.join(TOOLS)}", tool_name))
        return tool_name
    for name, tool in TOOLS.items():
        if tool.recognised(raw):
            return name
    fix = f"--from {'|'.join(TOOLS)}"
    raise UserError(Problem("FILE", "the keys are of no tool that this import knows", fix, where))
