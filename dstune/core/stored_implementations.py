"""Leaves out of a model's configuration what would load code from a model hub.

`attn_implementation` and `experts_implementation` of a `config.json` may name a repository with compiled kernels ("OWNER/NAME"),
which transformers downloads and runs. The file is a stranger's; the user chooses with `model.attention`.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

log = logging.getLogger(__name__)

OF_TRANSFORMERS = frozenset({"eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"})
"""Implementations in transformers itself."""
_INTERNAL = ("_attn_implementation_internal", "_experts_implementation_internal")


def without_stored_implementations(config: Any) -> Any:
    """Return `config`, in which no part asks for an implementation that is not on this machine."""
    parts, seen = [config], set[int]()
    while parts:
        part = parts.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        for name in _INTERNAL:
            requested = part.__dict__.get(name)
            if requested is not None and not is_on_this_machine(requested):
                log.warning(
                    "%r of the model's config.json is not used: model.attention chooses the attention", requested
                )
                part.__dict__[name] = None
        parts += [value for value in part.__dict__.values() if hasattr(value, "to_diff_dict")]
    return config


def is_on_this_machine(requested: object) -> bool:
    if requested == "flash_attention_2":  # without the package, transformers takes a kernel of a hub in its place
        return importlib.util.find_spec("flash_attn") is not None
    return requested in OF_TRANSFORMERS if isinstance(requested, str) else False
