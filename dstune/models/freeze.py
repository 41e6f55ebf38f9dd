"""Which parameters of a model are trained."""

from __future__ import annotations

from transformers import PreTrainedModel


def freeze_body(model: PreTrainedModel) -> None:
    """Train only what lies outside the pretrained body: the task's head."""
    model.requires_grad_(False)
    body = {id(parameter) for parameter in model.base_model.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in body)
