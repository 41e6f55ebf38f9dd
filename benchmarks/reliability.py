"""What happens to a run under faults, and whether its curve goes on: writes docs/reliability.md.

    python benchmarks/reliability.py                      # every fault once, then 30 random kills: about 40 minutes on 2 cores
    python benchmarks/reliability.py --only kill disk     # faults whose name begins so; prints, writes nothing
    python benchmarks/reliability.py --kills 5 --only soak
    python benchmarks/reliability.py --folder WORK        # keeps what it did there, and goes on where it was ended

Real runs through the command line on two ranks with a tiny model; one undisturbed run is the measure. The faults are those
of tests/support/faults.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.command import exact, ranks_of, result, wait_until  # noqa: E402
from support.faults import FAULTS  # noqa: E402
from support.struck import AT, EVERY, STEPS, Outcome, Scene, check, last_step, play  # noqa: E402

SOAK_STEPS = 120
"""Of the training that is killed over and over: a launch gets one or two steps far, and 40 steps were over after 20 kills."""
SOAK_MODES = {"sync": [], "async": ["checkpoint.mode=async"]}


def soak(scene: Scene, kills: int, mode: str, seed: int) -> dict[str, Any]:
    """Kill at random moments, start-up and saves included, until as many kills have struck; then the run may end.

    Kept in `soak-MODE.json` after every kill, so that the soak itself can be killed."""
    run_dir, notes = scene.folder / f"soak-{mode}", scene.folder / f"soak-{mode}.json"
    longer = f"trainer.max_steps={SOAK_STEPS}"
    whole = scene.folder / "undisturbed-soak"
    if missing(whole):
        scene.commands.run("train", *scene.overrides(whole, longer), timeout=900)
    done: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {"kills": 0, "starts": [], "trained": 0}
    while done["kills"] < kills:
        choose = random.Random(f"{seed}-{done['kills']}")
        fresh = scene.overrides(run_dir, longer, "checkpoint.every=1", *SOAK_MODES[mode])
        command = scene.commands.start("train", *([str(run_dir)] if (run_dir / "run.yaml").exists() else fresh))
        step_before = last_step(run_dir)
        began = time.monotonic()
        # Most launches get far enough to train a step or two; some are killed while they start.
        if choose.random() < 0.8:
            wait_until(lambda: last_step(run_dir) > step_before or command.poll() is not None)  # noqa: B023
            done["starts"].append(time.monotonic() - began)
            time.sleep(choose.uniform(0.0, 0.3))
        else:
            time.sleep(choose.uniform(1.0, 8.0))
        if command.poll() is not None:
            break
        ranks = ranks_of(run_dir)
        victims = [*ranks, command] if choose.random() < 0.4 else [choose.choice([*ranks, command])]
        for process in victims:
            process.send_signal(signal.SIGKILL)
        command.wait(timeout=60)
        wait_until(lambda: not ranks_of(run_dir))
        done["kills"] += 1
        notes.write_text(json.dumps(done))
        print(f"soak {mode}: kill {done['kills']} at step {last_step(run_dir)}", flush=True)
    if missing(run_dir):
        ended = scene.commands.run("train", str(run_dir), timeout=900)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    done["curve"] = exact(run_dir) == exact(whole)
    done["weights"] = scene.weights(run_dir.name) == scene.weights(whole.name)
    notes.write_text(json.dumps(done))
    return done


def missing(run_dir: Path) -> bool:
    try:
        return result(run_dir)["status"] != "completed"
    except (OSError, KeyError, ValueError):
        return True


def yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "**no**"


def table(outcomes: list[Outcome]) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    def words(text: str) -> str:
        return text.replace("|", "/")[:110]

    titles = (
        "fault",
        "what happened",
        "what it said",
        "exit",
        "s to exit",
        "left",
        "steps lost",
        "s to go on",
        "equal",
    )
    head = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|"
    lines = [
        f"| {o.name} | {o.what} | {words(o.message)} | {o.exit_code} | {number(o.exit_seconds)} | {o.left} "
        f"| {'' if o.lost is None else o.lost} | {number(o.resume_seconds)} | {yes(o.equal)} |"
        for o in outcomes
    ]
    return "\n".join([head, *lines])


def soaked(mode: str, done: dict[str, Any]) -> str:
    starts = done["starts"]
    median = f"{statistics.median(starts):.1f} s (longest {max(starts):.1f} s)" if starts else "not measured"
    return (
        f"- `checkpoint.mode={mode}`: {done['kills']} random kills over one training of {SOAK_STEPS} steps. Curve equal: "
        f"{yes(done['curve'])}. Final weights equal to the bit: {yes(done['weights'])}. From the command to the next "
        f"trained step: median {median}."
    )


def page(outcomes: list[Outcome], soaks: list[str], commit: str) -> str:
    missing = [fault.name for fault in FAULTS if fault.name not in {outcome.name for outcome in outcomes}]
    untried = f"\nNot tried yet: {', '.join(missing)}.\n" if missing else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    return f"""# What a run survives

Made by `python benchmarks/reliability.py` at {commit}: real runs of {STEPS} steps on two
ranks with a tiny model, a save every {EVERY} steps, a fault after step {AT}.
[Checkpoints, resuming and restarts](survival.md) explains how a run is protected and which settings there are.

- **s to exit**: from the fault to the end of the command; empty if the run went on without ending.
- **left**: processes of the run that still existed afterwards.
- **steps lost**: steps that `dstune train RUN` had to train again.
- **s to go on**: from that command to its first new step; most of it is Python importing torch and DeepSpeed.
- **equal**: whether every metric of every step and evaluation of the continued run equals that of the undisturbed run: to the bit,
  or within 1e-5 after a move to another layout.

Machine: {os.cpu_count()} cores ({platform.machine()}) shared with other work, no GPU; {packages}.

{table(outcomes)}
{untried}
## Soak

{chr(10).join(soaks) or "Not run yet."}
"""


def ended_soaks(folder: Path) -> list[str]:
    notes = {mode: folder / f"soak-{mode}.json" for mode in SOAK_MODES}
    return [mode for mode, file in notes.items() if file.exists() and "weights" in json.loads(file.read_text())]


def note_commit(folder: Path) -> str:
    """Return the commit at which the work in `folder` began."""
    note = folder / "commit.txt"
    if not note.exists():
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        note.write_text(done.stdout.strip() or "an unknown commit")
    return note.read_text()


def write_page(outcome_by_fault: dict[str, Outcome], soaks: list[str], commit: str) -> None:
    ordered = [outcome_by_fault[fault.name] for fault in FAULTS if fault.name in outcome_by_fault]
    (ROOT / "docs" / "reliability.md").write_text(page(ordered, soaks, commit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults whose name begins so, or soak")
    parser.add_argument("--kills", type=int, default=30, help="random kills of the soak")
    parser.add_argument("--modes", nargs="+", default=list(SOAK_MODES), choices=SOAK_MODES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--page", action="store_true", help="write the page with what is known in --folder; run nothing"
    )
    parser.add_argument("--folder", type=Path, help="work here, and keep it")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if not options.only or fault.name.startswith(tuple(options.only))]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="dstune-reliability-"))
    folder.mkdir(parents=True, exist_ok=True)
    notes, commit = folder / "outcomes.json", note_commit(folder)
    outcome_by_fault = {row["name"]: Outcome(**row) for row in json.loads(notes.read_text())} if notes.exists() else {}
    if options.page:
        soaks = [soaked(mode, json.loads((folder / f"soak-{mode}.json").read_text())) for mode in ended_soaks(folder)]
        write_page(outcome_by_fault, soaks, commit)
        return
    failures: list[str] = []
    try:
        scene = Scene(folder.absolute())
        for fault in faults:
            if fault.name not in outcome_by_fault:
                try:
                    outcome_by_fault[fault.name] = play(scene, fault)
                except Exception as error:  # the other faults are measured all the same
                    failures.append(f"{fault.name}: {type(error).__name__}: {str(error)[-2000:]}")
                    print(failures[-1], flush=True)
                    continue
                notes.write_text(json.dumps([outcome.to_dict() for outcome in outcome_by_fault.values()], indent=1))
            print(table([outcome_by_fault[fault.name]]).splitlines()[-1], flush=True)
            if wrong := check(fault, outcome_by_fault[fault.name]):
                failures.append(f"{fault.name}: {'; '.join(wrong)}")
        soaks = []
        if not options.only or "soak" in options.only:
            for mode in options.modes:
                soaks.append(soaked(mode, soak(scene, options.kills, mode, options.seed)))
                print(soaks[-1], flush=True)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(["as it should be" if not failures else "NOT as it should be:", *failures]))
    if not options.only:
        write_page(outcome_by_fault, soaks, commit)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
