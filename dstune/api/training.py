"""`dstune.train`: composes, launches and stores a run from Python as the command line does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.api import cell
from dstune.api import rows as memory
from dstune.api.launching import WriteRows, check_overrides, refuse_lone, refuse_settings, run_to_end, words_of
from dstune.api.run import Run
from dstune.core.errors import Problem, UserError

if TYPE_CHECKING:
    from dstune.api.rows import Rows
    from dstune.launch.train import Command


def train(
    *overrides: str | Mapping[str, Any],
    train: Rows | str | os.PathLike[str] | None = None,
    validation: Rows | str | os.PathLike[str] | None = None,
    test: Rows | str | os.PathLike[str] | None = None,
    callbacks: Sequence[str | type] = (),
    plugins: Sequence[str | os.PathLike[str]] = (),
    config_dirs: Sequence[str | os.PathLike[str]] = (),
    launch: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train a model and return its run. Blocks until the run has ended, and shows its progress.

    Configuration, launch and run directory are those of `dstune train`: every key, group and experiment of the command line
    is an override here, and `dstune status`, `cancel`, `report`, ... work with the run. Ranks run in separate processes; an
    interrupt (Ctrl-C, the stop button of a notebook) makes them save and stop. Inside a launcher of your own (`torchrun`),
    this process is a rank, and every rank must call this function with the same arguments.

    Args:
        overrides: `"KEY=VALUE"` or `"GROUP=CHOICE"`: `"experiment=sentiment"`, `"trainer.epochs=2"`, `"method=lora"`; a mapping of
            choices and sections, `{"method": "lora", "optimizer": {"lr": 1e-4}}`; or the name of a configuration file, `"my.yaml"`.
            `"KEY=VALUE"` overrides mappings and files.
        train: rows to train on: a list of mappings, a `datasets.Dataset`, a `pandas.DataFrame` or a Spark DataFrame, which are
            written into the run directory; or files or a table, as in `data.train`.
        validation: held-out rows, in the same forms.
        test: rows that are evaluated once at the end, in the same forms.
        callbacks: `"my_module:Printer"`, `"./printer.py:Printer"` or the class itself, registered with `@dstune.callback`. The
            source of a class from a notebook cell or a script is sent to the ranks as a file, so the class may use only modules,
            its own imports and plain constants of the cell.
        plugins: files and modules that register tasks, methods, metrics, ..., like the key `plugins`.
        config_dirs: folders with your own configuration groups, like `--config-dir`.
        launch: where the ranks run, like the group `launch`: `"local"`, `"spark"` (the active session), ...
        progress: whether to show progress; if False, it is only in the files of the run directory.
        settings: not supported: `epochs=3` is refused with the override to write instead.

    Returns:
        The run: `run.metrics`, `run.result`, `run.report()`, `run.predict(rows)`, `run.generate(prompt)`,
        `run.export(path)`, `run.resume(*overrides)`, `run.dir`.

    Raises:
        UserError: the configuration or the data is wrong; `problems` lists everything, each with a fix.
        Preempted: a signal or `run.time_limit` stopped the run after a save; `dstune.load_run(DIR).resume()` continues it.
        TrainingFailed: the run failed.

    Example:
        >>> rows = [{"text": "a great film", "label": "good"}, ...]
        >>> run = dstune.train("experiment=sentiment", "trainer.epochs=2", train=rows)
        >>> run.predict(["great film"])[0]["predicted"]
        'good'
    """
    from dstune.config.flags import Flags
    from dstune.launch.train import Command

    refuse_settings(settings)
    words = words_of(overrides)
    check_overrides(words)
    refuse_lone(callbacks=callbacks, plugins=plugins, config_dirs=config_dirs)
    if launch is not None:
        words = (*words, f"launch={launch}")
    splits = {
        name: rows for name, rows in (("train", train), ("validation", validation), ("test", test)) if rows is not None
    }
    folders = [os.fspath(folder) for folder in config_dirs]

    def command() -> tuple[Command, WriteRows | None]:
        composed, write = _with_rows(_with_plugins(words, callbacks, plugins), folders, splits)
        return Command(None, Flags(composed, folders), json=False), write

    return Run(run_to_end(command, progress))


def _with_plugins(
    overrides: Sequence[str], callbacks: Sequence[str | type], plugins: Sequence[str | os.PathLike[str]]
) -> list[str]:
    """Return the overrides with `plugins` and `trainer.callbacks` added. Raises UserError if a callback cannot be sent to the
    ranks."""
    from dstune.config.overrides import key_of, quoted
    from dstune.core.plugins import activate, load_built_ins

    specs = [_import_spec(callback) for callback in callbacks]
    if callbacks and any(key_of(text) == "trainer.callbacks" for text in overrides):
        raise UserError(Problem("trainer.callbacks", "is given as well as callbacks=...", "leave one of them out"))
    files = list(dict.fromkeys([*(os.fspath(plugin) for plugin in plugins), *specs]))
    words = list(overrides)
    if files:
        words.append(f"plugins=[{','.join(quoted(file) for file in files)}]")
    if specs:
        load_built_ins()
        activate(files)
        words.append(f"trainer.callbacks=[{','.join(_registered_name(spec) for spec in specs)}]")
    return words


def _import_spec(callback: Any) -> str:
    """Return MODULE:CLASS or FILE:CLASS, from which ranks import a callback. Raises UserError."""
    if isinstance(callback, str):
        if ":" in callback:
            return callback
        fix = 'write "MODULE:CLASS", for example "my_module:Printer"'
        raise UserError(Problem("callbacks", "names no class", fix, callback))
    if not isinstance(callback, type):
        fix = "pass the class, or its MODULE:CLASS; arguments go into trainer.callbacks=[{NAME: {ARGUMENT: VALUE}}]"
        raise UserError(Problem("callbacks", "expected a class or its name", fix, repr(callback)[:80]))
    if callback.__module__ == "__main__":
        return f"{cell.file_of(callback)}:{callback.__name__}"
    return f"{callback.__module__}:{callback.__name__}"


def _registered_name(spec: str) -> str:
    """Return the name under which a callback of an active plugin is registered. Raises UserError if it is none."""
    from dstune.core.plugins import members_of
    from dstune.protocols import CALLBACKS

    class_name = spec.rpartition(":")[2]
    names = [cls.name for kind, cls in members_of(spec) if kind is CALLBACKS and cls.__name__ == class_name]
    if not names:
        fix = "derive it from dstune.Callback, and decorate it with @dstune.callback"
        raise UserError(Problem("callbacks", f"{class_name} is not a registered callback", fix, spec))
    return names[-1]


def _with_rows(
    overrides: list[str], config_dirs: Sequence[str], splits: dict[str, Any]
) -> tuple[list[str], WriteRows | None]:
    """Return the overrides with a key for each split, and a function that writes rows from memory into the run directory (None if
    there are no such rows).

    Raises:
        UserError: a split is given twice, or the overrides are wrong, so that the run directory cannot be determined.
    """
    from dstune.config.compose import compose
    from dstune.config.overrides import key_of, quoted
    from dstune.launch.rundir import new_directory

    given_keys = {key_of(text) for text in overrides}
    twice = [name for name in splits if f"data.{name}" in given_keys]
    if twice:
        fix = "leave one of them out"
        raise UserError(Problem(f"data.{name}", f"is given as well as {name}=...", fix) for name in twice)
    words = [
        *overrides,
        *(f"data.{name}={quoted(os.fspath(rows))}" for name, rows in splits.items() if memory.is_file(rows)),
    ]
    in_memory = {name: rows for name, rows in splits.items() if not memory.is_file(rows)}
    if not in_memory:
        return words, None
    names = {name: memory.file_name(rows, name) for name, rows in in_memory.items()}
    config = compose([*words, *(f"data.{name}={file}" for name, file in names.items())], config_dirs).config
    run_dir = Path(config.run.dir) if config.run.dir else new_directory(config)
    if not config.run.dir:
        words.append(f"run.dir={quoted(str(run_dir))}")
    words += [f"data.{name}={quoted(str(run_dir.absolute() / file))}" for name, file in names.items()]

    def write(folder: Path) -> None:
        for name, rows in in_memory.items():
            memory.write(rows, folder / names[name], name)

    return words, write
