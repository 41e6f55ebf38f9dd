"""`dstune train`: from the command line to the end of the ranks."""

from __future__ import annotations

import json
import math
import os
import sys
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.config.compose import compose
from dstune.config.convert import format_value, to_yaml
from dstune.config.flags import Flags, hydra_flags, show
from dstune.config.ignored import ignored_settings
from dstune.config.resume import kept_origins
from dstune.config.run_file import Composed, plugins_of, read_run
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import RunConfig
from dstune.config.trust import Use
from dstune.config.validate import validate
from dstune.config.words import meaning
from dstune.core import places
from dstune.core.arguments import is_path
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER, Problem, UserError
from dstune.core.plugins import accepts_changes, refuse_changes
from dstune.core.rank_env import RankEnv, from_environment
from dstune.launch import records, rundir
from dstune.launch.commands import NO_TELEMETRY, OFFLINE, count_gpus, idle_gpus
from dstune.launch.console import Console
from dstune.launch.manage import status_of
from dstune.launch.mirror import Mirror, open_mirror
from dstune.launch.node_health import warnings_at_start
from dstune.launch.queues import submitter_of
from dstune.launch.rundir import Prepared
from dstune.launch.summary import summary
from dstune.protocols import launcher_of
from dstune.protocols.launcher import LaunchRequest
from dstune.tracking.jsonl import json_text

if TYPE_CHECKING:
    from dstune.rank.worker import Outcome


@dataclass(frozen=True)
class Command:
    """`dstune train [RUN] [key=value ...] [flags]`."""

    run: Path | None
    flags: Flags
    json: bool


WriteRows = Callable[[Path], None]
"""Writes the rows of a run into its directory (`dstune.train(train=rows)`)."""


def nothing_to_do(run_dir: Path) -> str:
    return f"{run_dir} was completed already; trainer.max_steps or trainer.epochs prolongs it"


def train(argv: list[str]) -> int:
    """Run the verb. Raises UserError; returns the exit code of the public contract."""
    env = from_environment(os.environ)
    if env is not None:
        return _as_rank(argv, env)
    command = parse(argv)
    if command.flags.shows:
        return show_configuration(command)
    console = Console(sys.stderr if command.json else sys.stdout)
    run_dir, code, pending = launched(command, console)
    if not pending:
        conclude(command, run_dir, code, console)
    elif command.json:
        print(json.dumps(status_of(run_dir).to_json(run_dir)))
    return code


def launched(command: Command, console: Console, write_rows: WriteRows | None = None) -> tuple[Path, int, bool]:
    """Prepare the run, start its ranks and wait for them: the run directory, the exit code, and whether the run is still
    waiting in a queue (`launch.wait=false`). write_rows: see `prepare`.

    Raises:
        UserError: whatever is wrong with the configuration or the data.
    """
    prepared = prepare(command, console, write_rows)
    place, mirror = prepared.place, prepared.mirror
    pending = not prepared.nothing_to_do and submitter_of(prepared.config.launch) is not None
    code, copied = EXIT_DONE, True
    try:
        if prepared.nothing_to_do:
            console.message(nothing_to_do(place))
        else:
            if mirror is not None:
                mirror.start()
            code = start(prepared, console)
            if not pending:
                leave_behind(prepared.run_dir, console.message)
    except UserError:
        prepared.before.restore()
        raise
    finally:
        if prepared.lock is not None:  # this process may go on: a notebook
            os.close(prepared.lock)
        if mirror is not None:
            copied = mirror.close()
    return place, code if copied or code else EXIT_FAILED, pending


def leave_behind(run_dir: Path, message: Callable[[str], None]) -> None:
    """Write the report of a run that has ended."""
    from dstune.report.command import leave_behind

    leave_behind(run_dir, message)


def start(prepared: Prepared, console: Console) -> int:
    """Start the ranks with the configured launcher, wait for them, and return the exit code. Raises UserError."""
    launcher = launcher_of(prepared.config.launch)
    return launcher.start(LaunchRequest(prepared.config, prepared.run_dir, console, lock=prepared.lock))


def parse(argv: list[str]) -> Command:
    """Parse and check the command line. Raises UserError for unknown flags, or a PATH that is not a run."""
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


def prepare(command: Command, console: Console, write_rows: WriteRows | None = None, nodes: int = 1) -> Prepared:
    """Compose, validate, choose the run directory, fetch what is needed, and write `run.yaml`.

    write_rows: writes data files into the chosen run directory, before anything reads them. nodes: of the launch that this
    process is a part of.

    Raises:
        UserError: whatever keeps the run from starting; nothing is left behind then.
    """
    with ExitStack() as rollback:

        def opened(place: Path) -> Mirror | None:
            mirror = open_mirror(place, console.message)
            if mirror is not None:
                rollback.callback(mirror.close)
            return mirror

        # Before its `run.yaml` is read, which may have been cut short where the run is.
        mirror = None if command.run is None else opened(command.run)
        composed = configuration(command if mirror is None else replace(command, run=mirror.work))
        validate(composed.config)
        place = rundir.path_of(composed.config, command.run)
        if command.run is None:
            mirror = opened(place)
        prepared = _prepare(command, composed, place, mirror, console, write_rows, nodes)
        rollback.pop_all()
    return prepared


def _prepare(
    command: Command,
    composed: Composed,
    place: Path,
    mirror: Mirror | None,
    console: Console,
    write_rows: WriteRows | None,
    nodes: int,
) -> Prepared:
    from dstune.launch import preflight  # not at the top: half a second of imports that `--cfg` and `--help` do without

    ignored = ignored_settings(composed.config, command.flags.overrides, continues=command.run is not None)
    of_node: list[str] = []
    if nodes > 1 or count_gpus(os.environ):
        of_node += warnings_at_start(Path.cwd(), several_nodes=nodes > 1)
    for warning in (*ignored, *idle_gpus(os.environ), *of_node):
        console.message(f"dstune: warning: {warning}")
    work = None
    if mirror is not None:
        work, mirror.keep = mirror.work, composed.config.checkpoint.keep
        if nodes > 1:
            mirror.refuse_other_machines(f"a launch of {nodes} nodes")
        if not launcher_of(composed.config.launch).on_this_machine:
            mirror.refuse_other_machines(f"launch={composed.config.launch.name}")
    composed = rundir.choose(composed, command.run, given=command.flags.overrides, place=place, work=work)
    before = rundir.before_launch(composed, work)
    origins = dict(composed.origins)
    for key, why in composed.origins.items():
        console.stage(f"{key.removesuffix('.name')}={format_value(attrgetter(key)(composed.config))}: {why}")
    try:
        if write_rows is not None:
            write_rows(before.path)
            if mirror is not None:
                mirror.copy_rows()
        config = preflight.resolve_run(composed.config, console.stage, origins=origins)
    except BaseException:
        before.restore_unless_taken()
        raise
    prepared = rundir.prepare(replace(composed, config=config, origins=origins), before, console.message)
    prepared = replace(prepared, mirror=mirror)
    if not prepared.nothing_to_do:
        start = f"continues from {prepared.continues}" if prepared.continues else "starts"
        console.stage(f"run {prepared.place} {start}")
    return prepared


def configuration(command: Command, use: Use = Use.everything) -> Composed:
    """Return what the command asks for, not validated yet. use: what it does with a stored run. Raises UserError."""
    if command.run is None:
        return compose(command.flags.overrides, command.flags.config_dirs)
    file = command.run / rundir.RUN_FILE
    stored = read_run(file, command.flags.overrides, use=use)
    if not accepts_changes(command.flags.overrides):
        refuse_changes(plugins_of(file), stored.plugins)
    config = apply_overrides(stored.config, command.flags.overrides)
    overrides = [*stored.overrides, *command.flags.overrides]
    return Composed(config, overrides, stored.plugins, origins=kept_origins(stored, config))


def _as_rank(argv: list[str], env: RankEnv) -> int:
    """Run one rank inside somebody else's launch, from the command line."""
    with suppress(UserError):  # raised again on rank 0, so that it is reported once and every rank ends with 2
        command = parse(argv)
        if command.flags.shows:
            return show_configuration(command) if env.rank == 0 else EXIT_DONE
    outcome = as_rank(env, lambda: (parse(argv), None))
    from dstune.rank.process import exit_now

    exit_now(outcome.code)
    return outcome.code


def as_rank(env: RankEnv, requested: Callable[[], tuple[Command, WriteRows | None]], *, prints: bool = True) -> Outcome:
    """Run one rank inside somebody else's launch: rank 0 prepares the run, and every rank gets it or the error.

    requested: called on rank 0 alone. prints: see `worker.main_inside`.
    """
    started: list[tuple[Command, Prepared]] = []

    def prepare_run() -> tuple[RunConfig | None, Path, Path]:
        with places.named():  # the ranks report the problems
            command, write_rows = requested()
            prepared = prepare(command, Console(), write_rows, math.ceil(env.world_size / env.local_size))
        if prepared.nothing_to_do:
            if prints:
                print(f"dstune: {nothing_to_do(prepared.place)}", file=sys.stderr, flush=True)
            if prepared.mirror is not None:
                prepared.mirror.close()
            return None, prepared.place, prepared.place
        started.append((command, prepared))
        if prepared.mirror is not None:
            prepared.mirror.start()
        records.begin(prepared.run_dir, uuid.uuid4().hex, env.world_size)
        return prepared.config, prepared.run_dir, prepared.place

    # Rank 0 alone may ask the hub, before any rank loads a model.
    os.environ.update(NO_TELEMETRY if env.rank == 0 else NO_TELEMETRY | OFFLINE)
    from dstune.rank.worker import main_inside

    outcome = main_inside(env, prepare_run, prints=prints)
    for command, prepared in started:
        run_dir, code = prepared.run_dir, outcome.code
        refused = code == EXIT_USER and prepared.before.restore()
        if code and not refused and records.read_result(run_dir) is None:
            records.write_result(run_dir, "failed", f"a rank ended with exit code {code}", env.world_size)
        if not refused:
            leave_behind(run_dir, Console().message)
        if prepared.mirror is not None:
            copied = prepared.mirror.close()
            outcome = replace(outcome, code=code if copied or code else EXIT_FAILED)
        if not refused:
            conclude(command, prepared.place, outcome.code, Console())
    return outcome


def conclude(command: Command, run_dir: Path, code: int, console: Console) -> None:
    """Print the last lines of the command: the results, or how to continue the run."""
    result = records.read_result(run_dir) or {}
    if command.json:
        print(json_text(result))
    elif code == EXIT_DONE:
        print(summary(run_dir))
    elif code == EXIT_PREEMPTED or result.get("checkpoint"):
        console.message(f"dstune: continue with: dstune train {run_dir}")


def show_configuration(command: Command) -> int:
    """Print what `--cfg`, `--help` and the like ask for; with the PATH of a run, `--cfg` shows that run's configuration."""
    if command.run is None or not command.flags.cfg:
        return show(command.flags)
    print(to_yaml(configuration(command).config), end="")
    return EXIT_DONE
