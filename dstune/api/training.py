"""`dstune.train`: a run from Python, composed, launched and kept as the command line does it."""

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

    The same configuration, launch and run directory as `dstune train`: every key, group and experiment of the command line
    is an override here, and `dstune status`, `cancel`, `report`, ... work with the run. Ranks are processes of their own;
    an interrupt (Ctrl-C, the stop button of a notebook) makes them save and stop. Inside a launcher of your own (`torchrun`)
    this process is a rank, and every rank calls this function with the same arguments.

    Args:
        overrides: `"KEY=VALUE"` or `"GROUP=CHOICE"`: `"experiment=sentiment"`, `"trainer.epochs=2"`, `"method=lora"`; a mapping of
            choices and sections, `{"method": "lora", "optimizer": {"lr": 1e-4}}`; or the name of a configuration file, `"my.yaml"`.
            Texts win over mappings and files.
        train: rows to train on: a list of mappings, a `datasets.Dataset`, a `pandas.DataFrame` or a DataFrame of Spark, written
            into the run directory; or files or a table, as in `data.train`.
        validation: held-out rows, likewise.
        test: rows that are measured once at the end, likewise.
        callbacks: `"my_module:Printer"`, `"./printer.py:Printer"` or the class itself, registered with `@dstune.callback`. A class
            of a notebook cell or a script travels to the ranks as a file with its source, so it may use modules, what it imports
            and plain constants, and nothing else of the cell.
        plugins: files and modules that register tasks, methods, metrics, ..., as the key `plugins`.
        config_dirs: folders with groups of your own, as `--config-dir`.
        launch: where the ranks run, as the group `launch`: `"local"`, `"spark"` (the active session), ...
        progress: whether to show what happens; without it everything is in the run directory only.
        settings: none; `epochs=3` is refused with the key that it means.

    Returns:
        The run: `run.metrics`, `run.result`, `run.report()`, `run.predict(rows)`, `run.generate(prompt)`,
        `run.export(path)`, `run.resume(*overrides)`, `run.dir`.

    Raises:
        UserError: the configuration or the data is wrong; `problems` lists everything, each with a fix.
        Preempted: a signal or `run.time_limit` stopped the run after a save; `dstune.load_run(DIR).resume()` continues it.
        TrainingFailed: the run could not go on.

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
    words = (*words, *(() if launch is None else (f"launch={launch}",)))
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
    """Return the overrides with `plugins` and `trainer.callbacks`. Raises UserError: a callback that cannot reach the ranks."""
    from dstune.config.overrides import key_of, quoted
    from dstune.core.plugins import activate, load_built_ins

    specs = [_importable(entry) for entry in callbacks]
    if callbacks and any(key_of(text) == "trainer.callbacks" for text in overrides):
        raise UserError(Problem("trainer.callbacks", "is given beside callbacks=...", "leave one of them out"))
    files = list(dict.fromkeys([*(os.fspath(entry) for entry in plugins), *specs]))
    words = list(overrides)
    if files:
        words.append(f"plugins=[{','.join(quoted(file) for file in files)}]")
    if specs:
        load_built_ins()
        activate(files)
        words.append(f"trainer.callbacks=[{','.join(_registered(spec) for spec in specs)}]")
    return words


def _importable(callback: Any) -> str:
    """Return the module and class of a callback, as ranks import it."""
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


def _registered(spec: str) -> str:
    """Return the name under which a callback is registered; its plugin is active."""
    from dstune.core.plugins import members_of
    from dstune.protocols import CALLBACKS

    member = spec.rpartition(":")[2]
    names = [cls.name for kind, cls in members_of(spec) if kind is CALLBACKS and cls.__name__ == member]
    if not names:
        raise UserError(Problem("callbacks", f"{member} is no callback", "derive it from dstune.Callback", spec))
    return names[-1]


def _with_rows(
    overrides: list[str], config_dirs: Sequence[str], splits: dict[str, Any]
) -> tuple[list[str], WriteRows | None]:
    """Return the overrides with a key for each split, and what writes rows from memory into the run directory.

    Raises:
        UserError: a split is given twice, or the run directory cannot be determined since the overrides are wrong.
    """
    from dstune.config.compose import compose
    from dstune.config.overrides import key_of, quoted
    from dstune.launch.rundir import new_directory

    given_keys = {key_of(text) for text in overrides}
    twice = [name for name in splits if f"data.{name}" in given_keys]
    if twice:
        fix = "leave one of them out"
        raise UserError(Problem(f"data.{name}", f"is given beside {name}=...", fix) for name in twice)
    words = [
        *overrides,
        *(f"data.{name}={quoted(os.fspath(rows))}" for name, rows in splits.items() if memory.is_file(rows)),
    ]
    held = {name: rows for name, rows in splits.items() if not memory.is_file(rows)}
    if not held:
        return words, None
    names = {name: memory.file_name(rows, name) for name, rows in held.items()}
    config = compose([*words, *(f"data.{name}={file}" for name, file in names.items())], config_dirs).config
    run_dir = Path(config.run.dir) if config.run.dir else new_directory(config)
    if not config.run.dir:
        words.append(f"run.dir={quoted(str(run_dir))}")
    words += [f"data.{name}={quoted(str(run_dir.absolute() / file))}" for name, file in names.items()]

    def write(chosen: Path) -> None:
        for name, rows in held.items():
            memory.write(rows, chosen / names[name], name)

    return words, write
