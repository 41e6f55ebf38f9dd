"""The checkpoints of the run that is going on: which one it starts from, and the saves of all ranks together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstune.checkpoint import store
from dstune.checkpoint.shards import Shards
from dstune.config.schema import RunConfig
from dstune.dist import World
from dstune.errors import Problem, TrainingFailed, UserError
from dstune.train.state import TrainState
from dstune.zero.engine import Engine

UNCHANGED = {
    "precision": ("trainer.precision", "set trainer.precision to it, or start another run with run.dir"),
    "labels": ("data.train", "bring back the rows with these labels, or set task.labels"),
    "samples": ("data.train", "bring back the rows, or start another run with run.dir"),
}
"""What a checkpoint shares with the run that continues it: the key to change where it differs, and how."""

SAVES_OF_FREE_SPACE = 2
"""A save is written beside the checkpoint that it will replace."""


class Checkpoints:
    """Reads and writes the checkpoints of one run. Every rank has one and calls its methods together with the others.

    facts: what is written into each checkpoint and, where UNCHANGED has it, must be equal in what is continued.
    say: shows a line to the user.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        engine: Engine,
        world: World,
        facts: dict[str, Any],
        say: Callable[[str], None],
    ):
        self._config, self._run_dir, self._engine, self._world = config, run_dir, engine, world
        self._facts, self._say = facts, say

    def resume(self) -> TrainState:
        """Load the newest whole checkpoint of the run, or of the run that `run.resume` names; else start at step 0.

        A checkpoint with a file that differs from its checksum is named and passed over.

        Raises UserError where what must not change between launches has changed, or no checkpoint is undamaged.
        """
        source = self._run_dir
        if self._world.is_main:
            store.mend(source)
        if self._world.broadcast(store.newest(source)) is None and self._config.run.resume not in ("auto", "never"):
            source = Path(self._config.run.resume)
        checkpoint = self._newest_undamaged(source)
        if checkpoint is None:
            return TrainState()
        saved = store.read_state(checkpoint)
        self._refuse_changes(checkpoint.name, saved)
        if (saved["world_size"], saved["zero_stage"]) == (self._world.size, self._engine.stage):
            self._engine.load(checkpoint.parent, checkpoint.name)
        else:
            self._engine.restore(Shards(checkpoint))
        return TrainState.from_dict(saved["train"])

    def _newest_undamaged(self, run_dir: Path) -> Path | None:
        """Each rank reads its share of the files; all come to the same answer."""
        candidates = self._world.broadcast([info.path for info in store.listing(run_dir) if info.committed])
        found: list[str] = []
        for checkpoint in reversed(candidates):
            mine = store.damaged_files(checkpoint, share=(self._world.rank, self._world.size))
            damaged = sorted(name for names in self._world.gather(mine) for name in names)
            if not damaged:
                return checkpoint
            found.append(f"{checkpoint.name} ({', '.join(damaged)})")
            self._say(f"{checkpoint.name} is damaged and not used: {', '.join(damaged)} differ from what was written")
            if self._world.is_main and run_dir == self._run_dir:
                store.set_aside(checkpoint)
            self._world.barrier()
        if found:
            reason = f"every checkpoint is damaged: {'; '.join(found)}"
            raise UserError(Problem("run.dir", reason, "start another run with run.dir", str(run_dir)))
        return None

    def _refuse_changes(self, name: str, saved: dict[str, Any]) -> None:
        problems = [
            Problem(
                UNCHANGED[fact][0],
                value=str(now) if fact != "samples" else str(self._config.data.train),
                reason=f"{name} was written with {fact} {saved.get(fact)}",
                fix=UNCHANGED[fact][1],
            )
            for fact, now in self._facts.items()
            if fact in UNCHANGED and saved.get(fact, now) != now
        ]
        if problems:
            raise UserError(problems)

    def check_space(self) -> None:
        """Say how much the checkpoints will take. Raises UserError where there is no room for two of them, unless
        `run.force` says to start all the same."""
        size = self._engine.checkpoint_bytes()
        free = self._world.broadcast(shutil.disk_usage(self._run_dir).free)
        keep = self._config.checkpoint.keep
        if free < SAVES_OF_FREE_SPACE * size:
            reason = f"a checkpoint takes about {_gb(size)}, and {_gb(free)} are free: there must be room for two"
            if not self._config.run.force:
                fix = "free some space, give a run.dir on a larger disk, or start all the same with run.force=true"
                raise UserError(Problem("run.dir", reason, fix, str(self._run_dir)))
            self._say(f"{reason}; started all the same (run.force)")
            return
        self._say(f"a checkpoint takes about {_gb(size)}; {keep} and the best are kept, {_gb(free)} are free")

    def save(self, state: TrainState) -> bool:
        """Write a checkpoint of all ranks; it exists once its marker is written and its folder renamed.

        Returns whether it was written: where the disk has no room for it, nothing is touched and the reason is told.
        Raises TrainingFailed where writing fails: the others would wait for this rank for ever if it went on.
        """
        began = time.monotonic()
        target = store.folder(self._run_dir)
        target.mkdir(parents=True, exist_ok=True)
        size, free = self._engine.checkpoint_bytes(), self._world.broadcast(shutil.disk_usage(target).free)
        if free < size:
            self._say(f"step {state.step} is not saved: it takes about {_gb(size)}, and {_gb(free)} are free")
            return False
        name = store.tag(state.step) + store.INCOMPLETE
        if (
            self._world.is_main
        ):  # what a torn save of other ranks or another stage left would be taken for a part of this one
            shutil.rmtree(target / name, ignore_errors=True)
        self._world.barrier()
        try:
            self._engine.save(target, name)
            self._world.barrier()
            if self._world.is_main:
                described = {
                    "step": state.step,
                    **self._facts,
                    "best": state.best and vars(state.best),
                    "metrics": state.eval_last,
                    "train": state.to_dict(),
                }
                store.commit(target / name, described)
        except (OSError, RuntimeError) as error:  # torch's writer of archives raises RuntimeError when the disk is full
            whole = store.newest(self._run_dir)
            left = f"{whole.name} is whole" if whole else "there is no earlier checkpoint"
            raise TrainingFailed(f"step {state.step} could not be saved ({error}); {left}") from error
        if self._world.is_main:
            store.prune(self._run_dir, self._config.checkpoint.keep)
        self._world.barrier()
        state.save_seconds = time.monotonic() - began
        return True


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
