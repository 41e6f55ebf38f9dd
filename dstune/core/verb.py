"""Defines the verbs of the command line and their registry.

This is not part of `dstune.protocols`, since importing that takes as long as all of `dstune --help`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

from dstune.core.registry import Registry

START = "Start"
TRAIN = "Train"
MEASURE = "Measure, use and hand over"
SERVE = "Serve and watch"
HOSTED = "Leave a hosted service"
MACHINE = "This machine"
PLUGINS = "Plugins"
GROUPS = (START, TRAIN, MEASURE, SERVE, HOSTED, MACHINE, PLUGINS)
"""The groups of verbs in `dstune --help`, in its order."""


@dataclass(frozen=True)
class Words:
    """Completions for the next word of a command line."""

    words: list[str] = field(default_factory=list)
    overrides: bool = False
    """Whether the word may also be an override."""
    files: bool = False
    """Whether the word may also be a path."""


class Verb:
    """Base of every verb. Subclasses register with `@verb`; a wing has its verbs in `dstune/WING/verbs.py`.

    A subclass needs `name`, `summary`, and either `action` or its own `run`. Modules that it calls are imported when it runs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """Its line in `dstune --help`, which begins with a verb."""
    group: ClassVar[str] = PLUGINS
    """The heading above it in `dstune --help`; one of `GROUPS`."""
    action: ClassVar[str]
    """`module:function`; the function takes the words after the verb and returns the exit code."""
    other_names: ClassVar[tuple[tuple[tuple[str, ...], str], ...]] = ()
    """Pairs of the names that other tools use for it, and what to type in dstune."""
    overrides: ClassVar[bool] = False
    """Whether it composes a configuration, so that `key=value` may follow it."""
    takes_files: ClassVar[bool] = True
    """Whether its positional arguments may be paths."""
    needs_plugins: ClassVar[bool] = True
    """Whether it stops if the working directory has plugins that the user has not trusted, instead of continuing without them."""
    further_words: ClassVar[tuple[str, ...]] = ()
    """Completions that its parser does not have."""

    def run(self, arguments: list[str]) -> int:
        """Run the verb with the words after it; return the exit code. Raises DstuneError."""
        return self.function()(arguments)

    def function(self) -> Callable[[list[str]], int]:
        module, _, name = self.action.partition(":")
        return cast("Callable[[list[str]], int]", getattr(importlib.import_module(module), name))

    def parser(self) -> argparse.ArgumentParser | None:
        """Return the parser of its flags; None if it reads them without one."""
        from dstune.core.arguments import parser_of

        return parser_of(self.function(), [])

    def words(self, words_before: Sequence[str]) -> Words:
        """Return what may follow the verb and `words_before`, for shell completion."""
        words = [*self.further_words]
        parser = self.parser()
        if parser is None:
            return Words(words, self.overrides, files=self.takes_files)
        last = parser._option_string_actions.get(words_before[-1]) if words_before else None
        if last is not None and last.nargs != 0:  # the next word is the value of a flag
            return Words([str(choice) for choice in last.choices or ()], files=not last.choices)
        words += [flag for flag in parser._option_string_actions if flag.startswith("--")]
        takes_words = any(not action.option_strings for action in parser._actions)
        return Words(words, self.overrides, files=takes_words and self.takes_files)


VERBS: Registry[Verb] = Registry("verb", Verb, "dstune.cli", in_wings="verbs", in_runs=False)
verb = VERBS.add


def other_names() -> dict[str, str]:
    """Return what to type in dstune, by the name that other tools use for it."""
    return {name: fix for verb in VERBS.classes().values() for names, fix in verb.other_names for name in names}
