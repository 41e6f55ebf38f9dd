"""A classifier on any body: hidden states pooled in a way of one's choice, dense layers, one output for each class.

An export carries this file, so that plain transformers loads it too (with `trust_remote_code=True`): it imports nothing of
dstune. Architectures have heads of their own, with a pooling and a depth that cannot be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


@dataclass
class PooledOutput(SequenceClassifierOutput):
    pooled: torch.Tensor | None = None
    """What the classifier reads, [batch, hidden]."""


class PooledForSequenceClassification(PreTrainedModel):
    """config: of the body, with `dstune_head`: {"pooling": "cls", "mean" or "last", "layers": dense layers in front of the
    output, "dropout": before each of them}."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        body = AutoModel._model_mapping[type(config)](config)
        if isinstance(getattr(body, "pooler", None), nn.Module):
            body.pooler = None  # a pooling of the architecture's own that nothing would read
        # transformers looks for the body, and for its weights, under the architecture's own prefix.
        self.base_model_prefix = body.base_model_prefix
        setattr(self, self.base_model_prefix, body)
        self.classifier = DenseHead(config)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: Any
    ) -> PooledOutput:
        """Classify pooled rows. input_ids, attention_mask: [batch, sequence]. logits: [batch, classes]."""
        inputs.pop("labels", None)
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = pool(hidden, mask, self.config.dstune_head["pooling"])
        return PooledOutput(logits=self.classifier(pooled), pooled=pooled)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool one vector for each row, [batch, hidden]: of its first token, of its last one, or their mean.

    hidden: [batch, sequence, hidden]. mask: [batch, sequence], 1 for tokens and 0 for padding on either side.
    """
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if pooling == "cls":
        index = torch.where(mask.bool(), places, mask.shape[1] - 1).amin(dim=1)
    else:
        index = (mask * places).amax(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]


class DenseHead(nn.Module):
    """Dense layers with tanh between pooled states and classes."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        head, width = config.dstune_head, config.get_text_config().hidden_size
        self.dropout = nn.Dropout(head["dropout"])
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(head["layers"]))
        self.output = nn.Linear(width, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Project pooled vectors: [batch, hidden] -> [batch, classes]."""
        for layer in self.layers:
            pooled = torch.tanh(layer(self.dropout(pooled)))
        return self.output(self.dropout(pooled))
