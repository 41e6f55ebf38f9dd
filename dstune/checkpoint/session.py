"""Loads the checkpoint that a run continues from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dstune.checkpoint import store
from dstune.checkpoint.saves import CheckpointAccess, megabytes
from dstune.checkpoint.shards import Shards, in_pieces
from dstune.config.schema import SaveMode
from dstune.core.errors import Problem, UserError
from dstune.core.files import INCOMPLETE
from dstune.data.recorded_files import changed_files
from dstune.protocols import optimizer_of
from dstune.trainer.state import TrainState

OTHER_ROWS = (
    "bring back the rows, or start another run with run.dir; if the rows are the same, an earlier version trained other tokens "
    "of them than a server asks for (docs/chat-templates.md), and that version can continue the run"
)

UNCHANGED = {
    "precision": ("trainer.precision", "set trainer.precision to it, or start another run with run.dir"),
    "labels": ("data.train", "bring back the rows with these labels, or set task.labels"),
    "samples": ("data.train", OTHER_ROWS),
    "content": ("data.train", OTHER_ROWS),
}
"""Facts that must be equal in a checkpoint and the run that continues it: the key to change if they differ, and the fix."""

ROWS = {"samples", "content"}
"""Facts of `UNCHANGED` that are digests of the training rows."""

LAYOUT = ("world_size", "zero_stage", "weight_parts", "shard_settings")
"""Facts that DeepSpeed's shards depend on."""
OF_EARLIER_VERSIONS: dict[str, Any] = {"weight_parts": 1, "shard_settings": {}}
"""Facts that checkpoints of earlier versions do not state."""

SAVES_OF_FREE_SPACE = 2
"""A save is written beside the checkpoint that it will replace."""


class Checkpoints(CheckpointAccess):
    """Reads the checkpoints of one run. Every rank has one and calls its methods together with the others.

    facts: written into each checkpoint; those in `UNCHANGED` must be equal in the checkpoint that is continued.
    message: shows a line to the user.
    """

    def resume(self) -> TrainState:
        """Load the newest complete checkpoint of the run, or of the run that `run.resume` names; without one, start at step 0.

        A checkpoint with a file that differs from its checksum is reported and skipped.

        Raises UserError if a fact of `UNCHANGED` has changed, or all checkpoints are damaged.
        """
        source = self._source()
        checkpoint = self._newest_undamaged(source)
        if self._world.is_main:
            self._report_incomplete(source, checkpoint)
        if checkpoint is None:
            return TrainState()
        saved = store.read_state(checkpoint)
        self._refuse_changes(source, checkpoint.name, saved)
        with store.hold(checkpoint):  # it may belong to another run that is still running and pruning
            if self._has_same_shards(checkpoint, saved):
                with self._refused_other_weights(checkpoint):
                    self._engine.load(checkpoint.parent, checkpoint.name)
            else:
                if why := optimizer_of(self._config.optimizer).why_no_other_layout:
                    raise UserError(
                        _other_layout(
                            checkpoint.name, why, OF_EARLIER_VERSIONS | saved, OF_EARLIER_VERSIONS | self._facts
                        )
                    )
                with self._refused_other_weights(checkpoint):
                    shards = Shards(checkpoint)
                    if in_pieces(checkpoint) and set(shards.shapes) - self._engine.trained_names:
                        raise KeyError("weights that the model does not train would be dropped")
                    self._engine.restore(shards)
        return TrainState.from_dict(saved["train"])

    def remembered(self, name: str) -> Any:
        """Return the entry `name` of `TrainState.results` in the checkpoint that will be continued; None without entry or
        checkpoint."""
        source = self._source()
        checkpoint = store.resumable(source) if self._world.is_main else None
        result = store.read_state(checkpoint)["train"]["results"].get(name) if checkpoint is not None else None
        return self._world.broadcast(result)

    def _source(self) -> Path:
        """Return the directory of the run whose newest checkpoint is continued. Every rank must call it."""
        if self._world.is_main:
            store.repair(self._run_dir)
        if self._world.broadcast(store.resumable(self._run_dir)) is None and self._config.run.resume not in (
            "auto",
            "never",
        ):
            return Path(self._config.run.resume)
        return self._run_dir

    def _report_incomplete(self, run_dir: Path, used: Path | None) -> None:
        """Report the checkpoints that are newer than the one in use and incomplete."""
        for path in sorted(store.folder(run_dir).glob("step-*")):
            if used is not None and path.name <= used.name:
                continue
            if path.name.endswith(INCOMPLETE):
                self._message(
                    f"{path.name.removesuffix(INCOMPLETE)} was being saved when the run ended, and is not used"
                )
            elif path.suffix == "" and not store.is_committed(path):
                self._message(
                    f"skipping incomplete checkpoint {path.name}: {', '.join(store.incomplete_reasons(path))}"
                )

    def rewind(self) -> TrainState | None:
        """Load the newest complete checkpoint that this run has written. Without one, return None and change nothing."""
        if self._world.broadcast(store.resumable(self._run_dir)) is None:
            return None
        return self.resume()

    def load_weights(self, checkpoint: Path) -> None:
        """Load the weights of one of this run's checkpoints to measure them. The run must not train on afterwards."""
        with store.hold(checkpoint):
            self._engine.restore(Shards(checkpoint))

    def _has_same_shards(self, checkpoint: Path, saved: dict[str, Any]) -> bool:
        """Return whether each rank can load the shards that the same rank number saved."""
        facts, saved_facts = OF_EARLIER_VERSIONS | self._facts, OF_EARLIER_VERSIONS | saved
        is_same_layout = all(saved_facts.get(fact) == facts.get(fact) for fact in LAYOUT)
        return is_same_layout and not self._engine.swaps and not in_pieces(checkpoint)

    def _newest_undamaged(self, run_dir: Path) -> Path | None:
        """Return the newest undamaged checkpoint, the same on all ranks. Each rank hashes a share of the files. Shards that it will
        load are read ahead in the same pass."""
        damage_by_name: dict[str, str] = {}
        absent: set[Path] = set()
        while (checkpoint := self._newest_but(run_dir, damage_by_name)) is not None:
            damaged = self._damaged_files(checkpoint)
            if damaged is None:
                if checkpoint in absent:
                    reason = f"{checkpoint} is there on the first rank, and not on all"
                    fix = "give a folder that all hosts share"
                    raise UserError(Problem("run.resume", reason, fix, str(run_dir)))
                absent.add(checkpoint)
                time.sleep(1)
                continue
            if not damaged:
                return checkpoint
            names = ", ".join(damaged)
            damage_by_name[checkpoint.name] = f"{checkpoint.name} ({names})"
            self._message(f"skipping damaged checkpoint {checkpoint.name}: {names} differ from what was written")
            if self._world.is_main and run_dir == self._run_dir:
                store.quarantine(checkpoint)
            self._world.barrier()
        if damage_by_name:
            reason = f"every checkpoint is damaged: {'; '.join(damage_by_name.values())}"
            raise UserError(Problem("run.dir", reason, "start another run with run.dir", str(run_dir)))
        return None

    def _newest_but(self, run_dir: Path, names: Collection[str]) -> Path | None:
        whole = (info.path for info in store.listing(run_dir) if info.committed and not info.weights_only)
        newest = max((path for path in whole if path.name not in names), default=None)
        return self._world.broadcast(newest)

    def _damaged_files(self, checkpoint: Path) -> list[str] | None:
        """Return the damaged files; None if the run that the checkpoint belongs to is running and has pruned it for a newer one."""
        hashes: dict[str, str] | None = None
        with suppress(FileNotFoundError), store.hold(checkpoint):
            is_same = self._has_same_shards(checkpoint, store.read_state(checkpoint))
            hashes = self._engine.read_ahead(checkpoint.parent, checkpoint.name) if is_same else {}
        names_read = self._world.gather(None if hashes is None else list(hashes))
        local_damage: list[str] | None = None
        if hashes is not None and None not in names_read:
            with suppress(FileNotFoundError):
                unread = {*store.committed_files(checkpoint)} - {name for names in names_read for name in names or ()}
                share = store.share_of_files(unread, self._world.rank, self._world.size)
                local_damage = store.damaged_files(checkpoint, {*hashes, *share}, hashes)
        parts = self._world.gather(local_damage)
        return None if None in parts else sorted({name for part in parts for name in part or ()})

    def _refuse_changes(self, source: Path, name: str, saved: dict[str, Any]) -> None:
        changed = {fact for fact, now in self._facts.items() if fact in UNCHANGED and saved.get(fact, now) != now}
        problems = [
            Problem(UNCHANGED[fact][0], f"{name} was written with {fact} {saved[fact]}", UNCHANGED[fact][1], str(now))
            for fact, now in self._facts.items()
            if fact in changed - ROWS
        ]
        if changed & ROWS:
            files = changed_files(source, self._config) or {"data.train": str(self._config.data.train)}
            reason = f"the file changed since {name} was written, which was trained on other rows of it"
            problems += [Problem(key, reason, OTHER_ROWS, file) for key, file in files.items()]
        if problems:
            raise UserError(problems)

    @contextmanager
    def _refused_other_weights(self, checkpoint: Path) -> Iterator[None]:
        """Within the block, raise UserError if loading fails because the model trains other weights than the checkpoint holds.

        An adapter that another version of dstune or peft puts on other layers is such a model.
        """
        try:
            yield
        except (RuntimeError, KeyError) as error:
            saved, trained = set(Shards(checkpoint).shapes), self._engine.trained_names
            if not (differing := sorted(saved ^ trained)):
                raise
            place = "the checkpoint" if differing[0] in saved else "the model"
            more = f", and {len(differing) - 1} others" if len(differing) > 1 else ""
            reason = (
                f"{checkpoint.name} has other trained weights than the model: {differing[0]} is only in {place}{more}"
            )
            fix = "continue with the versions that environment.json of the run names, or start another run with run.dir"
            raise UserError(Problem("run.dir", reason, fix, str(checkpoint.parent.parent))) from error

    def check_space(self) -> None:
        """Report how much disk space the checkpoints will take. Raises UserError if two of them do not fit, unless `run.force` is
        set."""
        size = self._engine.checkpoint_bytes()
        free = self._world.broadcast(shutil.disk_usage(self._run_dir).free)
        keep, kept_bytes = self._config.checkpoint.keep, size
        if self._config.checkpoint.weights_only:  # one with everything beside them, when preempted
            kept_bytes = self._engine.checkpoint_bytes(weights_only=True)
        if free < SAVES_OF_FREE_SPACE * size:
            reason = f"a checkpoint takes about {megabytes(size)}, and {megabytes(free)} are free: there must be room for two"
            if not self._config.run.force:
                fix = "free some space, give a run.dir on a larger disk, or start all the same with run.force=true"
                raise UserError(Problem("run.dir", reason, fix, str(self._run_dir)))
            self._message(f"{reason}; started all the same (run.force)")
            return
        copies = ""
        if self._config.checkpoint.mode is SaveMode["async"]:
            copies = " (each rank keeps a copy of its part in host memory)"
        self._message(
            f"a checkpoint takes about {megabytes(size)}{copies}; {keep} and the best are kept: "
            f"up to {megabytes((keep + 1) * kept_bytes + size)} while one is written, {megabytes(free)} are free"
        )


def _other_layout(checkpoint: str, why: str, before: dict[str, Any], now: dict[str, Any]) -> Problem:
    """Return the problem with continuing a checkpoint whose states depend on how the weights were partitioned."""

    def layout(facts: dict[str, Any]) -> str:
        parts = facts["weight_parts"]
        return f"{facts['world_size']} ranks at ZeRO stage {facts['zero_stage']}" + f", {parts} for a layer" * (
            parts > 1
        )

    reason = f"{checkpoint} was written on {layout(before)}, this run has {layout(now)}, and {why}"
    stage = before["zero_stage"]
    fix = f"as many ranks (launch.processes, launch.nodes) with zero=stage{stage}, or another run from the weights"
    return Problem("optimizer", reason, fix)
