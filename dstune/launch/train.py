"""The verb `train`: from the command line to ranks that have finished."""

from __future__ import annotations

import json
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from dstune.arguments import is_path
from dstune.config.compose import Composed, apply_overrides, compose, read_run, to_yaml
from dstune.config.flags import Flags, hydra_flags, show
from dstune.config.ignored import ignored_settings
from dstune.config.launch_schema import HostfileConfig, LocalConfig, OpenMpiConfig, SlurmConfig
from dstune.config.schema import RunConfig
from dstune.config.validate import validate
from dstune.config.words import meaning
from dstune.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, DstuneError, Problem, UserError
from dstune.launch import records, rundir
from dstune.launch.commands import NO_TELEMETRY, OFFLINE
from dstune.launch.console import Console
from dstune.launch.manage import status_of
from dstune.launch.rundir import Prepared
from dstune.launch.summary import summary
from dstune.rank_env import RankEnv, from_environment


@dataclass(frozen=True)
class Command:
    """`dstune train [RUN] [key=value ...] [flags]`."""

    run: Path | None
    flags: Flags
    json: bool


class NothingToDo(DstuneError):
    """The run was completed before, and no more steps are asked for."""

    exit_code = EXIT_DONE


def train(argv: list[str]) -> int:
    """The verb. Raises UserError; returns the exit code of the public contract."""
    env = from_environment(os.environ)
    if env is not None:
        return _as_rank(argv, env)
    command = parse(argv)
    if command.flags.shows:
        return show_configuration(command)
    console = Console(sys.stderr if command.json else sys.stdout)
    prepared = prepare(command, console)
    run_dir = prepared.run_dir
    if prepared.nothing_to_do:
        console.message(str(_nothing_to_do(prepared)))
        code = EXIT_DONE
    else:
        try:
            code = start(prepared, console)
        except UserError:
            prepared.before.restore()
            raise
    launch = prepared.config.launch
    if isinstance(launch, SlurmConfig) and not launch.wait and not prepared.nothing_to_do:
        if command.json:
            print(json.dumps(status_of(run_dir).to_json(run_dir)))
        return code
    _conclude(command, run_dir, code, console)
    return code


def start(prepared: Prepared, console: Console) -> int:
    """Start the ranks where the configuration says, and wait for them. Raises UserError; returns the exit code."""
    from dstune.launch import remote, slurm, supervise

    match prepared.config.launch:
        case SlurmConfig():
            return slurm.run(prepared.config, prepared.run_dir, console=console)
        case HostfileConfig() | OpenMpiConfig():
            return remote.run(prepared.config, prepared.run_dir, console=console)
        case LocalConfig():
            return supervise.run(prepared.config, prepared.run_dir, console=console, lock=prepared.lock)


def parse(argv: list[str]) -> Command:
    """Raises UserError: unknown flags, or a PATH that is no run."""
    words = [word for word in argv if word != "--json"]
    run = None
    if words and is_path(words[0]):
        path = Path(words[0])
        if not (path / rundir.RUN_FILE).is_file() and (fix := meaning(words[0], words[1:])):
            reason = "this is neither key=value nor a run directory"
            raise UserError(Problem("command line", reason, fix, words[0]))
        run = rundir.run_directory(path)
        del words[0]
    return Command(run, hydra_flags(words), json=len(words) + (run is not None) < len(argv))


def prepare(command: Command, console: Console) -> Prepared:
    """Compose, validate, choose the run directory, fetch what is needed, and write `run.yaml`.

    Raises:
        UserError: whatever keeps the run from starting; nothing is left behind then.
    """
    from dstune.launch import preflight  # not at the top: half a second of imports that `--cfg` and `--help` do without

    composed = configuration(command)
    validate(composed.config)
    for warning in ignored_settings(composed.config, command.flags.overrides):
        console.message(f"dstune: warning: {warning}")
    composed = rundir.choose(composed, command.run, given=command.flags.overrides)
    config = preflight.resolve_run(composed.config, console.stage)
    prepared = rundir.prepare(Composed(config, composed.overrides))
    if not prepared.nothing_to_do:
        start = f"continues from {prepared.continues}" if prepared.continues else "starts"
        console.stage(f"run {prepared.run_dir} {start}")
    return prepared


def configuration(command: Command) -> Composed:
    """What the command asks for, not validated yet. Raises UserError."""
    if command.run is None:
        return compose(command.flags.overrides, command.flags.config_dirs)
    stored = read_run(command.run / rundir.RUN_FILE)
    config = apply_overrides(stored.config, command.flags.overrides)
    return Composed(config, [*stored.overrides, *command.flags.overrides])


def _as_rank(argv: list[str], env: RankEnv) -> int:
    """One rank inside somebody else's launch: rank 0 prepares the run, and every rank gets it or the error."""
    mistake: UserError | None = None
    command: Command | None = None
    try:
        command = parse(argv)
    except UserError as error:  # raised below on rank 0, so that it is told once and every rank ends with 2
        mistake = error
    if command is not None and command.flags.shows:
        return show_configuration(command) if env.rank == 0 else EXIT_DONE
    started: list[Prepared] = []

    def prepare_run() -> tuple[RunConfig, Path]:
        if command is None:
            assert mistake is not None
            raise mistake
        prepared = prepare(command, Console())
        if prepared.nothing_to_do:
            raise _nothing_to_do(prepared)
        started.append(prepared)
        records.begin(prepared.run_dir, uuid.uuid4().hex, env.world_size)
        return prepared.config, prepared.run_dir

    # Rank 0 alone may ask the hub, before any rank loads a model.
    os.environ.update(NO_TELEMETRY if env.rank == 0 else NO_TELEMETRY | OFFLINE)
    from dstune.worker import leave, main_inside

    code = main_inside(env, prepare_run)
    if started and command is not None:
        run_dir, refused = started[0].run_dir, code == EXIT_USER and started[0].before.restore()
        if code and not refused and records.read_result(run_dir) is None:
            records.write_result(run_dir, "failed", f"a rank ended with exit code {code}", env.world_size)
        if not refused:
            _conclude(command, run_dir, code, Console())
    leave(code)
    return code


def _conclude(command: Command, run_dir: Path, code: int, console: Console) -> None:
    """The report, and the last words of the command: what was achieved, or how to go on."""
    from dstune.report.command import leave_behind

    leave_behind(run_dir, console.message)
    result = records.read_result(run_dir) or {}
    if command.json:
        print(json.dumps(result))
    elif code == EXIT_DONE:
        print(summary(run_dir))
    elif code == EXIT_PREEMPTED or result.get("checkpoint"):
        console.message(f"dstune: continue with: dstune train {run_dir}")


def show_configuration(command: Command) -> int:
    """`--cfg`, `--help` and the like; with the PATH of a run, `--cfg` shows that run's configuration."""
    if command.run is None or not command.flags.cfg:
        return show(command.flags)
    print(to_yaml(configuration(command).config), end="")
    return EXIT_DONE


def _nothing_to_do(prepared: Prepared) -> NothingToDo:
    reason = f"{prepared.run_dir} was completed already; trainer.max_steps or trainer.epochs prolongs it"
    return NothingToDo(reason)
