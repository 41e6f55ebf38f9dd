"""Defines the classifier that reads vectors, which a frozen body has computed, instead of texts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from dstune.models.load import initialize_weights
from dstune.models.pooled import DenseHead


class FeatureClassifier(PreTrainedModel):
    """The `classifier` of `PooledForSequenceClassification` without the body, with the same names and the same first weights."""

    main_input_name = "features"

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.classifier = DenseHead(config)
        self.post_init()

    def forward(self, features: torch.Tensor, **unused: Any) -> SequenceClassifierOutput:
        """Classify feature vectors. features: [batch, hidden]. Returns logits [batch, classes]."""
        return SequenceClassifierOutput(logits=self.classifier(features.to(self.classifier.output.weight.dtype)))


def feature_classifier(architecture: PretrainedConfig, dtype: torch.dtype, seed: int) -> FeatureClassifier:
    """Build the classifier; inside `zero.parts.partitioned_loading` its weights are partitioned. architecture: that of the complete
    model (`load.trained_config`)."""
    model = FeatureClassifier._from_config(architecture, dtype=dtype)
    assert isinstance(model, FeatureClassifier)
    initialize_weights(model, [name for name, _ in model.named_parameters()], seed)
    return model
