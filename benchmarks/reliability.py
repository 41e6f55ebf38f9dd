"""What happens to a run under faults, and whether its curve goes on: writes docs/reliability.md.

    python benchmarks/reliability.py                      # every fault once, then 30 random kills: about 25 minutes on 2 cores
    python benchmarks/reliability.py --only kill disk     # faults whose name begins so; prints, writes nothing
    python benchmarks/reliability.py --kills 5 --only soak

Real runs through the command line on two ranks with a tiny model; one undisturbed run is the measure. "Lost" are steps that
were trained and had to be trained again. "Equal" compares every metric of every step and evaluation: to the bit at the
same layout, within 1e-5 after a move to another one.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.command import Commands, exact, metrics, ranks_of, result, wait_until  # noqa: E402
from support.tiny import save_decoder, write_dialogues  # noqa: E402

from dstune.checkpoint import store  # noqa: E402

STEPS, EVERY, AT = 40, 5, 13
"""Steps of a run, between two saves, and after which a fault strikes."""


@dataclass
class Outcome:
    name: str
    what: str
    exit_code: int | None = None
    exit_seconds: float | None = None
    lost: int | None = None
    resume_seconds: float | None = None
    equal: bool | None = None


class Scene:
    """A folder with a model, data and the undisturbed run."""

    def __init__(self, folder: Path):
        self.commands = Commands(folder)
        self.folder = folder
        save_decoder(folder / "model")
        write_dialogues(folder / "dialogues.jsonl", 400)
        done = self.commands.run("train", *self.overrides("undisturbed"))
        assert done.returncode == 0, done.stdout + done.stderr
        self.reference = exact(folder / "undisturbed")

    def overrides(self, name: str | Path, *further: str) -> list[str]:
        return [
            "model.path=model",
            "data.train=dialogues.jsonl",
            "data.max_length=64",
            "data.packing=false",
            "model.config_overrides={attention_dropout:0.1}",
            "optimizer.lr=1e-3",
            "zero=stage2",
            "trainer.micro_batch_size=2",
            "trainer.global_batch_size=8",
            f"trainer.max_steps={STEPS}",
            f"checkpoint.every={EVERY}",
            "evaluate.every=10",
            "launch.processes=2",
            f"run.dir={name}",
            *further,
        ]

    def start(self, run_dir: Path, *further: str, at: int = AT) -> subprocess.Popen:
        command = self.commands.start("train", *self.overrides(run_dir, *further))
        wait_until(lambda: last_step(run_dir) >= at or command.poll() is not None)
        return command

    def weights(self, name: str) -> bytes:
        return (self.folder / name / "export" / "model.safetensors").read_bytes()


def last_step(run_dir: Path) -> int:
    rows = metrics(run_dir)
    return int(rows[-1]["step"]) if rows else 0


def rank(run_dir: Path, number: int):
    return next(process for process in ranks_of(run_dir) if process.environ()["RANK"] == str(number))


def saved_step(run_dir: Path) -> int:
    newest = store.newest(run_dir)
    return int(newest.name.removeprefix("step-")) if newest else 0


# -- faults: each strikes a running command ------------------------------------------------------------------------------

Strike = Callable[[subprocess.Popen, Path], None]


def to_rank(number: int, what: signal.Signals) -> Strike:
    return lambda command, run_dir: rank(run_dir, number).send_signal(what)


def to_command(*what: signal.Signals, pause: float = 0.5) -> Strike:
    def strike(command: subprocess.Popen, run_dir: Path) -> None:
        for index, number in enumerate(what):
            if index:
                time.sleep(pause)
            command.send_signal(number)

    return strike


def touch(name: str) -> Strike:
    return lambda command, run_dir: (run_dir / name).touch()


def during_save(command: subprocess.Popen, run_dir: Path) -> None:
    """Kills everything at the moment when a save is being written."""
    wait_until(lambda: list(store.folder(run_dir).glob(f"*{store.INCOMPLETE}")) or command.poll() is not None)
    for process in [*ranks_of(run_dir), command]:
        process.send_signal(signal.SIGKILL)


RUNNING: dict[str, tuple[str, Strike, list[str]]] = {
    "kill rank 0": ("SIGKILL to rank 0", to_rank(0, signal.SIGKILL), []),
    "kill rank 1": ("SIGKILL to rank 1", to_rank(1, signal.SIGKILL), []),
    "kill the command": ("SIGKILL to the launching process", to_command(signal.SIGKILL), []),
    "kill in a save": ("SIGKILL to all while a checkpoint is written", during_save, []),
    "segfault": ("SIGSEGV in rank 1", to_rank(1, signal.SIGSEGV), []),
    "abort": ("SIGABRT in rank 0 (a native assertion)", to_rank(0, signal.SIGABRT), []),
    "bus error": ("SIGBUS in rank 1 (full shared memory)", to_rank(1, signal.SIGBUS), []),
    "hang": ("rank 1 stops (SIGSTOP); stall_seconds=3", to_rank(1, signal.SIGSTOP), ["trainer.stall_seconds=3"]),
    "terminate": ("SIGTERM to the command", to_command(signal.SIGTERM), []),
    "interrupt": ("Ctrl-C", to_command(signal.SIGINT), []),
    "user signal": ("SIGUSR1 to the command", to_command(signal.SIGUSR1), []),
    "hang-up": ("the terminal closes (SIGHUP)", to_command(signal.SIGHUP), []),
    "one rank asked": ("SIGUSR1 to rank 1 only", to_rank(1, signal.SIGUSR1), []),
    "two signals": ("Ctrl-C twice: at once, unsaved", to_command(signal.SIGINT, signal.SIGINT), []),
    "file STOP": ("a file named STOP", touch("STOP"), []),
    "time limit": ("run.time_limit is over", lambda command, run_dir: None, ["run.time_limit=0.25"]),
}


def strike_running(scene: Scene, name: str) -> Outcome:
    what, strike, further = RUNNING[name]
    run_dir = scene.folder / name.replace(" ", "-")
    command = scene.start(run_dir, *further)
    began = time.monotonic()
    strike(command, run_dir)
    code = command.wait(timeout=120)
    seconds = time.monotonic() - began
    wait_until(lambda: not ranks_of(run_dir))
    outcome = Outcome(name, what, code, None if name == "time limit" else seconds)
    return resumed(scene, run_dir, outcome, "run.time_limit=null")


def resumed(scene: Scene, run_dir: Path, outcome: Outcome, *further: str, close: bool = False) -> Outcome:
    """Continue the run and compare its curve."""
    before, saved = last_step(run_dir), saved_step(run_dir)
    outcome.lost = before - saved
    began = time.monotonic()
    command = scene.commands.start("train", str(run_dir), *further)
    wait_until(lambda: (last_step(run_dir) > saved and ranks_of(run_dir)) or command.poll() is not None)
    outcome.resume_seconds = time.monotonic() - began
    code = command.wait(timeout=240)
    assert code == 0, scene.commands.log
    rows = exact(run_dir)
    outcome.equal = near(rows, scene.reference) if close else rows == scene.reference
    return outcome


def near(rows: list[dict], reference: list[dict], bound: float = 1e-5) -> bool:
    """Every metric of every row within a relative `bound`."""

    def agrees(left, right) -> bool:
        return left == right or (isinstance(left, float) and abs(left - right) <= bound * abs(right))

    return len(rows) == len(reference) and all(
        row.keys() == other.keys() and all(agrees(row[key], other[key]) for key in row if key != "grad_norm")
        for row, other in zip(rows, reference, strict=True)
    )


# -- faults of checkpoints: they strike a run that has ended ----------------------------------------------------------------


def flip_a_bit(newest: Path) -> None:
    shard = max(newest.glob("*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def truncate(newest: Path) -> None:
    shard = max(newest.glob("*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)


def delete_a_shard(newest: Path) -> None:
    max(newest.glob("*optim_states.pt")).unlink()


def delete_the_marker(newest: Path) -> None:
    (newest / store.COMMITTED).unlink()


def half_a_state(newest: Path) -> None:
    state = newest / store.STATE
    state.write_text(state.read_text()[:40])


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "bit flipped": ("one bit of the newest checkpoint", flip_a_bit),
    "truncated": ("half of a shard is gone", truncate),
    "shard deleted": ("a shard is gone", delete_a_shard),
    "marker deleted": ("COMMITTED is gone", delete_the_marker),
    "state cut": ("state.json ends early", half_a_state),
}


def strike_checkpoint(scene: Scene, name: str) -> Outcome:
    what, damage = DAMAGE[name]
    run_dir = scene.folder / name.replace(" ", "-")
    command = scene.start(run_dir, "checkpoint.keep=3")
    command.send_signal(signal.SIGTERM)
    code = command.wait(timeout=60)
    newest = store.newest(run_dir)
    assert newest is not None
    damage(newest)
    return resumed(scene, run_dir, Outcome(name, what, code))


# -- the disk, moves, restarts ------------------------------------------------------------------------------------------------


def full_disk(scene: Scene) -> Outcome:
    """Fills the disk after the first save: later ones are left out, and the run ends well once there is room again."""
    disk = scene.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        run_dir = disk / "run"
        command = scene.commands.start("train", *scene.overrides(run_dir))
        wait_until(lambda: store.newest(run_dir) is not None)
        filler = disk / "filler"
        try:
            with filler.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(2**16))
        except OSError:
            pass
        wait_until(lambda: "is not saved" in scene.commands.log)
        filler.unlink()
        code = command.wait(timeout=240)
        equal = exact(run_dir) == scene.reference
        return Outcome("disk full", "no room for a save; later there is", code, None, 0, None, equal)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


MOVES = {
    "fewer ranks": ["launch.processes=1"],
    "more ranks": ["launch.processes=3"],
    "stage 2 to 3": ["zero.stage=3"],
    "stage 2 to 1, 3 ranks": ["zero.stage=1", "launch.processes=3"],
}


def move(scene: Scene, name: str) -> Outcome:
    run_dir = scene.folder / name.replace(" ", "-").replace(",", "")
    command = scene.start(run_dir)
    began = time.monotonic()
    rank(run_dir, 1).kill()
    code = command.wait(timeout=60)
    outcome = Outcome(name, f"SIGKILL to rank 1, then {' '.join(MOVES[name])}", code, time.monotonic() - began)
    return resumed(scene, run_dir, outcome, *MOVES[name], close=True)


def restart(scene: Scene) -> Outcome:
    run_dir = scene.folder / "restart"
    command = scene.start(run_dir, "launch.restarts=1")
    saved = saved_step(run_dir)
    lost = last_step(run_dir) - saved
    began = time.monotonic()
    rank(run_dir, 1).kill()
    time.sleep(2)
    wait_until(lambda: last_step(run_dir) > saved and len(ranks_of(run_dir)) == 2)
    seconds = time.monotonic() - began
    code = command.wait(timeout=240)
    equal = exact(run_dir) == scene.reference
    return Outcome("restart", "SIGKILL to rank 1 with launch.restarts=1", code, None, lost, seconds, equal)


def soak(scene: Scene, kills: int, seed: int = 0) -> str:
    """Random kills at random moments, start-up and saves included, until one launch is left alone."""
    choose = random.Random(seed)
    run_dir = scene.folder / "soak"
    struck, before = 0, 0
    while struck < kills:
        arguments = (
            [str(run_dir)] if (run_dir / "run.yaml").exists() else scene.overrides(run_dir, "checkpoint.every=1")
        )
        command = scene.commands.start("train", *arguments)
        # Most launches get far enough to train a step or two, some are killed while they start.
        patience = choose.uniform(1, 6)
        if choose.random() < 0.8:
            wait_until(lambda saved=before, command=command: last_step(run_dir) > saved or command.poll() is not None)
            patience = choose.uniform(0.0, 0.3)
        time.sleep(patience)
        if command.poll() is not None:
            break
        victims = [*ranks_of(run_dir), command] if choose.random() < 0.5 else ranks_of(run_dir)[:1] or [command]
        for process in victims:
            process.send_signal(signal.SIGKILL)
        command.wait(timeout=60)
        wait_until(lambda: not ranks_of(run_dir))
        struck += 1
        before = last_step(run_dir)
    if result_missing(run_dir):
        done = scene.commands.run("train", str(run_dir), timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    curve = exact(run_dir) == scene.reference
    weights = scene.weights("soak") == scene.weights("undisturbed")
    return (
        f"{struck} random kills over one training of {STEPS} steps (seed {seed}): curve equal: {yes(curve)}, "
        f"final weights equal to the bit: {yes(weights)}."
    )


def result_missing(run_dir: Path) -> bool:
    try:
        return result(run_dir)["status"] != "completed"
    except (OSError, KeyError, ValueError):
        return True


def yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "**no**"


def table(outcomes: list[Outcome]) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    head = (
        "| fault | what happened | exit | s to exit | steps lost | s to the next step | curve equal |\n"
        + "|---" * 7
        + "|"
    )
    lines = [
        f"| {o.name} | {o.what} | {o.exit_code} | {number(o.exit_seconds)} | {'' if o.lost is None else o.lost} "
        f"| {number(o.resume_seconds)} | {yes(o.equal)} |"
        for o in outcomes
    ]
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults whose name begins so, or soak")
    parser.add_argument("--kills", type=int, default=30, help="random kills of the soak")
    options = parser.parse_args()
    cases: dict[str, Callable[[Scene], Outcome]] = {}
    cases |= {name: lambda scene, name=name: strike_running(scene, name) for name in RUNNING}
    cases |= {name: lambda scene, name=name: strike_checkpoint(scene, name) for name in DAMAGE}
    cases |= {"disk full": full_disk, "restart": restart}
    cases |= {name: lambda scene, name=name: move(scene, name) for name in MOVES}
    wanted = [name for name in cases if not options.only or any(name.startswith(start) for start in options.only)]
    folder = Path(tempfile.mkdtemp(prefix="dstune-reliability-"))
    try:
        scene = Scene(folder)
        outcomes = []
        for name in wanted:
            outcomes.append(cases[name](scene))
            print(table(outcomes[-1:]).splitlines()[-1], flush=True)
        soaked = soak(scene, options.kills) if not options.only or "soak" in options.only else ""
        print(soaked)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not options.only:
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
        (ROOT / "docs" / "reliability.md").write_text(
            f"""# What a run survives

Made by `python benchmarks/reliability.py`: real runs of {STEPS} steps on two ranks with a tiny model, a save every {EVERY} steps,
a fault after step {AT}. One undisturbed run is the measure: every metric of every step and evaluation, to the bit at the same
layout, within 1e-5 after a move to another one. "s to the next step" is from the command that continues the run to its first
new step; most of it is Python importing torch and DeepSpeed.

Machine: {os.cpu_count()} cores ({platform.machine()}), no GPU; {packages}.

{table(outcomes)}

{soaked}
"""
        )


if __name__ == "__main__":
    main()
