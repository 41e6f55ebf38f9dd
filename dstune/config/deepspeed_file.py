"""Translates a DeepSpeed configuration, or one of Hugging Face accelerate, into dstune's own keys.

Values that are `auto` are skipped, so dstune's own key decides. `zero_file` puts the result into a run's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstune.config.convert import dotted, format_value, load
from dstune.config.deepspeed_keys import FIXED, INSTEAD, OWN_KEYS, PASSED, REFUSED, RENAMED, TRANSLATED, WITHOUT_EFFECT
from dstune.config.deepspeed_training import read_training
from dstune.config.deepspeed_values import AUTO, Content, Value, section_of, whole_number
from dstune.config.not_offered import FEATURES
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json, read_file

LONGEST_CONFIGURATION = 1_000_000
"""Bytes. A data file that was given by mistake is not read completely."""


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
        fix = "zero=file zero.path=ds_config.json, relative to the folder in which dstune is started"
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
        if key.startswith("_") or value == AUTO or (key in SIZES and value is None):
            continue
        if key in OWN_KEYS:
            content.values.append(Value(OWN_KEYS[key], whole_number(value), key))
        elif not key.startswith(("optimizer.", "scheduler.")) and key not in TRANSLATED:
            content.problems += _pass_on(key, value, where, content.settings)
    read_training(raw, content, where)
    for value in list(content.values):
        if value.key == "zero.offload_param" and value.value == "nvme":
            content.values.remove(value)
            fix = f'"device": "cpu" in {where}'
            content.problems.append(Problem(value.source, FEATURES["nvme"][0], fix, "nvme"))
    zero = raw.get("zero_optimization", {})
    if isinstance(zero, Mapping):
        if "stage" not in zero:
            content.values.append(Value("zero.stage", 0, "zero_optimization.stage, absent"))
        _read_copies(zero, content, where)
    _merge_repeated(content, where)
    return content


def _read_copies(zero: Mapping[str, Any], content: Content, where: str) -> None:
    """Translate `zero_hpz_partition_size`, the number of ranks that share a copy of the weights. Below stage 3 DeepSpeed ignores
    it."""
    source = "zero_optimization.zero_hpz_partition_size"
    size = whole_number(zero.get("zero_hpz_partition_size", AUTO))
    if size == AUTO:
        return
    if type(size) is not int or size < 0:
        content.problems.append(
            Problem(f"{source} in {where}", "expected a whole number", "the GPUs of a node", format_value(size))
        )
    elif zero.get("stage") in (3, AUTO):
        content.values.append(Value("zero.hpz", size > 1, source))


SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Keys that are as good as absent if they are null."""
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
        for part in sections:
            holder = holder.setdefault(part, {})
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
        fix = f"{_remedy(key, value)}{'' if usual is None else f', or write {json.dumps(usual)}'}"
        return [Problem(where, f"dstune cannot honour this: {reason}", fix, format_value(value))]
    if key in REFUSED:
        is_off = value in (None, False) if key in ON_WHEN_THERE else not value or not _is_switched_on(value)
        reason = f"dstune cannot honour this: {REFUSED[key]}"
        return [] if is_off else [Problem(where, reason, _remedy(key, value))]
    return [Problem(where, "dstune does not know this key of DeepSpeed", "remove it", format_value(value))]


def _remedy(key: str, value: Any) -> str:
    """Return what to do about a key that is refused: remove it, and set what dstune or DeepSpeed has for it today."""
    if key in RENAMED:
        return f"write {RENAMED[key]} instead"
    if key not in INSTEAD:
        return "remove it"
    sizes = [size for _, size in dotted({"": value}) if type(size) is int and size > 1]
    return f"remove it, and set {INSTEAD[key].format(size=sizes[0] if sizes else 2)}"


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
    if not file and "zero_stage" not in section:
        _put(settings, ACCELERATE["zero_stage"], 2)  # accelerate's default
    precision = str(raw.get("mixed_precision") or "auto").lower()
    if precision in ("bf16", "fp16", "no"):
        for name in ("bf16", "fp16"):
            if section_of(settings, name).get("enabled", AUTO) == AUTO:
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
