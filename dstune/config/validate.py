"""Validates a configuration: ranges of single values and rules between several; all problems are reported at once.

Pure: no file, no network, no hardware is looked at. What only a machine or the data can tell is checked where they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from dstune.config import by_method
from dstune.config.augment_rules import check_augment
from dstune.config.cadence import check_cadences
from dstune.config.callbacks import check_callbacks
from dstune.config.convert import ENVIRONMENT, EnvironmentText, format_value
from dstune.config.data_schema import Unwanted
from dstune.config.forgetting_rules import check_forgetting
from dstune.config.launch_rules import check_launch
from dstune.config.multi_task import SHARED_METRICS, check_multi_task, tasks_of
from dstune.config.parallel_rules import check_parallel
from dstune.config.ranges import check_ranges
from dstune.config.rope import check_rope
from dstune.config.schema import (
    PREEMPTION_SIGNALS,
    STAGES,
    UNTIMED_STEPS,
    Attention,
    Automatic,
    EvaluateConfig,
    Export,
    Precision,
    RunConfig,
    Selective,
    SpikeAction,
)
from dstune.config.secret_rules import check_secrets
from dstune.config.sweep_rules import check_sweep
from dstune.config.task_rules import check_task
from dstune.config.token_rules import check_token_ids
from dstune.config.watched import watched
from dstune.config.zero_rules import check_zero
from dstune.core.errors import Problem, UserError
from dstune.protocols import (
    METRICS,
    ROW_FORMATS,
    TASKS,
    TRACKERS,
    launcher_of,
    method_of,
    metric_names,
    optimizer_of,
    parallelism_of,
    registered_metrics,
    schedule_of,
    task_of,
)
from dstune.protocols.task_options import BuildsBatches, TrainsOnRollouts


def validate(config: RunConfig) -> None:
    """Check everything that can be known from the configuration alone.

    Raises:
        UserError: every problem, each with key, value, reason and fix.
    """
    if problems := find_problems(config):
        raise UserError(problems)


def find_problems(config: RunConfig, doubtful: Collection[str] = ()) -> list[Problem]:
    """Return all problems of `config`.

    doubtful: keys, or sections, whose values are not those that the user meant, because what was written for them is
    wrong in itself. A rule's finding counts only if the rule has looked at none of them before. Of `zero.stage=auto` the
    rules see a stage that they allow, and where they allow none the one that least is wrong with.
    """
    if isinstance(config.zero.stage, Automatic):
        least = None
        for stage in reversed(STAGES):
            problems_at_stage = find_problems(at_stage(config, stage), doubtful)
            if least is None or len(problems_at_stage) < len(least):
                least = problems_at_stage
            if not least:
                break
        return least or []
    rules = (
        check_data,
        check_token_ids,
        check_mixture,
        check_multi_task,
        check_augment,
        check_streaming,
        check_order,
        check_task,
        check_model,
        lambda view: method_of(view.method).check(view),
        check_forgetting,
        check_optimizer,
        check_batches,
        check_recomputed,
        check_profile,
        check_callbacks,
        check_schedule,
        check_zero,
        check_parallel,
        check_evaluation,
        check_cadences,
        check_launch,
        check_spikes,
        check_saves,
        check_run,
        check_tracking,
        lambda view: check_sweep(view, metrics_of_run(view)),
    )
    composed = {section: {"name": getattr(config, section).name} for section in ("optimizer", "method", "task")}
    in_range = (by_method.with_composed_default(problem, composed) for problem in check_ranges(config))
    problems = [*in_range, *check_secrets(config)]
    for rule in rules:
        reads, view = watched(config, doubtful)
        problems += [problem for problem in rule(view) if not reads.doubtful_value]
    return problems


def permits(config: RunConfig, changed: RunConfig) -> bool:
    """Return whether `changed` has no problem that `config` does not have."""
    problems_before = find_problems(config)
    return all(problem in problems_before for problem in find_problems(changed))


def at_stage(config: RunConfig, stage: int) -> RunConfig:
    return replace(config, zero=replace(config.zero, stage=stage))


def allowed_stages(config: RunConfig) -> list[int]:
    """Return the stages that cause no problem in `config`; problems at every stage do not count."""
    count_by_stage = {stage: len(find_problems(at_stage(config, stage))) for stage in STAGES}
    return [stage for stage, problems in count_by_stage.items() if problems == min(count_by_stage.values())]


def check_data(config: RunConfig) -> Iterator[Problem]:
    data, task = config.data, task_of(config.task)
    if not data.train and not data.mixture:
        yield Problem(
            "data.train",
            "no training rows are given",
            "data.train=rows.jsonl, a sample (data=chitchat), or an experiment (experiment=quickstart)",
            format_value(data.train),
        )
    read_as = {data.format, *(form.shape for name, form in ROW_FORMATS.classes().items() if name == data.format)}
    readers = [name for name, cls in TASKS.classes().items() if read_as & {*cls.formats}]
    if readers and not read_as & {*task.formats}:
        yield Problem(
            "data.format",
            f"rows of this format are for task={' or '.join(readers)}, but the task is {task.name}",
            f"task={readers[0]}, or rows in the format {' or '.join(task.formats)}",
            data.format,
        )
    for code in data.clean.languages:
        if not re.fullmatch(r"[a-z]{2,3}", code):
            reason = "a language is given by its ISO 639 code"
            yield Problem("data.clean.languages", reason, "codes such as en, de or zh", format_value(code))
    for key, policy in (("refusals", data.clean.refusals), ("toxicity", data.clean.toxicity)):
        if policy is not Unwanted.keep and not task.generates:
            reason = f"this looks at what a model learns to write, and task={task.name} writes nothing"
            yield Problem(f"data.clean.{key}", reason, f"data.clean.{key}=keep", policy.value)
    most = data.clean.max_characters
    if most is not None and data.clean.min_characters > most:
        reason = f"no row has at least this many characters and at most {most} (data.clean.max_characters)"
        yield Problem("data.clean.min_characters", reason, f"at most {most}", format_value(data.clean.min_characters))
    if data.packing and task.unpackable:
        yield Problem("data.packing", f"{task.unpackable}, so rows are not packed", "data.packing=false", "true")
    if not data.pads_rows and isinstance(task, BuildsBatches):
        reason = f"a micro-batch of task={task.name} has several texts of each row, of different lengths"
        yield Problem("data.padding", reason, "data.padding=checked", data.padding.value)
    held_out = [
        (f"data.split.{name}", share)
        for name, share, file in (
            ("validation", data.split.validation, data.validation),
            ("test", data.split.test, data.test),
        )
        if not file and isinstance(share, float) and share
    ]
    if sum(share for _, share in held_out) >= 1:
        yield Problem(
            " + ".join(key for key, _ in held_out),
            "no row is left for training",
            "let the shares sum to less than 1",
            " + ".join(f"{share:g}" for _, share in held_out),
        )


def check_mixture(config: RunConfig) -> Iterator[Problem]:
    for name, source in config.data.mixture.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            # The name becomes part of a metric's name and of a key.
            yield Problem(
                "data.mixture", "a source's name has letters, digits, - and _", "rename it", format_value(name)
            )
        if not source.path.strip():
            key = f"data.mixture.{name}.path"
            yield Problem(key, "no rows are given", f"{key}=rows.jsonl, or a sample such as sample://chitchat", "''")


def check_order(config: RunConfig) -> Iterator[Problem]:
    data, reason = config.data, "data.order numbers the rows of one file, and "
    if data.order is None:
        return
    if data.packing:
        yield Problem("data.packing", f"{reason}packed rows hold several of them", "data.packing=false", "true")
    if data.streaming:
        yield Problem("data.streaming", f"{reason}a stream is never read completely", "data.streaming=false", "true")
    if data.mixture:
        yield Problem("data.mixture", f"{reason}a mixture has several", "data.mixture={} and data.train=FILE")
    if config.forgetting.replay:
        fix = "forgetting.replay=0, or leave data.order out"
        value = format_value(config.forgetting.replay)
        yield Problem("forgetting.replay", f"{reason}replayed rows come from another", fix, value)
    if config.trainer.spike.action is SpikeAction.rollback:
        fix = "trainer.spike.action=warn, or leave data.order out"
        yield Problem(
            "trainer.spike.action", "data.order has no rows for steps that are trained again", fix, "rollback"
        )


def check_streaming(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if not data.streaming:
        return
    if config.trainer.max_steps is None:
        yield Problem(
            "trainer.max_steps",
            "with data.streaming the number of rows is not known, so neither is the length of an epoch",
            "trainer.max_steps=1000, or data.streaming=false",
            "null",
        )
    if data.mixture:
        yield Problem(
            "data.streaming",
            "the weights of data.mixture count passes over complete sources, and the end of a stream is not known",
            "data.streaming=false, or data.mixture={} and one data.train",
            "true",
        )
    if data.max_rows is not None:
        yield Problem(
            "data.max_rows",
            "rows are chosen among all by their hash, and a stream is never read completely",
            "data.max_rows=null; trainer.max_steps ends the run",
            format_value(data.max_rows),
        )
    if data.max_synthetic_share < 1:
        yield Problem(
            "data.max_synthetic_share",
            "the share of synthetic rows is known only after all rows were read, and a stream is read while training",
            "data.streaming=false, or data.max_synthetic_share=1",
            format_value(data.max_synthetic_share),
        )
    task = task_of(config.task)
    if task.has_labels and not task.given_labels:
        yield Problem(
            "task.labels",
            "the labels of a stream are not known before its end",
            "task.labels=[NAME,NAME] names them all",
            "[]",
        )


def check_model(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if not model.path.strip():
        yield Problem("model.path", "no model is given", "model.path=ORG/MODEL, a folder, or model=smollm2", "''")
    if model.revision is not None and model.path.startswith("sample://"):
        yield Problem(
            "model.revision", "a packaged sample has no revisions", "leave it out", format_value(model.revision)
        )
    if model.attention is Attention.flash_attention_2 and config.trainer.precision is Precision.fp32:
        yield Problem(
            "model.attention",
            "flash attention computes in bf16 and fp16 only, and trainer.precision is fp32",
            "trainer.precision=bf16, or model.attention=sdpa",
            model.attention.name,
        )
    if not all(token.strip() for token in model.add_tokens):
        reason = "a token needs at least one character that is no white space"
        yield Problem("model.add_tokens", reason, "leave it out, or for example [TOOL]", format_value(model.add_tokens))
    if model.neftune_alpha:
        yield from _check_noise(config)
    yield from check_rope(config)


def _check_noise(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem if `model.neftune_alpha` would add other noise than the paper's, or different noise on another number of
    ranks."""
    task, method, parallelism = task_of(config.task), method_of(config.method), parallelism_of(config.parallel)
    reason = ""
    if not task.language:
        reason = f"it was measured only for the next-token loss of a causal language model, which task={task.name} does not have"
    elif method.in_front:
        reason = f"method={method.name} trains positions in front of the embeddings, which get no noise in the paper"
    elif parallelism.size > 1:
        reason = f"with parallel={parallelism.name}, ranks have only parts of the rows or layers that get the noise"
    if reason:
        value = format_value(config.model.neftune_alpha)
        yield Problem("model.neftune_alpha", reason, "model.neftune_alpha=0", value)


def check_optimizer(config: RunConfig) -> Iterator[Problem]:
    optimizer = optimizer_of(config.optimizer)
    yield from optimizer.check()
    yield from optimizer.check_run(config)
    if config.optimizer.lr == 0 and config.optimizer.vision_lr:
        reason = "the learning rate of the tower is a multiple of optimizer.lr, which is 0"
        fix = "optimizer.lr=1e-12, which trains almost nothing else"
        yield Problem("optimizer.vision_lr", reason, fix, f"{config.optimizer.vision_lr:g}")


def _answers_per_row(config: RunConfig) -> int:
    task = task_of(config.task)
    return task.answers_per_row if isinstance(task, TrainsOnRollouts) else 1


def check_batches(config: RunConfig) -> Iterator[Problem]:
    trainer = config.trainer
    if trainer.micro_batch_size is Automatic.auto:
        yield from _check_automatic(config)
    elif trainer.rows > (most := trainer.global_batch_size * (answers := _answers_per_row(config))):
        each = "" if answers == 1 else f" with {answers} answers each"
        yield Problem(
            "trainer.micro_batch_size",
            f"a micro-batch cannot have more rows than the optimizer step "
            f"(trainer.global_batch_size={trainer.global_batch_size}{each})",
            f"trainer.global_batch_size={trainer.rows}, or a smaller micro-batch"
            if answers == 1
            else f"trainer.micro_batch_size={most}",
            format_value(trainer.micro_batch_size),
        )


def _check_automatic(config: RunConfig) -> Iterator[Problem]:
    reason = None
    if config.data.streaming:
        reason = "the measurement needs the longest rows, and those of a stream are not known"
    elif why := method_of(config.method).why_not_measured:
        reason = why
    elif config.sweep.parallel > 1 and launcher_of(config.launch).here:
        reason = "parallel trials share memory and time, so none of them can measure its own"
    elif config.trainer.deterministic:
        reason = "it is chosen by measured times, so two runs may choose differently (trainer.deterministic=true)"
    if reason:
        yield Problem("trainer.micro_batch_size", reason, "a number, such as that of `dstune plan`", "auto")


TILED = ("gate_proj", "up_proj", "down_proj")
"""What a feed-forward layer of Llama and its kin has inside. Those of experts go by positions that were sorted already."""


def tiles_problem(model: str, tiles: int) -> Problem:
    """Return the problem that a model without such layers cannot compute them in pieces."""
    reason = f"{model} has no feed-forward layer with {', '.join(TILED)}"
    return Problem("trainer.mlp_tiles", reason, "trainer.mlp_tiles=1", str(tiles))


def check_recomputed(config: RunConfig) -> Iterator[Problem]:
    trainer = config.trainer
    if trainer.mlp_tiles > 1 and isinstance(trainer.activation_checkpointing, Selective):
        reason = "trainer.mlp_tiles recomputes the products of feed-forward layers, which selective checkpointing keeps"
        fix = "trainer.activation_checkpointing=true, or trainer.mlp_tiles=1"
        yield Problem("trainer.activation_checkpointing", reason, fix, "selective")


def check_profile(config: RunConfig) -> Iterator[Problem]:
    max_steps, profiled_steps = config.trainer.max_steps, config.trainer.profile_steps
    if profiled_steps > 0 and max_steps is not None and max_steps <= UNTIMED_STEPS:
        yield Problem(
            "trainer.profile_steps",
            f"the first {UNTIMED_STEPS} steps of a launch are not profiled, and the run has no more "
            f"(trainer.max_steps={max_steps})",
            f"trainer.max_steps={UNTIMED_STEPS + profiled_steps}, or trainer.profile_steps=0",
            format_value(profiled_steps),
        )


def check_schedule(config: RunConfig) -> Iterator[Problem]:
    yield from schedule_of(config.schedule).check(config.trainer.max_steps)


HOLD_OUT = "data.validation=rows.jsonl or data.split.validation=0.05"


def check_evaluation(config: RunConfig) -> Iterator[Problem]:
    evaluate, stopping, task = config.evaluate, config.trainer.early_stopping, task_of(config.task)
    held_out = bool(config.data.validation) or config.data.split.holds_out
    metrics = metrics_of_run(config)
    if stopping.metric not in metrics:
        yield Problem(
            "trainer.early_stopping.metric",
            f"task={task.name} has no such metric",
            f"one of {', '.join(metrics)}",
            format_value(stopping.metric),
        )
    for key in ("slices", "counterfactual"):
        if not task.row_loss and getattr(evaluate, key):
            reason = f"task={task.name} has no separate loss for each row"
            yield Problem(f"evaluate.{key}", reason, f"leave out evaluate.{key}", format_value(getattr(evaluate, key)))
    if evaluate.slice_metric is not None and evaluate.slice_metric not in metrics:
        reason = f"task={task.name} has no such metric"
        yield Problem(
            "evaluate.slice_metric", reason, f"one of {', '.join(metrics)}", format_value(evaluate.slice_metric)
        )
    elif evaluate.slice_metric in generation_metrics(config):
        reason = f"{evaluate.slice_metric} needs generated targets, and none are generated for subgroups"
        yield Problem("evaluate.slice_metric", reason, "evaluate.slice_metric=loss", evaluate.slice_metric)
    yield from _check_metrics_of_plugins(config, metrics)
    yield from _check_what_needs_evaluations(config, held_out)
    if stopping.max_gap is not None and not task.comparable_loss:
        reason = f"the loss of task={task.name} depends on how many texts are compared at once, so there is no gap to measure"
        yield Problem(
            "trainer.early_stopping.max_gap",
            reason,
            "trainer.early_stopping.patience=3",
            format_value(stopping.max_gap),
        )
    if (
        stopping.metric.rpartition("/")[2] in generation_metrics(config)
        and evaluate.generate_rows == 0
        and stopping.metric in metrics
    ):
        reason = f"{stopping.metric} needs generated targets, and evaluate.generate_rows is 0"
        fix = "evaluate.generate_rows=100, or trainer.early_stopping.metric=loss"
        yield Problem("trainer.early_stopping.metric", reason, fix, stopping.metric)
    if evaluate.baseline_shots:
        yield from _check_baseline(config, held_out)
    if evaluate.samples > 0 and not task.generates:
        reason = f"task={task.name} answers no prompts"
        yield Problem("evaluate.samples", reason, "evaluate.samples=0", format_value(evaluate.samples))
    if evaluate.safety and (reason := answers_no_questions(config)):
        yield Problem("evaluate.safety", reason, "evaluate.safety=false", "true")


def answers_no_questions(config: RunConfig) -> str:
    """Return why the model cannot answer the questions of probes; empty if it can."""
    task = task_of(config.task)
    if not task.generates:
        return f"probes read what a model writes, and task={task.name} writes nothing"
    if task.asks_by_prompt:
        return f"probes ask questions, and the model of task={task.name} writes targets for sources"
    return ""


def _check_what_needs_evaluations(config: RunConfig, held_out: bool) -> Iterator[Problem]:
    """Yield problems of settings that need held-out rows, or evaluations during training."""
    evaluate, stopping = config.evaluate, config.trainer.early_stopping
    every = "evaluate.every=25%, or a number of optimizer steps"
    requested = (
        ("trainer.early_stopping.patience", stopping.patience > 0, "early stopping", stopping.patience, True),
        ("trainer.early_stopping.max_gap", stopping.max_gap is not None, "the gap to", stopping.max_gap, True),
        ("run.export", config.run.export is Export.best, "exporting the best weights", config.run.export, True),
        ("evaluate.every", evaluate.every not in (0, EvaluateConfig.every), "evaluating", evaluate.every, False),
        ("evaluate.samples", evaluate.samples > 0, "answering held-out prompts", evaluate.samples, False),
        ("evaluate.slices", bool(evaluate.slices), "measuring slices", evaluate.slices, False),
        ("evaluate.counterfactual", bool(evaluate.counterfactual), "swapping terms", evaluate.counterfactual, False),
    )
    for key, is_requested, setting, value, needs_cadence in requested:
        if not is_requested:
            continue
        if not held_out and not (config.data.test and key in ("evaluate.slices", "evaluate.counterfactual")):
            yield Problem(key, f"{setting} needs validation rows, and none are held out", HOLD_OUT, format_value(value))
        if needs_cadence and evaluate.every == 0:
            yield Problem(key, f"{setting} needs evaluations during training", every, format_value(value))


def _check_baseline(config: RunConfig, held_out: bool) -> Iterator[Problem]:
    evaluate, task = config.evaluate, task_of(config.task)
    shots = format_value(evaluate.baseline_shots)
    if not held_out:
        yield Problem(
            "evaluate.baseline_shots",
            "the baseline is measured on validation rows, and none are held out",
            HOLD_OUT,
            shots,
        )
    if min(evaluate.baseline_shots) < 0:
        yield Problem("evaluate.baseline_shots", "a number of examples is 0 or more", "[0,4]", shots)
    if config.data.streaming:
        reason = "worked examples are drawn from all training rows, and a stream is never read completely"
        yield Problem("evaluate.baseline_shots", reason, "evaluate.baseline_shots=[]", shots)
    if not task.language:
        reason = f"the model of task={task.name} has no vocabulary to answer with"
        fix = "evaluate.baseline_shots=[], and after training `dstune evaluate RUN --shots 0,4 --prompted MODEL`"
        yield Problem("evaluate.baseline_shots", reason, fix, shots)


def metrics_of_run(config: RunConfig) -> tuple[str, ...]:
    """Return the metrics of the run's task. With several tasks: the metrics that all share, and those of each as `NAME/METRIC`."""
    if not (tasks := tasks_of(config)):
        return metric_names(config.task)
    return SHARED_METRICS + tuple(f"{name}/{metric}" for name, task in tasks.items() for metric in metric_names(task))


def generation_metrics(config: RunConfig) -> set[str]:
    """Return the names of the metrics that need generated text, of all tasks of the run. Every metric that a plugin adds to a task
    with such metrics is one of them."""
    tasks = [task_of(task) for task in (config.task, *tasks_of(config).values())]
    return {
        name
        for task in tasks
        if task.generation_metrics
        for name in (*task.generation_metrics, *registered_metrics(task))
    }


def _check_metrics_of_plugins(config: RunConfig, metrics: Sequence[str]) -> Iterator[Problem]:
    chosen = {
        "trainer.early_stopping.metric": [config.trainer.early_stopping.metric],
        "evaluate.slice_metric": [config.evaluate.slice_metric or "loss"],
        "sweep.objective": config.sweep.objective,
    }
    for key, names in chosen.items():
        for name in names:
            if name in metrics and name.rpartition("/")[2] not in METRICS:
                fix = "register a `dstune.Metric` of this name that sets `lower_is_better`"
                yield Problem(key, f"nothing says whether lower values of {name} are better", fix, name)
    for task in map(task_of, (config.task, *tasks_of(config).values())):
        for name in METRICS:
            if not task.has_predictions and METRICS[name].computed_for(task.name):
                reason = (
                    f"the metric {name} is computed from predictions, and evaluations of task={task.name} have none"
                )
                yield Problem("task", reason, f"leave {task.name} out of the `tasks` of {name}", task.name)


def check_saves(config: RunConfig) -> Iterator[Problem]:
    if not config.checkpoint.weights_only:
        return
    fix = "checkpoint.weights_only=false"
    if restarts := launcher_of(config.launch).restarts:
        reason = "a restart continues from a checkpoint, which is impossible if checkpoints contain only weights"
        yield Problem("launch.restarts", reason, f"{fix}, or launch.restarts=0", format_value(restarts))
    if config.trainer.spike.action is SpikeAction.rollback:
        reason = "a run cannot roll back to a checkpoint that contains only weights"
        yield Problem("trainer.spike.action", reason, f"{fix}, or trainer.spike.action=skip", "rollback")


def check_spikes(config: RunConfig) -> Iterator[Problem]:
    why = method_of(config.method).why_no_rollback
    if config.trainer.spike.action is SpikeAction.rollback and why:
        reason = why
        yield Problem("trainer.spike.action", reason, "trainer.spike.action=skip", "rollback")
    if config.trainer.spike.action is SpikeAction.rollback and not config.checkpoint.every:
        reason = "there is no checkpoint to roll back to: checkpoint.every=0 saves only at the end"
        yield Problem("trainer.spike.action", reason, "checkpoint.every=25%, or trainer.spike.action=skip", "rollback")


def check_run(config: RunConfig) -> Iterator[Problem]:
    name = config.run.name
    if not name.strip() or name in (".", "..") or re.search(r"[/\\\0\n]", name):
        yield Problem(
            "run.name",
            "the name of a run must be valid as a folder name",
            "a name without slashes",
            format_value(name),
        )
    for signal_name in config.run.signals:
        if signal_name not in PREEMPTION_SIGNALS:
            reason = "this is not a supported preemption signal"
            yield Problem("run.signals", reason, f"some of {', '.join(PREEMPTION_SIGNALS)}", format_value(signal_name))
    for key in ("dir", "resume"):
        value = getattr(config.run, key)
        if value is not None and not value.strip():
            yield Problem(f"run.{key}", "this is empty", "give a path, or leave it out", "''")


def check_tracking(config: RunConfig) -> Iterator[Problem]:
    tracking = config.tracking
    names = {"run.name": config.run.name, "tracking.project": tracking.project, "tracking.group": tracking.group}
    for tracker in TRACKERS.classes().values():
        names |= tracker.names(tracking)
    for key, value in names.items():
        if isinstance(value, EnvironmentText):
            variable = value.reference.split(ENVIRONMENT, 1)[1].split("}")[0].split(",")[0]
            yield Problem(
                key,
                "names are shown everywhere, but values from the environment are kept secret",
                f'{key}="${variable}", which lets the shell fill it in, if it is no secret',
                value.reference,
            )
    for tracker in TRACKERS.classes().values():
        yield from tracker.check(tracking)
