"""A classifier that reads vectors which a frozen body gave once, instead of texts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from dstune.models.load import initialize_weights
from dstune.models.pooled import DenseHead


class FeatureClassifier(PreTrainedModel):
    """The `classifier` of `PooledForSequenceClassification` without its body: the same names, the same first weights."""

    main_input_name = "features"

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.classifier = DenseHead(config)
        self.post_init()

    def forward(self, features: torch.Tensor, **unused: Any) -> SequenceClassifierOutput:
        """Classify feature vectors. features: [batch, hidden]. logits: [batch, classes]."""
        return SequenceClassifierOutput(logits=self.classifier(features.to(self.classifier.output.weight.dtype)))


def feature_classifier(architecture: PretrainedConfig, dtype: torch.dtype, seed: int) -> FeatureClassifier:
    """Build the classifier. architecture: that of the whole model (`load.trained_config`). Partitioned where
    `zero.parts.partitioned_loading` is open."""
    model = FeatureClassifier._from_config(architecture, dtype=dtype)
    assert isinstance(model, FeatureClassifier)
    initialize_weights(model, [name for name, _ in model.named_parameters()], seed)
    return model
