"""Completion of `dstune VERB key=value ...` in the shell.

Hydra's own engine expects the overrides right after the program's name, but dstune has a verb in between. Hydra's scripts for bash
and fish are used unchanged: they call `dstune -sc query=SHELL` with the line in COMP_LINE. For zsh, Hydra installs bash's script,
which fails in a shell without `bashcompinit`, so dstune has its own.
"""

from __future__ import annotations

import glob
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dstune.config.convert import is_optional
from dstune.config.fields import options_of
from dstune.config.names import keys_of, names_choice, registered_values
from dstune.core.errors import Problem, UserError

FILES = (
    "data.train",
    "data.validation",
    "data.test",
    "data.guard",
    "data.ood",
    "data.augment.synonyms",
    "model.path",
    "model.chat_template",
    "run.dir",
    "run.resume",
)
FLAGS = (
    "--cfg",
    "--config-dir",
    "--help",
    "--hydra-help",
    "--info",
    "--multirun",
    "--package",
    "--resolve",
    "--shell-completion",
)
ZSH = {
    "install": """\
_dstune() {
    local -a found
    found=(${(f)"$(COMP_LINE="$LBUFFER" $words[1] -sc query=zsh)"})
    compadd -Q -S '' -- $found
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _dstune dstune""",
    "uninstall": "compdef -d dstune; unfunction _dstune",
}


class NextWords(Protocol):
    """What a verb accepts as its next word."""

    @property
    def words(self) -> list[str]: ...
    @property
    def overrides(self) -> bool: ...
    @property
    def files(self) -> bool: ...


Verbs = Mapping[str, Callable[[Sequence[str]], NextWords]]
"""By verb: returns what may follow the words that stand after the verb so far."""


def complete(line: str, verbs: Verbs) -> list[str]:
    """Return the possible completions of the last word of a command line. Never raises."""
    words = line.split()[1:]
    word = "" if line.endswith(" ") or not words else words.pop()
    if not words:
        return [verb for verb in verbs if verb.startswith(word)]
    verb, *words_before = words
    if verb not in verbs:
        return []
    if words_before and words_before[-1] in ("--cfg", "-c"):
        return [kind for kind in ("job", "hydra", "all") if kind.startswith(word)]
    matches: list[str] = []
    try:
        completions = verbs[verb](words_before)
        words = [*completions.words, *(FLAGS if completions.overrides else ())]
        candidates = [text for text in words if text.startswith(word) and (word or not text.startswith("-"))]
        matches = list(dict.fromkeys(candidates))
        if completions.files and "=" not in word and not word.startswith("-"):
            matches += _files(word)
        if completions.overrides and not word.startswith("-"):
            matches += _overrides(word, words_before)
    except Exception:  # a half-written line may be wrong in any way, and a traceback would land in the user's prompt
        return sorted(matches)
    return sorted(matches)


def _overrides(word: str, words_before: Sequence[str]) -> list[str]:
    from dstune.config.compose import classes_for
    from dstune.config.hydra_session import group_options, session

    folders = [words_before[i + 1] for i, text in enumerate(words_before[:-1]) if text in ("--config-dir", "-cd")]
    with session(folders) as hydra:
        groups = group_options(hydra)
        chosen = [text for text in words_before if text.partition("=")[0] in groups and "=" in text]
        keys = keys_of(classes_for(hydra, chosen))
    if "=" in word:
        return _values(word, groups, keys)
    names = {f"{group}=" for group in groups}
    for key in (key for key in keys if not names_choice(key)):
        # One step at a time, as with folders: `tr` gives `trainer.`, `trainer.` gives its keys.
        end = key.find(".", len(word))
        names.add(key[: end + 1] if end >= 0 else f"{key}=")
    return [name for name in names if name.startswith(word)]


def _values(word: str, groups: Mapping[str, Sequence[str]], keys: Mapping[str, Any]) -> list[str]:
    key, _, value = word.partition("=")
    if key in groups:
        options = list(groups[key])
    elif key in FILES:
        options = _files(value)
    elif names := registered_values().get(key):
        options = [f"[{name}]" for name in names] if typing.get_origin(keys[key]) is list else list(names)
    else:
        hint = keys[key]
        options = ["null"] if is_optional(hint) else []
        for part in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
            if part is bool:
                options += ["true", "false"]
            options += options_of(part)
    return [f"{key}={option}" for option in options if option.startswith(value)]


def _files(start: str) -> list[str]:
    return [f"{path}{os.sep}" if os.path.isdir(path) else path for path in glob.glob(f"{glob.escape(start)}*")]


def shell_completion(request: Sequence[str], verbs: Verbs) -> None:
    """Answer `install=SHELL`, `uninstall=SHELL` or `query=SHELL` on standard output.

    Raises:
        UserError: none of these, or a shell without completion.
    """
    from dstune.config.hydra_session import program_name, session

    usage = "dstune completion bash (or zsh, fish); dstune --shell-completion uninstall=bash removes it"
    command, _, shell = request[0].partition("=") if len(request) == 1 else ("", "", "")
    if command not in ("install", "uninstall", "query"):
        raise UserError(Problem("--shell-completion", "expected one of install=, uninstall=, query=", usage))
    if command == "query" and shell in ("bash", "zsh", "fish"):
        separator = " " if shell == "bash" else "\n"
        print(separator.join(complete(os.environ.get("COMP_LINE", ""), verbs)))
        return
    if shell == "zsh":
        print(ZSH[command])
        return
    with session() as hydra:
        plugins = hydra.get_shell_to_plugin_map(hydra.config_loader)
        if shell not in plugins:
            raise UserError(
                Problem(
                    "completion", f"there is no completion for this shell, only for {', '.join(plugins)}", usage, shell
                )
            )
        with program_name():
            getattr(plugins[shell][0], command)()
