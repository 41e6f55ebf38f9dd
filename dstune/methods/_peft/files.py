"""Reads saved adapters: settings (peft's `adapter_config.json`), as keys of `method`, and tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config.convert import format_value
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json, read_file
from dstune.methods._peft.config import AdapterConfig
from dstune.models.adapter_sizes import check_sizes

if TYPE_CHECKING:
    from torch import Tensor

HEADS = {"classifier", "score", "qa_outputs"}
"""Modules that peft by itself saves whole."""

UNSUPPORTED = {
    "bias": "none",
    "layers_to_transform": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "exclude_modules": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
}
"""Settings of peft for which dstune has no key, with the value that has no effect."""


def adapter_folder(path: str, key: str) -> Path:
    """Return the folder with the adapter: `path`, or, for a run, its `export/`. Raises UserError if neither has one."""
    folder = Path(path)
    adapter = next((each for each in (folder, folder / "export") if (each / "adapter_config.json").is_file()), None)
    if adapter is None:
        fix = (
            f"dstune export {path}"
            if (folder / "run.yaml").is_file()
            else "give the export of a run, or a run with one"
        )
        raise UserError(Problem(key, "holds no adapter (adapter_config.json)", fix, path))
    return adapter


def read_settings(folder: Path, key: str) -> dict[str, Any]:
    """Return the content of `adapter_config.json`. Raises UserError if it cannot be read, is no object or has impossible sizes."""
    try:
        settings = parse_json(read_file(folder / "adapter_config.json"))
    except (OSError, ValueError) as error:
        raise UserError(Problem(key, f"adapter_config.json cannot be read: {error}", "", str(folder))) from None
    if not isinstance(settings, dict):
        raise UserError(Problem(key, "adapter_config.json is no object", "", str(folder)))
    check_sizes(settings, folder, key)
    return settings


def adapter_folders(paths: Sequence[str], key: str, kind: str) -> list[Path]:
    """Return the folders of finished adapters. Raises UserError if one is missing or not of peft's kind `kind`."""
    folders = [adapter_folder(path, key) for path in paths]
    for folder in folders:
        _refuse_other_kind(read_settings(folder, key), kind, key, folder)
    return folders


def with_settings_of(
    method: AdapterConfig, kind: str, renamed: Mapping[str, str], ours_alone: Collection[str]
) -> AdapterConfig:
    """Return `method` with the folder of the adapter that training starts from, and with the settings of that adapter.

    kind: peft's name of the expected kind. renamed: peft's names of keys that have another name in dstune. ours_alone: keys that
    do not describe an adapter's form.

    Raises UserError: there is no adapter, it is of another kind, or its settings contradict the configuration.
    """
    if method.adapter is None:
        return method
    folder = adapter_folder(method.adapter, "method.adapter")
    settings = read_settings(folder, "method.adapter")
    _refuse_other_kind(settings, kind, "method.adapter", folder)
    problems, values = [], {}
    for name, harmless in UNSUPPORTED.items():
        if settings.get(name, harmless) not in (harmless, None, False):
            reason = f"was trained with {name}={settings[name]}, for which there is no key"
            problems.append(Problem("method.adapter", reason, "begin from a merged model", method.adapter))
    for field in fields(method):
        if field.name in ours_alone:
            continue
        ours = getattr(method, field.name)
        stored = _value(settings, renamed.get(field.name, field.name), ours)
        if stored is None:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if ours not in (default, stored):
            reason = f"the adapter in {folder} has {format_value(stored)}"
            problems.append(Problem(f"method.{field.name}", reason, "leave it out", format_value(ours)))
        values[field.name] = stored
    if problems:
        raise UserError(problems)
    return replace(method, adapter=str(folder), **values)


def _refuse_other_kind(settings: dict[str, Any], expected: str, key: str, folder: Path) -> None:
    kind = settings.get("peft_type")
    if kind != expected:
        fix = "the method with which it was trained, or an adapter of this one"
        raise UserError(Problem(key, f"is of the kind {kind}, and this method's is {expected}", fix, str(folder)))


def _value(settings: dict[str, Any], name: str, ours: Any) -> Any:
    """Return a setting of peft, converted to the type of `ours` (dstune's value); None if the settings leave it open. Raises
    UserError if its type is wrong."""
    value = settings.get(name)
    names = value if isinstance(value, list) else [] if value is None or isinstance(value, str) else [None]
    if isinstance(ours, list) and not all(isinstance(entry, str) for entry in names):
        problem = Problem(
            "adapter_config.json", f"{name} is no list of names", "an adapter as peft saves it", str(value)
        )
        raise UserError(problem)
    if name == "modules_to_save":
        return sorted(set(value or []) - HEADS)
    if name == "target_modules" and isinstance(value, str) and value != "all-linear":
        return None
    if isinstance(ours, list):
        return None if value is None else sorted([value] if isinstance(value, str) else value)
    if not (isinstance(ours, float) and isinstance(value, int)):
        return value
    try:
        return float(value)
    except OverflowError:
        problem = Problem(
            "adapter_config.json", f"{name} is larger than any number here", "an adapter as peft saves it"
        )
        raise UserError(problem) from None


def tensors_of(folder: Path, key: str) -> dict[str, Tensor]:
    """Return the tensors in the folder of an adapter. key: the key that names it. Raises UserError if they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        reason = f"has no adapter_model.safetensors that can be read: {error}"
        raise UserError(Problem(key, reason, "give the folder of an adapter", str(folder))) from error
