"""Every tensor of models that the planner has no closed form for, counted on the meta device: no memory, no weights, no rows.

python -m dstune.models.inventory < REQUEST.json > ANSWER.json

`dstune.planning.counted` starts it, because the launching side imports no torch. REQUEST is `{"head", "labels", "configs": [...]}`
with whole `config.json`s, ANSWER a list with an inventory, or `{"error": reason}`, for each of them. A model is built by the class
that a run would load it with, so names are those that the run, its adapters and its exports have.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
from transformers.pytorch_utils import Conv1D

from dstune.core.stored_implementations import without_stored_implementations
from dstune.models.unreached import count_by_part, find_unreached, is_within, whole_class
from dstune.planning.adapters import UNADAPTED
from dstune.planning.architectures.tensors import CLASSIFIER, LANGUAGE_MODEL, TOKEN_CLASSIFIER

CLASSES = {CLASSIFIER: AutoModelForSequenceClassification, TOKEN_CLASSIFIER: AutoModelForTokenClassification}


def inventory(values: Mapping[str, Any], head: str, labels: int) -> dict[str, Any]:
    """Return names, shapes and kinds of the tensors that text reaches, and how many weights it does not reach.

    values: a whole `config.json`. Raises what transformers raises where it has no such model.
    """
    config = _config(values)
    config.num_labels = labels
    with torch.device("meta"):
        model = _class_for(config, head).from_config(config)
    model.dstune_unreached = unreached = find_unreached(model)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    tensors = [
        [name, list(parameter.shape), name in linear]
        for name, parameter in model.named_parameters()
        if not is_within(name, unreached)
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    return {
        "class": type(model).__name__,
        "values": _plain_values(config.get_text_config().to_dict()),
        "tensors": tensors,
        **_adapted(str(model.config.model_type)),
        "unreached": sum(count_by_part(model).values()),
        "embedding": names.get(id(table.weight)) if table is not None else None,
        "output": names.get(id(output.weight)) if output is not None else None,
    }


def _adapted(kind: str) -> dict[str, Any]:
    """Return which expert weights peft's `all-linear` adapts, as a pattern, and which linear layers it leaves out. kind: the model
    type."""
    return {
        "expert_pattern": _MODEL_TO_CONVERSION_PATTERN.get(kind) or "",
        "unadapted": list(UNADAPTED.get(kind, ())),
    }


def _config(values: Mapping[str, Any]) -> PretrainedConfig:
    """Read the configuration as transformers does from a file, since it has its own notation for infinity and similar values."""
    # Weights stored in few bits are trained and counted as the values that they represent. A model's own code is not run.
    plain = {key: value for key, value in values.items() if key not in ("quantization_config", "auto_map")}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        loaded = AutoConfig.from_pretrained(folder, local_files_only=True)
        config: PretrainedConfig = without_stored_implementations(loaded)
    return config


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration that are numbers, texts or lists of them."""
    plain = (bool, int, str)
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, plain) or (isinstance(value, list) and all(isinstance(part, plain) for part in value))
    }


def _class_for(config: PretrainedConfig, head: str) -> Any:
    if head == LANGUAGE_MODEL:
        if config.is_encoder_decoder:
            return AutoModelForSeq2SeqLM
        return whole_class(AutoModelForCausalLM, config)
    return CLASSES.get(head, AutoModel)


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    answers = []
    for values in request["configs"]:
        try:
            answers.append(inventory(values, request["head"], request["labels"]))
        except Exception as error:  # a stranger's file can cause any error
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            answers.append({"error": f"{type(error).__name__}: {lines[0][:200]}"})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
