"""What a verb of the command line is, and the table of all.

Here, not in `dstune.protocols`, which takes as long to import as all of `dstune --help`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

from dstune.core.registry import Registry


@dataclass(frozen=True)
class Words:
    """What the next word of a command line may be."""

    words: list[str] = field(default_factory=list)
    overrides: bool = False
    """Whether it may be an override too."""
    files: bool = False
    """Whether it may be a path."""


class Verb:
    """Base of every verb. Subclasses register with `@verb`; a wing has its verbs in `dstune/WING/verbs.py`.

    A subclass needs `name`, `summary`, and `action` or a `run` of its own. What it calls is imported when it runs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """Its line in `dstune --help`."""
    action: ClassVar[str]
    """`module:function` that takes the words behind the verb and returns the exit code."""
    other_names: ClassVar[tuple[tuple[tuple[str, ...], str], ...]] = ()
    """What other tools call it, and what to type here."""
    overrides: ClassVar[bool] = False
    """Whether it composes a configuration, so that `key=value` may stand behind it."""
    takes_files: ClassVar[bool] = True
    """Whether its plain words may be paths."""
    needs_plugins: ClassVar[bool] = True
    """Whether it refuses plugins of the working directory that the user has not trusted, and does not go on without them."""
    further_words: ClassVar[tuple[str, ...]] = ()
    """Words that it reads without a parser."""

    def run(self, arguments: list[str]) -> int:
        """Raises DstuneError; returns the exit code."""
        return self.function()(arguments)

    def function(self) -> Callable[[list[str]], int]:
        module, _, name = self.action.partition(":")
        return cast("Callable[[list[str]], int]", getattr(importlib.import_module(module), name))

    def parser(self) -> argparse.ArgumentParser | None:
        """Return the parser of its flags; None where it reads them by other means."""
        from dstune.core.arguments import parser_of

        return parser_of(self.function(), [])

    def words(self, words_before: Sequence[str]) -> Words:
        """Return what may follow the words `words_before` behind the verb, for completion in the shell."""
        words = [*self.further_words]
        parser = self.parser()
        if parser is None:
            return Words(words, self.overrides, files=self.takes_files)
        last = parser._option_string_actions.get(words_before[-1]) if words_before else None
        if last is not None and last.nargs != 0:  # the value of a flag
            return Words([str(choice) for choice in last.choices or ()], files=not last.choices)
        words += [flag for flag in parser._option_string_actions if flag.startswith("--")]
        takes_words = any(not action.option_strings for action in parser._actions)
        return Words(words, self.overrides, files=takes_words and self.takes_files)


VERBS: Registry[Verb] = Registry("verb", Verb, "dstune.cli", in_wings="verbs", in_runs=False)
verb = VERBS.add


def other_names() -> dict[str, str]:
    """Return what other tools call a verb, and what it is here."""
    return {name: fix for verb in VERBS.classes().values() for names, fix in verb.other_names for name in names}
