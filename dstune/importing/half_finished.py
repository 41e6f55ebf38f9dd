"""Continues a half-finished run of transformers' Trainer with DeepSpeed: writes a run directory with a checkpoint of dstune's own.

From then on it is a run like any other: `dstune train RUN` continues it on any number of ranks and at any ZeRO stage.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dstune.checkpoint import store
from dstune.config.compose import compose
from dstune.config.overrides import key_of
from dstune.config.run_file import Composed, write_run
from dstune.config.schema import RunConfig
from dstune.config.validate import validate
from dstune.core.errors import Problem, UserError
from dstune.core.files import INCOMPLETE
from dstune.core.parsing import parse_json, read_file
from dstune.core.paths import RUN_FILE, cache_root
from dstune.core.rank_env import RankEnv
from dstune.data import sources
from dstune.data.build import prepare
from dstune.data.collate import NO_TARGET
from dstune.data.order_file import write_order
from dstune.data.prepared import PreparedData
from dstune.data.rows import recognise
from dstune.generation.answers import write_texts
from dstune.importing.convert import USUAL, carry, text_of
from dstune.importing.result import MEANINGLESS, Dropped, Import
from dstune.importing.sampler_order import TrainerSampler
from dstune.importing.trainer_checkpoint import ADAPTER, WHERE, TrainerCheckpoint, read, refused_damage
from dstune.importing.trl import DEFAULTS
from dstune.launch.commands import NO_TELEMETRY, OFFLINE
from dstune.launch.console import Console
from dstune.models.load import load_tokenizer
from dstune.planning.source import config_json
from dstune.protocols import schedule_of
from dstune.show.command import with_local_files
from dstune.trainer.data_loader import refuse_other_numbers
from dstune.trainer.sanity_checks import content_digest, samples_digest
from dstune.trainer.state import FORMAT, TrainState
from dstune.zero.restore import WEIGHT
from dstune.zero.shard_files import SafeTensors, write_file
from dstune.zero.weight_files import BUFFER, weights_file

ORDER = "order.jsonl"
TOOL = "trl"
"""The tool whose table has all arguments of the Trainer."""
FILE_BYTES = 1 << 30
"""Bytes of tensors from which on a file of the checkpoint is full."""
MAX_ROWS = 1 << 27
"""Most rows of all steps: the file of their order has some ten bytes for each, and a rank holds eight."""
ALONE = RankEnv(0, 1, 0, 1, "alone")

CARRIED = {
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "num_train_epochs", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "tf32"),
    *DEFAULTS,
}
"""Arguments that are carried even where they have the Trainer's default, which may be another one in dstune."""
SETTLED = {
    *("output_dir", "logging_dir", "run_name", "report_to", "deepspeed", "max_steps", "bf16", "fp16", "bf16_full_eval"),
    *("accelerator_config", "data_seed", "dataloader_drop_last", "train_sampling_strategy", "group_by_length"),
    *("average_tokens_across_devices", "label_smoothing_factor", "shuffle_dataset", "packing_strategy"),
    *("sample_packing", "curriculum_sampling", "resume_from_checkpoint", "ignore_data_skip", "local_rank"),
    *("hf_deepspeed_config", "deepspeed_plugin", "distributed_state", "use_cpu", "no_cuda", "parallelism_config"),
    *("save_safetensors", "restore_callback_states_from_checkpoint", "batch_eval_metrics", "mixed_precision"),
    *(
        "activation_checkpointing",
        "disable_tqdm",
        "log_level_replica",
        "logging_nan_inf_filter",
        "torchdynamo",
        "label_names",
    ),
}
"""Arguments that the checkpoint itself answers, that are examined here, or that only concern where the Trainer ran."""
OTHER_OBJECTIVES = ("DPO", "KTO", "ORPO", "CPO", "Reward", "GRPO", "RLOO", "PPO", "BCO", "GKD", "XPO", "NashMD", "PRM")
"""Beginnings of TRL's classes of arguments for losses other than that of the next token."""
NEAR = 1e-6
"""Largest difference of two rates, as a share of the peak, that counts as none: rounding."""
WEIGHTS_INSTEAD = "start a new run from its weights: model.path=CHECKPOINT, or method.adapter=CHECKPOINT for an adapter"


@dataclass(frozen=True)
class ContinuedRun:
    """What became of the checkpoint."""

    run: str
    kind: str
    """Class of the Trainer's arguments."""
    step: int
    total_steps: int
    ranks: int
    """Ranks that wrote the checkpoint."""
    stage: int
    rows: int
    dropped: dict[str, Dropped]
    """Arguments that are not carried over."""
    differences: list[str]
    """Why losses may differ from those that the Trainer would have had."""
    assumed: list[str]


def continue_checkpoint(folder: Path, run: Path, overrides: Sequence[str], console: Console) -> ContinuedRun:
    """Write a run directory that continues the checkpoint in `folder`.

    overrides: what the checkpoint does not say, such as `data.train=rows.jsonl`; they take precedence over what it says.

    Raises:
        UserError: the checkpoint is damaged, its run has something that dstune cannot continue, or the rows are not its rows.
    """
    _refuse_place(folder, run)
    console.stage(f"reading {folder}")
    checkpoint = read(folder)
    imported = _imported(checkpoint, run, overrides)
    if problems := [*_changes(checkpoint, imported), *imported.problems]:
        raise UserError(problems)
    composed = _composed(imported, folder, overrides)
    validate(composed.config)
    _refuse_other_rates(checkpoint, composed.config)
    os.environ.update(NO_TELEMETRY | OFFLINE)
    local = with_local_files(composed.config, console)
    if _trains_completions_only(checkpoint, local):
        imported.values["task.train_on_prompt"] = False
        composed = _composed(imported, folder, overrides)
        local = replace(local, task=composed.config.task)
    composed = replace(composed, config=replace(composed.config, method=local.method))  # with the adapter's settings
    console.stage("preparing the rows")
    data = prepare(local, load_tokenizer(local.model), ALONE, cache_root(), write=write_texts)
    refuse_other_numbers(run.joinpath(ORDER).as_posix(), data)
    sampler = _sampler(checkpoint, composed.config, len(data.train.lengths))
    _refuse_other_tokens(checkpoint, composed.config, sampler, data)
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_order(run / ORDER, sampler.epochs(checkpoint.total_steps))
        console.stage("writing the checkpoint")
        with refused_damage(folder):
            _write_checkpoint(checkpoint, run, composed.config, data)
        write_run(run / RUN_FILE, composed)
    except BaseException as error:
        shutil.rmtree(run, ignore_errors=True)
        if isinstance(error, OSError):
            reason = f"cannot be written: {error.strerror or error}"
            raise UserError(Problem("--output", reason, "give a folder of yours with room for it", str(run))) from None
        raise
    dropped = {key: entry for key, entry in imported.dropped.items() if entry.kind != MEANINGLESS}
    return ContinuedRun(
        str(run),
        checkpoint.arguments.class_name.rpartition(".")[2],
        checkpoint.step,
        checkpoint.total_steps,
        checkpoint.ranks,
        checkpoint.stage,
        sampler.row_count,
        dropped,
        list(_differences(checkpoint, local, data)),
        list(_assumptions(checkpoint, data)),
    )


def _refuse_place(folder: Path, run: Path) -> None:
    """Raise UserError for a run directory that is not new, or a name that a configuration would resolve."""
    for key, path in ((WHERE, folder), ("--output", run)):
        if "${" in str(path):
            raise UserError(
                Problem(key, "a configuration takes ${...} for a reference", "rename the folder", str(path))
            )
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(Problem("--output", "exists already, and is not empty", "give a new folder", str(run)))


# ---- the configuration ----


def _imported(checkpoint: TrainerCheckpoint, run: Path, overrides: Sequence[str]) -> Import:
    """Return the Trainer's arguments as dstune's keys, by the same table as a configuration of TRL."""
    from transformers import TrainingArguments

    settings, supervised = checkpoint.arguments, _is_supervised(checkpoint)
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    raw = {
        key: value
        for key, value in settings.values.items()
        if key in CARRIED or (value and value != defaults.get(key) and key not in SETTLED and not key.startswith("_"))
    }
    # Since transformers 5.24 it has another name.
    recomputes = settings.values.get("activation_checkpointing", settings.values.get("gradient_checkpointing"))
    raw |= {"gradient_checkpointing": bool(recomputes)}
    choices = {"task": "causal_lm", "zero": f"stage{checkpoint.stage}"}
    if raw.get("dataset_text_field") == "text":  # the default, which says nothing of the rows
        del raw["dataset_text_field"]
    if supervised:
        raw |= {"trainer": "sft"}
        choices["task"] = "chat"
    if checkpoint.has_adapter:
        choices["method"] = "lora"
    choices |= {key: text.partition("=")[2] for text in overrides if (key := key_of(text) or "") in USUAL}
    imported = carry(raw, TOOL, checkpoint.folder, checkpoint.ranks, choices)
    with refused_damage(checkpoint.folder):
        peak = _peak(checkpoint)
    group = checkpoint.groups[0]
    imported.values |= {
        "data.order": str(run / ORDER),
        "data.packing": False,
        "data.clean.duplicates": "keep",
        "data.clean.unicode": False,
        "data.clean.leaks": False,
        "data.split.validation": 0.0,
        "optimizer.lr": peak,
        "optimizer.betas": group.betas,
        "optimizer.eps": group.eps,
        "optimizer.weight_decay": max(each.weight_decay for each in checkpoint.groups),
        "trainer.grad_clip": checkpoint.gradient_clipping,
        "trainer.max_steps": checkpoint.total_steps,
        "trainer.length_grouping": False,
        "trainer.precision": checkpoint.precision,
        "run.dir": str(run),
        "run.name": run.name,
    }
    imported.values["model.path"] = str(checkpoint.folder)
    if checkpoint.has_adapter:
        imported.values["method.adapter"] = str(checkpoint.folder)
        imported.values["model.path"] = _base_of(checkpoint)
    elif not any(checkpoint.folder.glob("*.safetensors")) and not any(
        key_of(text) == "model.path" for text in overrides
    ):
        reason = "the checkpoint has no weights in the format of transformers, from which a model is built"
        fix = "name the model that its run started from: model.path=MODEL (its weights are then taken from the shards)"
        imported.problems.append(Problem("model.path", reason, fix, str(checkpoint.folder)))
    return imported


def _is_supervised(checkpoint: TrainerCheckpoint) -> bool:
    """Return whether the arguments are those of TRL's SFTTrainer. Raises UserError for another trainer of TRL."""
    package, _, name = checkpoint.arguments.class_name.rpartition(".")
    if name.startswith(OTHER_OBJECTIVES) and name.endswith("Config"):
        reason = "only runs with the loss of the next token are continued"
        raise UserError(Problem(WHERE, reason, WEIGHTS_INSTEAD, name))
    if package.split(".")[0] == "swift":
        reason = "ms-swift shuffles rows by a sampler of its own, whose order dstune does not know"
        raise UserError(Problem(WHERE, reason, WEIGHTS_INSTEAD, name))
    return name.startswith("SFT")


def _base_of(checkpoint: TrainerCheckpoint) -> str:
    with refused_damage(checkpoint.folder):
        settings = parse_json(read_file(checkpoint.folder / ADAPTER))
        base = settings["base_model_name_or_path"]
        if not isinstance(base, str) or "${" in base:
            raise ValueError(f"{ADAPTER} names no base model")
        if settings.get("peft_type") != "LORA":
            reason = "only full fine-tuning and LoRA are continued"
            raise UserError(Problem(WHERE, reason, WEIGHTS_INSTEAD, str(settings.get("peft_type"))))
    return base


def _peak(checkpoint: TrainerCheckpoint) -> float:
    rate = checkpoint.groups[0].initial_lr
    return float(checkpoint.arguments.values["learning_rate"]) if rate is None else rate


def _trains_completions_only(checkpoint: TrainerCheckpoint, config: RunConfig) -> bool:
    """Return whether TRL left out the prompts, as it does by default for rows with a prompt and a completion, and only for them."""
    if not _is_supervised(checkpoint) or checkpoint.arguments.values.get("completion_only_loss") is not None:
        return False
    files = sources.of_part(config.data, "train", "data.train")
    row = next((row for row in chain.from_iterable(map(sources.read, files)) if row.fields is not None), None)
    if row is None or row.fields is None:
        return False
    data = config.data
    return recognise(row.fields, data.columns, data.format, config.task, row.place) == "prompt_completion"


def _composed(imported: Import, folder: Path, overrides: Sequence[str]) -> Composed:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "experiment").mkdir()
        (Path(place) / "experiment" / "half_finished.yaml").write_text(
            text_of(imported, TOOL, folder), encoding="utf-8"
        )
        composed = compose(["experiment=half_finished", *overrides], [place])
    run = replace(composed.config.run, dir=imported.values["run.dir"])
    return replace(composed, config=replace(composed.config, run=run), overrides=list(overrides), config_dirs=())


# ---- what cannot be continued ----


def _changes(checkpoint: TrainerCheckpoint, imported: Import) -> Iterator[Problem]:
    """Yield what the run has and dstune's would not have, so that it would be another run from here on."""
    arguments = checkpoint.arguments.values
    yield from _optimizer_changes(checkpoint, imported)
    yield from _order_changes(checkpoint)
    for key in ("lr_scheduler_type", "lr_scheduler_kwargs"):
        if dropped := imported.dropped.get(key):
            yield Problem(key, dropped.reason, WEIGHTS_INSTEAD, str(dropped.value))
    if checkpoint.deepspeed.get("scheduler"):
        reason = "the DeepSpeed file has a scheduler of its own, which is not carried over"
        yield Problem("deepspeed: scheduler", reason, WEIGHTS_INSTEAD)
    if checkpoint.precision == "fp16":
        reason = "the scale of the loss in fp16 is not carried over, and the first steps would be skipped"
        yield Problem("fp16", reason, WEIGHTS_INSTEAD, "true")
    if smoothing := arguments.get("label_smoothing_factor"):
        yield Problem("label_smoothing_factor", "dstune smooths no labels here", WEIGHTS_INSTEAD, str(smoothing))
    if checkpoint.ranks > 1 and arguments.get("average_tokens_across_devices") is False:
        reason = "each rank took the mean of its own tokens; dstune takes the mean of all tokens of a step"
        yield Problem("average_tokens_across_devices", reason, WEIGHTS_INSTEAD, "false")
    for key in ("packing", "sample_packing"):
        if arguments.get(key):
            yield Problem(key, "which texts share a row follows from the other tool's packing", WEIGHTS_INSTEAD, "true")
    if "parallelism_config" in checkpoint.arguments.unread or arguments.get("parallelism_config"):
        yield Problem("parallelism_config", "ranks that share rows are not continued", WEIGHTS_INSTEAD)


def _optimizer_changes(checkpoint: TrainerCheckpoint, imported: Import) -> Iterator[Problem]:
    groups, section = checkpoint.groups, checkpoint.deepspeed.get("optimizer")
    if isinstance(section, Mapping) and section.get("type") not in (None, "AdamW", "Adam"):
        yield Problem("deepspeed: optimizer", "only AdamW is continued", WEIGHTS_INSTEAD, str(section.get("type")))
    elif not section and (imported.choices.get("optimizer", "adamw") != "adamw" or "optim" in imported.dropped):
        optimizer = str(checkpoint.arguments.values.get("optim"))
        yield Problem("optim", "only AdamW with states in fp32 is continued", WEIGHTS_INSTEAD, optimizer)
    if len({(each.initial_lr, *each.betas, each.eps) for each in groups}) > 1:
        reason = "its parameter groups have different rates or moments, and dstune's have one"
        yield Problem("optimizer", reason, WEIGHTS_INSTEAD, ", ".join(f"lr {each.initial_lr}" for each in groups))
    decays = {each.weight_decay for each in groups}
    if decays == {0.0}:
        return
    one_to_one = len(checkpoint.members) == len(groups)
    for number, members in enumerate(checkpoint.members):
        vectors = {name: len(shape) < 2 for name, shape in members.items()}
        decayed = groups[number].weight_decay > 0 if one_to_one else not all(vectors.values())
        for name, is_vector in vectors.items():
            if is_vector is decayed:
                here = "norms, biases and other vectors have none" if is_vector else "all matrices have it"
                reason = f"{name} has {'' if decayed else 'no '}weight decay there; in dstune {here}"
                yield Problem("weight_decay", reason, WEIGHTS_INSTEAD, f"{max(decays):g}")
                return
    if len(decays - {0.0}) > 1:
        yield Problem(
            "weight_decay", "its parameter groups have several, and dstune's one", WEIGHTS_INSTEAD, str(decays)
        )


def _order_changes(checkpoint: TrainerCheckpoint) -> Iterator[Problem]:
    arguments = checkpoint.arguments.values
    accelerator = arguments.get("accelerator_config")
    reason = "the order of its rows cannot be computed"
    if not isinstance(accelerator, Mapping) or not accelerator.get("use_seedable_sampler"):
        why = f"{reason}: without accelerate's seedable sampler it follows from random states"
        yield Problem("accelerator_config: use_seedable_sampler", why, WEIGHTS_INSTEAD, "false")
        return
    for key, usual in (("split_batches", False), ("dispatch_batches", None), ("even_batches", True)):
        if (value := accelerator.get(key, usual)) != usual and value is not None:
            why = f"{reason} for this setting"
            yield Problem(f"accelerator_config: {key}", why, WEIGHTS_INSTEAD, str(value).lower())
    strategy = arguments.get("train_sampling_strategy", "random")
    if arguments.get("group_by_length") or strategy not in ("random", "sequential"):
        why = f"{reason}: rows of similar length were put together, by random states"
        yield Problem("train_sampling_strategy", why, WEIGHTS_INSTEAD, str(strategy))
    for key in ("shuffle_dataset", "curriculum_sampling"):
        if arguments.get(key):
            yield Problem(key, f"{reason}: the rows were put in another order before", WEIGHTS_INSTEAD, "true")


def _refuse_other_rates(checkpoint: TrainerCheckpoint, config: RunConfig) -> None:
    """Raise UserError unless every further step has the rate that it would have had, and the log has the rates of the arguments."""
    from transformers import get_scheduler

    _refuse_other_length(checkpoint, checkpoint.arguments.values.get("max_steps"))
    arguments, total = checkpoint.arguments.values, checkpoint.total_steps
    name, peak = str(arguments.get("lr_scheduler_type", "linear")), config.optimizer.lr
    options = arguments.get("lr_scheduler_kwargs") or {}
    with refused_damage(checkpoint.folder):
        given = arguments.get("warmup_steps") or arguments.get("warmup_ratio") or 0
        warmup = int(given) if given >= 1 else math.ceil(total * given)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak or 1.0)
        theirs = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=dict(options))
        factor_there = theirs.lr_lambdas[0]
    schedule = schedule_of(config.schedule)
    for step in range(checkpoint.step, total):
        there, here = factor_there(step), schedule.factor(step, total)
        if abs(there - here) > NEAR:
            reason = f"step {step + 1} would have a rate of {peak * here:.6g}, and had one of {peak * there:.6g} there"
            fix = WEIGHTS_INSTEAD
            if step < warmup:
                fix = f"continue from a checkpoint of step {warmup} or later, after the warm-up, or {WEIGHTS_INSTEAD}"
            raise UserError(Problem("lr_scheduler_type", reason, fix, name))
    logged = [entry for entry in _log(checkpoint) if "learning_rate" in entry]
    if logged:
        at: Any = logged[-1].get("step")
        rate: Any = logged[-1]["learning_rate"]
        with refused_damage(checkpoint.folder):
            # Versions of the Trainer differ in whether they note the rate of the step or of the next one.
            expected = [peak * factor_there(at - 1), peak * factor_there(at)]
            differs = all(abs(rate - each) > 1e-4 * abs(peak) for each in expected)
        if differs:
            reason = f"at step {at} it trained with a rate of {rate:g}, and its arguments say {expected[0]:g}"
            raise UserError(
                Problem("learning_rate", f"{reason}: it had a schedule of its own", WEIGHTS_INSTEAD, f"{peak:g}")
            )


def _refuse_other_length(checkpoint: TrainerCheckpoint, steps: Any) -> None:
    """Raise UserError if the arguments give the run another number of `steps`, on which the rates depend."""
    if isinstance(steps, int) and steps > 0 and steps != checkpoint.total_steps:
        reason = f"its state says {checkpoint.total_steps:,} steps, and its arguments {steps:,}"
        raise UserError(Problem(WHERE, reason, "give a checkpoint as the Trainer wrote it", str(checkpoint.folder)))


# ---- rows ----


def _sampler(checkpoint: TrainerCheckpoint, config: RunConfig, row_count: int) -> TrainerSampler:
    """Return the sampler of the Trainer. Raises UserError if it has another number of rows than `data.train`."""
    arguments = checkpoint.arguments.values
    seed = arguments.get("data_seed")
    with refused_damage(checkpoint.folder):
        sampler = TrainerSampler(
            row_count,
            int(arguments["seed"] if seed is None else seed),
            int(arguments["per_device_train_batch_size"]),
            int(arguments["gradient_accumulation_steps"]),
            checkpoint.ranks,
            drops_last=bool(arguments.get("dataloader_drop_last")),
            shuffles=arguments.get("train_sampling_strategy", "random") == "random",
        )
        for name, number in (
            ("train_micro_batch_size_per_gpu", sampler.micro_batch_size),
            ("gradient_accumulation_steps", sampler.accumulation_steps),
            ("train_batch_size", sampler.rows_together * sampler.accumulation_steps),
        ):
            if (value := checkpoint.deepspeed.get(name, number)) != number:
                raise ValueError(f"DeepSpeed's {name} is {value}, and its arguments and shards say {number}")
        epoch = float(checkpoint.state["epoch"])
    with refused_damage(checkpoint.folder):
        if int(arguments.get("max_steps") or 0) <= 0 and sampler.steps:
            _refuse_other_length(checkpoint, math.ceil(float(arguments["num_train_epochs"]) * sampler.steps))
    if row_count * -(-checkpoint.total_steps // max(1, sampler.steps)) > MAX_ROWS:
        reason = (
            f"{checkpoint.total_steps:,} steps have more than {MAX_ROWS:,} rows, too many for the file of their order"
        )
        raise UserError(Problem("data.train", reason, WEIGHTS_INSTEAD, str(config.data.train)))
    expected = sampler.epoch_after(checkpoint.step) if sampler.batches else 0.0
    if abs(epoch - expected) > 1e-6:
        steps = checkpoint.step / epoch if epoch else 0.0
        reason = (
            f"{row_count:,} rows are {sampler.steps:,} steps an epoch, and after step {checkpoint.step} its run was at epoch "
            f"{epoch:.4f}, which is about {steps:,.1f} steps an epoch: it had other rows"
        )
        fix = "give the rows that it was trained on, in their order, and none more"
        raise UserError(Problem("data.train", reason, fix, str(config.data.train)))
    return sampler


def _refuse_other_tokens(
    checkpoint: TrainerCheckpoint, config: RunConfig, sampler: TrainerSampler, data: PreparedData
) -> None:
    """Raise UserError if the rows of a step have more or fewer tokens than the Trainer has counted, where it has counted any."""
    for key in ("num_tokens", "num_input_tokens_seen"):
        logged = [(entry["step"], entry[key]) for entry in _log(checkpoint) if {"step", key} <= entry.keys()]
        if not logged:
            continue
        # The difference of two entries: a count begins anew where the Trainer has continued a run.
        (begin, before), (end, after) = [(0, 0), *logged][-2:]
        with refused_damage(checkpoint.folder):
            if not 0 <= begin <= end <= checkpoint.step:
                raise ValueError("its log has steps that are not done")
            steps = list(chain.from_iterable(sampler.epochs(int(end))))[int(begin) : int(end)]
            tokens, counted = int(data.train.lengths[list(chain.from_iterable(steps))].sum()), int(after) - int(before)
        if counted > 0 and tokens != counted:
            reason = (
                f"the rows of the steps {begin + 1} to {end} have {tokens:,} tokens, and the Trainer counted {counted:,} "
                f"({key}): it made other tokens of them"
            )
            fix = (
                "compare with `dstune data show`: the template (model.chat_template), data.max_length, or whether a text ends "
                "with the end token; rows that are token ids (data.format=tokens) are taken as they are"
            )
            raise UserError(Problem("data.train", reason, fix, str(config.data.train)))
        return


def _log(checkpoint: TrainerCheckpoint) -> list[dict[str, Any]]:
    """Return the entries of the Trainer's log."""
    entries = checkpoint.state.get("log_history")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _differences(checkpoint: TrainerCheckpoint, config: RunConfig, data: PreparedData) -> Iterator[str]:
    """Yield why losses may differ from those that the Trainer would have had."""
    values = config_json(config.model)
    dropouts = {key: value for key, value in values.items() if "dropout" in key or "pdrop" in key}
    if checkpoint.has_adapter:
        dropouts["lora_dropout"] = getattr(config.method, "dropout", 0.0)
    active = {key: value for key, value in dropouts.items() if isinstance(value, (int, float)) and value > 0}
    if active:
        names = ", ".join(f"{key}={value:g}" for key, value in active.items())
        yield f"dropout ({names}) draws other masks: dstune's follow from trainer.seed, the step and the micro-batch"
    if checkpoint.arguments.values.get("neftune_noise_alpha"):
        yield "NEFTune draws other noise: dstune's follows from trainer.seed, the step and the micro-batch"
    if _is_supervised(checkpoint) and getattr(config.task, "train_on_prompt", True) is False:
        if checkpoint.arguments.values.get("assistant_only_loss"):
            yield "TRL counts the tokens that the template marks as generated; dstune counts answers with their end tokens"
        elif untrained := _untrained_at_the_end(data):
            yield (
                f"TRL also counts what the template prints after an answer's end token ({untrained} in each row); dstune does "
                "not. Rows of token ids with labels (task=causal_lm data.format=tokens) are the same"
            )
    if checkpoint.precision == "bf16":
        yield "bf16 rounds sums by their order, which depends on the number of ranks and on the kernels"


def _untrained_at_the_end(data: PreparedData) -> str:
    """Return how many tokens after its last target a row has, as text; empty if none."""
    labels = data.train.sample(0).get("labels")
    targets = np.flatnonzero(labels != NO_TARGET) if labels is not None else np.array([])
    count = len(labels) - 1 - int(targets[-1]) if labels is not None and len(targets) else 0
    return f"{count} token{'s' * (count != 1)}" if count else ""


def _assumptions(checkpoint: TrainerCheckpoint, data: PreparedData) -> Iterator[str]:
    yield "the Trainer read the rows of data.train in their order, and made the same tokens of them: `dstune data show RUN`"
    if truncated := data.report["train"].get("truncated"):
        yield f"{truncated:,} rows are longer than data.max_length, and were cut there too"
    if not _is_supervised(checkpoint):
        yield "the loss is that of the next token (task), computed by the model"
    if unread := {
        key: name for key, name in checkpoint.arguments.unread.items() if key not in SETTLED and key[0] != "_"
    }:
        yield f"arguments that hold objects change nothing: {', '.join(sorted(unread))}"


# ---- the checkpoint ----


def _write_checkpoint(checkpoint: TrainerCheckpoint, run: Path, config: RunConfig, data: PreparedData) -> None:
    """Write weights, moments and counters by the parameters' names, which every layout loads. Raises OSError."""
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "weights_only": False,
        "world_size": checkpoint.ranks,
        "zero_stage": checkpoint.stage,
        "weight_parts": 1,
        "shard_settings": {},
        "precision": config.trainer.precision.value,
        "labels": list(data.labels),
        "samples": samples_digest(data),
        "content": content_digest(data),
        "best": None,
        "metrics": None,
        "train": TrainState(step=checkpoint.step, planned_steps=checkpoint.total_steps).to_dict(),
    }
    written = store.folder(run) / (store.tag(checkpoint.step) + INCOMPLETE)
    written.mkdir(parents=True)
    shapes = {name: list(shape) for name, shape in checkpoint.shards.shapes.items()}
    metadata = {"shapes": json.dumps(shapes), "global_steps": str(checkpoint.step)}
    entries = {}
    for number, tensors in enumerate(_files(_pieces(checkpoint))):
        name = weights_file(0, number)
        entries[name] = write_file(SafeTensors(tensors, metadata), written / name)
    store.commit(written, state, entries)


def _pieces(checkpoint: TrainerCheckpoint) -> Iterator[tuple[str, torch.Tensor]]:
    shards = checkpoint.shards
    for name, buffer in shards.buffers.items():
        yield f"{BUFFER}{name}", buffer.clone()
    for name in chain.from_iterable(checkpoint.members):
        yield f"{name}@0", shards.read(name, WEIGHT).float()
        for kind in sorted(shards.kinds(name)):
            yield f"{kind}:{name}@0", shards.read(name, kind).float()
        yield f"step:{name}", torch.tensor(checkpoint.counter(name), dtype=torch.float32)


def _files(pieces: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield tensors by file, so that no more than one file is in memory."""
    tensors: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in pieces:
        tensors[name] = tensor
        size += tensor.nbytes
        if size >= FILE_BYTES:
            yield tensors
            tensors, size = {}, 0
    if tensors:
        yield tensors
