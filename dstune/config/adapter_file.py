"""The settings of a saved adapter (`adapter_config.json` of peft), as keys of `method`."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from dstune.config.convert import shown
from dstune.config.method_schema import (
    AdapterConfig,
    Ia3Config,
    LoraConfig,
    OftConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QloraConfig,
    VeraConfig,
)
from dstune.errors import Problem, UserError
from dstune.protocols.method import MethodConfig

HEADS = {"classifier", "score", "qa_outputs"}
"""Modules that peft saves whole by itself."""

UNSUPPORTED = {
    "bias": "none",
    "layers_to_transform": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "exclude_modules": None,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
}
"""What dstune has no key for, with the value under which it does nothing."""


PEFT_TYPES: dict[type, str] = {
    LoraConfig: "LORA",
    QloraConfig: "LORA",
    Ia3Config: "IA3",
    VeraConfig: "VERA",
    OftConfig: "OFT",
    PromptConfig: "PROMPT_TUNING",
    PrefixConfig: "PREFIX_TUNING",
    PTuningConfig: "P_TUNING",
}
"""peft's name of the kind of adapter that a method trains."""

RENAMED = {
    "rank": "r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "virtual_tokens": "num_virtual_tokens",
    "block_size": "oft_block_size",
    "first_scale": "d_initial",
    "projection_seed": "projection_prng_key",
}
"""peft's names of keys that are called otherwise here."""

PER_METHOD: dict[type, dict[str, str]] = {
    LoraConfig: {"dropout": "lora_dropout"},
    QloraConfig: {"dropout": "lora_dropout"},
    VeraConfig: {"dropout": "vera_dropout"},
    OftConfig: {"dropout": "module_dropout"},
}
"""The same, where they depend on the method."""

OURS_ALONE = (
    "name",
    "adapter",
    "init",
    "init_iterations",
    "lr_ratio",
    "frozen_adapters",
    "double_quantization",
    "init_text",
    "exact",
)
"""Keys that say nothing of an adapter's form."""


def adapter_folder(path: str, key: str) -> Path:
    """The folder with the adapter: `path`, or `export/` in it where it is a run. Raises UserError."""
    folder = Path(path)
    found = next((each for each in (folder, folder / "export") if (each / "adapter_config.json").is_file()), None)
    if found is None:
        fix = (
            f"dstune export {path}"
            if (folder / "run.yaml").is_file()
            else "give the export of a run, or a run with one"
        )
        raise UserError(Problem(key, "holds no adapter (adapter_config.json)", fix, path))
    return found


def read_settings(folder: Path, key: str) -> dict[str, Any]:
    """`adapter_config.json`. Raises UserError."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(Problem(key, f"adapter_config.json cannot be read: {error}", "", str(folder))) from error
    return dict(settings)


def resolve_adapters(method: MethodConfig) -> MethodConfig:
    """`method` with the folders of its adapters, and with the settings of the one that it starts from.

    Raises UserError: no adapter there, of another kind, or with other settings than those that were given.
    """
    if isinstance(method, LoraConfig) and method.frozen_adapters:
        found = [adapter_folder(path, "method.frozen_adapters") for path in method.frozen_adapters]
        for folder in found:
            _refuse_other_kind(
                read_settings(folder, "method.frozen_adapters"), "LORA", "method.frozen_adapters", folder
            )
        method = replace(method, frozen_adapters=[str(folder) for folder in found])
    if not isinstance(method, AdapterConfig) or method.adapter is None:
        return method
    folder = adapter_folder(method.adapter, "method.adapter")
    settings = read_settings(folder, "method.adapter")
    _refuse_other_kind(settings, PEFT_TYPES[type(method)], "method.adapter", folder)
    problems, values = [], {}
    for name, harmless in UNSUPPORTED.items():
        if settings.get(name, harmless) not in (harmless, None, False):
            reason = f"was trained with {name}={settings[name]}, for which there is no key"
            problems.append(Problem("method.adapter", reason, "begin from a merged model", method.adapter))
    names = RENAMED | PER_METHOD.get(type(method), {})
    for field in fields(method):
        if field.name in OURS_ALONE:
            continue
        ours = getattr(method, field.name)
        theirs = _value(settings, names.get(field.name, field.name), ours)
        if theirs is None:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if ours not in (default, theirs):
            reason = f"the adapter in {folder} has {shown(theirs)}"
            problems.append(Problem(f"method.{field.name}", reason, "leave it out", shown(ours)))
        values[field.name] = theirs
    if problems:
        raise UserError(problems)
    return replace(method, adapter=str(folder), **values)


def _refuse_other_kind(settings: dict[str, Any], wanted: str, key: str, folder: Path) -> None:
    kind = settings.get("peft_type")
    if kind != wanted:
        fix = "the method with which it was trained, or an adapter of this one"
        raise UserError(Problem(key, f"is of the kind {kind}, and this method's is {wanted}", fix, str(folder)))


def _value(settings: dict[str, Any], name: str, ours: Any) -> Any:
    """A setting of peft in the type that ours has; None where it says nothing."""
    value = settings.get(name)
    if name == "modules_to_save":
        return sorted(set(value or []) - HEADS)
    if name == "target_modules" and isinstance(value, str) and value != "all-linear":
        return None
    if isinstance(ours, list):
        return None if value is None else [value] if isinstance(value, str) else sorted(value)
    return float(value) if isinstance(ours, float) and isinstance(value, int) else value
