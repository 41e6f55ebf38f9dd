"""Compute the loss of sampled completions, and the log-probabilities that the sampler's are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dstune.core.distributed import World
from dstune.models.adapters import without_adapters
from dstune.models.cross_entropy import projected_log_probabilities
from dstune.models.heads.base import IGNORED, Batch, Forward, HeadOutput, inputs_of
from dstune.models.heads.language import CausalLmHead
from dstune.models.shared_prompts import SharedPrompts, share_prompts, stop_sharing
from dstune.tasks.reinforcement.config import Correction, ReinforcementConfig
from dstune.tasks.reinforcement.losses import importance_factors, policy_loss


class Targets(NamedTuple):
    """The sampled tokens of a micro-batch that are trained."""

    inputs: Mapping[str, Any]
    """Inputs of the model."""
    places: Tensor
    """Indices of the hidden states that predict the targets, in all rows end to end, int64 [targets]."""
    width: int
    """Number of tokens in a row."""
    tokens: Tensor
    """Token ids, int64 [targets]."""
    completion: Tensor
    """Index of the completion that each target belongs to, int64 [targets]."""
    sampled: Tensor
    """The sampler's log-probabilities of the targets, fp32 [targets]."""


class Reference(Protocol):
    """A separate model that gives the log-probabilities of sampled tokens before training."""

    def share_prompts(self, world: World) -> bool:
        """See `PolicyHead.share_prompts`."""

    def log_probabilities(self, targets: Targets) -> Tensor:
        """Return the log-probabilities of `targets`, without a graph, fp32 [targets]."""


class PolicyHead(CausalLmHead):
    """A policy loss over the tokens that the model sampled, at the sampling temperature.

    The loss uses the log-probabilities of this forward pass, never the sampler's, so with one update per rollout the ratio is
    exactly 1. The sampler's are compared with them, token by token.
    """

    def __init__(self, task: ReinforcementConfig, model: PreTrainedModel, reference: Reference | None = None):
        """reference: the model to stay close to; None for `model` without its adapter."""
        super().__init__(model)
        self._task, self._model, self._reference = task, model, reference
        self.kept_old: list[Tensor] | None = None
        """Receives the log-probabilities of each micro-batch in the first of several updates."""
        self.largest_difference = 0.0
        """Largest difference of a token's log-probability between sampler and training forward pass since this was set to 0."""
        turn_off_dropout(model)

    def indexed(self, batch: Batch) -> dict[str, Tensor]:
        """Return batches of prompts unchanged: the targets of a step are known only after its rollout."""
        return dict(batch)

    def share_prompts(self, forward: Forward, device: torch.device, world: World) -> bool:
        """Return whether batches may share prompts (`batches.shared_batch`): only if on all ranks the model computes the same as
        for each completion alone. `forward` must be in evaluation mode."""
        excess = share_prompts(self._model, forward, device)
        if excess is None:
            return False
        is_right = not world.any(not excess <= 1)
        if is_right and self._reference is not None:
            is_right = self._reference.share_prompts(world)
        if not is_right:
            stop_sharing(self._model)
        return is_right

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """Compute the loss. batch: from `batches.completion_batch` or `batches.shared_batch`; from the second update on also `old`
        [targets], the log-probabilities at the first update."""
        targets = self.targets_of(batch)
        reference = None
        if self._task.kl.coefficient:  # first, while the other pass holds no activations in memory
            reference = self._of_reference(forward, targets)
        logps = self.log_probabilities(forward, targets)
        old = batch["old"] if "old" in batch else logps.detach()
        if self.kept_old is not None and "old" not in batch:
            self.kept_old.append(old)
        completion, count = targets.completion, len(batch["advantages"])
        advantages = batch["advantages"][completion]
        sampled = targets.sampled
        cap = self._task.cap
        masked = self._task.correction is Correction.mask
        correction = None if cap is None else importance_factors(old, sampled, cap, masked=masked)
        output = policy_loss(self._task, logps, old, advantages, completion, count, reference, correction)
        sums = {"tokens": torch.tensor(float(len(logps))), "clipped_low": output.clipped_low.float()}
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
        return HeadOutput(loss_sum=output.loss_sum, weight=torch.tensor(len(logps)), correct=zero, sums=sums)

    def targets_of(self, batch: Batch) -> Targets:
        return _shared_targets(batch) if "prompt_lengths" in batch else _targets(batch, self.labels_of(batch))

    @property
    def has_adapter(self) -> bool:
        return any(hasattr(module, "_disable_adapters") for module in self._model.modules())

    def without_adapter(self) -> AbstractContextManager[None]:
        return without_adapters(self._model)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Compute log-probabilities at a different temperature within the block."""
        task, self._task = self._task, replace(self._task, temperature=temperature)
        try:
            yield
        finally:
            self._task = task

    def _of_reference(self, forward: Forward, targets: Targets) -> Tensor:
        if self._reference is not None:
            return self._reference.log_probabilities(targets)
        with torch.no_grad(), without_adapters(self._model):
            return self.log_probabilities(forward, targets)

    def log_probabilities(self, forward: Forward, targets: Targets) -> Tensor:
        """Compute the log-probabilities of `targets`, fp32 [targets]."""
        self._projected_positions = targets.places, targets.width
        self._targets = targets.tokens if self.examined else None
        try:
            output: Tensor = forward(**targets.inputs, use_cache=False).logits
        finally:
            self._projected_positions = self._targets = None
        if self.examined:
            return output.float()
        logits = output.float() / self._task.temperature
        return torch.log_softmax(logits, dim=-1).gather(1, targets.tokens[:, None])[:, 0]

    def _projected(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return projected_log_probabilities(
            self._projection, self._project, hidden, targets, temperature=self._task.temperature
        )


def _targets(batch: Batch, labels: Tensor) -> Targets:
    """Return the targets of a batch from `completion_batch`. labels: the token that each position predicts, [rows, width]."""
    places, width = (labels != IGNORED).flatten().nonzero().squeeze(1), labels.shape[1]
    sampled = torch.nn.functional.pad(batch["sampled"][:, 1:], (0, 1)).flatten()
    tokens = labels.flatten().index_select(0, places)
    return Targets(inputs_of(batch), places, width, tokens, places // width, sampled.index_select(0, places))


def _shared_targets(batch: Batch) -> Targets:
    """Return the targets of a batch from `shared_batch`."""
    prompts, sizes, answers = (batch[name].tolist() for name in ("prompt_lengths", "prompt_samples", "answer_lengths"))
    tokens, labels = batch["input_ids"], batch["labels"]
    shared = SharedPrompts.build(prompts, sizes, answers, tokens.device)
    longest = labels.shape[1]
    chosen = (labels != IGNORED).flatten().nonzero().squeeze(1)
    places, labels, sampled = (
        values.flatten().index_select(0, chosen) for values in (shared.predecessors(longest), labels, batch["sampled"])
    )
    return Targets(shared.model_inputs(tokens), places, tokens.shape[1], labels, chosen // longest, sampled)


def turn_off_dropout(model: nn.Module) -> None:
    """Turn off all dropout, so that the forward pass of training computes the same function as sampling.

    Modules of transformers also keep dropout rates as attributes (`attention_dropout`), which they read in training mode.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextmanager
def kept_log_probabilities(head: PolicyHead) -> Iterator[list[Tensor]]:
    """Collect the log-probabilities of each micro-batch in the block, in order."""
    logps: list[Tensor] = []
    head.kept_old = logps
    try:
        yield logps
    finally:
        head.kept_old = None
