"""Loads adapters by peft, which leaves out weights that do not fit: it warns of the first adapter's, and only returns the others'.

peft passes the names in an adapter's file through the renamings by which transformers loads the base's files. Some of them change
names that are right already (transformers 5.24: `mlp.shared_expert.` of Laguna is a pattern that also matches `shared_experts`).
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

_LEFT_OUT = "Found missing adapter keys"
"""The part of peft's warning before their names; a name of the adapter such as `lora` or `a` puts a sentence in front of it."""


def load_peft_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """Put the adapter in `folder` into `model`, which may have others; return the PeftModel.

    Raises ValueError if the adapter does not fit the model, or if peft does not load all of its weights.
    """
    from dstune.models.peft_import import peft

    if isinstance(model, peft.PeftModel):
        missing = model.load_adapter(folder, adapter_name=name).missing_keys
        # peft also returns weights of the other adapters if their names contain this one.
        weight_of_adapter = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
        _refuse_left_out(", ".join(key for key in missing if weight_of_adapter.search(key)))
        return model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
    for warning in caught:
        if _LEFT_OUT in (text := str(warning.message)):
            _refuse_left_out(text.partition("[")[2].rstrip("]."))
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model


def _refuse_left_out(names: str) -> None:
    if names:
        raise ValueError(f"peft does not load all of its weights: {names[:200]}")


def unloadable_weights(adapted: Any) -> list[str]:
    """Return the names of the adapter's weights that peft could not load again from the file that it saves, in order.

    adapted: a PeftModel; its weights may be partitioned or on the meta device.
    """
    from dstune.models.peft_import import peft

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # an older peft renames nothing
        return []
    settings = adapted.peft_config["default"]
    names = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    placeholders = {name: torch.empty(0, device="meta") for name in names}
    loaded = convert_peft_adapter_state_dict_for_transformers(adapted, settings, placeholders)
    return [name for name in names if name not in loaded]
