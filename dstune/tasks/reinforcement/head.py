"""The loss of sampled completions, and what the sampler is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dstune.models.adapters import without_adapters
from dstune.models.cross_entropy import projected_log_probabilities
from dstune.models.heads.base import IGNORED, Batch, Forward, HeadOutput, inputs_of
from dstune.models.heads.language import CausalLmHead
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.losses import importance_factors, policy_loss


class PolicyHead(CausalLmHead):
    """A policy loss of the tokens that the model sampled, at the temperature of sampling.

    The log-probabilities that train are those of this forward pass, never the sampler's: with one update for each rollout the
    ratio is 1 exactly. The sampler's are compared with them, token by token.
    """

    def __init__(self, task: ReinforcementConfig, model: PreTrainedModel):
        super().__init__(model)
        self._task, self._model = task, model
        self.kept_old: list[Tensor] | None = None
        """Where the first of several updates leaves the log-probabilities of each micro-batch."""
        self.largest_difference = 0.0
        """Of a token's log-probability between sampler and training forward, since it was set to 0."""
        turn_off_dropout(model)

    def indexed(self, batch: Batch) -> dict[str, Tensor]:
        """Return batches of prompts as they are: what trains of a step is known after its rollout."""
        return dict(batch)

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """Compute the loss. batch: input_ids, attention_mask, labels [completions, sequence] (the sampled tokens), sampled
        [completions, sequence] (the sampler's log-probability of each label), advantages [completions]; old [targets] from the
        second update on."""
        labels, inputs = self.labels_of(batch), inputs_of(batch)
        positions = (labels != IGNORED).flatten().nonzero().squeeze(1)
        targets = labels.flatten().index_select(0, positions)
        width, count = labels.shape[1], len(labels)
        completion = positions // width
        reference = None
        if self._task.kl.coefficient:  # first, so that no activations of the other pass are in memory meanwhile
            with torch.no_grad(), without_adapters(self._model):
                reference = self._of_targets(forward, inputs, positions, targets, width)
        logps = self._of_targets(forward, inputs, positions, targets, width)
        old = batch["old"] if "old" in batch else logps.detach()
        if self.kept_old is not None and "old" not in batch:
            self.kept_old.append(old)
        advantages = batch["advantages"][completion]
        sampled = _shifted(batch["sampled"]).flatten().index_select(0, positions)
        cap = self._task.cap
        correction = None if cap is None else importance_factors(old, sampled, cap)
        output = policy_loss(self._task, logps, old, advantages, completion, count, reference, correction)
        sums = {"tokens": torch.tensor(float(len(targets))), "clipped_low": output.clipped_low.float()}
        sums |= {"clipped_high": output.clipped_high.float(), "kl": output.kl}
        if "old" not in batch:
            difference = old - sampled
            if len(difference):
                self.largest_difference = max(self.largest_difference, float(difference.abs().max()))
            sums |= {
                "difference": difference.sum(),
                "absolute_difference": difference.abs().sum(),
                "compared": torch.tensor(float(len(difference))),
            }
            if correction is not None:
                sums["importance"] = correction.sum()
        zero = torch.zeros(())
        return HeadOutput(loss_sum=output.loss_sum, weight=torch.tensor(len(targets)), correct=zero, sums=sums)

    def _of_targets(
        self, forward: Forward, inputs: Mapping[str, Any], positions: Tensor, targets: Tensor, width: int
    ) -> Tensor:
        """Compute log-probabilities of `targets`, fp32 [targets]."""
        self._kept, self._targets = (positions, width), targets if self.examined else None
        try:
            output: Tensor = forward(**inputs, use_cache=False).logits
        finally:
            self._kept = self._targets = None
        if self.examined:
            return output.float()
        logits = output.float() / self._task.temperature
        return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]

    def _projected(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return projected_log_probabilities(
            self._projection, self._project, hidden, targets, temperature=self._task.temperature
        )


def _shifted(values: Tensor) -> Tensor:
    """Return what stands at the next position, [rows, sequence]; 0 behind the last."""
    return torch.nn.functional.pad(values[:, 1:], (0, 1))


def turn_off_dropout(model: nn.Module) -> None:
    """Make the forward pass of training the function that samples.

    Modules of transformers also keep rates as attributes (`attention_dropout`), which they read while they train.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextmanager
def kept_log_probabilities(head: PolicyHead) -> Iterator[list[Tensor]]:
    """Keep the log-probabilities of each micro-batch within the block, in order."""
    logps: list[Tensor] = []
    head.kept_old = logps
    try:
        yield logps
    finally:
        head.kept_old = None
