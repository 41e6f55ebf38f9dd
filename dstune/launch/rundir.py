"""Chooses and prepares the directory of a run, and decides whether it contains a run to continue."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.checkpoint import store
from dstune.config.overrides import key_of
from dstune.config.resume import check_resume, continue_run, kept_origins
from dstune.config.run_file import Composed, plugins_of, read_run_beside, write_run
from dstune.config.run_links import refuse_links
from dstune.config.schema import RunConfig
from dstune.core import plugins
from dstune.core.disk import fix_of_unwritable_folder
from dstune.core.errors import Problem, UserError
from dstune.core.files import INCOMPLETE, open_plain, write
from dstune.core.parsing import MAX_BYTES
from dstune.core.paths import BEGUN
from dstune.core.paths import RUN_FILE as RUN_FILE
from dstune.core.secrets import publish
from dstune.launch import records
from dstune.launch.positions import truncate_as_before
from dstune.launch.queues import queue_of
from dstune.protocols.launcher import Unreachable
from dstune.tracking.trials import is_sweep

if TYPE_CHECKING:
    from dstune.launch.mirror import Mirror

REPLACED = (RUN_FILE, "result.json", "launch.json")
"""Files that every start writes again."""
KEYWORDS = ("auto", "never")
"""Values of `run.resume` that are not paths."""


@dataclass(frozen=True)
class Before:
    """The state of a run directory before a launch, to restore it if the ranks refuse to start."""

    path: Path
    created: tuple[Path, ...]
    """The folders that the launch creates: the directory and its parents, the innermost first."""
    files: dict[str, bytes | None]
    """Content, by name, of the plain files that a start replaces; None for a file that did not exist."""
    began: tuple[int | None, ...]
    """When training last began there, by stage: modification times of environment.json in nanoseconds."""

    @classmethod
    def of(cls, path: Path) -> Before:
        """Record the state of the directory `path`."""
        created = [folder for folder in (path, *path.parents) if not folder.exists()]
        copies = [str(file.relative_to(path)) for file in path.glob(f"{plugins.FOLDER}/*.py")]
        return cls(path, tuple(created), _contents(path, (*REPLACED, *copies)), _begin_times(path))

    def restore(self) -> bool:
        """Undo the launch unless training has begun. Returns whether it was undone."""
        if _begin_times(self.path) != self.began:
            return False
        if self.path in self.created:
            if self.path.exists():
                shutil.rmtree(self.path)
            for folder in self.created[1:]:
                with suppress(OSError):  # another run is in it by now
                    folder.rmdir()
            return True
        for name, content in self.files.items():
            if content is None:
                (self.path / name).unlink(missing_ok=True)
            elif content != _contents(self.path, [name]).get(name):
                write(self.path / name, content)
        for error in (self.path / "logs").glob("rank-*.error"):
            error.unlink()
        return True

    def restore_unless_taken(self) -> None:
        """Undo a launch that has not locked the directory yet, unless another launch has created and locked it meanwhile.

        Two commands in the same second choose the same new directory, and one of them may fail while the other trains.
        """
        if self.path not in self.created or not (self.path / records.LOCK).exists():
            self.restore()


def _begin_times(path: Path) -> tuple[int | None, ...]:
    """Return when training began in the directory and in the folder of each stage; None for a folder where it has not begun."""
    # Folders of stages count too: a failure in the last stage must not undo the earlier ones.
    return tuple(_modified_ns(file) for file in (path / BEGUN, *sorted(path.glob(f"*/{BEGUN}"))))


def _contents(path: Path, names: Sequence[str]) -> dict[str, bytes | None]:
    """Return by name the content of files in the directory `path`; None for a file that does not exist.

    Links, pipes, devices and files of more than MAX_BYTES are left out, so they are not restored: a copy of the private file that a
    stranger's link leads to would be theirs to read.
    """
    contents: dict[str, bytes | None] = {}
    for name in names:
        try:
            with os.fdopen(open_plain(path / name, os.O_RDONLY), "rb") as stream:
                content = stream.read(MAX_BYTES + 1)
        except OSError:
            contents[name] = None
        except UserError:  # no plain file
            continue
        else:
            if len(content) <= MAX_BYTES:
                contents[name] = content
    return contents


def _modified_ns(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


@dataclass(frozen=True)
class Prepared:
    """A run directory that is ready for the ranks."""

    config: RunConfig
    run_dir: Path
    lock: int | None
    """Descriptor whose lock keeps other launches out while it is open; None if there is nothing to do."""
    before: Before
    """The directory before this launch changed it."""
    continues: Path | None
    """The checkpoint that the ranks start from; None for a start at step 0."""
    nothing_to_do: bool = False
    """Whether the directory contains a completed run, and the configuration requests no further steps."""
    mirror: Mirror | None = None
    """Copies `run_dir` to the run's own place, if ranks cannot work there."""

    @property
    def place(self) -> Path:
        """The directory that the user knows the run by."""
        return self.run_dir if self.mirror is None else self.mirror.place


def path_of(config: RunConfig, run: Path | None = None, now: datetime | None = None) -> Path:
    """Return the directory of a run: `run` from the command line, else `run.dir`, else a new one.

    Raises:
        UserError: it is a file, or a folder with something other than a run.
    """
    path = run or (Path(config.run.dir) if config.run.dir else None) or new_directory(config, now)
    if not (path / RUN_FILE).is_file() and path.exists() and (not path.is_dir() or _foreign(path)):
        reason = "this folder is not empty and contains no run" if path.is_dir() else "this is a file"
        raise UserError(Problem("run.dir", reason, "give a new or empty folder, or one that contains a run", str(path)))
    return path


def choose(
    composed: Composed,
    run: Path | None = None,
    now: datetime | None = None,
    given: Sequence[str] = (),
    *,
    place: Path | None = None,
    work: Path | None = None,
) -> Composed:
    """Return the configuration for the directory that it will run in, before anything is written.

    In the result `run.dir` is set, and a continued run has the values that its first start froze.

    run: directory of an existing run that was named on the command line (its `run.yaml` is part of `composed`).
    given: the overrides of this command; those of `composed` include the ones of the run's earlier starts.
    place: the directory, if it is known already (`path_of`). work: where its files are, if elsewhere (`dstune.launch.mirror`).

    Raises:
        UserError: the directory contains something other than a run, or a run that `run.resume` or other keys refuse to continue;
            or `run.resume` names a path without a complete checkpoint.
    """
    config = composed.config
    resume_from = config.run.resume
    place = place or path_of(config, run, now)
    path = work or place
    publish(str(place))
    if (path / RUN_FILE).is_file():
        # The value that `run.resume` had when the named run began does not prevent continuing it now.
        is_resume_given = run is None or any(key_of(text) == "run.resume" for text in given)
        composed = _continued(composed, path, given, may_refuse=is_resume_given)
    elif resume_from not in KEYWORDS:
        checkpoint_of(resume_from)
        if (Path(resume_from) / RUN_FILE).is_file():
            composed = _continue_composed(_stored(Path(resume_from), composed, given), composed)
    # Changed plugins are accepted for this start alone, not for every later one.
    run_section = replace(composed.config.run, dir=str(place), accept_plugin_changes=False)
    return replace(composed, config=replace(composed.config, run=run_section))


def new_directory(config: RunConfig, now: datetime | None = None) -> Path:
    """Return an unused directory `runs/NAME/DATE_TIME` for a run whose configuration names none."""
    return _unused_directory(Path("runs") / config.run.name, now or datetime.now())


def before_launch(composed: Composed, work: Path | None = None) -> Before:
    """Record the state of the chosen run directory. work: see `choose`."""
    if work is not None:
        return Before.of(work)
    assert composed.config.run.dir is not None, "choose() sets it"
    return Before.of(Path(composed.config.run.dir))


def prepare(
    composed: Composed, before: Before | None = None, message: Callable[[str], None] = lambda text: None
) -> Prepared:
    """Create the chosen run directory, lock it and write its `run.yaml`.

    before: the directory before this launch changed it. message: shows the user a line about what the launch waits for.

    Raises:
        UserError: another launch uses the directory; it cannot be written; or a setting that a continued run must keep differs,
            such as the commit that a branch name in `model.revision` stands for.
    """
    config = composed.config
    before = before or before_launch(composed)
    path = before.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        if config.run.mode.value is not None:
            path.chmod(config.run.mode.value)
        lock = records.acquire_lock(path)
    except OSError as error:
        reason = f"cannot be created or written: {error.strerror}"
        raise UserError(Problem("run.dir", reason, fix_of_unwritable_folder(error), str(path))) from None
    with ExitStack() as rollback:
        rollback.callback(os.close, lock)
        rollback.callback(before.restore)
        records.wait_for_former_ranks(path, message)
        _refuse_running_job(path)
        refuse_links(path)
        run_file = path / RUN_FILE
        if run_file.is_file():
            stored = read_run_beside(run_file, config, decided=True).config
            if store.resumable(path) is not None:
                check_resume(stored, config)
            if _is_done(path, stored, config):
                return Prepared(config, path, None, before, store.newest(path), nothing_to_do=True)
        checkpoint = store.resumable(path)
        if checkpoint is None and store.newest(path) is not None:
            raise UserError(_weights_only_problem("run.dir", path))
        if checkpoint is None and config.run.resume not in KEYWORDS:
            checkpoint = checkpoint_of(config.run.resume)
        write_run(run_file, composed)
        rollback.pop_all()
    return Prepared(config, path, lock, before, checkpoint)


def _refuse_running_job(path: Path) -> None:
    """Raise UserError if a job of a queue uses the directory: jobs hold no lock."""
    record = records.read_launch(path)
    if record is None or not record.jobs:
        return
    try:
        jobs = queue_of(record).alive(record.jobs)
    except Unreachable:
        if records.read_result(path) is None:
            reason = f"job {record.jobs[-1]} may be running here, and {queue_of(record).name} does not answer"
            raise UserError(Problem("run.dir", reason, "run this command on a login node", str(path))) from None
        return
    if jobs:
        fix = f"wait for it, stop it with `dstune cancel {path}`, or give another run.dir"
        raise UserError(Problem("run.dir", str(jobs[0]), fix, str(path)))


def checkpoint_of(run: str) -> Path:
    """Return the newest complete checkpoint of the run at `run`.

    Raises:
        UserError: there is no such directory, or no complete checkpoint in it.
    """
    path = Path(run)
    if not path.is_dir():
        fix = "give the directory of a run, `auto` or `never`"
        raise UserError(Problem("run.resume", "there is no such run directory", fix, run))
    newest = store.resumable(path)
    if newest is None and store.newest(path) is not None:
        raise UserError(_weights_only_problem("run.resume", path))
    if newest is not None:
        return newest
    if store.is_committed(path):
        reason, fix = "this is a checkpoint, not a run", f"run.resume={path.parent.parent}"
    else:
        names = ", ".join(info.path.name for info in store.listing(path))
        reason = "this run has no complete checkpoint" + (f" (incomplete: {names})" if names else "")
        fix = "give a run that has saved a checkpoint"
    raise UserError(Problem("run.resume", reason, fix, run))


def _weights_only_problem(key: str, path: Path) -> Problem:
    reason = "its checkpoints contain only weights (checkpoint.weights_only), so it cannot be continued"
    return Problem(
        key, reason, f"`dstune export {path}`, then start a new run from the export with model.path", str(path)
    )


def run_directory(path: Path) -> Path:
    """Return `path` if it is the directory of a run.

    Raises:
        UserError: it is not.
    """
    if (path / RUN_FILE).is_file():
        return path
    if is_sweep(path):
        fix = f"`dstune runs {path}` lists its trials; `dstune train {path}` continues it"
        raise UserError(Problem("RUN", "this is a sweep, not a run", fix, str(path)))
    if _holds_runs(path):
        fix = f"`dstune runs {path}` lists them; or give {_similar(path)}"
        raise UserError(Problem("RUN", "this folder contains runs, but is not one itself", fix, str(path)))
    reason = "this folder holds no run (no run.yaml)" if path.is_dir() else "there is no such run directory"
    raise UserError(Problem("RUN", reason, f"give {_similar(path)}", str(path)))


def refuse_missing(path: Path) -> None:
    """Refuse a path that can only mean a run but is none: `runs/nope` is a typing error there, not a model of the hub.

    Raises:
        UserError: `path` does not exist in a folder that contains runs; or it is a folder of runs, and not a model.
    """
    parent = path.parent
    is_missing_run = parent != Path() and not path.exists() and _holds_runs(parent)
    is_model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if is_missing_run or (not is_model and _holds_runs(path)):
        run_directory(path)


def _holds_runs(folder: Path) -> bool:
    return any(any(folder.glob(f"{depth}/{RUN_FILE}")) for depth in ("*", "*/*"))


def _continued(composed: Composed, path: Path, given: Sequence[str], may_refuse: bool) -> Composed:
    """Return the configuration with which the run at `path` continues.

    A run that has not saved starts at step 0 again, so any setting may differ: its configuration may have been wrong.

    may_refuse: whether `run.resume=never` refuses to continue it.
    """
    resume = composed.config.run.resume
    stored = _stored(path, composed, given)
    if resume == "never" and may_refuse and (path / "metrics.jsonl").exists():
        fix = "run.resume=auto continues it; another run.dir starts a new run"
        raise UserError(Problem("run.resume", f"{path} contains a run already", fix, "never"))
    began_from_there = stored.config.run.resume == resume or Path(resume).absolute() == path.absolute()
    if resume not in KEYWORDS and not began_from_there:
        reason = f"{path} contains a run that did not begin from there"
        fix = "give another run.dir, or run.resume=auto to continue it"
        raise UserError(Problem("run.resume", reason, fix, resume))
    composed = composed if store.resumable(path) is None else _continue_composed(stored, composed)
    if resume not in KEYWORDS:
        return composed
    # A run that began from another run and has not saved yet begins from there again.
    run_section = replace(composed.config.run, resume=stored.config.run.resume)
    return replace(composed, config=replace(composed.config, run=run_section))


def _stored(path: Path, composed: Composed, given: Sequence[str]) -> Composed:
    """Return the configuration that the run at `path` began with. Raises UserError if the plugins of a saved run have changed."""
    file = path / RUN_FILE
    if store.resumable(path) is not None and not composed.config.run.accept_plugin_changes:
        plugins.refuse_changes(plugins_of(file), composed.plugins)
    return read_run_beside(file, composed.config, given)


def _continue_composed(stored: Composed, composed: Composed) -> Composed:
    """Return the configuration with which `composed` continues the saved run `stored`. Raises UserError."""
    config = continue_run(stored, replace(composed, config=truncate_as_before(stored.config, composed.config)))
    return replace(composed, config=config, origins=kept_origins(stored, config))


def _is_done(path: Path, stored: RunConfig, config: RunConfig) -> bool:
    result = records.read_result(path) or {}
    same_length = (stored.trainer.max_steps, stored.trainer.epochs) == (config.trainer.max_steps, config.trainer.epochs)
    return result.get("status") in ("completed", "stopped") and same_length


def _foreign(path: Path) -> bool:
    """Return whether the folder contains more than traces of a launch that ended before it wrote its `run.yaml`."""
    if (path / records.LEASE).exists():
        return False
    return any(entry.name != records.LOCK and not entry.name.endswith(INCOMPLETE) for entry in path.iterdir())


def _unused_directory(parent: Path, now: datetime) -> Path:
    """Return a path below `parent` that does not exist, named after the time to the second."""
    path = parent / now.strftime("%Y-%m-%d_%H-%M-%S")
    candidates: Sequence[Path] = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _similar(path: Path) -> str:
    """Return what the user may have meant: the newest run below `path` or next to it."""
    places = [path, path.parent] if path.is_dir() or path.parent.is_dir() else [Path("runs")]
    runs = [file.parent for place in places for depth in ("*", "*/*") for file in place.glob(f"{depth}/{RUN_FILE}")]
    if not runs:
        return "the directory of a run, for example runs/NAME/DATE_TIME"
    return f"the directory of a run, for example {max(runs, key=lambda run: (run / RUN_FILE).stat().st_mtime)}"
