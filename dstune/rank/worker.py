"""The program of a training rank, from `run.yaml` to the result: `python -m dstune.rank.worker RUN_DIR`."""

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
from dstune.rank.startup import describe, measure_untuned, show_samples, unprinted_tokens
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
    # Built first, so that no signal is lost during start-up. All stages share it: they share the time limit and the stop files.
    preemption = Preemption(config, time.monotonic(), run_dir, is_main=world.is_main)
    config = choose_zero_stage(config, run_dir, world)
    with swap.own_folder(config.zero, run_dir, world) as zero:
        config = replace(config, zero=zero)
        *earlier_stages, config = stages_of(config, run_dir)
        for stage in earlier_stages:
            train_earlier_stage(stage, config, run_dir, world, preemption)
            startup = StartupTimer()  # `result.json` has the times of the last stage
        train_stage(config, run_dir, world, preemption, startup)


def stages_of(config: RunConfig, run_dir: Path) -> list[RunConfig]:
    """Return the configurations that are trained one after another; the last one is the run itself."""
    method = method_of(config.method)
    return method.stages(config, run_dir) if isinstance(method, TrainsInStages) else [config]


def train_stage(
    config: RunConfig, run_dir: Path, world: World, preemption: Preemption, startup: StartupTimer | None = None
) -> None:
    """Train a single stage. Raises as `train` does."""
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
        if world.size == 1:  # with several ranks the device may still be waiting for one that is gone
            close(engine, setup.task)
        raise
    close(engine, setup.task)


def close(engine: Engine | None, task: Task) -> None:
    """Close the engine and the task's models, so that another stage or run can follow in this process. An error is only logged:
    the run's result is already written."""
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
        for warning in unprinted_tokens(run, tokenizer):
            run.message(f"warning: {warning}")
        run.state.planned_steps = run.total_steps
        show_samples(run, tokenizer, before=True)
        measure_untuned(run, run_dir, module, tokenizer)
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
        # Errors in here must not hide why the run failed.
        with suppress(Exception):
            if run.log is not None:
                run.log.finish("failed", crashed=True)  # flush what it holds: this process ends abruptly
        with suppress(Exception):
            run.callbacks.close()
        raise
    run.callbacks.close()  # last: a preempted run has little time left for its result


def take_over_export(source: Path, run_dir: Path) -> None:
    """Copy the export of an earlier stage from the run `source`, unless this run has one. The checkpoint that this run continues
    was trained from that export, and the other run's folder may be gone by the next launch."""
    source_export, export = source / "export", run_dir / "export"
    if not (source_export / "config.json").is_file() or export.is_dir():
        return
    temporary = export.with_name(f"{export.name}{INCOMPLETE}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source_export, temporary)
    temporary.rename(export)


def train_earlier_stage(
    stage: RunConfig, config: RunConfig, run_dir: Path, world: World, preemption: Preemption
) -> None:
    """Train an earlier stage in its own folder below the run, unless it has been exported there or in `run.resume`'s run."""
    assert stage.run.dir is not None
    folder = Path(stage.run.dir)
    if world.is_main and config.run.resume not in ("auto", "never"):
        take_over_export(Path(config.run.resume) / folder.relative_to(run_dir), folder)
    if world.broadcast((folder / "export" / "config.json").is_file()):
        return
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        run_file = run_dir / "run.yaml"
        write_run(folder / "run.yaml", Composed(stage, [], plugins.used_by(stage)), signature_of=run_file)
    world.barrier()
    try:
        train_stage(stage, folder, world, preemption)
    except Preempted:
        if world.is_main:  # the complete run is preempted, and its next launch continues with this stage
            files.write(run_dir / "result.json", (folder / "result.json").read_bytes())
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the process of a rank that dstune's launch layer started: on this machine, by a node's agent or by mpirun."""
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
    """Result of a rank that another program launched."""

    code: int
    run_dir: Path | None = None
    """None if the run was refused before it had one."""
    error: DstuneError | None = None


def main_inside(
    env: RankEnv, prepare_run: Callable[[], tuple[RunConfig | None, Path, Path]], *, prints: bool = True
) -> Outcome:
    """Run a rank that another program launched. Rank 0 prepares the run; all ranks read what it has written, or return its error
    and exit code.

    prepare_run: returns the configuration (None if nothing is left to do), the folder with the `run.yaml`, and the run directory
    that the user knows, which differs if the run is only copied there (`dstune.launch.mirror`).
    prints: whether errors are printed to stderr; the outcome has them in any case.
    """

    try:
        return _run_inside(env, prepare_run, prints)
    finally:
        rendezvous.leave_store(env, os.environ)


def _run_inside(env: RankEnv, prepare_run: Callable[[], tuple[RunConfig | None, Path, Path]], prints: bool) -> Outcome:
    def report(text: str) -> None:
        if prints:
            print(f"dstune: {text}", file=sys.stderr, flush=True)

    redact_output()
    answer_with_stacks()
    try:
        rendezvous.set_address(env, os.environ)
    except DstuneError as error:  # every rank gets the same UserError, so rank 0 reports it
        if env.rank == 0 or not isinstance(error, UserError):
            report(str(error))
        return Outcome(error.exit_code, error=error)
    try:
        record_collectives(os.environ)
        world = start_process_group(env)
        rendezvous.remove_meeting_files(env, os.environ)
    except (
        DstuneError
    ) as error:  # such as a node with too few GPUs; the other ranks wait for this one until they are ended
        report(f"rank {env.rank}: {error}")
        return Outcome(error.exit_code, error=error)
    config: RunConfig | None = None
    prepared: dict[str, Any] | None = None
    if world.is_main:
        config, prepared = _prepare_for_all(prepare_run)
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


def _prepare_for_all(
    prepare_run: Callable[[], tuple[RunConfig | None, Path, Path]],
) -> tuple[RunConfig | None, dict[str, Any]]:
    """Prepare the run on rank 0. Return the configuration, and the message to all ranks: the run, or the error."""
    try:
        config, run_dir, place = prepare_run()
        # `run.yaml` may refer to variables of rank 0's environment that the launcher did not pass to the other ranks.
        names = set(REFERENCE.findall((run_dir / "run.yaml").read_text(encoding="utf-8"))) & os.environ.keys()
        variables = {name: os.environ[name] for name in names} | variables_for_ranks(run_dir)
        return config, {"run": run_dir, "place": place, "to do": config is not None, "variables": variables}
    except DstuneError as error:
        return None, {"error": to_json(error)}
    except Exception as error:  # the other ranks wait for the message whatever happens here
        traceback.print_exc()
        return None, {"error": to_json(DstuneError(f"{type(error).__name__}: {error}"))}


def refuse_unshared(world: World, run_dir: Path) -> None:
    """Raise UserError on all ranks unless every node sees the run directory that rank 0 made. Every rank writes its checkpoint
    shards there, and reads those of other ranks when their number changes."""
    file = run_dir / "run.yaml"
    content = world.broadcast(file.read_bytes() if world.is_main else None)
    is_shared = file.is_file() and file.read_bytes() == content
    by_host = zip(world.gather(environment.host()), world.gather(is_shared), strict=True)
    hosts_without = sorted({host for host, has_file in by_host if not has_file})
    if hosts_without:
        reason = f"it is not there on {', '.join(hosts_without)}: the nodes do not share this file system"
        fix = "give a run.dir on a file system that all nodes share (caches and data may be each node's own)"
        raise UserError(Problem("run.dir", reason, fix, str(run_dir)))


def record_collectives(variables: MutableMapping[str, str], run_dir: Path | None = None) -> None:
    """Turn on NCCL's flight recorder: if a collective times out, it dumps the last collectives of each rank into `logs/` of the
    run, for `torchfrtrace` to read. The size of its buffer is read when ranks connect, the path of the dump when it is written.
    Variables that the user has set stay."""
    if not accelerator.present():
        return
    has_new_names = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    variables.setdefault("TORCH_FR_BUFFER_SIZE" if has_new_names else "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    variables.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if run_dir is not None:
        variable = "TORCH_FR_DUMP_TEMP_FILE" if has_new_names else "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
        variables.setdefault(variable, str(run_dir.absolute() / "logs" / "nccl_trace_rank_"))


if __name__ == "__main__":
    exit_now(main())
