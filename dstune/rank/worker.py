"""What each rank runs, from `run.yaml` to the result: `python -m dstune.rank.worker RUN_DIR`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dstune.checkpoint.model_folder import parameter_names, refuse_added
from dstune.checkpoint.saves import Saves
from dstune.checkpoint.session import Checkpoints
from dstune.config.convert import format_value
from dstune.config.run_file import Composed, read_decided, variables_for_ranks, write_run
from dstune.config.schema import Export, Precision, RunConfig, stage_of
from dstune.core import environment, files, handoff, plugins, rendezvous
from dstune.core.distributed import World
from dstune.core.errors import EXIT_DONE, DstuneError, Preempted, Problem, UserError, from_json, to_json
from dstune.core.files import INCOMPLETE
from dstune.core.paths import cache_root
from dstune.core.rank_env import RankEnv, die_with_parent, from_environment
from dstune.core.rank_errors import report_once, report_to_launcher
from dstune.core.secrets import REFERENCE, publish, redact_output
from dstune.data.blocks import Blocks
from dstune.data.build import prepare, prove
from dstune.models.kernels import use_kernels
from dstune.models.load import load_config, load_model, load_tokenizer, new_weights
from dstune.models.lora_sum import use_joint_sums
from dstune.models.neftune import add_noise
from dstune.models.packed_attention import attention_of_samples
from dstune.models.tensor import slice_model
from dstune.models.ulysses import SequenceCut
from dstune.models.unreached import keep_frozen
from dstune.optim.groups import method_groups
from dstune.protocols import method_of, optimizer_of, parallelism_of, task_of
from dstune.protocols.method import Preparation
from dstune.protocols.method_options import NeedsPreparation, TrainsInStages, UnfreezesLater
from dstune.protocols.task_options import NeedsReference, TrainsOnRollouts
from dstune.rank.finalize import finish
from dstune.rank.process import guarded, leave
from dstune.rank.startup import ask_untuned, describe, show_samples
from dstune.rank.zero_stage import choose_zero_stage
from dstune.tracking.console import Console, show_activities
from dstune.tracking.log import RunLog
from dstune.trainer import micro_batch
from dstune.trainer.callback_list import CallbackList
from dstune.trainer.callbacks.preemption import Preemption
from dstune.trainer.callbacks.startup_timer import StartupTimer
from dstune.trainer.callbacks.watchdog import answer_with_stacks
from dstune.trainer.data_loader import data_loader_of
from dstune.trainer.evaluate import Evaluator
from dstune.trainer.forgetting import Penalties, general_fisher
from dstune.trainer.loop import Training, fit
from dstune.trainer.memory import PeakMemory, keep_freed
from dstune.trainer.monitored_sets import evaluate_monitored_sets
from dstune.trainer.out_of_memory import advice, explained
from dstune.trainer.rollouts import Rollouts
from dstune.trainer.sanity_checks import (
    check_unreached,
    content_digest,
    examine,
    refuse_different_rows,
    samples_digest,
    verify_rows,
)
from dstune.trainer.utilization import prefetch_of, utilization_of
from dstune.zero import accelerator, swap
from dstune.zero.ds_config import SHARD_SETTINGS, deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import partitioned_loading
from dstune.zero.precision import DTYPES, resolve, set_arithmetic
from dstune.zero.slices import Slices
from dstune.zero.start import start_process_group

activity = logging.getLogger("dstune.worker")  # not __name__, which is __main__ in a rank
"""What goes on before the first step; rank 0 shows it."""


def train(config: RunConfig, run_dir: Path, world: World) -> None:
    """Fine-tune on this rank together with the others. Raises Preempted, TrainingFailed or UserError."""
    startup = StartupTimer(os.environ)
    # First, so that a signal during start-up is not lost; of all stages, which share the time and the files that ask.
    preemption = Preemption(config, time.monotonic(), run_dir, is_main=world.is_main)
    config = choose_zero_stage(config, run_dir, world)
    with swap.own_folder(config.zero, run_dir, world) as zero:
        config = replace(config, zero=zero)
        *before, config = stages_of(config, run_dir)
        for stage in before:
            train_before(stage, config, run_dir, world, preemption)
            startup = StartupTimer()  # of the last stage, which `result.json` is about
        train_stage(config, run_dir, world, preemption, startup)


def stages_of(config: RunConfig, run_dir: Path) -> list[RunConfig]:
    """The runs that `config` trains one after another; the last one is the run itself."""
    method = method_of(config.method)
    return method.stages(config, run_dir) if isinstance(method, TrainsInStages) else [config]


def train_stage(
    config: RunConfig, run_dir: Path, world: World, preemption: Preemption, startup: StartupTimer | None = None
) -> None:
    """As `train`, a single stage."""
    setup = Setup(config, run_dir, world, preemption, startup or StartupTimer())
    try:
        setup.configure_rank()
        setup.load_data()
        with explained(setup.doing, setup.less_memory):
            setup.prepare_method()
            setup.build_model()
            setup.build_engine()
            setup.check_arithmetic()
            setup.load_checkpoint()
            run_training(setup, setup.build_training())
    except BaseException:
        if world.size == 1:  # with more of them the device may still wait for a rank that is gone
            setup.close()
        raise
    setup.close()


class Setup:
    """What a rank builds before the loop, in this order: each step takes what the steps before it have made."""

    def __init__(self, config: RunConfig, run_dir: Path, world: World, preemption: Preemption, startup: StartupTimer):
        self.config, self.run_dir, self.world = config, run_dir, world
        self.preemption, self.startup = preemption, startup
        self.started = time.monotonic()
        self.on_gpu = accelerator.present()
        self.console = Console()
        self.message: Callable[[str], None] = self.console.message if world.is_main else lambda text: None

    def close(self) -> None:
        """Another stage may follow in this process, or another run. What the run is worth is decided by now."""
        if hasattr(self, "engine"):
            try:
                self.engine.close()
            except Exception as error:
                activity.warning("the engine could not be closed: %s", error)

    def configure_rank(self) -> None:
        """Precision, groups of ranks, and the dictionary for DeepSpeed."""
        config, world = self.config, self.world
        publish(str(self.run_dir))
        if world.is_main:
            show_activities(self.console)
        self.precision = Precision[world.broadcast(resolve(config).name)]
        parallel = parallelism_of(config.parallel)
        self.cut = SequenceCut.of(parallel.row_ranks, world)
        self.shards = Slices.of(parallel.weight_ranks, world)
        prefetch = prefetch_of(config) if self.on_gpu and stage_of(config.zero) == 3 else None
        self.deepspeed = deepspeed_config(config, world.size, self.precision, on_gpu=self.on_gpu, prefetch=prefetch)
        set_arithmetic(config.trainer)

    def doing(self) -> str:
        """What memory ran out in, and on which of several ranks."""
        what = "training" if hasattr(self, "state") else "setting up the model and the optimizer"
        return what if self.world.size == 1 else f"{what} on rank {self.world.rank}"

    def less_memory(self) -> list[str]:
        values = load_config(self.config.model).get_text_config().to_dict()
        return advice(self.config, values, self.precision, self.world.size, self.world.local_size)

    def load_data(self) -> None:
        config, world = self.config, self.world
        self.tokenizer = load_tokenizer(config.model)
        self.data = prepare(config, self.tokenizer, world.env, cache_root())
        self.startup.mark("data")
        self.served = prove(config, self.tokenizer, self.data)
        self.startup.mark("proof")
        if self.served.note:
            self.message(self.served.note)
        self.blocks: Blocks | None = None
        if self.data.stream is not None:  # now, so that the process that prepares them starts while the model loads
            leader = world.local_rank == 0
            given = self.served.arguments
            self.blocks = Blocks(
                config, self.tokenizer, self.data, self.run_dir, cache_root(), arguments=given, leader=leader
            )
        self.memory = PeakMemory()
        self.task = task_of(config.task)
        if isinstance(self.task, NeedsReference):
            self.data = self.task.before_loading(config, self.data, self.tokenizer, world, self.precision)
        self.startup.mark("data")

    def prepare_method(self) -> None:
        """What the method computes on a copy of the model that is thrown away."""
        config, world = self.config, self.world
        activity.info("loading %s", format_value(config.model.path))
        self.digests = {"samples": samples_digest(self.data), "content": content_digest(self.data)}
        self.method = method_of(config.method)
        prepared = Preparation(self.data)
        if isinstance(self.method, NeedsPreparation):
            prepared = self.method.prepare(config, self.data, self.tokenizer, self.precision, world, self.run_dir)
        self.prepared, self.data = prepared, prepared.data
        labels = self.data.labels
        self.fisher = general_fisher(config, labels, self.tokenizer, self.precision, world, prepared.restrict)

    def build_model(self) -> None:
        """The model with the method's parameters, cut or sharded where ranks share rows or weights, and the head."""
        config, dtype = self.config, DTYPES[self.precision]
        with partitioned_loading(self.deepspeed):
            model = self.prepared.model(config, self.tokenizer, dtype)
            if model is None:
                model = load_model(config, self.tokenizer, self.data.labels, dtype)
        self.model = model
        if self.cut is not None:
            self.cut.install(model)
        self.rows = self.cut or attention_of_samples(config, model, self.world, self.message)
        plain = parameter_names(model)
        self.module = self.method.apply(model, config)
        if config.run.export is not Export.none and not self.method.adapter:
            trained = (name for name, parameter in self.module.named_parameters() if parameter.requires_grad)
            refuse_added(plain, trained, self.method.name)
        if self.shards is not None:
            slice_model(self.module, model, self.shards)
        use_kernels(self.module, config.model, self.message)
        use_joint_sums(self.module)
        if config.model.neftune_alpha:
            add_noise(self.module, model, config.model.neftune_alpha)
        self.startup.mark("model")
        self.head = self.task.head(model, self.rows)  # after the method: an adapter may wrap the projection

    def build_engine(self) -> None:
        """Parameter groups, the optimizer and the DeepSpeed engine."""
        config, module, prepared = self.config, self.module, self.prepared
        prepared.restrict(module, new_weights(self.model))
        keep_frozen(self.model)
        optimizer, groups = optimizer_of(config.optimizer), method_groups(config, module)
        once = goes_once_through(config)
        self.engine = Engine(
            module, optimizer, self.deepspeed, self.world, groups=groups, one_pass=once, slices=self.shards
        )
        self.startup.mark("engine")

    def check_arithmetic(self) -> None:
        """Sanity checks of the head and of packed rows; masks and penalties, while the weights are those of the start."""
        config, engine, world = self.config, self.engine, self.world
        examine(self.head, engine)
        check_unreached(self.model, engine)
        if self.prepared.masks:
            engine.mask(self.prepared.masks)
        self.penalties: Penalties | None = None
        if config.forgetting.l2sp or config.forgetting.ewc:
            self.penalties = Penalties(config.forgetting, engine, new_weights(self.model), self.fisher)
        architecture = self.model.config.get_text_config()
        verify_rows(config, engine, self.head, self.rows, architecture, world, self.message)
        keep_freed()
        refuse_different_rows(world, self.digests["samples"] + self.digests["content"])

    def load_checkpoint(self) -> None:
        """The size of a micro-batch, log-probabilities of the start weights, and the newest checkpoint."""
        engine, world, padding = self.engine, self.world, self.tokenizer.pad_token_id
        zero = self.deepspeed["zero_optimization"]
        self.metadata: dict[str, Any] = {
            "world_size": world.size,
            "zero_stage": engine.stage,
            "weight_parts": 1 if self.shards is None else self.shards.parts,
            "shard_settings": {key: zero[key] for key in SHARD_SETTINGS if key in zero},
            "precision": self.precision.value,
            "labels": list(self.data.labels),
            "chat_template_kwargs": dict(self.served.arguments),
            **self.digests,
        }
        self.checkpoints = Checkpoints(self.config, self.run_dir, engine, world, self.metadata, self.message)
        trials = micro_batch.Trials(
            self.config, self.data.train, engine, self.head, world, padding, self.memory, self.message
        )
        # Before layers are frozen for later: all of them take the most.
        self.config, known = trials.choose_micro_batch_size(self.checkpoints.remembered(micro_batch.NAME))
        if isinstance(self.task, NeedsReference):
            self.data = self.task.before_training(
                self.config, self.data, engine, self.head, world, padding, self.precision
            )
        self.state = self.checkpoints.resume()
        if known is not None:
            self.state.results[micro_batch.NAME] = known
        self.checkpoints.check_space()

    def build_training(self) -> Training:
        """The order of the data, the log and the callbacks."""
        config, world, engine, data, state = self.config, self.world, self.engine, self.data, self.state
        data_loader = data_loader_of(config, data, self.blocks, state.cursor)
        unfreezing = None
        if isinstance(self.method, UnfreezesLater):
            unfreezing = self.method.unfreezing(self.model, engine, data_loader, state.step)
        log = None
        if world.is_main:
            log = RunLog(config, self.run_dir, resumed_at_step=state.step or None, console=self.console)
        run = Training(
            config=config,
            world=world,
            run_dir=self.run_dir,
            engine=engine,
            head=self.head,
            data=data,
            data_loader=data_loader,
            total_steps=config.trainer.max_steps or data_loader.steps(config.trainer.epochs),
            state=state,
            evaluator=Evaluator(config, data, engine, self.head, world, self.tokenizer),
            rewind=self.checkpoints.rewind,
            saves=Saves(config, self.run_dir, engine, world, self.metadata, self.message),
            log=log,
            memory=self.memory,
            pad_token_id=self.tokenizer.pad_token_id,
            utilization=utilization_of(config, self.model, self.module, self.precision, world, len(data.labels)),
            preemption=self.preemption,
            startup=self.startup,
            unfreezing=unfreezing,
            penalties=self.penalties,
            rollouts=self.rollouts(),
            started=self.started,
            seconds_before=state.seconds,
        )
        run.callbacks = CallbackList.for_run(run)
        return run

    def rollouts(self) -> Rollouts | None:
        """What answers the prompts of a task whose rows they are."""
        if not isinstance(self.task, TrainsOnRollouts):
            return None
        return self.task.rollouts(
            self.config, self.data, self.engine, self.head, self.tokenizer, self.world, self.run_dir
        )


def run_training(setup: Setup, run: Training) -> None:
    """From the first lines on the console to `result.json`."""
    run_dir, tokenizer = setup.run_dir, setup.tokenizer
    try:
        describe(run.config, run_dir, run, setup.module, setup.model, setup.prepared)
        run.state.planned_steps = run.total_steps
        show_samples(run, tokenizer, before=True)
        ask_untuned(run, run_dir, setup.module, tokenizer)
        if run.state.step == 0:
            evaluate_monitored_sets(run, "before")
        run.startup.mark("checks")
        request = fit(run)
        if run.rollouts is not None:
            run.rollouts.close()
        run.callbacks.on_train_end(run, request)
        finish(run, setup.checkpoints, run_dir, tokenizer, request, setup.prepared)
    except BaseException:
        if run.rollouts is not None:
            run.rollouts.close()
        if run.log is not None:
            run.log.finish("failed", crashed=True)  # what it holds, before this process ends without further ado
        with suppress(Exception):  # what it raises is not why the run failed
            run.callbacks.close()
        raise
    run.callbacks.close()  # last: a run that is preempted has little time for its result


def goes_once_through(config: RunConfig) -> bool:
    """Whether each micro-batch goes through a decoder once, and the same parameters train from the first to the last step."""
    return task_of(config.task).one_pass and method_of(config.method).same_parameters_throughout


def take_over_export(source: Path, own: Path) -> None:
    """Copy what an earlier stage of another run has exported, unless this run has its own: the checkpoint that the run goes on
    from stands on it, and that run's folder may be gone by the next launch."""
    theirs = source / "export"
    own = own / "export"
    if not (theirs / "config.json").is_file() or own.is_dir():
        return
    temporary = own.with_name(f"{own.name}{INCOMPLETE}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(theirs, temporary)
    temporary.rename(own)


def train_before(stage: RunConfig, config: RunConfig, run_dir: Path, world: World, preemption: Preemption) -> None:
    """A stage in front of the run, in a folder of its own, unless its export is there already, or in `run.resume`'s run."""
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
    """The rank's process as dstune's own launch starts it, here, by the agent of a node or by mpirun."""
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
    """A rank inside somebody else's launch: rank 0 alone prepares the run, all read what it has written, or get its error and
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
        rendezvous.have_met(env, os.environ)
    except DstuneError as error:  # a node with too few GPUs; the other ranks wait for these until they are ended
        report(f"rank {env.rank}: {error}")
        return Outcome(error.exit_code, error=error)
    config: RunConfig | None = None
    given: dict[str, Any] | None = None
    if world.is_main:
        config, given = _prepared_for_all(prepare_run)
    given = world.broadcast(given)
    assert given is not None
    if "error" in given:
        refusal = from_json(given["error"])
        if world.is_main:
            report(str(refusal))
        world.barrier()
        return Outcome(refusal.exit_code, error=refusal)
    run_dir = given["run"]
    if not given["to do"]:
        world.barrier()
        return Outcome(EXIT_DONE, given["place"])
    os.environ.update(given["variables"])
    record_collectives(os.environ, run_dir)
    errors: list[DstuneError] = []

    def report_error(error: DstuneError) -> None:
        errors.append(error)
        report_once(run_dir, env, error, prints=prints)

    def work() -> None:
        refuse_unshared(world, run_dir)
        train(config or read_decided(run_dir / "run.yaml").config, run_dir, world)

    code = guarded(work, report_error)
    return Outcome(code, given["place"], errors[0] if errors else None)


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
        {host for host, seen in zip(world.gather(environment.host()), world.gather(sees), strict=True) if not seen}
    )
    if blind:
        reason = f"it is not there on {', '.join(blind)}: the nodes do not share this file system"
        fix = "give a run.dir on a file system that all nodes share (caches and data may be each node's own)"
        raise UserError(Problem("run.dir", reason, fix, str(run_dir)))


def record_collectives(variables: MutableMapping[str, str], run_dir: Path | None = None) -> None:
    """NCCL's flight recorder: a collective that times out leaves the last ones of each rank in `logs/` of the run, which
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
    leave(main())
