"""Starts a run from Python and waits for its end, as the command line does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.api.notebook import console
from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED, Preempted, Problem, TrainingFailed, UserError

if TYPE_CHECKING:
    from dstune.launch.train import Command

WriteRows = Callable[[Path], None]


def resume(run: Path, *overrides: str, progress: bool = True) -> Path:
    """Continue a run; see `Run.resume`. Returns the run directory."""
    from dstune.config.flags import Flags
    from dstune.launch.train import Command

    check_overrides(overrides)
    return run_to_end(lambda: (Command(run, Flags(list(overrides)), json=False), None), progress)


def run_to_end(requested: Callable[[], tuple[Command, WriteRows | None]], progress: bool) -> Path:
    from dstune.core.rank_env import from_environment
    from dstune.launch.summary import summary
    from dstune.launch.train import as_rank, launched

    env = from_environment(os.environ)
    if env is not None:
        outcome = as_rank(env, requested, prints=False)
        if outcome.error is not None:
            raise outcome.error
        if outcome.run_dir is None or outcome.code != EXIT_DONE:
            raise TrainingFailed(f"rank {env.rank} ended with exit code {outcome.code}")
        return outcome.run_dir
    command, write_rows = requested()
    progress_console = console(progress)
    run_dir, code, pending = launched(command, progress_console, write_rows)
    if progress and not pending and code == EXIT_DONE:
        progress_console.message(summary(run_dir, commands=False))
    return _ended(run_dir, code)


def _ended(run_dir: Path, code: int) -> Path:
    """Return the run directory. Raises Preempted or TrainingFailed if the run did not end normally."""
    if code == EXIT_DONE:
        return run_dir
    from dstune.launch.records import read_result

    reason = str((read_result(run_dir) or {}).get("reason") or f"exit code {code}")
    if code == EXIT_PREEMPTED:
        raise Preempted(f"{reason}; dstune.load_run({str(run_dir)!r}).resume() continues the run")
    raise TrainingFailed(f"{reason} (logs: {run_dir / 'logs'})")


def check_overrides(overrides: Sequence[Any]) -> None:
    """Raises UserError for command-line flags and for overrides that are not texts."""
    problems = []
    for word in overrides:
        if not isinstance(word, str):
            fix = 'write "KEY=VALUE"; rows to train on are passed as train=rows'
            problems.append(Problem("overrides", "expected a text", fix, repr(word)[:80]))
        elif word.startswith("-"):
            fix = "pass KEY=VALUE or GROUP=CHOICE; flags belong to the command line"
            problems.append(Problem("overrides", "this is a flag", fix, word))
    if problems:
        raise UserError(problems)


def words_of(overrides: Sequence[Any]) -> tuple[str, ...]:
    """Return the overrides as texts: mappings and configuration files as what they stand for, where no text repeats it.

    Raises:
        UserError: a mapping or a file that is no configuration.
    """
    if all(isinstance(word, str) and not word.endswith((".yaml", ".yml")) for word in overrides):
        return tuple(overrides)
    from dstune.config.overrides import key_of
    from dstune.config.plain_file import overrides_of, read_overrides
    from dstune.core.arguments import is_configuration_file

    texts = [word for word in overrides if not isinstance(word, Mapping) and not _is_file(word, is_configuration_file)]
    repeated = {key_of(word) for word in texts if isinstance(word, str)}
    text_by_key: dict[str, str] = {}
    for word in overrides:
        if isinstance(word, Mapping):
            text_by_key |= {key_of(text): text for text in overrides_of(word, "overrides")}
        elif _is_file(word, is_configuration_file):
            text_by_key |= {key_of(text): text for text, _ in read_overrides(Path(word))}
    return (*(text for key, text in text_by_key.items() if key not in repeated), *texts)


def _is_file(word: Any, is_configuration_file: Callable[[str], bool]) -> bool:
    return isinstance(word, str) and is_configuration_file(word)


def refuse_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError for keyword arguments that are settings, naming the override for each."""
    if not settings:
        return
    from dstune.config.convert import format_value
    from dstune.config.habits import answer
    from dstune.config.names import all_keys, sections, suggest_key
    from dstune.config.plain_file import literal

    problems = []
    for name, value in settings.items():
        text = format_value(value)
        if words := answer(name, text):
            fix = words
        elif name in sections():
            fix = f"dstune.train({{{name!r}: {value!r}}})"
        elif key := suggest_key(name, all_keys()):
            fix = f'dstune.train("{key}={literal(value)}")'
        else:
            fix = "help(dstune.train) lists the arguments, `dstune train --help` the keys"
        reason = "settings are overrides: texts or a mapping in front of the other arguments"
        problems.append(Problem(name, reason, fix, text))
    raise UserError(problems)


def refuse_lone(**lists: Any) -> None:
    """Raises UserError for a single text, path or class where an argument takes a list: a text would be read letter by letter."""
    problems = []
    for name, argument in lists.items():
        if isinstance(argument, (str, os.PathLike, type)):
            text = argument.__name__ if isinstance(argument, type) else repr(os.fspath(argument))
            problems.append(Problem(name, "expected a list", f"{name}=[{text}]", text))
    if problems:
        raise UserError(problems)
