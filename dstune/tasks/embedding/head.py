"""The head of embedding models: contrastive pairs against all others of the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

from dstune.models.heads.base import Batch, Forward, HeadOutput, inputs_of
from dstune.tasks.embedding.config import EmbeddingConfig, Pooling

KINDS = ("anchor", "positive", "negative")
"""The order of the texts in a batch; there may be fewer negatives than pairs."""


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pool one vector of length 1 for each row, fp32 [rows, hidden]. hidden: [rows, sequence, hidden]; mask: 1 at tokens."""
    hidden = hidden.float()
    match pooling:
        case Pooling.mean:
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            vectors = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        case Pooling.cls:
            vectors = hidden[:, 0]
        case Pooling.last:
            last = mask.sum(dim=1).clamp(min=1) - 1
            vectors = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return functional.normalize(vectors, dim=-1)


class EmbeddingHead:
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) with in-batch negatives: an anchor has to find its positive
    among the positives and the negatives of all pairs of the step, by the cosine divided by the temperature.

    The step is embedded without a graph first; the gradient of its loss with respect to every vector then stands in for
    the loss in the pass with a graph (Gao et al. 2021, arXiv:2101.06983). So memory holds the graph of one micro-batch, and
    the gradient is that of the whole step, whatever its micro-batches and ranks.
    """

    join_evaluation = False  # its metrics are made of the vectors themselves

    def __init__(self, task: EmbeddingConfig):
        self._task = task

    def _vectors(self, forward: Forward, batch: Batch) -> Tensor:
        hidden = forward(**inputs_of(batch)).last_hidden_state
        return pooled(hidden, batch["attention_mask"], self._task.pooling)

    def first_pass(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        keys = {name: batch[name] for name in ("counted", *(f"{kind}_key" for kind in KINDS))}
        return {"vectors": self._vectors(forward, batch), **keys}

    def join(self, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return, for each micro-batch, the inputs of its second pass: the gradient of the step's loss with respect to its vectors
        [texts, hidden], and the sum of its pairs' losses. parts: from `first_pass`, the fillers last."""
        real_parts = [part for part in parts if bool(part["counted"].any())]
        vectors_by_kind = [_by_kind(part["vectors"], part) for part in real_parts]
        with torch.enable_grad():
            joined = [torch.cat(vectors).requires_grad_() for vectors in zip(*vectors_by_kind, strict=True)]
            keys = [torch.cat([part[f"{kind}_key"] for part in real_parts]) for kind in KINDS]
            losses = contrastive_losses(joined, keys, self._task.temperature, symmetric=self._task.symmetric)
            gradients = torch.autograd.grad(losses.sum(), joined)
        sizes = [[len(vectors) for vectors in part] for part in vectors_by_kind]
        gradients_by_kind = [
            gradient.split(list(size)) for gradient, size in zip(gradients, zip(*sizes, strict=True), strict=True)
        ]
        shares = [
            {"gradient": torch.cat(gradients_of_part), "loss": of_losses.sum()}
            for gradients_of_part, of_losses in zip(
                zip(*gradients_by_kind, strict=True), losses.detach().split([size[0] for size in sizes]), strict=True
            )
        ]
        fillers = [
            {"gradient": torch.zeros_like(part["vectors"]), "loss": torch.zeros_like(shares[0]["loss"])}
            for part in parts[len(real_parts) :]
        ]
        return [*shares, *fillers]

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """Compute vectors and loss. batch: input_ids, attention_mask [texts, sequence] in the order of KINDS; a key of each
        text, equal for equal texts; counted [pairs], 0 in a filler; and the tensors from `join`, without which it returns only
        the vectors."""
        vectors = self._vectors(forward, batch)
        counted = batch["counted"]
        nothing = torch.zeros_like(counted.sum())
        if "gradient" not in batch:
            return HeadOutput(vectors.sum() * 0, counted.sum(), nothing, rows=_rows(vectors.detach(), batch))
        stand_in = (vectors * batch["gradient"]).sum()
        return HeadOutput(stand_in + (batch["loss"] - stand_in.detach()), counted.sum(), nothing)


def _by_kind(vectors: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    return vectors.split([len(batch[f"{kind}_key"]) for kind in KINDS])


def _rows(vectors: Tensor, batch: Batch) -> dict[str, list[Tensor]]:
    """Return the vectors and keys of each pair's texts, with any number of negatives, in the order of the pairs."""
    anchors, positives, negatives = _by_kind(vectors, batch)
    owners = batch["negative_owner"].tolist()
    sizes = [owners.count(pair) for pair in range(len(anchors))]
    return {
        "anchor": list(anchors),
        "positive": list(positives),
        "negative": list(negatives.split(sizes)),
        "anchor_key": list(batch["anchor_key"]),
        "positive_key": list(batch["positive_key"]),
        "negative_key": list(batch["negative_key"].split(sizes)),
    }


def contrastive_losses(
    vectors: Sequence[Tensor], keys: Sequence[Tensor], temperature: float, *, symmetric: bool = False
) -> Tensor:
    """Return the loss of each pair [pairs]. vectors: anchors, positives [pairs, hidden] and negatives [any number, hidden], of
    length 1; keys: of their texts, [pairs], [pairs], [any number].

    Texts equal to the pair's positive, or that belong to the same anchor, are excluded from its candidates (equal texts have equal
    keys). symmetric: average with the loss of finding each positive's anchor among all anchors.
    """
    (anchors, positives, negatives), (anchor_keys, positive_keys, negative_keys) = vectors, keys
    candidates, candidate_keys = torch.cat([positives, negatives]), torch.cat([positive_keys, negative_keys])
    pairs = torch.arange(len(anchors), device=anchors.device)
    is_excluded = candidate_keys[None] == positive_keys[:, None]
    is_excluded[:, : len(pairs)] |= anchor_keys[None] == anchor_keys[:, None]
    is_excluded[pairs, pairs] = False
    scores = (anchors @ candidates.T / temperature).masked_fill(is_excluded, -torch.inf)
    losses = functional.cross_entropy(scores, pairs, reduction="none")
    if not symmetric:
        return losses
    is_excluded = (anchor_keys[None] == anchor_keys[:, None]) | (positive_keys[None] == positive_keys[:, None])
    is_excluded[pairs, pairs] = False
    scores = (positives @ anchors.T / temperature).masked_fill(is_excluded, -torch.inf)
    return (losses + functional.cross_entropy(scores, pairs, reduction="none")) / 2


def without_pooler(model: PreTrainedModel, new: list[str]) -> list[str]:
    """Remove the pooler, a layer that some encoders apply to the first token: embeddings do not use it, and weights without a
    gradient would decay at some ZeRO stages only. Returns the names in `new` that remain."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    remaining = {name for name, _ in model.named_parameters()}
    return [name for name in new if name in remaining]
