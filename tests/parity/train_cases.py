"""Program of the parity tests, on every rank: trains a list of cases one after another in one process group."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from support.ranks import end_with, start_rank

from dstune.config.run_file import read_run, write_run
from dstune.core.errors import Preempted, UserError
from dstune.rank import worker
from dstune.trainer import generation, loop, micro_batch

TRAIN_STEP = loop.train_step
GAIN = micro_batch.GAIN


def leaping(number: int, factor: float):
    """A step that finds the losses of one global batch of the data `factor` times as large."""

    def train_step(run, step):
        if run.state.next_batch != number:
            return TRAIN_STEP(run, step)
        head = run.head

        def larger(forward, batch):
            output = head(forward, batch)
            return replace(output, loss_sum=output.loss_sum * factor)

        run.head = larger
        try:
            return TRAIN_STEP(run, step)
        finally:
            run.head = head

    return train_step


def main() -> None:
    world = start_rank()
    for case in json.loads(sys.argv[1]):
        run_dir = Path(case["run_dir"])
        composed = read_run(Path(case["run_yaml"]))
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_run(run_dir / "run.yaml", composed)
        world.barrier()
        loop.train_step = leaping(*case["leap"]) if "leap" in case else TRAIN_STEP
        micro_batch.GAIN = case.get("gain", GAIN)
        room = generation.room_for_weights
        if (share := case.get("room")) is not None:  # as if ranks had room for so much of the whole model
            generation.room_for_weights = lambda engine, world, share=share: int(
                share * generation.weights_bytes(engine)
            )
        try:
            with contextlib.suppress(Preempted):
                worker.train(composed.config, run_dir, world)
        except UserError as error:
            if not case.get("refused"):
                raise
            (run_dir / "refused.txt").write_text(str(error))
        generation.room_for_weights = room


if __name__ == "__main__":
    end_with(main)
