"""Translates a DeepSpeed configuration, or one of Hugging Face accelerate, into dstune's own keys.

Values that are `auto` are skipped, so dstune's own key decides. `zero_file` puts the result into a run's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.config.convert import dotted, format_value, load
from dstune.config.deepspeed_keys import FIXED, OWN_KEYS, PASSED, REFUSED, TRANSLATED, WITHOUT_EFFECT
from dstune.config.names import classes_of
from dstune.config.not_offered import FEATURES
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json, read_file

AUTO = "auto"
LONGEST_CONFIGURATION = 1_000_000
"""Bytes. A data file that was given by mistake is not read completely."""


@dataclass(frozen=True)
class Value:
    """One value that the file sets."""

    key: str
    """dstune's key, or the name of a group; then `value` is the choice."""
    value: Any
    source: str
    """The key of the file that sets it."""
    implied: bool = False
    """Whether it is DeepSpeed's default for a key that is not in the file. A value that the user gives takes precedence."""


@dataclass
class Content:
    """The content of a file, translated into dstune's keys."""

    values: list[Value] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """Values that dstune has no key for, nested as in DeepSpeed's configuration."""
    accumulation: Value | None = None
    """Micro-batches of a rank in one step; None if the file does not set it."""
    processes: int | None = None
    """Ranks on this machine, which only accelerate's files contain. `launch.processes`, if given, takes precedence."""
    problems: list[Problem] = field(default_factory=list)


# ---- reading ----


def read(path: Path) -> Content:
    """Read a file and translate each of its values by the tables of `deepspeed_keys`.

    Raises:
        UserError: the file cannot be read, or is neither kind of configuration. Other mistakes are in `Content.problems`.
    """
    raw = _parse(path)
    try:
        return _content(raw, path)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        reason = f"a value in it has a type that DeepSpeed does not take there: {error}"
        raise UserError(Problem("zero.path", reason, "give a file that DeepSpeed reads", str(path))) from None


def _content(raw: Mapping[str, Any], path: Path) -> Content:
    if "deepspeed_config" in raw or "distributed_type" in raw:
        return _translate_accelerate(raw, path)
    tables = (OWN_KEYS, TRANSLATED, PASSED, WITHOUT_EFFECT, FIXED, REFUSED)
    if not any(key.split(".", 1)[0] in raw for table in tables for key in table):
        fix = "give the JSON for DeepSpeed, or accelerate's YAML with a section deepspeed_config"
        raise UserError(Problem("zero.path", "this is not a DeepSpeed configuration", fix, str(path)))
    return translate(raw, str(path))


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LONGEST_CONFIGURATION:
            raise UserError(Problem("zero.path", "this is too long for a configuration", value=str(path)))
        text = read_file(path).decode("utf-8")
    except OSError as error:
        fix = "zero.path=ds_config.json, relative to the folder in which dstune is started"
        raise UserError(Problem("zero.path", f"cannot be read: {error.strerror}", fix, str(path))) from None
    except UnicodeDecodeError:
        raise UserError(Problem("zero.path", "this is not text", "give a JSON or YAML file", str(path))) from None
    if path.suffix in (".yaml", ".yml"):
        content = load(text, str(path))
    else:
        try:
            content = parse_json(text)
        except json.JSONDecodeError as error:
            raise UserError(Problem(f"{path}:{error.lineno}", f"this is no JSON: {error.msg}")) from None
        except ValueError as error:
            raise UserError(Problem("zero.path", f"this is no configuration: {error}", value=str(path))) from None
    if not isinstance(content, dict):
        raise UserError(Problem("zero.path", "this is no configuration (a mapping of keys)", value=str(path)))
    return content


# ---- DeepSpeed's own format ----


def translate(raw: Mapping[str, Any], where: str) -> Content:
    """Translate a DeepSpeed configuration; `where` names it in messages."""
    content = Content()
    for key, value in dotted(raw, REFUSED):
        if key.startswith("_") or value == AUTO or (key == "gradient_accumulation_steps" and value is None):
            continue
        if key in OWN_KEYS:
            content.values.append(Value(OWN_KEYS[key], _number(value), key))
        elif key == "gradient_accumulation_steps":
            content.accumulation = Value("trainer.global_batch_size", _number(value), key)
        elif not key.startswith(("optimizer.", "scheduler.")) and key not in TRANSLATED:
            content.problems += _pass_on(key, value, where, content.settings)
    _read_precision(raw, content, where)
    _read_optimizer(raw.get("optimizer"), content, where)
    _read_scheduler(raw.get("scheduler"), content, where)
    for value in list(content.values):
        if value.key == "zero.offload_param" and value.value == "nvme":
            content.values.remove(value)
            fix = f'"device": "cpu" in {where}'
            content.problems.append(Problem(value.source, FEATURES["nvme"][0], fix, "nvme"))
    has_stage = any(value.key == "zero.stage" for value in content.values)
    if not has_stage and isinstance(raw.get("zero_optimization", {}), Mapping):
        content.values.append(Value("zero.stage", 0, "zero_optimization.stage, absent"))
    _merge_repeated(content, where)
    return content


SECTIONS = {
    **dict.fromkeys(("bf16", "bfloat16", "fp16"), '{"enabled": true}'),
    "zero_optimization": '{"stage": 2}',
    **dict.fromkeys(("zero_optimization.offload_optimizer", "zero_optimization.offload_param"), '{"device": "cpu"}'),
    "optimizer": '{"type": "AdamW"}',
    "scheduler": '{"type": "WarmupDecayLR"}',
}
"""Examples of sections, for fixes. Sections that are not listed may be empty."""


def _pass_on(key: str, value: Any, where: str, settings: dict[str, Any]) -> list[Problem]:
    """Put a value that dstune has no key for into `settings`, unless something is wrong with it. Returns the problems."""
    if key in WITHOUT_EFFECT:
        return []
    if any(known_key.startswith(f"{key}.") for table in (OWN_KEYS, TRANSLATED, PASSED, FIXED) for known_key in table):
        fix = f'such as "{key.rpartition(".")[2]}": {SECTIONS.get(key, "{}")}, or remove it'
        return [Problem(f"{key} in {where}", "this is a section: expected an object", fix, format_value(value))]
    problems = setting_problems(key, value, f"{key} in {where}")
    if not problems and key in PASSED:
        *sections, name = key.split(".")
        holder = settings
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = _typed(value, PASSED[key])
    return problems


def settings_problems(settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with `zero.settings`, which may contain only keys of DeepSpeed for which dstune has none."""
    for key, value in dotted(settings, REFUSED):
        where = f"zero.settings.{key}"
        group = key.split(".", 1)[0].replace("scheduler", "schedule")
        own_key = OWN_KEYS.get(key) or TRANSLATED.get(key)
        if group in ("optimizer", "schedule"):
            yield Problem(
                where, f"dstune has a group for this: {group}", f"{group}=CHOICE {group}.KEY=VALUE", format_value(value)
            )
        elif own_key:
            yield Problem(where, f"dstune's own key for this is {own_key}", f"{own_key}=VALUE", format_value(value))
        elif key in WITHOUT_EFFECT:
            yield Problem(where, "this has no effect: dstune does it by itself", "leave it out", format_value(value))
        else:
            yield from setting_problems(key, value, where)


def setting_problems(key: str, value: Any, where: str) -> list[Problem]:
    """Return what is wrong with a DeepSpeed key that dstune has none for (a leaf, or a section of `REFUSED`)."""
    if key in PASSED:
        kind = PASSED[key]
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        if _typed(value, kind) is not None:
            return []
        return [Problem(where, f"expected {words[kind]}", value=format_value(value))]
    if key in FIXED:
        usual, reason = FIXED[key]
        if value == usual:
            return []
        fix = f"remove it{'' if usual is None else f', or write {json.dumps(usual)}'}"
        return [Problem(where, f"dstune cannot honour this: {reason}", fix, format_value(value))]
    if key in REFUSED:
        is_off = value in (None, False) if key in ON_WHEN_THERE else not value or not _is_switched_on(value)
        return [] if is_off else [Problem(where, f"dstune cannot honour this: {REFUSED[key]}", "remove it")]
    return [Problem(where, "dstune does not know this key of DeepSpeed", "remove it", format_value(value))]


ON_WHEN_THERE = {"zero_optimization.zenflow"}
"""Sections that DeepSpeed treats as switched on even if they are empty."""


def _is_switched_on(value: Any) -> bool:
    return not isinstance(value, Mapping) or _enabled(value)


def _enabled(section: Mapping[str, Any]) -> bool:
    """Return whether a section switches something on: by `enabled` if it has that, else by any other value.

    If a section with `enabled: true` has subsections, one of these must be on, too.
    """
    parts = [part for part in section.values() if isinstance(part, Mapping)]
    if "enabled" in section:
        return bool(section["enabled"]) and (not parts or any(_enabled(part) for part in parts))
    return any(_enabled(part) if isinstance(part, Mapping) else bool(part) for part in section.values())


def _typed(value: Any, kind: type) -> Any:
    """Return `value` as `kind`; None if it has another type. A float such as JSON's 5e8 counts as a whole number."""
    if kind in (bool, str) or isinstance(value, (bool, str)):
        return value if type(value) is kind else None
    if not isinstance(value, (int, float)):
        return None
    if kind is int:
        return int(value) if float(value).is_integer() else None
    return float(value)


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _section(raw: Mapping[str, Any], name: str) -> Any:
    value = raw.get(name)
    return value if isinstance(value, Mapping) or value == AUTO else {}


def _read_precision(raw: Mapping[str, Any], content: Content, where: str) -> None:
    """Add the `trainer.precision` that the sections `bf16` and `fp16` mean to `content`."""
    enabled_by_name = {}
    for name, sections in {"bf16": ("bf16", "bfloat16"), "fp16": ("fp16",)}.items():
        for section in sections:
            settings = _section(raw, section)
            enabled = settings.get("enabled", AUTO) if settings and settings != AUTO else AUTO
            if enabled != AUTO:
                enabled_by_name[name] = bool(enabled)
    enabled_names = [name for name, enabled in enabled_by_name.items() if enabled]
    if len(enabled_names) == 2:
        content.problems.append(Problem(f"fp16.enabled in {where}", "bf16 is enabled too", "disable one of them"))
    elif enabled_names:
        content.values.append(Value("trainer.precision", enabled_names[0], f"{enabled_names[0]}.enabled"))
    elif enabled_by_name.get("bf16") is False:
        content.values.append(Value("trainer.precision", "fp32", "bf16.enabled"))


OPTIMIZERS = {"adamw": "adamw", "adam": "adamw", "sgd": "sgd"}
"""DeepSpeed's `Adam` decays weights as AdamW does, unless `adam_w_mode` is false."""
OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay", "momentum")
OPTIMIZER_FIXED: dict[str, Any] = {
    "adam_w_mode": True,
    "bias_correction": True,
    "amsgrad": False,
    "nesterov": False,
    "dampening": 0,
}


def _read_optimizer(section: Any, content: Content, where: str) -> None:
    if not isinstance(section, Mapping):
        return
    kind = section.get("type", AUTO)
    by_name = {name.lower(): name for name in classes_of("optimizer")}
    choice = OPTIMIZERS.get(str(kind).lower(), by_name.get(str(kind).lower()))
    if kind != AUTO and choice is None:
        reason = f"dstune has no such optimizer (there are {', '.join(sorted(classes_of('optimizer')))})"
        content.problems.append(Problem(f"optimizer.type in {where}", reason, value=str(kind)))
        return
    if choice is not None:
        content.values.append(Value("optimizer", choice, "optimizer.type"))
    params = _params("optimizer", section, content, where)
    if choice == "adamw" and "weight_decay" not in params:
        # Without this key DeepSpeed's own Adam decays nothing. torch's AdamW, which `torch_adam` chooses, decays by 0.01.
        decay = 0.01 if params.get("torch_adam") and str(kind).lower() == "adamw" else 0.0
        content.values.append(Value("optimizer.weight_decay", decay, "optimizer.params.weight_decay, absent", True))
    for name, value in params.items():
        source = f"optimizer.params.{name}"
        if value == AUTO or name in ("torch_adam", "fused", "foreach"):
            continue
        if name in OPTIMIZER_PARAMS:
            content.values.append(Value(f"optimizer.{name}", value, source))
        elif OPTIMIZER_FIXED.get(name, value is None) != value:
            content.problems.append(
                Problem(f"{source} in {where}", "dstune's optimizers do not do this", value=format_value(value))
            )


def _params(name: str, section: Mapping[str, Any], content: Content, where: str) -> Mapping[str, Any]:
    params = section.get("params")
    if isinstance(params, Mapping):
        return params
    if params not in (None, AUTO):
        reason = "this is a section: expected an object"
        content.problems.append(
            Problem(f"{name}.params in {where}", reason, 'such as {"lr": 1e-5}', format_value(params))
        )
    return {}


SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
SCHEDULER_PARAMS = {
    "warmup_max_lr": "optimizer.lr",
    "warmup_num_steps": "schedule.warmup_steps",
    "cos_min_ratio": "schedule.min_lr_ratio",
}


def _read_scheduler(section: Any, content: Content, where: str) -> None:
    if not isinstance(section, Mapping):
        return
    kind = section.get("type", AUTO)
    if kind != AUTO and kind not in SCHEDULERS:
        reason = f"dstune has no such schedule; {', '.join(SCHEDULERS)} have one"
        content.problems.append(Problem(f"scheduler.type in {where}", reason, value=str(kind)))
        return
    if kind != AUTO:
        content.values.append(Value("schedule", SCHEDULERS[kind], "scheduler.type"))
    for name, value in _params("scheduler", section, content, where).items():
        source = f"scheduler.params.{name}"
        if value == AUTO:
            continue
        if name in SCHEDULER_PARAMS:
            content.values.append(Value(SCHEDULER_PARAMS[name], value, source))
        elif name == "total_num_steps":
            content.values.append(Value("trainer.max_steps", value, source))
        elif (name, value) not in (("warmup_min_lr", 0), ("warmup_min_ratio", 0), ("warmup_type", "linear")):
            reason = "the rate rises linearly from 0"
            content.problems.append(Problem(f"{source} in {where}", reason, 'write "auto"', format_value(value)))


def _merge_repeated(content: Content, where: str) -> None:
    """Keep each key of dstune once; two places in the file that set it to different values are a problem."""
    value_by_key: dict[str, Value] = {}
    for value in content.values:
        other = value_by_key.setdefault(value.key, value)
        if other.value != value.value:
            reason = f"{other.source} says {format_value(other.value)}"
            content.problems.append(Problem(f"{value.source} in {where}", reason, value=format_value(value.value)))
    content.values = list(value_by_key.values())


# ---- accelerate's format ----

ACCELERATE = {
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "gradient_clipping": "gradient_clipping",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
ACCELERATE_WITHOUT_EFFECT = {
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "deepspeed_multinode_launcher",
    "deepspeed_hostfile",
    "deepspeed_inclusion_filter",
    "deepspeed_exclusion_filter",
    "seq_parallel_communication_data_type",
}
"""Keys by which accelerate decides how it launches, loads and saves; dstune does all of this in its own way."""


def _translate_accelerate(raw: Mapping[str, Any], path: Path) -> Content:
    """Translate a configuration of accelerate. Raises UserError if it would not use DeepSpeed."""
    section = raw.get("deepspeed_config")
    kind = str(raw.get("distributed_type", "DEEPSPEED")).upper()
    if not isinstance(section, Mapping) or kind != "DEEPSPEED":
        reason = f"accelerate does not use DeepSpeed with this file (distributed_type {kind})"
        raise UserError(Problem("zero.path", reason, "choose zero=stage2 or zero=stage3 instead", str(path)))
    settings: dict[str, Any] = {}
    problems: list[Problem] = []
    if file := section.get("deepspeed_config_file"):
        settings = _parse(Path(file) if Path(file).is_file() else path.parent / file)
    for name, value in section.items():
        if name in ACCELERATE and not file:
            _put(settings, ACCELERATE[name], value)
        elif not file and name not in ACCELERATE_WITHOUT_EFFECT and value not in (None, "none", False):
            problems.append(
                Problem(
                    f"deepspeed_config.{name} in {path}", "this version does not support it", value=format_value(value)
                )
            )
    precision = str(raw.get("mixed_precision") or "auto").lower()
    if precision in ("bf16", "fp16", "no"):
        for name in ("bf16", "fp16"):
            if _section(settings, name).get("enabled", AUTO) == AUTO:
                _put(settings, f"{name}.enabled", precision == name)
    elif precision != AUTO:
        problems.append(Problem(f"mixed_precision in {path}", "this version does not support it", value=precision))
    parallel = raw.get("parallelism_config") or {}
    for name in ("tp", "cp", "sp"):
        size = parallel.get(f"parallelism_config_{name}_size", 1)
        if size not in (None, 1):
            where = f"parallelism_config_{name}_size in {path}"
            fix = {"tp": f"parallel=tensor parallel.size={size}", "sp": f"parallel=ulysses parallel.size={size}"}.get(
                name
            )
            reason = (
                "zero=file reads only the settings of ZeRO"
                if fix
                else "dstune shares rows among ranks by attention heads only (parallel=ulysses)"
            )
            problems.append(Problem(where, reason, fix or "parallel=ulysses parallel.size=N", format_value(size)))
    content = translate(settings, str(path))
    content.problems += problems
    if raw.get("num_machines", 1) == 1 and isinstance(raw.get("num_processes"), int):
        content.processes = raw["num_processes"]
    return content


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[name] = value
