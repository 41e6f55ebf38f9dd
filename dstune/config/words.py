"""Guesses what a user meant by a word of the command line that is not KEY=VALUE, or that the shell split."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dstune.config.convert import literal, typed
from dstune.config.examples import complete, complete_example
from dstune.config.names import all_keys, names_choice, sections, suggest_key
from dstune.core.errors import Problem

DATA_ENDINGS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".zip")


def meaning(word: str, following: Sequence[str] = ()) -> str | None:
    """Return a fix that says how `word`, which has no `=`, was probably meant; None if nothing is similar. following: the words
    after it."""
    choices = packaged_choices()
    if names_choice(word):
        return meaning(word.partition(".")[0], following)
    if word in all_keys():
        return complete_example(word)
    if word in choices and following and following[0] in choices[word]:
        return f"write {complete(f'{word}={following[0]}')}"
    for group, names in choices.items():
        if word in names:
            return f"did you mean {complete(f'{group}={word}')}?"
    if word in choices:
        key_form = f", or {word}.KEY=VALUE" if word in sections() else ""
        return f"write {word}=CHOICE with one of {', '.join(choices[word])}{key_form}"
    if word in sections():
        return f"write {word}.KEY=VALUE"
    path = Path(word)
    if path.suffix in (".yaml", ".yml"):
        return f"`{shlex.join(['dstune', 'train', word])}` reads a configuration file"
    if path.name.lower().endswith(DATA_ENDINGS):
        return f"did you mean {typed('data.train', literal(word))}?"
    if (path / "config.json").is_file():
        return f"did you mean {typed('model.path', literal(word))}?"
    if len(path.parts) == 1 and (similar := suggest_key(word, all_keys())):
        return f"did you mean {similar}=VALUE?"
    return None


def packaged_choices() -> dict[str, list[str]]:
    """Return the choices of dstune's own groups by group, from the names of its files (Hydra would take 0.3 s)."""
    from dstune.config.hydra_session import config_folders

    choices: dict[str, set[str]] = {}
    for file in (file for folder in config_folders() for file in folder.glob("*/*.yaml")):
        choices.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(choices.items())}


def rejoined(texts: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Return the overrides without those that the shell split at a space inside brackets, and a problem for each of these."""
    intact: list[str] = []
    problems: list[Problem] = []
    remaining = list(texts)
    while remaining:
        text = remaining.pop(0)
        key, equals, value = text.partition("=")
        pieces = _words_to_closing_bracket(value, remaining) if equals and _open_brackets(value) > 0 else 0
        if not pieces:
            intact.append(text)
            continue
        key, value = key.lstrip("+"), " ".join([value, *remaining[:pieces]])
        del remaining[:pieces]
        problems.append(Problem(key, "the shell split this at its spaces", typed(key, value), value))
    return intact, problems


def _words_to_closing_bracket(value: str, following: Sequence[str]) -> int:
    """Return how many of the following words belong to `value`; 0 if its bracket is never closed."""
    opened = _open_brackets(value)
    for number, word in enumerate(following, start=1):
        opened += _open_brackets(word)
        if opened <= 0:
            return number
    return 0


def _open_brackets(text: str) -> int:
    """Return the number of opening brackets minus that of closing ones."""
    return sum(text.count(bracket) for bracket in "[{") - sum(text.count(bracket) for bracket in "]}")
