"""What each rank runs, from `run.yaml` to the result: `python -m dstune.worker RUN_DIR`."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from dstune import baseline_file, environment, handed, rendezvous
from dstune.checkpoint import store
from dstune.checkpoint.saves import Saves
from dstune.checkpoint.session import Checkpoints
from dstune.config.compose import Composed, read_run, write_run
from dstune.config.convert import shown
from dstune.config.domain_stage import FOLDER, classifier_stage, has_language_model_stage, language_model_stage
from dstune.config.method_schema import FeaturesConfig
from dstune.config.schema import Export, RunConfig
from dstune.data.blocks import Blocks
from dstune.data.build import PreparedData, prepare
from dstune.data.clean.report import summary
from dstune.data.statistics import with_packing
from dstune.dist import World
from dstune.errors import EXIT_FAILED, DstuneError, Preempted, Problem, TrainingFailed, UserError
from dstune.models.features import feature_classifier
from dstune.models.heads import Head, build_head
from dstune.models.heads.language import CausalLmHead
from dstune.models.load import load_model, load_tokenizer, new_weights, trained_config
from dstune.models.packing import TOLERANCE, contamination
from dstune.models.peft import apply_method
from dstune.paths import cache_root
from dstune.rank_env import RankEnv, die_with_parent, from_environment
from dstune.redact import publish, redact_output, redacted
from dstune.telling import leave_error, tell_launcher, tell_once
from dstune.tracking.console import Console, show_activities
from dstune.tracking.log import Tracker
from dstune.train import spikes
from dstune.train.baseline import measure_prompted
from dstune.train.beforehand import work_out
from dstune.train.classical import classical_results
from dstune.train.evaluate import Evaluator, answer_prompts, limited
from dstune.train.features import Features
from dstune.train.forgetting import Penalties
from dstune.train.hooks import LEAVING, Cadence, Decision, EarlyStopping, NonFinite, Preemption, Wish
from dstune.train.importance import Selected
from dstune.train.loop import Training, evaluate, fit
from dstune.train.memory import PeakMemory
from dstune.train.optim import build_optimizer, method_groups
from dstune.train.reference import with_reference, with_reference_model
from dstune.train.stragglers import OwnTime
from dstune.train.supply import supply_of
from dstune.train.unfreezing import unfreezing_of
from dstune.train.watchdog import Watchdog, answer_with_stacks
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine, full_count, partitioned_loading, start_process_group
from dstune.zero.precision import DTYPES, resolve

activity = logging.getLogger("dstune.worker")  # not __name__, which is __main__ in a rank
"""What goes on before the first step; rank 0 shows it."""


def train(config: RunConfig, run_dir: Path, world: World) -> None:
    """Fine-tune on this rank together with the others. Raises Preempted, TrainingFailed or UserError."""
    # First, so that a signal during start-up is not lost; of all stages, which share the time and the files that ask.
    preemption = Preemption(config, time.monotonic(), run_dir, is_main=world.is_main)
    if has_language_model_stage(config):
        train_language_model(config, run_dir, world, preemption)
        config = classifier_stage(config, run_dir)
    train_stage(config, run_dir, world, preemption)


def train_stage(config: RunConfig, run_dir: Path, world: World, preemption: Preemption) -> None:
    """As `train`, a single stage."""
    started = time.monotonic()
    publish(str(run_dir))
    console = Console()
    if world.is_main:
        show_activities(console)
    precision = world.broadcast(resolve(config))
    settings = deepspeed_config(config, world.size, precision, on_gpu=torch.cuda.is_available())
    if config.trainer.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is deterministic with a fixed workspace only
        torch.use_deterministic_algorithms(True)
    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, world.env, cache_root())
    blocks = None
    if data.stream is not None:  # now, so that the process that prepares them starts while the model loads
        blocks = Blocks(config, tokenizer, data, run_dir, cache_root(), leader=world.local_rank == 0)
    memory = PeakMemory()
    data = with_reference_model(
        config, data, tokenizer, world, precision, cache_root(), on_gpu=torch.cuda.is_available()
    )
    activity.info("loading %s", shown(config.model.path))
    digest = samples_digest(data)
    before = work_out(config, data, tokenizer, precision, world, run_dir)
    data, features, selection = before.data, before.features, before.selection
    with partitioned_loading(settings):
        if features is not None:
            architecture = trained_config(config, tokenizer, data.labels)
            model = feature_classifier(architecture, DTYPES[precision], config.trainer.seed)
        else:
            model = load_model(config, tokenizer, data.labels, DTYPES[precision])
    module = apply_method(config, model)
    head = build_head(config.task, model)  # after the method: an adapter may wrap the vocabulary projection
    if selection is not None:
        selection.freeze_others(module, new_weights(model))
    engine = Engine(module, build_optimizer(config.optimizer, method_groups(config, module)), settings, world)
    examine(head, engine)
    if selection is not None and selection.masks:
        engine.mask(selection.masks)
    penalties = None
    if config.forgetting.l2sp or config.forgetting.ewc:
        penalties = Penalties(config.forgetting, engine, new_weights(model), before.fisher, world)
    check_packing(config, engine, model.config.get_text_config().vocab_size, world)
    data = with_reference(config, data, engine, head, world, tokenizer.pad_token_id, precision, cache_root())
    facts: dict[str, Any] = {
        "world_size": world.size,
        "zero_stage": engine.stage,
        "precision": precision.value,
        "labels": list(data.labels),
        "samples": digest,
    }
    refuse_different_rows(world, facts["samples"])
    say = console.message if world.is_main else lambda text: None
    checkpoints = Checkpoints(config, run_dir, engine, world, facts, say)
    state = checkpoints.resume()
    checkpoints.check_space()
    supply = supply_of(config, data, blocks, state.cursor)
    total_steps = config.trainer.max_steps or supply.steps(config.trainer.epochs)
    unfreezing = unfreezing_of(config, model, engine, supply, state.step)
    log = Tracker(config, run_dir, resumed_at_step=state.step or None, console=console) if world.is_main else None
    hooks = [
        Cadence(config, total_steps, can_evaluate=data.validation is not None),
        NonFinite(config),
        EarlyStopping(config),
        preemption,
    ]
    run = Training(
        config=config,
        world=world,
        engine=engine,
        head=head,
        data=data,
        supply=supply,
        total_steps=total_steps,
        state=state,
        hooks=hooks,
        evaluator=Evaluator(config, data, engine, head, world, tokenizer),
        rewind=checkpoints.rewind,
        guard=spikes.SpikeGuard(config),
        own_time=OwnTime(),
        saves=Saves(config, run_dir, engine, world, facts, say),
        watchdog=Watchdog(config.trainer.stall_seconds, world.rank, partial(leave_error, run_dir, world.rank)),
        log=log,
        memory=memory,
        pad_token_id=tokenizer.pad_token_id,
        unfreezing=unfreezing,
        penalties=penalties,
        started=started,
        seconds_before=state.seconds,
    )
    try:
        describe(config, run_dir, run, module, features, selection)
        show_samples(run, tokenizer, before=True)
        ask_untuned(run, run_dir, module, tokenizer)
        decision = fit(run)
        run.watchdog.rest()
        finish(run, run_dir, tokenizer, decision, features_seconds=features.seconds if features else 0.0)
    except BaseException:
        if log is not None:
            log.finish("failed", crashed=True)  # what it holds, before this process ends without further ado
        raise


def examine(head: Head, engine: Engine) -> None:
    """Let the head of a language model see whether it may leave the logits out."""
    if isinstance(head, CausalLmHead):
        engine.train(False)
        head.examine(engine.forward, engine.device)
        engine.train(True)


def train_language_model(config: RunConfig, run_dir: Path, world: World, preemption: Preemption) -> None:
    """The first stage of the run, in a folder of its own, unless its export is there already."""
    folder = run_dir / FOLDER
    if world.broadcast((folder / "export" / "config.json").is_file()):
        return
    stage = language_model_stage(config, run_dir)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder / "run.yaml", Composed(stage, []))
    world.barrier()
    try:
        train_stage(stage, folder, world, preemption)
    except Preempted:
        if world.is_main:  # the whole run is preempted; the next launch goes on with this stage
            shutil.copyfile(folder / "result.json", run_dir / "result.json")
        raise


def check_packing(config: RunConfig, engine: Engine, vocabulary: int, world: World) -> None:
    """Raises UserError on all ranks where samples of one packed row see each other on any of them."""
    if not config.data.packing:
        return
    engine.train(False)
    difference, dtype = contamination(engine.forward, vocabulary, engine.device)
    engine.train(True)
    if world.any(not difference <= TOLERANCE[dtype]):  # not a number is no proof either
        raise UserError(
            Problem(
                "data.packing",
                value="true",
                reason=f"attention of {config.model.path} crosses packed samples (logits differ by {difference:.1%})",
                fix="data.packing=false, or another model.attention",
            )
        )


def refuse_different_rows(world: World, digest: str) -> None:
    """Raises UserError on all ranks where nodes with files of their own do not have the same rows."""
    digests = dict(zip(world.gather(environment.host()), world.gather(digest), strict=True))
    common, _ = Counter(digests.values()).most_common(1)[0]
    others = sorted(host for host, found in digests.items() if found != common)
    if others:
        reason = f"the rows on {', '.join(others)} are not those of the other nodes"
        raise UserError(Problem("data.train", reason, "bring the same files to every node"))


def samples_digest(data: PreparedData) -> str:
    """Digest of the lengths and targets of all training samples in order: it changes with the rows, not with the code.

    Of a stream it knows the first block and what the shards are."""
    digest = xxhash.xxh3_64()
    digest.update(data.train.lengths.tobytes())
    digest.update(data.train.weights.tobytes())
    if data.stream is not None:
        digest.update(data.stream.identity.encode())
    return digest.hexdigest()


def describe(
    config: RunConfig,
    run_dir: Path,
    run: Training,
    module: torch.nn.Module,
    features: Features | None,
    selection: Selected | None,
) -> None:
    """Write `environment.json` and say on the console what is about to be trained."""
    hosts = run.world.gather(environment.host())
    if not run.world.is_main or run.log is None:
        return
    total = sum(full_count(parameter) for parameter in module.parameters())
    if features is not None:
        total += features.body_parameters
        took = f"computed in {features.seconds:.1f} s" if features.seconds else "found in the cache"
        run.log.message(f"features of all rows: {took}; the body is not run again")
    trained = run.engine.trained_count
    if selection is not None and selection.masks:
        in_masks = sum(
            full_count(parameter) for name, parameter in module.named_parameters() if name in selection.masks
        )
        trained += sum(int(mask.sum()) for mask in selection.masks.values()) - in_masks
    model = {
        "path": shown(config.model.path),
        "revision": config.model.revision,
        "parameters": total,
        "trained": trained,
    }
    facts = environment.describe(hosts, run.data.fingerprint, model)
    facts["launches"] = environment.launches(run_dir / "environment.json", run.state.step, run.world.size)
    (run_dir / "environment.json").write_text(json.dumps(redacted(facts), indent=1))
    (run_dir / "data_report.json").write_text(json.dumps(redacted(data_report(config, run.data)), indent=1))
    run.log.message(
        f"{shown(config.model.path)}: {total / 1e6:.1f}M parameters, {trained / 1e6:.2f}M trained ({config.method.name}), "
        f"ZeRO-{config.zero.stage} on {run.world.size} rank{'s' * (run.world.size > 1)}, {run.engine.device.type} "
        f"{str(next(iter(module.parameters())).dtype).removeprefix('torch.')}"
    )
    rows = {split.name: len(split.lengths) for split in (run.data.train, run.data.validation, run.data.test) if split}
    run.log.message(
        f"{', '.join(f'{count:,} {name} rows' for name, count in rows.items())}; "
        f"steps {run.state.step + 1} to {run.total_steps}, {config.trainer.global_batch_size} rows each"
    )
    if run.unfreezing is not None and (waiting := run.unfreezing.waiting(run.total_steps)):
        run.log.message(f"the lowest {waiting} layers never train: the run is over before (method.unfreeze_epochs)")
    for part, counts in run.data.report.items():
        if cleaned := summary(counts.get("clean", {})):
            run.log.message(f"cleaning of the {part} rows: {cleaned} (data_report.json)")


def data_report(config: RunConfig, data: PreparedData) -> dict[str, Any]:
    """What happened to the rows, and how well they pack."""
    if not config.data.packing:
        return data.report
    parts = (data.train, data.validation, data.test)
    return with_packing(data.report, {part.name: part.lengths for part in parts if part}, config.data.max_length)


def show_samples(run: Training, tokenizer: Any, *, before: bool) -> None:
    if not run.config.evaluate.samples or (before and run.state.step > 0):
        return
    answers = answer_prompts(run.config, run.data, run.engine, tokenizer, run.world)
    if isinstance(run.log, Tracker) and answers:
        run.log.samples(run.state.step, answers)


def ask_untuned(run: Training, run_dir: Path, module: torch.nn.Module, tokenizer: Any) -> None:
    """`evaluate.baseline_shots`: what the model reaches on the validation rows before training, with examples in front."""
    config, validation = run.config, run.data.validation
    if not config.evaluate.baseline_shots or run.state.step > 0 or validation is None:
        return
    adapted: Any = module
    untouched = adapted.disable_adapter() if hasattr(module, "disable_adapter") else nullcontext()
    with untouched, run.watchdog.paused():
        prompted = measure_prompted(
            config,
            run.data,
            run.engine,
            run.head,
            tokenizer,
            run.world,
            validation,
            config.evaluate.baseline_shots,
            key="evaluate.baseline_shots",
        )
    if run.log is None:
        return
    rows = len(limited(validation, config.evaluate.max_rows, config.task).lengths)
    found = [{"shots": one.shots, "metrics": one.evaluation.metrics} for one in prompted]
    baseline_file.remember(run_dir, shown(config.model.path), validation.name, rows, found)
    for one in prompted:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in one.evaluation.metrics.items())
        run.log.message(f"untuned, {one.shots} examples: {metrics}")


def finish(run: Training, run_dir: Path, tokenizer: Any, decision: Decision, *, features_seconds: float = 0.0) -> None:
    """Final evaluation, save, test, export and result of a run that ended as planned; the result alone of another."""
    state, config = run.state, run.config
    result: dict[str, Any] = {"reason": decision.reason, "export": None, "test": None}
    if not decision.wish & LEAVING:
        evaluated = run.data.validation is not None and state.eval_last_step != state.step
        if evaluated:
            evaluate(run)
            run.watchdog.rest()
        run.saves.settle()
        newest = store.newest(run_dir)
        # Saved again where an evaluation came after the save, so that the checkpoint knows whether it is the best one.
        due = run.world.broadcast(evaluated or newest is None or newest.name != store.tag(state.step))
        if due and not run.saves.save(state, now=True):
            reason = f"step {state.step} could not be saved: {run.saves.refusal}"
            raise TrainingFailed(f"{reason}; continue the run when that is mended")
        if run.data.test is not None:
            result["test"] = run.evaluator(run.data.test).metrics
        if isinstance(config.method, FeaturesConfig) and run.world.is_main:
            method, rows = config.method, config.evaluate.max_rows
            result["feature_seconds"] = round(features_seconds, 3)
            result["classifiers"] = classical_results(method, run.data, config.trainer.seed, rows)
        if run.data.validation is not None and config.evaluate.counterfactual:
            state.extra["counterfactual"] = run.evaluator.counterfactual(run.data.validation)
        if config.run.export is not Export.none and run.world.is_main:
            result["export"] = str(export(run_dir, config))
        run.world.barrier()
        show_samples(run, tokenizer, before=False)
    run.saves.settle()
    run.supply.close(for_good=not decision.wish & LEAVING)
    state.seconds = run.seconds_before + time.monotonic() - run.started
    status = "stopped" if decision.reason else "completed"
    status = "pruned" if decision.wish & Wish.PRUNE else status
    status = "preempted" if decision.wish & Wish.PREEMPT else "failed" if decision.wish & Wish.FAIL else status
    if run.world.is_main:
        found = {name: value for name, value in state.extra.items() if name != spikes.NAME}
        checkpoint = store.newest(run_dir)
        speed = state.tokens_per_second
        result |= {
            "status": status,
            "steps": state.step,
            "world_size": run.world.size,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "tokens_per_second": speed and round(speed, 2),
            "peak_memory_gib": round(state.peak_memory_gib, 4),
            "eval_initial": state.eval_initial,
            "eval_final": state.eval_last,
            "best": state.best and vars(state.best),
            "checkpoint": checkpoint and str(checkpoint),
            "nonfinite_steps": state.nonfinite_steps,
            "overflow_steps": state.overflow_steps,
            "spikes": {**spikes.counts(state), "events": spikes.events(state)},
            "slowest_rank": {"rank": run.stragglers.rank, "to_median": round(run.stragglers.ratio, 3)},
            **({"labels": list(run.data.labels), **found} if found else {}),
        }
        write_result(run_dir, result)
        assert isinstance(run.log, Tracker)
        run.log.summary({key: value for key, value in result.items() if value is not None and key not in state.extra})
        run.log.finish(status)
    run.memory.close()
    run.world.barrier()
    if status == "preempted":
        raise Preempted(f"{decision.reason}: saved at step {state.step}")
    if status == "failed":
        raise TrainingFailed(decision.reason)


def export(run_dir: Path, config: RunConfig) -> Path:
    from dstune.checkpoint.export import export_checkpoint

    checkpoint = store.newest(run_dir)
    if config.run.export is Export.best:
        checkpoint = store.best(run_dir) or checkpoint
    assert checkpoint is not None, "the final save comes before the export"
    return export_checkpoint(run_dir, checkpoint, run_dir / "export", force=True)


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write `result.json` whole or not at all."""
    aside = run_dir / "result.json.incomplete"
    aside.write_text(json.dumps(redacted(result), indent=1))
    aside.replace(run_dir / "result.json")


def main(argv: Sequence[str] | None = None) -> int:
    """The rank's process as dstune's own launch starts it, here or through SLURM, pdsh or mpirun."""
    (argument,) = sys.argv[1:] if argv is None else argv
    die_with_parent()
    answer_with_stacks()
    env = from_environment(os.environ) or RankEnv(0, 1, 0, 1, "alone")
    run_dir = Path(argument)
    handed.settle(env.rank, run_dir, os.environ)
    redact_output()

    def work() -> None:
        config = read_run(run_dir / "run.yaml").config
        rendezvous.meet(env, run_dir, os.environ)
        record_collectives(run_dir, os.environ)
        train(config, run_dir, start_process_group(env))

    return guarded(work, lambda error: tell_launcher(run_dir, env.rank, error))


def main_inside(env: RankEnv, prepare_run: Callable[[], tuple[RunConfig, Path]]) -> int:
    """A rank inside somebody else's launch: rank 0 alone prepares the run, all get it, or its error and exit code."""
    redact_output()
    answer_with_stacks()
    try:
        rendezvous.set_address(env, os.environ)
    except DstuneError as error:  # every rank comes to the same answer
        if env.rank == 0:
            print(f"dstune: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    try:
        world = start_process_group(env)
    except DstuneError as error:  # a node with too few GPUs; the other ranks wait for these until they are ended
        print(f"dstune: rank {env.rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    prepared: tuple[RunConfig, Path] | DstuneError | None = None
    if world.is_main:
        try:
            prepared = prepare_run()
        except DstuneError as error:
            prepared = error
        except Exception as error:  # the other ranks wait for an answer whatever happens here
            traceback.print_exc()
            prepared = DstuneError(f"{type(error).__name__}: {error}")
    prepared = world.broadcast(prepared)
    assert prepared is not None
    if isinstance(prepared, DstuneError):
        if world.is_main:
            print(f"dstune: {prepared}", file=sys.stderr, flush=True)
        world.barrier()
        return prepared.exit_code
    config, run_dir = prepared

    def work() -> None:
        refuse_unshared(world, run_dir)
        train(config, run_dir, world)

    return guarded(work, lambda error: tell_once(run_dir, env, error))


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


def record_collectives(run_dir: Path, variables: MutableMapping[str, str]) -> None:
    """NCCL's flight recorder: a collective that times out leaves the last ones of each rank in `logs/`, which
    `torchfrtrace` reads. What the user has set is kept."""
    if not torch.cuda.is_available():
        return
    renamed = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    size = "TORCH_FR_BUFFER_SIZE" if renamed else "TORCH_NCCL_TRACE_BUFFER_SIZE"
    file = "TORCH_FR_DUMP_TEMP_FILE" if renamed else "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
    variables.setdefault(size, "2000")
    variables.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    variables.setdefault(file, str(run_dir.absolute() / "logs" / "nccl_trace_rank_"))


def guarded(work: Callable[[], None], tell: Callable[[DstuneError], None]) -> int:
    """Run `work` and return the exit code; an error that a user can cause goes to `tell`."""
    try:
        work()
        return 0
    except DstuneError as error:
        tell(error)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return EXIT_FAILED


def leave(code: int) -> None:
    """End this process now: after an error, threads of a collective that waits for dead ranks would keep it alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
