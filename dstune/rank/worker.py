"""What each rank runs, from `run.yaml` to the result: `python -m dstune.rank.worker RUN_DIR`."""

from __future__ import annotations

import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dstune.checkpoint.session import Checkpoints
from dstune.config.run_file import Composed, read_decided, variables_for_ranks, write_run
from dstune.config.schema import RunConfig
from dstune.core import environment, files, handoff, plugins, rendezvous
from dstune.core.distributed import World
from dstune.core.errors import EXIT_DONE, DstuneError, Preempted, Problem, UserError, from_json, to_json
from dstune.core.files import INCOMPLETE
from dstune.core.rank_env import RankEnv, die_with_parent, from_environment
from dstune.core.rank_errors import report_once, report_to_launcher
from dstune.core.secrets import REFERENCE, redact_output
from dstune.protocols import Task, method_of
from dstune.protocols.method import Preparation
from dstune.protocols.method_options import TrainsInStages
from dstune.protocols.task_options import HoldsModels
from dstune.rank.finalize import finish
from dstune.rank.process import exit_now, guarded
from dstune.rank.setup import BuiltModel, Setup, activity
from dstune.rank.startup import ask_untuned, describe, show_samples
from dstune.rank.zero_stage import choose_zero_stage
from dstune.trainer.callbacks.preemption import Preemption
from dstune.trainer.callbacks.startup_timer import StartupTimer
from dstune.trainer.callbacks.watchdog import answer_with_stacks
from dstune.trainer.loop import Training, fit
from dstune.trainer.monitored_sets import evaluate_monitored_sets
from dstune.trainer.out_of_memory import explained
from dstune.trainer.safety import measure_moment
from dstune.zero import accelerator, swap
from dstune.zero.engine import Engine
from dstune.zero.start import start_process_group


def train(config: RunConfig, run_dir: Path, world: World) -> None:
    """Fine-tune on this rank together with the others. Raises Preempted, TrainingFailed or UserError."""
    startup = StartupTimer(os.environ)
    # First, so that a signal during start-up is not lost; of all stages, which share the time and the files that ask.
    preemption = Preemption(config, time.monotonic(), run_dir, is_main=world.is_main)
    config = choose_zero_stage(config, run_dir, world)
    with swap.own_folder(config.zero, run_dir, world) as zero:
        config = replace(config, zero=zero)
        *earlier_stages, config = stages_of(config, run_dir)
        for stage in earlier_stages:
            train_before(stage, config, run_dir, world, preemption)
            startup = StartupTimer()  # of the last stage, which `result.json` is about
        train_stage(config, run_dir, world, preemption, startup)


def stages_of(config: RunConfig, run_dir: Path) -> list[RunConfig]:
    """Return the runs that `config` trains one after another; the last one is the run itself."""
    method = method_of(config.method)
    return method.stages(config, run_dir) if isinstance(method, TrainsInStages) else [config]


def train_stage(
    config: RunConfig, run_dir: Path, world: World, preemption: Preemption, startup: StartupTimer | None = None
) -> None:
    """Train as `train`, a single stage."""
    setup = Setup(config, run_dir, world, preemption, startup or StartupTimer())
    engine: Engine | None = None
    try:
        layout = setup.configure_rank()
        rows = setup.load_data(layout)
        with explained(setup.place("setting up the model and the optimizer"), partial(setup.less_memory, layout)):
            start, rows = setup.prepare_method(layout, rows)
            built = setup.build_model(layout, rows, start)
            engine = setup.build_engine(layout, built, start)
            penalties = setup.check_arithmetic(rows, built, engine, start)
            restored = setup.restore(layout, rows, built, engine, start)
        with explained(setup.place("training"), partial(setup.less_memory, layout)):
            run = setup.build_training(layout, rows, built, engine, penalties, restored)
            run_training(run, built, rows.tokenizer, restored.checkpoints, start.preparation)
    except BaseException:
        if world.size == 1:  # with more of them the device may still wait for a rank that is gone
            close(engine, setup.task)
        raise
    close(engine, setup.task)


def close(engine: Engine | None, task: Task) -> None:
    """Close the engine, so that another stage may follow in this process, or another run. What the run is worth is decided by
    now."""
    for holder in (engine, task):
        try:
            if isinstance(holder, Engine | HoldsModels):
                holder.close()
        except Exception as error:
            activity.warning("a model could not be closed: %s", error)


def run_training(
    run: Training, built: BuiltModel, tokenizer: Any, checkpoints: Checkpoints, preparation: Preparation
) -> None:
    """Run the training from the first lines on the console to `result.json`."""
    run_dir, module = run.run_dir, built.module
    try:
        describe(run.config, run_dir, run, module, built.model, preparation)
        run.state.planned_steps = run.total_steps
        show_samples(run, tokenizer, before=True)
        ask_untuned(run, run_dir, module, tokenizer)
        if run.state.step == 0:
            evaluate_monitored_sets(run, "before")
            measure_moment(run, tokenizer, "before")
        run.startup.mark("checks")
        request = fit(run)
        if run.rollouts is not None:
            run.rollouts.close()
        run.callbacks.on_train_end(run, request)
        finish(run, checkpoints, run_dir, tokenizer, request, preparation)
    except BaseException:
        if run.rollouts is not None:
            run.rollouts.close()
        if run.log is not None:
            run.log.finish("failed", crashed=True)  # what it holds, before this process ends without further ado
        with suppress(Exception):  # what it raises is not why the run failed
            run.callbacks.close()
        raise
    run.callbacks.close()  # last: a run that is preempted has little time for its result


def take_over_export(source: Path, run_dir: Path) -> None:
    """Copy what an earlier stage of another run has exported, unless this run has its own: the checkpoint that the run goes on
    from stands on it, and that run's folder may be gone by the next launch."""
    exported = source / "export"
    run_dir = run_dir / "export"
    if not (exported / "config.json").is_file() or run_dir.is_dir():
        return
    temporary = run_dir.with_name(f"{run_dir.name}{INCOMPLETE}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(exported, temporary)
    temporary.rename(run_dir)


def train_before(stage: RunConfig, config: RunConfig, run_dir: Path, world: World, preemption: Preemption) -> None:
    """Train a stage in front of the run, in a folder of its own, unless its export is there already, or in `run.resume`'s run."""
    assert stage.run.dir is not None
    folder = Path(stage.run.dir)
    if world.is_main and config.run.resume not in ("auto", "never"):
        take_over_export(Path(config.run.resume) / folder.relative_to(run_dir), folder)
    if world.broadcast((folder / "export" / "config.json").is_file()):
        return
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        above = run_dir / "run.yaml"
        write_run(folder / "run.yaml", Composed(stage, [], plugins.used_by(stage)), signature_of=above)
    world.barrier()
    try:
        train_stage(stage, folder, world, preemption)
    except Preempted:
        if world.is_main:  # the whole run is preempted; the next launch goes on with this stage
            files.write(run_dir / "result.json", (folder / "result.json").read_bytes())
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rank's process as dstune's own launch starts it, here, by the agent of a node or by mpirun."""
    (argument,) = sys.argv[1:] if argv is None else argv
    die_with_parent()
    answer_with_stacks()
    env = from_environment(os.environ) or RankEnv(0, 1, 0, 1, "alone")
    run_dir = Path(argument)
    handoff.set_up_rank(env.rank, run_dir, os.environ)
    redact_output()

    def work() -> None:
        config = read_decided(run_dir / "run.yaml").config
        rendezvous.meet(env, run_dir, os.environ)
        record_collectives(os.environ, run_dir)
        train(config, run_dir, start_process_group(env))

    return guarded(work, lambda error: report_to_launcher(run_dir, env.rank, error))


@dataclass(frozen=True)
class Outcome:
    """How a rank inside somebody else's launch ended."""

    code: int
    run_dir: Path | None = None
    """None where the run was refused before it had one."""
    error: DstuneError | None = None


def main_inside(
    env: RankEnv, prepare_run: Callable[[], tuple[RunConfig | None, Path, Path]], *, prints: bool = True
) -> Outcome:
    """Run a rank inside somebody else's launch: rank 0 alone prepares the run, all read what it has written, or get its error and
    exit code.

    prepare_run: the configuration (None where nothing is left to do), the folder of the run with its `run.yaml`, and the run
    directory that the user knows, which is another one where that is only copied to (`dstune.launch.mirror`).
    prints: whether errors go to stderr; they are in the outcome too.
    """

    try:
        return _inside(env, prepare_run, prints)
    finally:
        rendezvous.leave_store(env, os.environ)


def _inside(env: RankEnv, prepare_run: Callable[[], tuple[RunConfig | None, Path, Path]], prints: bool) -> Outcome:
    def report(text: str) -> None:
        if prints:
            print(f"dstune: {text}", file=sys.stderr, flush=True)

    redact_output()
    answer_with_stacks()
    try:
        rendezvous.set_address(env, os.environ)
    except DstuneError as error:  # of the user's, every rank comes to the same answer
        if env.rank == 0 or not isinstance(error, UserError):
            report(str(error))
        return Outcome(error.exit_code, error=error)
    try:
        record_collectives(os.environ)
        world = start_process_group(env)
        rendezvous.remove_meeting_files(env, os.environ)
    except DstuneError as error:  # a node with too few GPUs; the other ranks wait for these until they are ended
        report(f"rank {env.rank}: {error}")
        return Outcome(error.exit_code, error=error)
    config: RunConfig | None = None
    prepared: dict[str, Any] | None = None
    if world.is_main:
        config, prepared = _prepared_for_all(prepare_run)
    prepared = world.broadcast(prepared)
    assert prepared is not None
    if "error" in prepared:
        refusal = from_json(prepared["error"])
        if world.is_main:
            report(str(refusal))
        world.barrier()
        return Outcome(refusal.exit_code, error=refusal)
    run_dir = prepared["run"]
    if not prepared["to do"]:
        world.barrier()
        return Outcome(EXIT_DONE, prepared["place"])
    os.environ.update(prepared["variables"])
    record_collectives(os.environ, run_dir)
    errors: list[DstuneError] = []

    def report_error(error: DstuneError) -> None:
        errors.append(error)
        report_once(run_dir, env, error, prints=prints)

    def work() -> None:
        refuse_unshared(world, run_dir)
        train(config or read_decided(run_dir / "run.yaml").config, run_dir, world)

    code = guarded(work, report_error)
    return Outcome(code, prepared["place"], errors[0] if errors else None)


def _prepared_for_all(
    prepare_run: Callable[[], tuple[RunConfig | None, Path, Path]],
) -> tuple[RunConfig | None, dict[str, Any]]:
    """Rank 0's configuration, and what the other ranks are sent: the run, or the error that there is instead of one."""
    try:
        config, run_dir, place = prepare_run()
        # Files refer to variables of rank 0's environment, which the launcher may have kept from the others.
        names = set(REFERENCE.findall((run_dir / "run.yaml").read_text(encoding="utf-8"))) & os.environ.keys()
        variables = {name: os.environ[name] for name in names} | variables_for_ranks(run_dir)
        return config, {"run": run_dir, "place": place, "to do": config is not None, "variables": variables}
    except DstuneError as error:
        return None, {"error": to_json(error)}
    except Exception as error:  # the other ranks wait for an answer whatever happens here
        traceback.print_exc()
        return None, {"error": to_json(DstuneError(f"{type(error).__name__}: {error}"))}


def refuse_unshared(world: World, run_dir: Path) -> None:
    """Raises UserError on all ranks where nodes do not see the run directory that rank 0 made: every rank writes its
    shards of a checkpoint there, and reads those of others when the number of ranks changes."""
    written = world.broadcast((run_dir / "run.yaml").read_bytes() if world.is_main else None)
    file = run_dir / "run.yaml"
    sees = file.is_file() and file.read_bytes() == written
    blind = sorted(
        {
            host
            for host, is_seen in zip(world.gather(environment.host()), world.gather(sees), strict=True)
            if not is_seen
        }
    )
    if blind:
        reason = f"it is not there on {', '.join(blind)}: the nodes do not share this file system"
        fix = "give a run.dir on a file system that all nodes share (caches and data may be each node's own)"
        raise UserError(Problem("run.dir", reason, fix, str(run_dir)))


def record_collectives(variables: MutableMapping[str, str], run_dir: Path | None = None) -> None:
    """Turn on NCCL's flight recorder: a collective that times out leaves the last ones of each rank in `logs/` of the run, which
    `torchfrtrace` reads. NCCL looks for the size when ranks meet, and for the place when it writes. What the user has set is
    kept."""
    if not accelerator.present():
        return
    renamed = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    variables.setdefault("TORCH_FR_BUFFER_SIZE" if renamed else "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    variables.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if run_dir is not None:
        file = "TORCH_FR_DUMP_TEMP_FILE" if renamed else "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
        variables.setdefault(file, str(run_dir.absolute() / "logs" / "nccl_trace_rank_"))


if __name__ == "__main__":
    exit_now(main())
