"""The files that a run writes and the lines that it prints before its first step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dstune.config.cadence import cadence
from dstune.config.convert import format_value
from dstune.config.rope import RopeType
from dstune.config.schema import UNTIMED_STEPS, RunConfig
from dstune.core import baseline_file, environment, files
from dstune.core.paths import CERTIFICATE_FILE, certificates_folder
from dstune.core.secrets import redacted
from dstune.data import inputs, recorded_files
from dstune.data.clean.report import summary
from dstune.data.label_names import suspicious
from dstune.data.prepared import PreparedData
from dstune.data.sources import data_source_of
from dstune.data.statistics import with_packing
from dstune.models import kernels
from dstune.models.unreached import count_by_part
from dstune.planning.fillers import fillers
from dstune.protocols import method_of, parallelism_of, schedule_of, task_of
from dstune.protocols.method import Preparation
from dstune.protocols.method_options import GivesCautions
from dstune.tracking.console import FEW_ROWS
from dstune.trainer.baseline import measure_prompted
from dstune.trainer.evaluate import answer_prompts, limited
from dstune.trainer.loop import Training
from dstune.zero import accelerator
from dstune.zero.parts import full_count
from dstune_verify import certificate

FEW_STEPS = 20
"""A run with fewer optimizer steps gets a warning: adapters at their usual rate hardly change in so few."""
MAX_LISTED_LABELS = 12
SEARCHED_ROWS = 2000
"""Training rows that are searched for the tokens of `model.add_tokens`."""


def describe(
    config: RunConfig, run_dir: Path, run: Training, module: torch.nn.Module, base: Any, preparation: Preparation
) -> None:
    """Write `environment.json` and `data_report.json`, and print what is about to be trained. base: the model without the
    method's parameters."""
    hosts = run.world.gather(environment.host())
    if not run.world.is_main or run.log is None:
        return
    total = sum(map(run.engine.whole_count, module.parameters()))
    total += preparation.parameters_left_out
    for message in preparation.messages():
        run.log.message(message)
    trained = run.engine.whole_trained_count
    unreached = count_by_part(base, run.engine.whole_count)
    if masks := preparation.masks:
        masked = sum(full_count(parameter) for name, parameter in module.named_parameters() if name in masks)
        trained += sum(int(mask.sum()) for mask in masks.values()) - masked
    model = {
        "path": format_value(config.model.path),
        "revision": config.model.revision,
        "parameters": total,
        "trained": trained,
        **({"unreached": unreached} if unreached else {}),
    }
    facts = environment.describe(hosts, accelerator.names(), run.data.fingerprint, model)
    facts["kernels"] = kernels.of_run(module, base, run.head, run.engine.inner_optimizer)
    facts["launches"] = environment.launches(run_dir / "environment.json", run.state.step, run.world.size)
    files.write(run_dir / "environment.json", json.dumps(redacted(facts), indent=1))
    record_certificate(run_dir, run.log.message)
    files.write(run_dir / recorded_files.REPORT, json.dumps(redacted(data_report(config, run.data)), indent=1))
    run.log.message(
        f"{format_value(config.model.path)}: {total / 1e6:.1f}M parameters, {trained / 1e6:.2f}M trained ({config.method.name}), "
        f"ZeRO-{run.engine.stage} on {run.world.size} rank{'s' * (run.world.size > 1)}, {run.engine.device.type} "
        f"{str(next(iter(module.parameters())).dtype).removeprefix('torch.')}"
    )
    if unreached:
        parts = ", ".join(f"{name} ({count / 1e6:.2f}M)" for name, count in unreached.items())
        run.log.message(f"frozen, since rows of text never reach them: {parts}")
    rows = {split.name: len(split.lengths) for split in run.data.splits}
    split_counts = [
        f"{count:,} {name} rows{conversations_of(run.data.report.get(name, {}))}" for name, count in rows.items()
    ]
    packed = f" packed into rows of {config.data.max_length:,} tokens" if config.data.packing else ""
    run.log.message(
        f"{', '.join(split_counts)}{packed}; "
        f"steps {run.state.step + 1} to {run.total_steps}, {config.trainer.global_batch_size} {'of these ' * bool(packed)}rows each"
    )
    if labels := run.data.report.get("train", {}).get("labels"):
        run.log.message(label_counts(labels))
    for warning in cautions(config, run):
        run.log.message(f"warning: {warning}")
    if run.unfreezing is not None and (waiting := run.unfreezing.waiting(run.total_steps)):
        run.log.message(
            f"the lowest {waiting} layers stay frozen: training ends before they unfreeze (method.unfreeze_epochs)"
        )
    for part, counts in run.data.report.items():
        if cleaned := summary(counts.get("clean", {})):
            run.log.message(f"cleaning of the {part} rows: {cleaned} (data_report.json)")
    if augment := run.data.report.get("train", {}).get("augment"):
        left_out = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in augment.get("left_out", {}).items())
        without = f", left out: {left_out}" if left_out else ""
        run.log.message(f"{augment['copies']:,} copies of training rows added{without} (data_report.json)")


def record_certificate(run_dir: Path, say: Callable[[str], None]) -> None:
    """Copy the newest certificate of `dstune verify` into the run, and say how its packages and device differ from these."""
    newest = certificate.newest(certificates_folder())
    if newest is None:
        return
    files.write(run_dir / CERTIFICATE_FILE, json.dumps(newest, indent=1))
    if changes := certificate.changes(newest):
        say(
            f"the stack has changed since `dstune verify` on {newest['made'].partition('T')[0]}: {', '.join(changes)} "
            "(`dstune verify` shows whether it still computes the right gradients)"
        )


def conversations_of(counts: Mapping[str, Any]) -> str:
    """Format how many conversations a split's samples come from, and how many times their tokens the samples have; empty unless
    the chat template makes several samples of a conversation."""
    tokens_once, conversations = counts.get("tokens_once"), counts.get("conversations")
    if not tokens_once or not conversations or counts["samples"] <= conversations:
        return ""
    return f" of {conversations:,} conversations ({counts['tokens'] / tokens_once:.1f} times their tokens)"


def label_counts(counts: dict[str, int]) -> str:
    """Format how many training rows each label has, the most frequent first."""
    ordered = sorted(counts, key=lambda name: -counts[name])
    listed = ", ".join(f"{name} {counts[name]:,}" for name in ordered[:MAX_LISTED_LABELS])
    further = f" and {len(ordered) - MAX_LISTED_LABELS} more" if len(ordered) > MAX_LISTED_LABELS else ""
    return f"{len(ordered)} labels: {listed}{further}"


def unlikely_labels(counts: dict[str, int]) -> Iterator[str]:
    """Yield a warning for each label that looks like a typing error; those beyond `MAX_LISTED_LABELS` are only counted."""
    messages = suspicious(counts)
    yield from messages[:MAX_LISTED_LABELS]
    if further := len(messages[MAX_LISTED_LABELS:]):
        yield f"{further:,} more labels look like a slip (data_report.json has all labels)"


def few_steps(config: RunConfig, run: Training) -> Iterator[str]:
    """Yield a warning if the run has few optimizer steps: how its rows become steps, and how to get more."""
    trainer, rows, total = config.trainer, run.data_loader.rows(), run.total_steps
    if run.state.step or total >= FEW_STEPS:
        return
    warning = f"this run has only {total} optimizer step{'s' * (total != 1)}"
    if rows is None:
        yield f"{warning} (trainer.max_steps={trainer.max_steps}): a larger trainer.max_steps trains longer"
        return
    steps_per_pass, samples = run.data_loader.steps(1), len(run.data.train.lengths)
    packed = f" -> {rows:,} packed rows of {config.data.max_length:,} tokens" if config.data.packing else ""
    rows_read = run.data.report.get("train", {}).get("rows", samples)
    split_up = f" -> {samples:,} samples" if samples != rows_read else ""
    steps = f"{steps_per_pass} step{'s' * (steps_per_pass != 1)} of {trainer.global_batch_size} rows in a pass"
    conversion = f"{rows_read:,} rows{split_up}{packed} -> {steps}"
    if trainer.max_steps is not None:
        yield f"{warning} (trainer.max_steps={trainer.max_steps}; {conversion}): a larger trainer.max_steps trains longer"
        return
    needed_per_pass = -(-FEW_STEPS // trainer.epochs)
    batch = (rows - 1) // (needed_per_pass - 1) if needed_per_pass > 1 else 0
    smaller = f", trainer.global_batch_size={batch}" if 1 <= batch < trainer.global_batch_size else ""
    passes = "" if trainer.epochs == 1 else f", {trainer.epochs} passes"
    fix = f"trainer.epochs={-(-FEW_STEPS // max(1, steps_per_pass))}{smaller} or more rows give {FEW_STEPS}"
    yield f"{warning} ({conversion}{passes}), in which a model learns little: {fix}"


def beyond_positions(run: Training) -> Iterator[str]:
    """Yield a warning if training rows are longer than the model's computed (rotary) positions. Rows beyond learned positions were
    cut before."""
    architecture = getattr(run.engine.module, "config", None)
    if architecture is None or architecture.is_encoder_decoder:
        return
    positions, lengths = (
        getattr(architecture.get_text_config(), "max_position_embeddings", None),
        run.data.train.lengths,
    )
    if (
        run.config.model.rope.type is RopeType.dynamic
        or not positions
        or not (beyond := int((lengths > positions).sum()))
    ):
        return
    yield (
        f"{beyond:,} of {len(lengths):,} train rows are longer than the {positions:,} positions that the model was made for "
        f"(the longest has {lengths.max():,} tokens), and servers cut or refuse such rows: data.max_length={positions}, or "
        "extend the positions (model.rope)"
    )


def unprinted_tokens(run: Training, tokenizer: Any) -> Iterator[str]:
    """Yield a warning if tokens of `model.add_tokens` are in none of the first training rows, so that nothing trains them."""
    tokens, table = run.config.model.add_tokens, run.data.train.table
    if not tokens or not run.world.is_main:
        return
    rows = table.select(range(min(SEARCHED_ROWS, len(table))))
    seen = {
        token
        for row in rows
        for name, ids in row.items()
        if name.endswith(("input_ids", "target_ids"))
        for token in ids
    }
    absent = [token for token in tokens if tokenizer.convert_tokens_to_ids(token) not in seen]
    if absent:
        yield (
            f"none of the first {len(rows):,} train samples has {', '.join(absent)} of model.add_tokens, so nothing trains the new "
            "embeddings. The chat template has to print such tokens: in the text of a row they are encoded as text"
        )


def cautions(config: RunConfig, run: Training) -> Iterator[str]:
    """Yield warnings about settings and data that are allowed but probably not intended."""
    yield from few_steps(config, run)
    yield from unlikely_labels(run.data.report.get("train", {}).get("labels", {}))
    for part, counts in run.data.report.items():
        if (bad := counts.get("bad_rows")) and (part == "train" or getattr(config.data, part, None)):
            yield f"{bad:,} of {counts['rows_read']:,} rows of data.{part} are bad and left out (data_report.json names the first)"
        for column, rows in counts.get("unread_columns", {}).items():
            yield f"the column {column!r} of {rows:,} {part} rows is not used; data.columns says which columns are"
        splits_long_rows = task_of(config.task).splits_long_rows
        if (truncated := counts.get("truncated")) and not splits_long_rows:
            longest = f"the longest has {counts['longest']:,} tokens, " if counts.get("longest") else ""
            yield (
                f"{truncated:,} of {counts.get('rows', truncated):,} {part} rows are longer than "
                f"data.max_length={config.data.max_length} and were cut ({longest}`dstune data show` shows them)"
            )
    if run.data.validation is not None and (held_out := len(run.data.validation.lengths)) < FEW_ROWS:
        few = f"{held_out} validation row{'s' * (held_out != 1)}: metrics of so few say little"
        yield f"{few} (data.split.validation, or data.validation=FILE)"
    yield from beyond_positions(run)
    if isinstance(method := method_of(config.method), GivesCautions):
        yield from method.cautions(run)
    if config.trainer.profile_steps and run.total_steps - run.state.step <= UNTIMED_STEPS:
        steps_left = run.total_steps - run.state.step
        reason = f"{steps_left} step{'s' * (steps_left != 1)} left, and the first {UNTIMED_STEPS} of a launch are not profiled"
        yield f"trainer.profile_steps={config.trainer.profile_steps} has no effect: {reason}"
    stopping, every = config.trainer.early_stopping.patience, config.evaluate.every
    if stopping and run.data.validation is not None and cadence(every).times(run.total_steps, run.epochs) == 1:
        yield f"early stopping has nothing to compare: {run.total_steps} steps and evaluate.every={every}"
    parallel = parallelism_of(config.parallel)
    if run.world.local_size % parallel.size:
        payload = parallel.sent_in_layers
        reason = f"parallel.size={parallel.size} does not divide the {run.world.local_size} ranks of a node"
        yield f"{reason}: ranks of two nodes share {payload} over the network in every layer"
    yield from fillers(config, run.world.size)
    yield from changed_schedule(config, run)


def changed_schedule(config: RunConfig, run: Training) -> Iterator[str]:
    """Yield a warning if the number of steps of a continued run has changed, so that its learning rate jumps."""
    step, total_before = run.state.step, run.state.planned_steps
    if not step or not total_before or total_before == run.total_steps:
        return
    schedule = schedule_of(config.schedule)
    factor_before = schedule.factor(min(step, total_before - 1), total_before)  # of the next step, or of the last one
    factor = schedule.factor(step, run.total_steps)
    if abs(factor - factor_before) >= 0.01:
        yield (
            f"the run has {run.total_steps:,} steps now instead of {total_before:,}, and its schedule is stretched to them: the "
            f"rate goes on at {config.optimizer.lr * factor:.2g} instead of {config.optimizer.lr * factor_before:.2g}. For a "
            f"schedule of their own, train the further steps as a new run: model.path=EXPORT"
        )


def data_report(config: RunConfig, data: PreparedData) -> dict[str, Any]:
    """Return the contents of `data_report.json`: what happened to the rows, the tables they come from, and how well they pack."""
    report = data.report
    specs = {key: getattr(row_input.data, part) for key, part, row_input in inputs.row_inputs(config)}
    if tables := {key: source.describe(spec) for key, spec in specs.items() if (source := data_source_of(spec))}:
        report = report | {"tables": tables}
    if data.files:
        report = report | {recorded_files.KEY: data.files}
    if not config.data.packing:
        return report
    return with_packing(report, {part.name: part.lengths for part in data.splits}, config.data.max_length)


def show_samples(run: Training, tokenizer: Any, *, before: bool) -> None:
    """Show the model's answers to held-out prompts (`evaluate.samples`). before: the run is starting. Every rank must call it."""
    if not run.config.evaluate.samples or (before and run.state.step > 0):
        return
    if prompts := run.data.prompts[: run.config.evaluate.samples]:
        run.message(f"answering {len(prompts)} held-out prompt{'s' if len(prompts) > 1 else ''} (evaluate.samples)")
    answers = answer_prompts(run.config, run.data, run.engine, tokenizer, run.world)
    if run.log is not None and answers:
        run.log.samples(run.state.step, answers)


def measure_untuned(run: Training, run_dir: Path, module: torch.nn.Module, tokenizer: Any) -> None:
    """Measure the untuned model on the validation rows with worked examples in its prompt (`evaluate.baseline_shots`)."""
    config, validation = run.config, run.data.validation
    if not config.evaluate.baseline_shots or run.state.step > 0 or validation is None:
        return
    peft_module: Any = module
    adapter_disabled = peft_module.disable_adapter() if hasattr(module, "disable_adapter") else nullcontext()
    with adapter_disabled, run.around("asking the untuned model"):
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
    results = [{"shots": answers.shots, "metrics": answers.evaluation.metrics} for answers in prompted]
    baseline_file.remember(run_dir, format_value(config.model.path), validation.name, rows, results)
    for answers in prompted:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in answers.evaluation.metrics.items())
        run.log.message(f"untuned, {answers.shots} examples: {metrics}")
