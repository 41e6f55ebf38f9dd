"""`dstune train --multirun`: runs a sweep, from the command line to finished trials."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dstune.config.compose import compose
from dstune.config.flags import Flags, hydra_flags, show
from dstune.config.ignored import ignored_in_sweep, ignored_settings
from dstune.config.overrides import key_of, quoted
from dstune.config.schema import RunConfig
from dstune.config.sweep_rules import holds_out, objectives
from dstune.config.sweep_space import Split, first, split, with_space
from dstune.config.trust import FLAG, is_believed_by_command
from dstune.config.validate import validate
from dstune.core import plugins
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, Problem, UserError
from dstune.core.limited_places import refused_operations
from dstune.core.rank_env import from_environment
from dstune.core.secrets import publish
from dstune.launch import preflight, records
from dstune.launch.console import Console
from dstune.launch.local import warm
from dstune.launch.runs import cell, table
from dstune.launch.signals import caught_signals
from dstune.protocols import launcher_of
from dstune.report.best_trial import best_commands
from dstune.report.command import leave_behind
from dstune.sweep import array, devices, directory, probes
from dstune.sweep.directory import Sweep
from dstune.sweep.grid import Grid
from dstune.sweep.schedule import Schedule, Source
from dstune.sweep.study import Study
from dstune.tracking.trials import TRAINING_LOSS, Record, is_sweep, ranked, read_records


@dataclass(frozen=True)
class Command:
    """`dstune train --multirun [SWEEP] [key=value ...] [flags]`, or `dstune train SWEEP ...`."""

    flags: Flags
    split: Split
    json: bool


def main(argv: list[str]) -> int:
    """Run the verb `train` for a sweep. Raises UserError; returns the exit code of the public contract:

    0 if every trial finished or was pruned, 75 if some can be continued, 1 if some failed.
    """
    command = parse(argv)
    if command.flags.shows:
        chosen = [*command.split.fixed, *first(command.split.axes).overrides]
        return show(replace(command.flags, overrides=chosen))
    if from_environment(os.environ) is not None:
        reason = "a sweep starts the ranks of its trials itself, and this process is a rank already"
        fix = "start it once, without srun, mpirun or deepspeed (launch/sweep.sbatch)"
        raise UserError(Problem("--multirun", reason, fix))
    console = Console(sys.stderr if command.json else sys.stdout)
    sweep, runs_became_longer = prepare(command, console)
    objective_names = choose_objectives(sweep.base)
    code = run(sweep, objective_names, runs_became_longer, console)
    trial_records = read_records(sweep.path)
    if command.json:
        print(json.dumps(as_json(sweep.path, objective_names, trial_records)))
    else:
        print(as_text(sweep.path, objective_names, trial_records))
    return code


def choose_objectives(base: RunConfig) -> list[str]:
    """Return the metrics that trials are compared by: `sweep.objective`, else those of the task, or the training loss if there are
    no validation rows."""
    return list(base.sweep.objective) or (objectives(base) if holds_out(base) else [TRAINING_LOSS])


# ---- from the command line to a sweep ----


def parse(argv: list[str]) -> Command:
    """Parse the command line. The directory of a sweep in it stands for the overrides with which that sweep began.

    Raises:
        UserError: unknown flags, or values that cannot be read.
    """
    words = [word for word in argv if word != "--json"]
    sweep = None
    for word in words[:1] if words and not words[0].startswith("-") else words[1:2]:
        if "=" not in word and is_sweep(Path(word)):
            sweep = Path(word)
            words.remove(word)
    flags = hydra_flags(words, may_sweep=True)
    if sweep is not None:
        overrides_before, folders = directory.read_overrides(sweep)
        replaced_keys = {key_of(text) for text in flags.overrides}
        still_valid = [text for text in overrides_before if key_of(text) not in replaced_keys]
        flags = replace(
            flags,
            overrides=[*still_valid, *flags.overrides, f"sweep.dir={quoted(str(sweep))}"],
            config_dirs=flags.config_dirs or folders,
        )
    groups = probes.groups(flags.config_dirs, flags.overrides)
    return Command(flags, split(flags.overrides, groups), json="--json" in argv)


def prepare(command: Command, console: Console) -> tuple[Sweep, bool]:
    """Compose and validate the values of all axes, check the first trial as `dstune train` would, and choose the directory.

    Writes nothing. The second value: whether the runs became longer since the sweep began.

    Raises:
        UserError: everything that would keep a trial from starting, as far as it shows before.
    """
    flags = command.flags
    folders = [str(Path(folder).resolve()) for folder in flags.config_dirs]
    parts = command.split
    base = compose([*parts.fixed, *first(parts.axes).overrides], folders).config
    parts = with_space(parts, base.sweep.space, probes.groups(folders, flags.overrides))
    if not parts.axes:
        fix = "give a key several values: optimizer.lr=1e-5,1e-4 (or sweep.space in an experiment)"
        raise UserError(Problem("--multirun", "nothing varies", fix))
    problems = [*probes.of_axes(base.sweep, parts.axes), *array.problems(base, parts.axes)]
    problems += [
        Problem(
            "run.dir",
            "every trial has its own directory inside that of the sweep",
            "sweep.dir=FOLDER",
            text.partition("=")[2],
        )
        for text in parts.fixed
        if key_of(text) == "run.dir"
    ]
    if problems:
        raise UserError(problems)
    configs = probes.configurations(parts, folders)
    for config in configs:
        validate(config)
    base = configs[0]
    run_overrides = [text for text in parts.fixed if not _is_sweep_key(text)]
    for warning in (*ignored_settings(base, run_overrides), *ignored_in_sweep(base, parts.fixed)):
        console.message(f"dstune: warning: {warning}")
    ranks = sorted({launcher_of(config.launch).ranks for config in configs}, key=str)
    devices.slots(base, devices.here(), ranks)
    # Each trial chooses its ZeRO stage itself when it starts, since the stage may depend on its values.
    resolved = replace(preflight.resolve_run(base, console.stage), zero=base.zero)
    overrides = [text for text in flags.overrides if key_of(text) != "sweep.dir"]
    sweep = Sweep(directory.sweep_path(base, parts.axes), resolved, overrides, folders, parts.axes)
    publish(str(sweep.path))
    return directory.continued(sweep)


def common_overrides(sweep: Sweep, fixed: Sequence[str]) -> list[str]:
    """Return the arguments of `dstune train` that all trials share."""
    flags = [word for folder in sweep.config_dirs for word in ("--config-dir", folder)]
    run_overrides = [text for text in fixed if not _is_sweep_key(text)]
    group = [] if sweep.base.tracking.group else [f"tracking.group={quoted(group_name(sweep))}"]
    flags += [FLAG, plugins.KEY] if is_believed_by_command(plugins.KEY) else []
    return [*flags, *run_overrides, *directory.frozen_overrides(sweep.base, sweep.axes), *group]


def group_name(sweep: Sweep) -> str:
    """Return the name under which trackers group the trials."""
    return f"{sweep.base.run.name}/{sweep.path.name}"


def _is_sweep_key(text: str) -> bool:
    key = key_of(text)
    return key == "sweep" or key.startswith("sweep.")


# ---- running the trials ----


def run(sweep: Sweep, objective_names: Sequence[str], runs_became_longer: bool, console: Console) -> int:
    """Run the trials that are not finished, wait for them (except for an array of jobs), and return the exit code."""
    path = sweep.path
    if refused := refused_operations(path).keys() & {"append", "lock", "rename files"}:
        reason = f"a sweep keeps its records there, and the place refuses {', '.join(sorted(refused))}"
        raise UserError(Problem("sweep.dir", reason, "give a folder on a local disk, or on NFS or Lustre", str(path)))
    try:
        path.mkdir(parents=True, exist_ok=True)
        if sweep.base.run.mode.value is not None:
            path.chmod(sweep.base.run.mode.value)
    except OSError as error:
        reason = f"cannot be created: {error.strerror}"
        raise UserError(Problem("sweep.dir", reason, "give a folder of yours", str(path))) from None
    fixed = split(sweep.overrides, probes.groups(sweep.config_dirs, sweep.overrides)).fixed
    # With a study in a storage of its own (sweep.storage), several machines may work in one directory.
    optuna = sweep.base.sweep.optuna
    is_shared = optuna is not None and optuna.storage is not None
    lock = records.acquire_lock(path, shared=is_shared)
    try:
        records.note(path, uuid.uuid4().hex, sweep.base.sweep.parallel)
        directory.write_sweep(sweep, objective_names)
        source = open_source(sweep, objective_names, runs_became_longer, console)
        common = common_overrides(sweep, fixed)
        if isinstance(source, Grid) and array.is_array(sweep.base):
            array.submit(sweep, source, common, console)
            console.message(f"dstune: watch with `dstune runs {path}`; the same command again submits failed trials")
            return EXIT_DONE
        ranks = [launcher_of(sweep.base.launch).ranks]
        slots = devices.slots(sweep.base, devices.here(), ranks)
        with caught_signals(sweep.base.run.signals) as received, warm.offer() as variables:
            Schedule(path, source, slots, common, console, received, variables).run()
    finally:
        os.close(lock)
    leave_behind(path, console.message)
    trial_records = read_records(path)
    if received or any(record.status in ("preempted", "running") for record in trial_records):
        console.message(f"dstune: continue with: dstune train --multirun {path}")
        return EXIT_PREEMPTED
    return EXIT_FAILED if any(record.status == "failed" for record in trial_records) else EXIT_DONE


def open_source(sweep: Sweep, objective_names: Sequence[str], runs_became_longer: bool, console: Console) -> Source:
    """Open the Optuna study or the grid that gives the trials, and print how many there are. Raises UserError."""
    parallel = sweep.base.sweep.parallel
    if sweep.base.sweep.optuna:
        if runs_became_longer:
            reason = "Optuna compares trials of one length, and the earlier trials of this study were shorter"
            fix = "give the earlier length, or another sweep.dir"
            raise UserError(Problem("trainer.max_steps", reason, fix, str(sweep.base.trainer.max_steps)))
        study = Study(sweep, objective_names)
        finished_text = f", {study.done} of them before" if study.done else ""
        console.stage(
            f"sweep {sweep.path}: {study.planned_trials} trials chosen by Optuna{finished_text}, {parallel} at a time"
        )
        return study
    grid = Grid(sweep.path, sweep.base, sweep.axes, objective_names, repeat_finished=runs_became_longer)
    done = len(grid.finished)
    skipped = f", {done} of them finished before" if done else ""
    console.stage(f"sweep {sweep.path}: {len(grid.trials)} trials{skipped}, {parallel} at a time")
    return grid


# ---- the summary at the end ----


def as_json(path: Path, objective_names: Sequence[str], trial_records: Sequence[Record]) -> dict[str, object]:
    """Return what `--json` prints: the trials, best first, and the commands that use the best one."""
    best_first = ranked(trial_records, objective_names[0])
    trials = [{**vars(record), "run": str(path / record.name)} for record in best_first]
    best = trials[0] if trials and best_first[0].objective else None
    commands = best_commands(path, trial_records, objective_names[0])
    return {
        "sweep": str(path),
        "objective": list(objective_names),
        "best": best,
        "commands": commands,
        "trials": trials,
    }


def as_text(path: Path, objective_names: Sequence[str], trial_records: Sequence[Record]) -> str:
    """Return a table of the trials, best first, and the commands that use the best one."""
    best_first = ranked(trial_records, objective_names[0])
    keys = list(dict.fromkeys(key for record in best_first for key in record.values))
    heading = ["trial", "status", *objective_names, *keys, "seconds"]
    rows = [
        [
            record.name,
            record.status,
            *(f"{record.objective[name]:.4g}" if name in record.objective else "-" for name in objective_names),
            *(cell(record.values.get(key)) for key in keys),
            f"{record.seconds:.0f}",
        ]
        for record in best_first
    ]
    counts = Counter(record.status for record in trial_records)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [f"\n{table(heading, rows)}", "", f"{len(trial_records)} trials: {summary}", f"sweep  {path}"]
    lines.append(f"report {path / 'report.html'}")
    for title, command in zip(
        ("best   ", "export "), best_commands(path, trial_records, objective_names[0]), strict=False
    ):
        lines.append(f"{title}{command}")
    return "\n".join(lines)
