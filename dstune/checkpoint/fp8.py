"""Writes a complete model with its linear layers in FP8, in the format of compressed-tensors, which vLLM reads.

Weights are E4M3 with a scale for each output. A server rounds activations as it computes, with a scale for each token, so no rows
are needed to choose scales. llm-compressor calls this scheme FP8_DYNAMIC.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.weight_index import INDEX

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SCHEME = "FP8_DYNAMIC"
FORMAT = "float-quantized"
EXPERT = re.compile(r"\.experts\.\d+\.\w+$")
"""Matches the module of a single expert's matrix, as published checkpoints name it."""


def write_fp8(whole: Path, folder: Path, model: PreTrainedModel) -> None:
    """Write the complete model in `whole`, with all its other files, to `folder`.

    model: a model of the same class on the meta device. Needs memory for one file of weights.
    """
    import shutil

    import compressed_tensors
    from safetensors.torch import load_file, save_file

    index: dict[str, str] = {}
    sizes = 0
    unrounded_modules: set[str] = set()
    for file in sorted(whole.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file() and file.name != INDEX:
                shutil.copy(file, folder / file.name)
            continue
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if is_rounded(module, tensor, model):
                tensors |= {f"{module}.{leaf}": value for leaf, value in _compressed(tensor).items()}
            else:
                tensors[name] = tensor
                unrounded_modules |= {module} if tensor.ndim == 2 else set()
        save_file(tensors, folder / file.name, {"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
        sizes += sum(tensor.nbytes for tensor in tensors.values())
    if (whole / INDEX).is_file():
        text = json.dumps({"metadata": {"total_size": sizes}, "weight_map": index}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    settings = _settings(sorted(_ignored(unrounded_modules, model)))
    config["quantization_config"] = {"version": compressed_tensors.__version__, **settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_rounded(module: str, weight: Tensor, model: PreTrainedModel) -> bool:
    """Return whether `weight` is stored in FP8: the matrix of an expert, or of a linear layer other than the vocabulary
    projection."""
    from torch import nn

    if weight.ndim != 2:
        return False
    if EXPERT.search(module):
        return True
    try:
        layer = model.get_submodule(module)
    except AttributeError:
        return False
    return isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings()


def _ignored(unrounded_modules: set[str], model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of the matrices that a server would otherwise take for rounded linear layers: routers, and the vocabulary
    projection, even if it is tied."""
    embeddings = model.get_input_embeddings()
    names = dict(model.named_modules())
    yield from (name for name in unrounded_modules if names.get(name) is not embeddings)
    head = model.get_output_embeddings()
    yield from (name for name, module in names.items() if module is head and name not in unrounded_modules)


def _compressed(weight: Tensor) -> dict[str, Tensor]:
    """Round `weight` [out, in] to FP8; return it with its `weight_scale` [out, 1], which has the original dtype of the weight."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _scheme()
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale, _ = calculate_qparams(low, high, scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(FORMAT)
    compressed: dict[str, Tensor] = compressor.compress(
        {"weight": weight, "weight_scale": scale.to(weight.dtype)}, scheme
    )
    return {name: value.contiguous() for name, value in compressed.items()}


def _scheme() -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(SCHEME, targets=["Linear"])


def _settings(ignored: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` as compressed-tensors itself writes it."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = QuantizationConfig(
        config_groups={"group_0": _scheme()},
        ignore=ignored,
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    settings: dict[str, Any] = config.to_dict()
    return settings
