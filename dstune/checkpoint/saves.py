"""Saves checkpoints of all ranks: files are written into a temporary folder, synced, read back and committed; at once or in the
background."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.checkpoint import store
from dstune.config.schema import RunConfig, SaveMode
from dstune.core.distributed import World
from dstune.core.errors import TrainingFailed
from dstune.core.files import INCOMPLETE
from dstune.core.lease import is_superseded, refuse_if_superseded
from dstune.trainer.state import FORMAT, TrainState
from dstune.zero.engine import Engine

if TYPE_CHECKING:
    from dstune.zero.shard_files import Save

POLL_SECONDS = 0.05
"""How often rank 0 looks for the other ranks' reports of a save in the background."""


@dataclass
class PendingSave:
    """A save whose files are being written."""

    thread: threading.Thread
    reported: threading.Event = field(default_factory=threading.Event)
    """Set when this rank has written its report, or `unreported`."""
    unreported: str = ""
    """Why this rank could not write its report; empty if it could."""
    parts: list[str] | None = None
    """Rank 0: `unreported` of all ranks, once gathered."""
    refusal: str = ""
    """Rank 0: why the save gave no checkpoint."""


class CheckpointAccess:
    """The state that reading and writing the checkpoints of a run share; every rank has one."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        engine: Engine,
        world: World,
        facts: dict[str, Any],
        message: Callable[[str], None],
    ):
        self._config, self._run_dir, self._engine, self._world = config, run_dir, engine, world
        self._facts, self._message = facts, message


class Saves(CheckpointAccess):
    """Writes the checkpoints of one run. Every rank has one and calls its methods together with the others.

    In the background (`checkpoint.mode=async`) each rank copies its shards to host memory and continues; a thread writes them,
    then a report file. The thread of rank 0 waits for all reports and commits. The threads use no collectives, which could mix
    with those of the loop. If a rank dies, the folder gets no marker and is no checkpoint.

    facts: written into each checkpoint. message: shows a line to the user.
    """

    _pending: PendingSave | None = None
    refusal = ""
    """Why the last save failed, on every rank; empty if it was written."""
    _reported: tuple[int, str] | None = None
    """Rank 0: the step and the refusal that the user was last told."""

    def save(self, state: TrainState, *, now: bool = False, whole: bool = False) -> bool:
        """Save all ranks, after the previous save has finished. now: write it before this returns, regardless of `checkpoint.mode`.
        whole: save everything needed to continue, regardless of `checkpoint.weights_only`.

        Returns whether it was written, or is being written in the background. If the disk refuses, earlier checkpoints stay, the
        reason is shown to the user and is in `refusal`.
        """
        began = time.monotonic()
        self.wait_for_pending_save()
        weights_only = self._config.checkpoint.weights_only and not whole
        folder = self._prepare(state.step, weights_only)
        if folder is None:
            return False
        background = self._config.checkpoint.mode is SaveMode["async"] and not now
        write = self._engine.save_weights if weights_only else self._engine.save
        save = write(folder.parent, folder.name, background=background)
        described = self._described(state, weights_only)
        if background:
            arguments = (save, folder, described, state, began)
            self._pending = PendingSave(threading.Thread(target=self._work_off, args=arguments, name="checkpoint"))
            self._pending.thread.daemon = True
            self._pending.thread.start()
            return True
        parts = self._world.gather((save.entries, save.error))
        refusal = _refusals([error for _, error in parts])
        if self._world.is_main and not refusal:
            refusal = self._commit(folder, described, _joined([entries for entries, _ in parts]))
        self._record_outcome(state.step, folder, self._world.broadcast(refusal))
        state.save_seconds = time.monotonic() - began
        return not self.refusal

    def wait_for_pending_save(self) -> bool:
        """Wait for the save in the background. Returns False if it failed."""
        if self._pending is None:
            return True
        self._pending.reported.wait()
        self._pending.parts = self._world.gather(self._pending.unreported)
        self._pending.thread.join()
        self.refusal = self._world.broadcast(self._pending.refusal)
        self._pending = None
        return not self.refusal

    def _prepare(self, step: int, weights_only: bool) -> Path | None:
        """Create the empty folder for a checkpoint and return it; None if the disk has no room for the checkpoint."""
        folder = store.folder(self._run_dir) / (store.tag(step) + INCOMPLETE)
        refusal = ""
        if self._world.is_main:
            refuse_if_superseded()
            try:
                # Files left by an interrupted save of another layout would be taken for a part of this one.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                size, free = self._engine.checkpoint_bytes(weights_only=weights_only), shutil.disk_usage(folder).free
                if free < size:
                    refusal = f"it takes about {megabytes(size)}, and {megabytes(free)} are free"
            except OSError as error:
                refusal = str(error)
        self._record_outcome(step, folder, self._world.broadcast(refusal))
        return None if self.refusal else folder

    def _record_outcome(self, step: int, folder: Path, refusal: str) -> None:
        """Set `refusal` on every rank, and report a failed save on rank 0."""
        self.refusal = refusal
        if refusal and self._world.is_main:
            self._report_unsaved(step, folder)

    def _report_unsaved(self, step: int, folder: Path) -> None:
        if not is_superseded():  # otherwise another group of ranks may be writing a folder of this name
            shutil.rmtree(folder, ignore_errors=True)
        if (step, self.refusal) == self._reported:  # the end of a run tries the save of its last step again
            return
        self._reported = (step, self.refusal)
        whole = store.newest(self._run_dir)
        remainder = f"{whole.name} is whole" if whole else "there is no earlier checkpoint"
        self._message(f"step {step} is not saved: {self.refusal}; {remainder}")

    def _described(self, state: TrainState, weights_only: bool) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": state.step,
            "weights_only": weights_only,
            **self._facts,
            "best": state.best and vars(state.best).copy(),
            "metrics": state.eval_last,
            "train": state.to_dict(),
        }

    def _commit(self, folder: Path, described: dict[str, Any], entries: dict[str, Any]) -> str:
        """Commit a save, on rank 0. Returns why it could not be committed; empty if it was."""
        try:
            refuse_if_superseded()
            store.commit(folder, described, entries)
        except (OSError, TrainingFailed) as error:
            return str(error)
        try:
            store.prune(self._run_dir, self._config.checkpoint.keep)
        except OSError as error:  # this checkpoint is whole all the same
            self._message(f"older checkpoints could not be removed: {error}")
        return ""

    def _work_off(self, save: Save, folder: Path, described: dict[str, Any], state: TrainState, began: float) -> None:
        """Finish a save in the background, in a thread."""
        assert self._pending is not None
        try:
            save.work_off()
        except BaseException as error:  # nothing else waits for it, and rank 0 waits for an answer
            save.error = f"{type(error).__name__}: {error}"
        report = _report_file(folder, self._world.rank)
        temporary = report.with_suffix(INCOMPLETE)
        try:
            temporary.write_text(json.dumps({"entries": save.entries, "error": save.error}))
            temporary.rename(report)
        except OSError as error:  # gathered in `wait_for_pending_save`
            self._pending.unreported = save.error or str(error)
        self._pending.reported.set()
        if not self._world.is_main:
            return
        try:
            parts = [self._wait_for_report(folder, rank) for rank in range(self._world.size)]
            refusal = _refusals([part["error"] for part in parts])
            if not refusal:
                for rank in range(self._world.size):
                    _report_file(folder, rank).unlink()
                refusal = self._commit(folder, described, _joined([part["entries"] for part in parts]))
        except BaseException as error:  # a thread that ends without a word would count as a save
            refusal = f"{type(error).__name__}: {error}"
        if refusal:
            self.refusal = refusal
            self._report_unsaved(described["step"], folder)
        self._pending.refusal = refusal
        state.save_seconds = time.monotonic() - began

    def _wait_for_report(self, folder: Path, rank: int) -> dict[str, Any]:
        """Wait for the report of `rank` and return it. A dead rank never reports, but then the launcher ends this process too."""
        report = _report_file(folder, rank)
        while True:
            if report.exists():
                part: dict[str, Any] = json.loads(report.read_text())
                return part
            if self._pending is not None and self._pending.parts and self._pending.parts[rank]:
                return {"entries": {}, "error": self._pending.parts[rank]}
            time.sleep(POLL_SECONDS)


def _report_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.written"


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: entry for part in parts for name, entry in part.items()}


def _refusals(errors: list[str]) -> str:
    return "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)


def megabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
