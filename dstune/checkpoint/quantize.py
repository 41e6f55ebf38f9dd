"""`dstune export --quantize`: writes a smaller copy of a run's model for servers, and measures its loss on held-out rows."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.checkpoint.answer_files import record_files
from dstune.checkpoint.contents import KEY, describe_contents, is_composite
from dstune.checkpoint.export import (
    check_free,
    check_gguf,
    export_checkpoint,
    quietly,
    temporary_folder,
    write_gguf_export,
)
from dstune.checkpoint.quantization import K_TYPES, Measure, Quantization, require_package
from dstune.checkpoint.record import NAME as RECORD
from dstune.config.run_file import read_run
from dstune.config.schema import RunConfig
from dstune.config.trust import Use
from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in
from dstune.core.stored_implementations import without_stored_implementations
from dstune.data.recorded_files import refuse_changed_files
from dstune.protocols import method_of, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTIZATION = "quantization"
"""Key of `dstune.json`."""
WHOLE, READABLE = "original", "read-back"
"""Temporary folders within the export: the original model, and the GGUF model as transformers reads it."""


def export_quantized(
    run_dir: Path,
    checkpoint: Path,
    out: Path,
    quantization: Quantization,
    *,
    measure: Measure | None = None,
    force: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Write the complete model of `checkpoint` (with its adapter merged) to `out` in fewer bits.

    Needs disk space for three copies of the model. `out` appears complete or not at all. measure: called for the original and for
    the quantized model; both losses are written to `dstune.json` and the card.

    Returns the folder (for GGUF, the file) and its description in `dstune.json`. Raises UserError, before any work, if `out`
    exists, a package is missing, or the format does not support the model.
    """
    check_free(out, force)
    config = read_run(run_dir / "run.yaml", use=Use.weights).config
    with quietly():
        _check_model(config, quantization)  # first: installing a package does not help if the model is not supported
    holds_out = config.data.validation or config.data.split.holds_out
    if quantization.format == "awq" or (measure is not None and holds_out):
        without_rows = "--quantize fp8 --no-loss" if quantization.format == "awq" else "--no-loss"
        refuse_changed_files(run_dir, config, f"quantize without them: {without_rows}")
    require_package(quantization)
    with quietly():
        blocks = _calibration(config) if quantization.format == "awq" else []
    with temporary_folder(out) as folder:
        merge = method_of(config.method).merges
        whole = export_checkpoint(
            run_dir, checkpoint, folder / WHOLE, config=config, merge=merge, with_dropped=quantization.format != "gguf"
        )
        written = readable = folder
        with quietly():
            if quantization.format == "fp8":
                from dstune.checkpoint.fp8 import write_fp8

                write_fp8(whole, folder, _on_meta(whole))
            elif quantization.format == "awq":
                from dstune.checkpoint.awq import write_awq

                write_awq(whole, folder, blocks)
            else:
                written = write_gguf_export(config, whole, folder, quantization.type)
                if measure is not None:
                    readable = _read_gguf_back(written, whole, folder / READABLE)
        description = {"format": str(quantization), "written_with": _versions(quantization)}
        if measure is not None:
            description |= _losses(partial(measure, run_dir), whole, readable)
        _describe(folder, description)
        for leftover in (WHOLE, READABLE):
            shutil.rmtree(folder / leftover, ignore_errors=True)
        record_files(folder)
    return out / written.relative_to(folder), description


# -- before any work --------------------------------------------------------------------------------------------------


def _check_model(config: RunConfig, quantization: Quantization) -> None:
    """Raise UserError if the format does not support the run's model."""
    from dstune.models.load import load_config

    architecture = load_config(config.model)
    if quantization.format == "gguf":
        check_gguf(config, architecture)
        return

    def refuse(reason: str) -> UserError:
        fix = "dstune export RUN --merge, which does not quantize"
        return UserError(Problem("--quantize", reason, fix, architecture.model_type))

    if not task_of(config.task).generates or architecture.is_encoder_decoder:
        raise refuse(f"{quantization} is written for causal language models")
    if is_composite(architecture.to_dict()):
        raise refuse(f"{quantization} is not written for models with parts for images or sound")
    if not type(architecture).__module__.startswith("transformers."):
        raise refuse(f"{quantization} is only written for models whose code is part of transformers")
    from torch import nn
    from transformers import AutoModelForCausalLM

    with _meta():
        model = AutoModelForCausalLM.from_config(architecture)
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise refuse(f"{quantization} is not written for models with recurrent (state-space) layers")
    if not any(isinstance(module, nn.Linear) for name, module in model.named_modules() if "." in name):
        raise refuse(f"the model has no linear layers, and {quantization} quantizes no others")
    stacked = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    if stacked and quantization.format == "awq":
        raise refuse("AWQ is not written for mixtures of experts")
    if stacked and not _published_one_by_one(architecture.model_type):
        raise refuse("experts of this architecture are published as one stacked tensor, for which FP8 is not written")
    if quantization.format == "awq":
        from dstune.checkpoint.awq import GROUPS, group_size

        if group_size(model) is None:
            sizes = " or ".join(map(str, GROUPS))
            raise refuse(f"weights share scales in groups of {sizes}, and none of them divides all rows of the model")
        require_package(quantization)
        from auto_round.algorithms.transforms.awq.mappings import AWQ_MAPPING_REGISTRY

        if type(model).__name__ not in AWQ_MAPPING_REGISTRY:
            raise refuse(f"auto-round does not know between which layers of {type(model).__name__} AWQ may move scales")


def _published_one_by_one(model_type: str) -> bool:
    """Return whether published checkpoints of the architecture have a matrix for each expert, which transformers stacks when it
    loads them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    mapping = get_checkpoint_conversion_mapping(model_type) or []
    return any("experts.*" in str(getattr(entry, "source_patterns", "")) for entry in mapping)


def _calibration(config: RunConfig) -> list[Any]:
    from dstune.checkpoint.awq import read_calibration

    return read_calibration(config)


# -- the model --------------------------------------------------------------------------------------------------------


def _on_meta(whole: Path) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    with _meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            without_stored_implementations(AutoConfig.from_pretrained(whole))
        )
    return model


@contextmanager
def _meta() -> Any:
    import torch

    with torch.device("meta"):
        yield


def _read_gguf_back(file: Path, whole: Path, folder: Path) -> Path:
    """Write the weights of the GGUF model `file` to `folder` as transformers stores them, with the other files of `whole`; return
    `folder`."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from dstune.checkpoint.gguf_file import read_weights
    from dstune.models.base_weights import tensor_files

    folder.mkdir()
    places, shapes, dtypes = tensor_files(whole), {}, {}
    for place in set(places.values()):
        with safe_open(whole / place, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                stored = opened.get_slice(name)
                shapes[name], dtypes[name] = stored.get_shape(), stored.get_dtype()
    by_file: dict[str, dict[str, torch.Tensor]] = {}
    architecture = without_stored_implementations(AutoConfig.from_pretrained(whole))
    for name, weight in read_weights(file, architecture.get_text_config(), shapes):
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(dtypes[name], torch.float32)
        by_file.setdefault(places[name], {})[name] = torch.from_numpy(weight.copy()).to(dtype)
    for name in shapes.keys() - {name for tensors in by_file.values() for name in tensors}:  # parts for images
        with safe_open(whole / places[name], framework="pt") as opened:
            by_file.setdefault(places[name], {})[name] = opened.get_tensor(name)
    for place, tensors in by_file.items():
        save_file(tensors, folder / place, metadata={"format": "pt"})
    for path in whole.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    return folder


# -- what is said of it -----------------------------------------------------------------------------------------------


def _versions(quantization: Quantization) -> dict[str, str]:
    if quantization.format == "gguf":
        packages = ["gguf", *(["llama-cpp-python"] if quantization.type in K_TYPES else [])]
    else:
        packages = ["compressed-tensors", *(["auto-round"] if quantization.format == "awq" else [])]
    return {name: importlib.metadata.version(name) for name in packages}


def _losses(measure: Any, whole: Path, readable: Path) -> dict[str, Any]:
    before, after = measure(whole), measure(readable)
    if before is None or after is None:
        return {}
    return {
        "split": after["split"],
        "rows": after["rows"],
        "original": _numbers(before["metrics"]),
        "quantized": _numbers(after["metrics"]),
    }


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float) and name != "targets"}


def _describe(folder: Path, description: dict[str, Any]) -> None:
    """Add `description` to the record and to the model card."""
    record = object_in(folder / RECORD) | {QUANTIZATION: description}
    if (folder / "config.json").is_file():
        record[KEY] = describe_contents(folder)
    files.write(folder / RECORD, json.dumps(record, indent=1) + "\n")
    card = folder / "README.md"
    files.write(card, card.read_text(encoding="utf-8").rstrip() + "\n\n" + describe_quantization(description))


def describe_quantization(description: Mapping[str, Any]) -> str:
    """Write the section of the model card about the quantization."""
    tools = ", ".join(f"{name} {version}" for name, version in description["written_with"].items())
    lines = ["## Quantization", "", f"Stored as `{description['format']}`, written with {tools}.", ""]
    if "quantized" not in description:
        return "\n".join([*lines, "Its loss was not measured.", ""])
    before, after = description["original"], description["quantized"]
    rows = f"{description['rows']:,} {description['split']} rows"
    lines += [f"| metric of {rows} | original | quantized |", "| --- | --- | --- |"]
    lines += [f"| {name} | {before[name]:.4f} | {after[name]:.4f} |" for name in after if name in before]
    return "\n".join([*lines, ""])
