"""Learn from preferences: which of two answers is better, or whether an answer is good.

Every loss is a mean over the pairs of the complete global batch (with `kto`, over its rows). The log-probability of an answer is
the sum over its tokens; the prompt's tokens do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import PreTrainedModel

from dstune.models.adapters import without_adapters
from dstune.models.heads.base import IGNORED, OF_TOKENS, OF_WHOLE_IMAGES, Batch, Forward, HeadOutput, inputs_of
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss, beta_of

LARGEST_LOG_PROBABILITY = -1e-6
"""Upper limit of the mean log-probability of a token in the odds ratio: an answer with probability 1 has infinite odds."""


class TargetLogits:
    """Computes logits only at the positions that have a target.

    The other logits would take most of the memory and up to a fifth of the time of a small model, so a hook before the
    vocabulary projection keeps only the hidden states whose next token is a target: [batch, sequence, hidden] becomes
    [targets, hidden]. Operations after the projection (soft-capping, scaling) are elementwise and need no change.
    """

    def __init__(self, model: PreTrainedModel):
        self._is_target: torch.Tensor | None = None
        projection = model.get_output_embeddings()
        assert isinstance(projection, nn.Module), f"{type(model).__name__} has no vocabulary projection"
        self._projection = projection
        projection.register_forward_pre_hook(self._keep_targets)

    def _keep_targets(self, projection: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._is_target is None:
            return None
        hidden, *other_inputs = inputs
        # Trained prompt positions come before the row; none of them has a target.
        is_target = functional.pad(self._is_target, (hidden.shape[1] - self._is_target.shape[1], 0))
        return (hidden[is_target], *other_inputs)

    def __call__(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits of the targets. batch: input_ids, labels [batch, sequence], and either attention_mask or position_ids
        of packed rows.

        Returns logits [targets, vocabulary] in fp32, targets [targets], and the row of each [targets].
        """
        # The label of the next position is the target of this one; the last position has none.
        targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        self._is_target = is_target = targets != IGNORED
        try:
            # The samples of a packed row are kept apart only without a cache; with one they contaminate each other silently.
            inputs = inputs_of(batch, next(self._projection.parameters()).dtype)
            logits = forward(**inputs, use_cache=False).logits
        finally:
            self._is_target = None
        return logits.float(), targets[is_target], is_target.nonzero()[:, 0]


class LogProbabilities:
    """Computes log-probabilities of answers under the trained model and under the reference."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._logits = TargetLogits(model)

    def __call__(self, forward: Forward, batch: Batch, prefix: str = "") -> tuple[Tensor, Tensor]:
        """Sum the log-probabilities of the targets of each row. batch: input_ids, attention_mask, labels and token types of images,
        all with `prefix` and [rows, sequence]; the images themselves without it. Returns the sums, fp32 [rows], and the numbers of
        targets [rows]."""
        inputs = {name: batch[f"{prefix}{name}"] for name in (*OF_TOKENS, "labels") if f"{prefix}{name}" in batch}
        inputs |= {name: batch[name] for name in OF_WHOLE_IMAGES if name in batch}
        logits, targets, rows = self._logits(forward, inputs)
        each = -functional.cross_entropy(logits, targets, reduction="none")
        zeros = torch.zeros(len(inputs["input_ids"]), dtype=each.dtype, device=each.device)
        return zeros.index_add(0, rows, each), zeros.index_add(0, rows, torch.ones_like(each.detach()))

    def reference(self, forward: Forward, batch: Batch, prefix: str = "") -> Tensor:
        """Return the log-probabilities under the reference, without a graph, fp32 [rows]: those of the batch if they were computed
        before training, otherwise those of the model with its adapters switched off."""
        if f"{prefix}reference" in batch:
            return batch[f"{prefix}reference"]
        with torch.no_grad(), without_adapters(self._model):
            return self(forward, batch, prefix)[0]

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)


class PairHead:
    """Computes the loss of pairs of a better and a worse answer, both in one forward pass."""

    def __init__(self, task: PreferenceConfig, model: PreTrainedModel):
        self._task = task
        self._log_probabilities = LogProbabilities(model)

    def log_probabilities(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the log-probabilities of the better and the worse answer of each pair, fp32 [pairs, 2]."""
        return self._log_probabilities(forward, batch)[0].view(2, -1).T

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """Compute the loss. batch: input_ids, attention_mask, labels [2 pairs, sequence], the better answers first; counted
        [pairs], 0 in a filler; reference [2 pairs] if it was computed before training."""
        # First, while the other pass holds no activations in memory.
        compared = self._log_probabilities.reference(forward, batch).view(2, -1) if self._task.compares else None
        summed, tokens = (part.view(2, -1) for part in self._log_probabilities(forward, batch))
        losses, rewards = pair_losses(self._task, summed, tokens, compared)
        counted = batch["counted"]
        better, worse = (rewards.detach() * counted).unbind()
        sums = {"reward_chosen": better.sum(), "reward_rejected": worse.sum(), "chosen": counted.sum()}
        sums |= {"rejected": counted.sum()}
        for name, values in zip(("logps_chosen", "logps_rejected"), summed.detach() * counted, strict=True):
            sums[name] = values.sum()
        return HeadOutput(
            loss_sum=(losses * counted).sum(),
            weight=counted.sum(),
            correct=((better > worse) & (counted > 0)).sum(),
            sums=sums,
        )


def pair_losses(
    task: PreferenceConfig, summed: Tensor, tokens: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each pair [pairs], and the rewards of its better and its worse answer [2, pairs].

    summed: log-probabilities of the answers, tokens: their lengths, reference: the log-probabilities under the reference
    model; each [2, pairs], the better answers first.

    dpo: Rafailov et al. 2023 (arXiv:2305.18290), equation 7; with label smoothing its conservative form.
    ipo: Azar et al. 2023 (arXiv:2310.12036), equation 17, of the mean over an answer's tokens.
    orpo: Hong et al. 2024 (arXiv:2403.07691), equation 6; the first term is the mean over the better answer's tokens.
    simpo: Meng et al. 2024 (arXiv:2405.14734), equation 6.
    """
    beta = beta_of(task)
    means = summed / tokens.clamp(min=1)
    match task.loss:
        case PreferenceLoss.dpo:
            assert reference is not None
            rewards = beta * (summed - reference)
            margin = rewards[0] - rewards[1]
            wrong = task.label_smoothing
            return -(1 - wrong) * functional.logsigmoid(margin) - wrong * functional.logsigmoid(-margin), rewards
        case PreferenceLoss.ipo:
            assert reference is not None
            ratios = means - reference / tokens.clamp(min=1)
            return (ratios[0] - ratios[1] - 1 / (2 * beta)) ** 2, beta * ratios
        case PreferenceLoss.orpo:
            means = means.clamp(max=LARGEST_LOG_PROBABILITY)
            odds = means - torch.log(-torch.expm1(means))
            return -means[0] - beta * functional.logsigmoid(odds[0] - odds[1]), beta * means
        case PreferenceLoss.simpo:
            rewards = beta * means
            return -functional.logsigmoid(rewards[0] - rewards[1] - task.gamma), rewards
    raise AssertionError(f"{task.loss} has no pairs")


class JudgedHead:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8): single answers, good or bad, against a reference point.

    The reference point z0 estimates how far the model has moved from the reference on mismatched answers. Each prompt is
    continued with the answer to a later, different prompt in the data (the first sample follows the last), and z0 is the mean
    of these log-probability ratios over the complete global batch, at least 0. The pairing depends only on the data, neither on
    the number of ranks nor on the order of training. z0 is computed without gradient and without dropout.
    """

    join_evaluation = True

    def __init__(self, task: PreferenceConfig, model: PreTrainedModel):
        self._task, self._beta = task, beta_of(task)
        self._log_probabilities = LogProbabilities(model)

    def log_probabilities(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the log-probabilities of each row's answer and of the answer to a different prompt, fp32 [rows, 2]."""
        answers = [self._log_probabilities(forward, batch, prefix)[0] for prefix in ("", "other_")]
        return torch.stack(answers, dim=1)

    def first_pass(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        with self._log_probabilities.without_dropout():
            moved, _ = self._log_probabilities(forward, batch, "other_")
        moved = moved - self._log_probabilities.reference(forward, batch, "other_")
        return {"moved": (moved * batch["counted"]).sum().double(), "rows": batch["counted"].sum()}

    def join(self, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        moved, rows = (sum(part[name] for part in parts) for name in ("moved", "rows"))  # in fp64
        return [{"reference_point": torch.as_tensor(moved / rows).clamp(min=0).float()}] * len(parts)

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """Compute the loss. batch: input_ids, attention_mask, labels [rows, sequence]; desirable, counted [rows]; reference [rows]
        if it was computed before training; and the reference point that `join` adds. Names with `other_` belong to the first
        pass."""
        compared = self._log_probabilities.reference(forward, batch)
        summed, _ = self._log_probabilities(forward, batch)
        rewards = self._beta * (summed - compared)
        good, counted = batch["desirable"] > 0, batch["counted"]
        losses = judged_losses(self._task, rewards, good, batch["reference_point"])
        better, worse = good * counted, ~good * counted
        rewards, summed = rewards.detach(), summed.detach()
        sums = {"chosen": better.sum(), "rejected": worse.sum()}
        for name, values in (("reward", rewards), ("logps", summed)):
            sums |= {f"{name}_chosen": (values * better).sum(), f"{name}_rejected": (values * worse).sum()}
        right = (rewards > self._beta * batch["reference_point"]) == good
        return HeadOutput(
            loss_sum=(losses * counted).sum(), weight=counted.sum(), correct=(right & (counted > 0)).sum(), sums=sums
        )


def judged_losses(task: PreferenceConfig, rewards: Tensor, good: Tensor, reference_point: Tensor) -> Tensor:
    """Return the loss of each answer, [rows].

    rewards: beta times the log-probability ratios [rows]. good: whether each answer is good [rows]. reference_point: the mean
    log-probability ratio of answers to different prompts, at least 0.
    """
    above = rewards - beta_of(task) * reference_point
    weight = torch.where(good, task.desirable_weight, task.undesirable_weight)
    return weight * (1 - torch.sigmoid(torch.where(good, above, -above)))
