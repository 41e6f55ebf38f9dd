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
from dstune.core.errors import Problem, UserError
from dstune.core.files import INCOMPLETE, write
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
"""Values of `run.resume` that are no path."""


@dataclass(frozen=True)
class Before:
    """The state of a run directory before a launch, to restore it if the ranks refuse to start."""

    path: Path
    created: tuple[Path, ...]
    """The folders that the launch creates: the directory and those above it, the innermost first."""
    files: dict[str, bytes | None]
    """Content of what a start replaces, by name; None for a file that was not there."""
    began: tuple[int | None, ...]
    """When training began there last, by stage: the times of environment.json in nanoseconds."""

    @classmethod
    def of(cls, path: Path) -> Before:
        created = [folder for folder in (path, *path.parents) if not folder.exists()]
        copies = [str(file.relative_to(path)) for file in path.glob(f"{plugins.FOLDER}/*.py")]
        files = {name: _content(path / name) for name in (*REPLACED, *copies)}
        return cls(path, tuple(created), files, _begun(path))

    def restore(self) -> bool:
        """Undo the launch unless training has begun. Returns whether it was undone."""
        if _begun(self.path) != self.began:
            return False
        if self.path in self.created:
            if self.path.exists():
                shutil.rmtree(self.path)
            for folder in self.created[1:]:
                with suppress(OSError):  # somebody else's run is in it by now
                    folder.rmdir()
            return True
        for name, content in self.files.items():
            if content is None:
                (self.path / name).unlink(missing_ok=True)
            elif content != _content(self.path / name):
                write(self.path / name, content)
        for error in (self.path / "logs").glob("rank-*.error"):
            error.unlink()
        return True

    def restore_unless_taken(self) -> None:
        """Undo a launch that has not locked the directory yet. One that another launch has created and locked since stays: two
        commands of one second choose the same new directory, and one of them may fail while the other trains.
        """
        if self.path not in self.created or not (self.path / records.LOCK).exists():
            self.restore()


def _begun(path: Path) -> tuple[int | None, ...]:
    # What stops the last stage of a run does not undo those before it, which have folders of their own.
    return tuple(_written_at(file) for file in (path / BEGUN, *sorted(path.glob(f"*/{BEGUN}"))))


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _written_at(file: Path) -> int | None:
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
    """Descriptor whose lock keeps other launches out as long as it is open; None where there is nothing to do."""
    before: Before
    """How the directory was before this launch touched it."""
    continues: Path | None
    """The checkpoint that the ranks start from; None for a start at step 0."""
    nothing_to_do: bool = False
    """Whether the directory contains a completed run, and the configuration asks for no further steps."""
    mirror: Mirror | None = None
    """Where the run's own place cannot be worked in: what copies `run_dir` there."""

    @property
    def place(self) -> Path:
        """The directory that the user knows the run by."""
        return self.run_dir if self.mirror is None else self.mirror.place


def path_of(config: RunConfig, run: Path | None = None, now: datetime | None = None) -> Path:
    """Return the directory of a run: the one named on the command line, `run.dir`, or a new one.

    Raises:
        UserError: it holds something else.
    """
    path = run or (Path(config.run.dir) if config.run.dir else None) or new_directory(config, now)
    if not (path / RUN_FILE).is_file() and path.exists() and (not path.is_dir() or _foreign(path)):
        reason = "this is not a run, and not empty" if path.is_dir() else "this is a file"
        raise UserError(Problem("run.dir", reason, "give a new or empty folder, or one that holds a run", str(path)))
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

    run: directory of an existing run that was named on the command line (its `run.yaml` is part of `composed`).
    given: the overrides of this command; those of `composed` hold the ones of the run's earlier starts too.
    place: the directory, where it is known (`path_of`). work: where its files are, if elsewhere (`dstune.launch.mirror`).
    The result has `run.dir` set, and what the first start of a continued run froze.

    Raises:
        UserError: the directory holds something else, or a run that `run.resume` or other keys refuse to continue;
            `run.resume` names a path without a whole checkpoint.
    """
    config = composed.config
    resume_from = config.run.resume
    place = place or path_of(config, run, now)
    path = work or place
    publish(str(place))
    if (path / RUN_FILE).is_file():
        # What `run.resume` said when the named run began does not keep it from being continued now.
        is_resume_given = run is None or any(key_of(text) == "run.resume" for text in given)
        composed = _continued(composed, path, given, may_refuse=is_resume_given)
    elif resume_from not in KEYWORDS:
        checkpoint_of(resume_from)
        if (Path(resume_from) / RUN_FILE).is_file():
            composed = _going_on(_stored(Path(resume_from), composed, given), composed)
    # A change is accepted once, not by every later start.
    run_section = replace(composed.config.run, dir=str(place), accept_plugin_changes=False)
    return replace(composed, config=replace(composed.config, run=run_section))


def new_directory(config: RunConfig, now: datetime | None = None) -> Path:
    """Return the directory of a run that names none: `runs/NAME/DATE_TIME`, which nobody has taken yet."""
    return _fresh(Path("runs") / config.run.name, now or datetime.now())


def before_launch(composed: Composed, work: Path | None = None) -> Before:
    """Return the chosen run directory as it is now. work: see `choose`."""
    if work is not None:
        return Before.of(work)
    assert composed.config.run.dir is not None, "choose() sets it"
    return Before.of(Path(composed.config.run.dir))


def prepare(
    composed: Composed, before: Before | None = None, message: Callable[[str], None] = lambda text: None
) -> Prepared:
    """Create the chosen run directory, lock it and write its `run.yaml`. before: the directory before this launch touched it.
    message: told what is waited for.

    Raises:
        UserError: another launch uses the directory, it cannot be written, or what a branch name of `model.revision`
            stands for has changed since the run began.
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
        raise UserError(Problem("run.dir", reason, "give a folder of yours", str(path))) from None
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
            raise UserError(_weights_alone("run.dir", path))
        if checkpoint is None and config.run.resume not in KEYWORDS:
            checkpoint = checkpoint_of(config.run.resume)
        write_run(run_file, composed)
        rollback.pop_all()
    return Prepared(config, path, lock, before, checkpoint)


def _refuse_running_job(path: Path) -> None:
    """Raises UserError where a job, which holds no lock, uses the directory."""
    record = records.read_launch(path)
    if record is None or not record.jobs:
        return
    try:
        jobs = queue_of(record).alive(record.jobs)
    except Unreachable:
        if records.read_result(path) is None:
            reason = f"job {record.jobs[-1]} may be running here, and {queue_of(record).name} does not answer"
            raise UserError(Problem("run.dir", reason, "start it on a login node", str(path))) from None
        return
    if jobs:
        fix = f"wait for it, stop it with `dstune cancel {path}`, or give another run.dir"
        raise UserError(Problem("run.dir", str(jobs[0]), fix, str(path)))


def checkpoint_of(run: str) -> Path:
    """Return the newest whole checkpoint of the run at `run`.

    Raises:
        UserError: no such directory, or no whole checkpoint in it.
    """
    path = Path(run)
    if not path.is_dir():
        fix = "give the directory of a run, `auto` or `never`"
        raise UserError(Problem("run.resume", "there is no such run directory", fix, run))
    newest = store.resumable(path)
    if newest is None and store.newest(path) is not None:
        raise UserError(_weights_alone("run.resume", path))
    if newest is None:
        incomplete = [info.path.name for info in store.listing(path)]
        reason = "this run has no whole checkpoint" + (f" ({', '.join(incomplete)} is torn)" if incomplete else "")
        if store.is_committed(path):
            reason = "this is a checkpoint, not a run"
        fix = f"run.resume={path.parent.parent}" if store.is_committed(path) else "give a run that has saved"
        raise UserError(Problem("run.resume", reason, fix, run))
    return newest


def _weights_alone(key: str, path: Path) -> Problem:
    reason = "its checkpoints hold weights alone (checkpoint.weights_only), which cannot be continued"
    return Problem(key, reason, f"`dstune export {path}`, and begin another run from that with model.path", str(path))


def run_directory(path: Path) -> Path:
    """Return `path`, if it is the directory of a run.

    Raises:
        UserError: it is none.
    """
    if (path / RUN_FILE).is_file():
        return path
    if is_sweep(path):
        fix = f"`dstune runs {path}` lists its trials; `dstune train {path}` continues it"
        raise UserError(Problem("RUN", "this is a sweep, not a run", fix, str(path)))
    if _holds_runs(path):
        fix = f"`dstune runs {path}` lists them; or give {_similar(path)}"
        raise UserError(Problem("RUN", "this folder holds runs, and is none itself", fix, str(path)))
    reason = "this folder holds no run (no run.yaml)" if path.is_dir() else "there is no such run directory"
    raise UserError(Problem("RUN", reason, f"give {_similar(path)}", str(path)))


def refuse_missing(path: Path) -> None:
    """Refuse what is not there beside runs (`runs/nope` is a typing error, and no model of the hub), and a folder of runs.

    Raises:
        UserError: runs are in the folder that `path` would be in; runs are in `path`, which is no model.
    """
    beside = path.parent
    missing = beside != Path() and not path.exists() and _holds_runs(beside)
    is_model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if missing or (not is_model and _holds_runs(path)):
        run_directory(path)


def _holds_runs(folder: Path) -> bool:
    return any(any(folder.glob(f"{depth}/{RUN_FILE}")) for depth in ("*", "*/*"))


def _continued(composed: Composed, path: Path, given: Sequence[str], may_refuse: bool) -> Composed:
    """Return the configuration with which the run at `path` goes on.

    A run that has saved nothing starts at step 0 again, so whatever was wrong with its configuration may be mended.
    """
    resume = composed.config.run.resume
    stored = _stored(path, composed, given)
    if resume == "never" and may_refuse and (path / "metrics.jsonl").exists():
        fix = "run.resume=auto continues it; another run.dir begins anew"
        raise UserError(Problem("run.resume", f"{path} holds a run already", fix, "never"))
    begun_there = stored.config.run.resume == resume or Path(resume).absolute() == path.absolute()
    if resume not in KEYWORDS and not begun_there:
        reason = f"{path} holds a run that did not begin from there"
        fix = "give another run.dir, or run.resume=auto to continue it"
        raise UserError(Problem("run.resume", reason, fix, resume))
    composed = composed if store.resumable(path) is None else _going_on(stored, composed)
    if resume not in KEYWORDS:
        return composed
    # A run that began from another one and has saved nothing yet begins from there again.
    run_section = replace(composed.config.run, resume=stored.config.run.resume)
    return replace(composed, config=replace(composed.config, run=run_section))


def _stored(path: Path, composed: Composed, given: Sequence[str]) -> Composed:
    """Return what the run at `path` began with. Raises UserError where a saved run would go on with other plugins."""
    file = path / RUN_FILE
    if store.resumable(path) is not None and not composed.config.run.accept_plugin_changes:
        plugins.refuse_changes(plugins_of(file), composed.plugins)
    return read_run_beside(file, composed.config, given)


def _going_on(stored: Composed, composed: Composed) -> Composed:
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


def _fresh(parent: Path, now: datetime) -> Path:
    """Return an unused directory path, named after the time to the second."""
    path = parent / now.strftime("%Y-%m-%d_%H-%M-%S")
    candidates: Sequence[Path] = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _similar(path: Path) -> str:
    """Return what the user may have meant: the newest run below or beside `path`."""
    places = [path, path.parent] if path.is_dir() or path.parent.is_dir() else [Path("runs")]
    runs = [file.parent for place in places for depth in ("*", "*/*") for file in place.glob(f"{depth}/{RUN_FILE}")]
    if not runs:
        return "the directory of a run, for example runs/NAME/DATE_TIME"
    return f"the directory of a run, for example {max(runs, key=lambda run: (run / RUN_FILE).stat().st_mtime)}"
