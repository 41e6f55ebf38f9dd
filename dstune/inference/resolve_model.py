"""Finds the files of a model that a command names, and checks adapters before peft loads them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.checkpoint.record import read_record
from dstune.config.convert import refers, resolve_text
from dstune.config.registered import registry_of
from dstune.config.schema import ModelConfig
from dstune.config.trust import SIGNATURE, check_reference
from dstune.core.confinement.here import check_patterns
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json, read_file
from dstune.models.adapter_sizes import check_sizes

if TYPE_CHECKING:
    import torch


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return the `adapter_config.json` that peft wrote to `folder`. Raises UserError."""
    file = folder / "adapter_config.json"
    try:
        settings = parse_json(read_file(file))
    except (OSError, ValueError) as error:
        raise UserError(Problem(str(file), f"cannot be read: {error}", "give the folder of an adapter")) from None
    if not isinstance(settings, dict):
        raise UserError(Problem(str(file), "is no JSON object", "give the folder of an adapter"))
    return settings


def check_adapter(folder: Path, model: Any, where: str) -> None:
    """Check the adapter in `folder` before peft puts it into `model`; the file may come from a stranger.

    Raises UserError if matching its patterns would not end, or if it asks for larger matrices than it has.
    """
    settings = adapter_settings(folder)
    check_patterns(settings, [name for name, _ in model.named_modules()], where, str(folder))
    check_sizes(settings, folder, where)


_ADAPTED = re.compile(r"base_model\.model\.(.+?)\.(?:lora_|ia3_|oft_|vera_|token_adapter)")


def adapted_modules(folder: Path) -> set[str]:
    """Return the names of the modules that the tensors of the adapter in `folder` change; empty if they cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
            matches = [_ADAPTED.match(name) for name in tensors.keys()]  # noqa: SIM118
    except (OSError, SafetensorError):
        return set()
    return {match[1] for match in matches if match}


def base_of(folder: Path, model: ModelConfig) -> ModelConfig:
    """Return `model` with the path and revision of the base model of the adapter in `folder`. Raises UserError."""
    settings = adapter_settings(folder)
    path = settings.get("base_model_name_or_path")
    if not isinstance(path, str):
        fix = "write the hub id or the folder of its base into base_model_name_or_path"
        raise UserError(Problem(str(folder / "adapter_config.json"), "does not name its base model", fix))
    if refers(path):  # exports keep references to variables unresolved
        check_reference(path, read_record(folder).get(SIGNATURE), folder)
        path = resolve_text(path, str(folder / "adapter_config.json"))
    recorded = read_record(folder).get("base_model")
    if isinstance(recorded, str) and registry_of(recorded) is not None and not Path(path).is_dir():
        path = recorded  # exported on another machine, whose cache held the base
    return replace(model, path=path, revision=settings.get("revision"))


def with_local_files(model: ModelConfig) -> ModelConfig:
    """Return `model` with its files on this machine. Raises UserError, whose problems name flags instead of configuration keys."""
    from dstune.launch.preflight import resolve_model

    flags = {"model.path": "MODEL", "model.revision": "--revision", "model.trust_remote_code": "--trust-remote-code"}
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr)  # noqa: E731
    try:
        return resolve_model(model, report)
    except UserError as error:
        raise UserError(replace(p, where=flags.get(p.where, p.where)) for p in error.problems) from error


def local_pretrained_options(model: ModelConfig) -> dict[str, Any]:
    """Bring the model to this machine and return the arguments of `from_pretrained` for it. Raises UserError."""
    from dstune.models.load import local_path

    local_model = with_local_files(model)
    revision = {} if local_model.revision is None else {"revision": local_model.revision}
    return {
        "pretrained_model_name_or_path": local_path(local_model.path),
        "trust_remote_code": local_model.trust_remote_code,
        "local_files_only": True,
        **revision,
    }


def computing_dtype(architecture: Any) -> torch.dtype:
    """Return the dtype to compute in: the stored one on a GPU; on a CPU bf16 if it is fast there and the weights are
    not fp32, else fp32."""
    import torch

    from dstune.zero import accelerator
    from dstune.zero.precision import fast_bf16

    stored = architecture.dtype or torch.float32
    if accelerator.present():
        return stored
    return torch.bfloat16 if stored is not torch.float32 and fast_bf16() else torch.float32
