"""Freezes the pretrained body of a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from dstune.core.errors import Problem, UserError
from dstune.models.load import new_weights
from dstune.models.unreached import keep_frozen


def freeze_body(model: PreTrainedModel) -> None:
    """Train only the task's head, which lies outside the pretrained body, and new weights of the body (a pooler).

    Raises UserError if rows of added tokens have to be trained: they are part of the frozen vocabulary.
    """
    new = new_weights(model)
    if new.rows:
        raise UserError(
            Problem(
                "method", f"{len(new.rows)} added tokens have to be trained, and they lie in the body", "method=lora"
            )
        )
    model.requires_grad_(False)
    body = {id(parameter) for parameter in model.base_model.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) not in body or name in new.parameters)
    keep_frozen(model)
