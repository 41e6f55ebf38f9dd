"""Freezes parameters of a loaded model."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from dstune.core.errors import Problem, UserError
from dstune.methods.freeze.config import FreezeConfig
from dstune.models.layers import layers_of
from dstune.models.load import new_weights
from dstune.models.unreached import unreached_parameters


def freeze_parts(model: PreTrainedModel, method: FreezeConfig) -> None:
    """Freeze the parameters that `method` names. New weights (a head, a pooler) are trained in any case.

    Raises UserError if it names something that the model does not have, nothing would be frozen, nothing would remain to train, or
    rows of added tokens would be frozen.
    """
    layers = layers_of(model)
    unreached = {name for name, _ in unreached_parameters(model)}
    names = [name for name, _ in model.named_parameters() if name not in unreached]
    problems = []
    for key in ("first_layers", "last_layers"):
        if (count := getattr(method, key)) > len(layers.blocks):
            reason = f"the model has {len(layers.blocks)} layers"
            problems.append(Problem(f"method.{key}", reason, f"at most {len(layers.blocks)}", str(count)))
    for key in ("parameters", "trained"):
        for pattern in getattr(method, key):
            if not any(re.search(pattern, name) for name in names):
                middle = names[len(names) // 2]
                reason = f"no parameter has a name like that; names are such as {names[0]}, {middle} and {names[-1]}"
                problems.append(Problem(f"method.{key}", reason, "an expression that finds some of them", pattern))
    if problems:
        raise UserError(problems)

    frozen = set(layers.embeddings if method.embeddings else ())
    for block in layers.blocks[: method.first_layers] + layers.blocks[len(layers.blocks) - method.last_layers :]:
        frozen.update(block)
    frozen |= {name for name in names if any(re.search(pattern, name) for pattern in method.parameters)}
    frozen -= {name for name in names if any(re.search(pattern, name) for pattern in method.trained)}
    new = new_weights(model)
    frozen -= set(new.parameters)
    if not frozen:
        fix = "freeze more, or method=full"
        raise UserError(Problem("method.trained", "nothing of the model would be frozen", fix, str(method.trained)))
    if len(frozen) == len(names):
        fix = "freeze less, or method.trained=[...] for what is to be trained"
        raise UserError(Problem("method", "nothing is left to be trained", fix, "freeze"))
    vocabulary = model.get_input_embeddings().weight
    if new.rows and any(parameter is vocabulary and name in frozen for name, parameter in model.named_parameters()):
        reason = f"{len(new.rows)} added tokens have to be trained, and their rows would be frozen"
        raise UserError(Problem("method", reason, "leave the embeddings out, or method=lora", "freeze"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and name not in unreached)
