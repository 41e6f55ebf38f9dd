"""What may stand behind a verb beside overrides: its own flags and their choices, for completion in the shell."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dstune.arguments import VerbParser, parser_of

WITH_OVERRIDES = ("train", "plan", "evaluate", "predict", "data", "doctor", "models")
"""Verbs that compose a configuration."""

WITHOUT_PARSER = {
    "train": ("--json", "--multirun"),
    "plan": ("hardware=", "nodes=", "price=", "--calibrate", "--json", "--help"),
    "models": ("hardware=", "nodes="),
    "completion": ("bash", "zsh", "fish"),
}
"""Words that a verb reads without a parser of its own."""


@dataclass(frozen=True)
class Words:
    """What the next word may be."""

    words: list[str] = field(default_factory=list)
    overrides: bool = False
    """Whether it may be an override too."""
    files: bool = False
    """Whether it may be a path."""


def words_behind(verb: str, given: Sequence[str], verbs: Mapping[str, tuple[str, str, str]]) -> Words:
    """What may stand behind `verb` and the words `given` behind it. verbs: as `dstune.cli.VERBS`."""
    if verb == "data" and not given:
        return Words(["show"])
    composes = verb in WITH_OVERRIDES
    words = list(WITHOUT_PARSER.get(verb, ()))
    if verb in ("plan", "models") and not given:
        words += [f"hardware={name}" for name in _devices()]
    parser = None if verb in ("train", "plan", "completion") else _parser(verb, verbs)
    if parser is None:
        return Words(words, composes, files=verb == "plan")
    last = parser._option_string_actions.get(given[-1]) if given else None
    if last is not None and last.nargs != 0:  # the value of a flag
        return Words([str(choice) for choice in last.choices or ()], files=not last.choices)
    words += [flag for flag in parser._option_string_actions if flag.startswith("--")]
    if verb == "samples":
        words += _samples()
    takes_words = any(not action.option_strings for action in parser._actions)
    return Words(words, composes, files=takes_words and verb not in ("samples", "doctor"))


def _parser(verb: str, verbs: Mapping[str, tuple[str, str, str]]) -> argparse.ArgumentParser | None:
    module, function, _ = verbs[verb]
    action = getattr(importlib.import_module(module), function)
    found: VerbParser | None = parser_of(action, ["show"] if verb == "data" else [])
    return found


def _devices() -> list[str]:
    from dstune.planning.hardware import DEVICES

    return list(DEVICES)


def _samples() -> list[str]:
    from dstune.samples import available

    return [info.uri.removeprefix("sample://") for info in available()]
