"""Faults that strike a run on two ranks, and what is expected of each: for the tests and for benchmarks/reliability.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from dstune.checkpoint import store
from support.command import ranks_of, wait_until
from support.struck import AT, Fault, Strike

# -- from outside -------------------------------------------------------------------------------------------------------


def rank(run_dir: Path, number: int) -> psutil.Process:
    return next(process for process in ranks_of(run_dir) if process.environ()["RANK"] == str(number))


def to_rank(number: int, sent_signal: signal.Signals) -> Strike:
    return lambda command, run_dir: rank(run_dir, number).send_signal(sent_signal)


def to_command(*signals: signal.Signals, pause: float = 0.5) -> Strike:
    def strike(command: subprocess.Popen, run_dir: Path) -> None:
        for index, number in enumerate(signals):
            if index:
                time.sleep(pause)
            command.send_signal(number)

    return strike


def ctrl_c_twice(command: subprocess.Popen, run_dir: Path) -> None:
    """Press Ctrl-C twice, the second time while the first is obeyed: so small a run saves in 0.3 s, so a rank is held back."""
    to_rank(1, signal.SIGSTOP)(command, run_dir)
    to_command(signal.SIGINT, signal.SIGINT)(command, run_dir)


def touch(name: str) -> Strike:
    return lambda command, run_dir: (run_dir / name).touch()


def during_save(command: subprocess.Popen, run_dir: Path) -> None:
    """Kill everything at the moment when a save is being written."""
    wait_until(lambda: list(store.folder(run_dir).glob(f"*{store.INCOMPLETE}")) or command.poll() is not None)
    for process in [*ranks_of(run_dir), command]:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)


def fill_for_a_while(command: subprocess.Popen, run_dir: Path) -> None:
    filler = run_dir.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(2**12))
    log = run_dir.parent.parent / "command.log"  # the run's own logs lie on the full disk
    wait_until(lambda: "is not saved" in log.read_text() or command.poll() is not None)
    filler.unlink()


def read_only(command: subprocess.Popen, run_dir: Path) -> None:
    """Hide the run directory by a second, read-only mount: a file system with files open for writing cannot become read-only
    itself."""
    subprocess.run(["mount", "--bind", str(run_dir), str(run_dir)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(run_dir)], check=True)


def writable_again(run_dir: Path) -> None:
    subprocess.run(["umount", "-l", str(run_dir)], check=True)


# -- damage to a checkpoint ---------------------------------------------------------------------------------------------


def _shard(newest: Path) -> Path:
    return max(newest.glob("*optim_states.pt"))


def flip_a_bit(newest: Path) -> None:
    data = bytearray(_shard(newest).read_bytes())
    data[len(data) // 2] ^= 1
    _shard(newest).write_bytes(data)


def truncate(newest: Path) -> None:
    os.truncate(_shard(newest), _shard(newest).stat().st_size // 2)


def delete_a_shard(newest: Path) -> None:
    _shard(newest).unlink()


def delete_the_marker(newest: Path) -> None:
    (newest / store.COMMITTED).unlink()


def half_a_state(newest: Path) -> None:
    state = newest / store.STATE
    state.write_text(state.read_text()[:40])


def damaged(name: str, description: str, damage: Callable[[Path], None]) -> Fault:
    says = "skipping damaged checkpoint" if damage is flip_a_bit else "skipping incomplete checkpoint"
    keep = ["checkpoint.keep=3"]
    terminate = to_command(signal.SIGTERM)
    return Fault(name, description, terminate, exit_code=75, says=says, damage=damage, overrides=keep)


def continued_in_another_layout(name: str, *overrides: str, stage: int = 2) -> Fault:
    """Make the fault of a run at ZeRO stage `stage` whose rank 1 is killed, and which is continued with `overrides`."""
    description = f"SIGKILL to rank 1 at stage {stage}, then {' '.join(overrides)}"
    layout = [f"zero.stage={stage}"]
    return Fault(name, description, to_rank(1, signal.SIGKILL), overrides=layout, again=list(overrides), close=True)


def micro_batches(step: int) -> int:
    """Count the calls of `Engine.accumulate` on a rank before that of `step`: 8 rows in micro-batches of 2 on 2 ranks."""
    return 2 * (step - 1) + 1


FAULTS = [
    Fault("kill rank 0", "SIGKILL to rank 0", to_rank(0, signal.SIGKILL), says="rank 0 was killed by SIGKILL"),
    Fault("kill rank 1", "SIGKILL to rank 1", to_rank(1, signal.SIGKILL), says="rank 1 was killed by SIGKILL"),
    Fault("kill the command", "SIGKILL to the launching process", to_command(signal.SIGKILL), exit_code=-9),
    Fault("kill in a save", "SIGKILL to all while a checkpoint is written", during_save, exit_code=-9),
    Fault(
        "kill in the background",
        "the same with checkpoint.mode=async",
        during_save,
        exit_code=-9,
        overrides=["checkpoint.mode=async"],
    ),
    Fault("segfault", "SIGSEGV in rank 1", to_rank(1, signal.SIGSEGV), says="rank 1 was killed by SIGSEGV"),
    Fault("abort", "SIGABRT in rank 0 (a native assertion)", to_rank(0, signal.SIGABRT), says="rank 0 .*SIGABRT"),
    Fault("bus error", "SIGBUS in rank 1 (full shared memory)", to_rank(1, signal.SIGBUS), says="rank 1 .*SIGBUS"),
    Fault(
        "stopped",
        "rank 1 stops (SIGSTOP); trainer.stall_seconds=3",
        to_rank(1, signal.SIGSTOP),
        overrides=["trainer.stall_seconds=3"],
        says="rank 1 .*stopped",
    ),
    Fault(
        "hang",
        "rank 1 waits for ever in the forward pass; trainer.stall_seconds=3",
        inject={"at": "dstune.zero.engine:Engine.accumulate", "rank": 1, "call": micro_batches(AT + 1), "do": "hang"},
        overrides=["trainer.stall_seconds=3"],
        says="rank 1 .*made no progress",
    ),
    Fault(
        "hang in a save",
        "rank 1 waits for ever before it writes its shard; trainer.stall_seconds=2",
        inject={"at": "dstune.zero.engine:Engine.save", "rank": 1, "call": 3, "do": "hang"},
        overrides=["trainer.stall_seconds=2"],
        says="rank 1 .*made no progress for 20 s",
        waits=20.0,
    ),
    Fault(
        "hang in the last save",
        "rank 1 waits for ever in the save after the last step, the only one; trainer.stall_seconds=2",
        inject={"at": "dstune.zero.engine:Engine.save", "rank": 1, "call": 1, "do": "hang"},
        overrides=["trainer.stall_seconds=2", "checkpoint.every=0"],
        says="rank 1 .*made no progress for 20 s",
        waits=20.0,
    ),
    Fault(
        "exception in the forward pass",
        "RuntimeError in rank 1",
        inject={
            "at": "dstune.zero.engine:Engine.accumulate",
            "rank": 1,
            "call": micro_batches(AT + 1),
            "do": "raise",
            "value": "a layer broke",
        },
        says=("rank 1 ended", "a layer broke"),
    ),
    Fault(
        "out of memory",
        "an allocation fails in rank 1",
        inject={"at": "dstune.zero.engine:Engine.accumulate", "rank": 1, "call": micro_batches(AT + 1), "do": "oom"},
        says="in training on rank 1 .*allocate memory",
    ),
    Fault(
        "exception in the data",
        "RuntimeError while rank 1 collates",
        inject={"at": "dstune.data.collate:collate", "rank": 1, "call": 60, "do": "raise", "value": "a row broke"},
        says=("rank 1 ended", "a row broke"),
    ),
    Fault(
        "exception in an evaluation",
        "RuntimeError in the third evaluation of rank 0",
        inject={
            "at": "dstune.trainer.evaluate:Evaluator.__call__",
            "rank": 0,
            "call": 3,
            "do": "raise",
            "value": "a metric broke",
        },
        says=("rank 0 ended", "a metric broke"),
    ),
    Fault(
        "exception in a save",
        "RuntimeError in rank 0 while it commits the third save",
        inject={
            "at": "dstune.checkpoint.store:commit",
            "rank": 0,
            "call": 3,
            "do": "raise",
            "value": "the store broke",
        },
        says=("rank 0 ended", "the store broke"),
    ),
    Fault(
        "disk error in a save",
        "EIO while rank 1 writes its second shard: that save is left out",
        inject={"at": "dstune.zero.shard_files:write_file", "rank": 1, "call": 2, "do": "oserror", "value": "EIO"},
        exit_code=0,
        says="step 10 is not saved: rank 1",
    ),
    Fault(
        "disk full", "no room for a save; later there is", fill_for_a_while, exit_code=0, says="is not saved", disk=True
    ),
    Fault(
        "run directory read-only",
        "it becomes so, and writable again before the run is continued",
        read_only,
        says=("rank . ended", "Read-only file system"),
        disk=True,
        repair=writable_again,
    ),
    Fault(
        "cache unreadable",
        "EIO when rank 1 opens the prepared rows; then it works",
        inject={"at": "dstune.data.build:_load", "rank": 1, "call": 1, "do": "oserror", "value": "EIO"},
        says=("rank 1 ended", "Input/output error"),
    ),
    Fault(
        "clock jump",
        "the clock of both ranks jumps ten days ahead, with run.time_limit=60",
        inject={
            "at": "dstune.zero.engine:Engine.accumulate",
            "call": micro_batches(AT + 1),
            "do": "clock",
            "value": 864000.0,
        },
        overrides=["run.time_limit=60"],
        exit_code=0,
    ),
    Fault(
        "slow rank",
        "the matrix products of rank 1 take 2 ms more from the start",
        inject={"at": "torch.nn.functional:linear", "rank": 1, "do": "slow", "value": 0.002, "always": True},
        exit_code=0,
        says="rank 1 is slow",
    ),
    Fault(
        "tracker raises",
        "W&B fails in the tenth row",
        inject={
            "at": "dstune.tracking.trackers.wandb:Wandb.write",
            "rank": 0,
            "call": 10,
            "do": "raise",
            "value": "no network",
        },
        overrides=["tracking.wandb.mode=offline"],
        exit_code=0,
        says="wandb|W&B",
    ),
    Fault("terminate", "SIGTERM to the command", to_command(signal.SIGTERM), exit_code=75, says="received SIGTERM"),
    Fault("interrupt", "Ctrl-C", to_command(signal.SIGINT), exit_code=75, says="received SIGINT"),
    Fault("user signal", "SIGUSR1 to the command", to_command(signal.SIGUSR1), exit_code=75, says="received SIGUSR1"),
    Fault(
        "chosen signal",
        "SIGUSR2 with run.signals=[SIGUSR2]",
        to_command(signal.SIGUSR2),
        overrides=["run.signals=[SIGUSR2]"],
        exit_code=75,
        says="received SIGUSR2",
    ),
    Fault("hang-up", "the terminal closes (SIGHUP)", to_command(signal.SIGHUP), exit_code=75, says="received SIGHUP"),
    Fault(
        "one rank asked", "SIGUSR1 to rank 1 only", to_rank(1, signal.SIGUSR1), exit_code=75, says="received SIGUSR1"
    ),
    Fault(
        "two signals", "Ctrl-C twice, rank 1 being slow to save: at once, unsaved", ctrl_c_twice, says="second signal"
    ),
    Fault("file STOP", "a file named STOP", touch("STOP"), exit_code=75, says="STOP"),
    Fault(
        "time limit",
        "run.time_limit is over",
        overrides=["run.time_limit=0.02"],
        exit_code=75,
        says="run.time_limit",
        again=["run.time_limit=null"],
    ),
    Fault(
        "restart",
        "SIGKILL to rank 1 with launch.restarts=1: the command goes on by itself",
        to_rank(1, signal.SIGKILL),
        overrides=["launch.restarts=1"],
        exit_code=0,
        says="starting again from step-",
    ),
    damaged("bit flipped", "one bit of the newest checkpoint", flip_a_bit),
    damaged("truncated", "half of a shard is gone", truncate),
    damaged("shard deleted", "a shard is gone", delete_a_shard),
    damaged("marker deleted", "COMMITTED is gone", delete_the_marker),
    damaged("state cut", "state.json ends early", half_a_state),
    continued_in_another_layout("fewer ranks", "launch.processes=1"),
    continued_in_another_layout("more ranks", "launch.processes=3"),
    continued_in_another_layout("stage 2 to 3", "zero.stage=3"),
    continued_in_another_layout("stage 3 to 2 with offload", "zero.stage=2", "zero.offload_optimizer=cpu", stage=3),
    continued_in_another_layout("stage 2 to 1 on 3 ranks", "zero.stage=1", "launch.processes=3"),
]
