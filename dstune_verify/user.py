"""Cases of what the user has: a DeepSpeed configuration, a model of transformers, LoRA, a precision.

The DeepSpeed configuration is taken as it is, apart from what a tiny model makes necessary: sizes that depend on the model, the
optimizer (SGD shows gradients, Adam hides them), and sections that write files. `Prepared.changes` lists it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dstune_verify import engines
from dstune_verify.cases import installed
from dstune_verify.options import Options
from dstune_verify.training import TrainingCase

MOST_BYTES, MOST_LEVELS = 2**24, 50
ROWS = 2
MOST_ACCUMULATED = 4
BUCKETS = {"reduce_bucket_size": 3000, "allgather_bucket_size": 3000, "stage3_prefetch_bucket_size": 3000}
WRITES_OR_MEASURES = (
    "tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "comms_logger", "dump_state", "wall_clock_breakdown",
    "memory_breakdown", "checkpoint", "nebula", "autotuning", "elasticity", "aio",
)  # fmt: skip
REPLACED = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "steps_per_print")


class ConfigurationError(Exception):
    """The user's file cannot be verified, or is not what it should be."""


@dataclass(frozen=True)
class Prepared:
    """A DeepSpeed configuration for tiny models."""

    settings: dict[str, Any]
    precision: str
    accumulation: int
    clipping: float
    unsupported: str = ""
    """Why DeepSpeed cannot be compared with a plain loop under these settings."""
    changes: list[str] = field(default_factory=list)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file, which may be a stranger's. Raises ConfigurationError."""
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path}: is no regular file")
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MOST_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: cannot be read as JSON of at most {MOST_BYTES:,} bytes ({error})") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: {what} is a JSON object, not a {type(content).__name__}")
    level: list[Any] = [content]
    for _ in range(MOST_LEVELS):
        level = [item for value in level for item in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in level if isinstance(value, (dict, list))]
    if level:
        raise ConfigurationError(f"{path}: is nested more than {MOST_LEVELS} deep")
    return content


def prepare(config: dict[str, Any], precision: str) -> Prepared:
    """Return a DeepSpeed configuration for tiny models. precision: for `"enabled": "auto"`. Raises ConfigurationError."""
    settings, changes = copy.deepcopy(config), []
    for key in (*WRITES_OR_MEASURES, *REPLACED):
        if key in settings:
            del settings[key]
            changes.append(f"{key} left out")
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigurationError(f"zero_optimization is an object, not {json.dumps(zero)[:40]}")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigurationError(f"zero_optimization.stage is 0, 1, 2 or 3, not {json.dumps(zero['stage'])[:40]}")
    precision = _precision(settings, precision)
    accumulation = _whole(settings.get("gradient_accumulation_steps", 1), "gradient_accumulation_steps", auto=2)
    if accumulation > MOST_ACCUMULATED:
        changes.append(f"gradient_accumulation_steps: {MOST_ACCUMULATED} instead of {accumulation}")
        accumulation = MOST_ACCUMULATED
    settings["gradient_accumulation_steps"] = accumulation
    clipping = settings.get("gradient_clipping", 0.0)
    if clipping == "auto":
        clipping = settings["gradient_clipping"] = 1.0  # max_grad_norm of transformers' TrainingArguments
        changes.append("gradient_clipping: 1.0 for auto")
    if not isinstance(clipping, (int, float)):
        raise ConfigurationError(f"gradient_clipping is a number, not {json.dumps(clipping)[:40]}")
    changes += list(_shrink_zero(zero))
    settings |= {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if precision == "fp16":
        settings["fp16"] = settings.get("fp16", {}) | {"enabled": True, "loss_scale": 128}
        changes.append("fp16.loss_scale: 128")
    if remaining := sorted(_autos(settings)):
        raise ConfigurationError(
            f'"auto" is not known for {", ".join(remaining)}: write the value that your trainer uses'
        )
    return Prepared(settings, precision, accumulation, float(clipping), _unsupported(settings), changes)


def _precision(settings: dict[str, Any], precision: str) -> str:
    for name in ("bf16", "bfloat16", "fp16"):
        section = settings.get(name)
        if isinstance(section, dict) and section.get("enabled") == "auto":
            section["enabled"] = precision == name
    if precision and precision != "fp32":
        settings.setdefault(precision, {})["enabled"] = True
    on = [
        name for name in ("bf16", "bfloat16", "fp16")
        if isinstance(settings.get(name), dict) and settings[name].get("enabled")
    ]  # fmt: skip
    if "fp16" in on:
        for key in ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"):
            settings["fp16"].pop(key, None)
        return "fp16"
    return "bf16" if on else "fp32"


def _whole(value: Any, key: str, *, auto: int) -> int:
    if value == "auto":
        return auto
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{key} is a whole number from 1, not {json.dumps(value)[:40]}")
    return value


def _shrink_zero(zero: dict[str, Any]) -> Iterator[str]:
    """Adapt what depends on the model's size or on paths."""
    for key, size in BUCKETS.items():
        if zero.get(key) == "auto":
            zero[key] = size
            yield f"{key}: {size} for auto"
    if zero.get("stage") == 3:
        if zero.get("stage3_param_persistence_threshold") != 0:
            zero["stage3_param_persistence_threshold"] = 0
            yield "stage3_param_persistence_threshold: 0, so that a tiny model is partitioned"
        for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance", "sub_group_size"):
            if zero.get(key) == "auto":
                del zero[key]
    for section in ("offload_optimizer", "offload_param"):
        offload = zero.get(section)
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            zero[section] = {"device": "cpu"}
            yield f"{section}: to the CPU instead of NVMe"


def _autos(settings: Any, path: str = "") -> Iterator[str]:
    if settings == "auto":
        yield path
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _autos(value, f"{path}.{key}".strip("."))


def _unsupported(settings: dict[str, Any]) -> str:
    zero = settings["zero_optimization"]
    for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zenflow"):
        if zero.get(key):
            return f"{key} changes gradients on purpose"
    for section in ("compression_training", "torch_autocast"):
        if isinstance(settings.get(section), dict) and settings[section].get("enabled", section != "torch_autocast"):
            return f"{section} is not compared yet"
    parallel = settings.get("tensor_parallel")
    if isinstance(parallel, dict) and parallel.get("autotp_size", 0) > 1:
        return "tensor parallelism is not compared yet"
    if settings.get("sequence_parallel_size", 1) > 1:
        return "sequence parallelism is not compared yet"
    return ""


TINY: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping-left-out": {"clipping": None},
    "several-buckets": {"small_buckets": True},
    "recomputed": {"recomputation": "non-reentrant"},
    "two-inputs": {"model": "two-inputs"},
    # In small buckets: if both calls of a module fall into one, DeepSpeed 0.19.8 ends with an error. Blocks of large models do not.
    "repeated-reentrant": {"model": "repeated", "recomputation": "reentrant", "small_buckets": True},
    "experts": {"model": "experts", "ban_experts": True, "rows": 4, "length": 17},
}
"""What is tried of the user's settings on the tiny models. `clipping-left-out` is only tried if the settings leave it out; the
other cases say so explicitly then, so that each shows its own faults."""
OF_NETWORK: dict[str, dict[str, Any]] = {
    "model": {},
    "clipping-left-out": {"clipping": None},
    "model-recomputed": {"recomputation": "non-reentrant"},
    "model-reentrant": {"recomputation": "reentrant"},
}
WITHOUT_FILE: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2, "accumulation": 2},
    "zero3": {"stage": 3, "accumulation": 2},
    "ddp": {"engine": "ddp", "accumulation": 2},
    "fsdp2": {"engine": "fsdp2", "accumulation": 2},
}
"""Engines for a model, LoRA or precision without a DeepSpeed configuration."""


def cases(options: Options) -> list[TrainingCase]:
    """Return the cases of what the user has. Raises ConfigurationError."""
    if not options.any:
        return []
    shared: dict[str, Any] = {"network": options.network, "lora": options.lora}
    variants = OF_NETWORK if options.network is not None else TINY
    if options.deepspeed is not None:
        return [*_of_file(options.deepspeed, options.precision, variants, shared)]
    made = []
    for engine, settings in WITHOUT_FILE.items():
        if settings.get("engine") or installed("deepspeed"):
            for name in ("model", "model-recomputed", "plain", "recomputed"):
                if name in variants:
                    fields = variants[name] | settings | shared | {"precision": options.precision or "fp32"}
                    made.append(TrainingCase(f"yours-{engine}-{name}", **fields))
    return made


def _of_file(
    config: dict[str, Any], precision: str, variants: dict[str, dict[str, Any]], shared: dict[str, Any]
) -> Iterator[TrainingCase]:
    prepared = prepare(config, precision)
    base = TrainingCase(
        "yours", settings=prepared.settings, precision=prepared.precision, accumulation=prepared.accumulation,
        clipping=prepared.clipping, unsupported=prepared.unsupported, **shared,
    )  # fmt: skip
    for name, fields in variants.items():
        if base.lora and fields.get("model") == "experts":
            continue  # experts without gradients among adapters: the tiny experts have none
        if base.zero_stage < 3 and fields.get("model") == "repeated":
            continue  # ZeRO-1 and ZeRO-2 refuse it
        fields = dict(fields)
        settings = prepared.settings
        if "gradient_clipping" not in settings and "clipping" not in fields:
            settings = settings | {"gradient_clipping": 0.0}
        elif "clipping" in fields and "gradient_clipping" in settings:
            continue
        if fields.pop("small_buckets", False):
            if base.zero_stage == 0:
                continue
            settings = engines.merged(settings, {"zero_optimization": BUCKETS})
        yield replace(base, name=f"yours-{name}", settings=settings, **fields)
