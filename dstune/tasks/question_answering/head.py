"""The head of question answering."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from dstune.models.heads.base import IGNORED, Batch, Forward, HeadOutput, inputs_of


class AnswerHead:
    """Cross entropy of the first and of the last token of the answer, their mean for each row.

    batch: input_ids, attention_mask, char_start, char_end [batch, sequence], start_positions, end_positions,
    null_positions [batch]. Padding takes no part, so that a row's loss does not depend on its neighbours' lengths. Of each
    row an evaluation keeps the score of its best span (the sum of the two logits), the characters of it, and the score of
    having no answer.
    """

    def __init__(self, max_answer_tokens: int):
        self._max_answer_tokens = max_answer_tokens

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        output = forward(**inputs_of(batch))
        padding = batch["attention_mask"] == 0
        starts, ends = (
            logits.float().masked_fill(padding, torch.finfo(torch.float32).min)
            for logits in (output.start_logits, output.end_logits)
        )
        start_positions, end_positions = batch["start_positions"], batch["end_positions"]
        losses = [
            functional.cross_entropy(logits, positions, ignore_index=IGNORED, reduction="none")
            for logits, positions in zip((starts, ends), (start_positions, end_positions), strict=True)
        ]
        loss = (losses[0] + losses[1]) / 2
        hits = (starts.detach().argmax(-1) == start_positions) & (ends.detach().argmax(-1) == end_positions)
        rows = {}
        if not torch.is_grad_enabled():
            inside = batch["char_end"] > batch["char_start"]
            score, first, last = best_span(starts, ends, inside, self._max_answer_tokens)
            null = batch["null_positions"][:, None]
            rows = {
                "score": score,
                "null": (starts.gather(1, null) + ends.gather(1, null))[:, 0],
                "char_start": batch["char_start"].gather(1, first[:, None])[:, 0],
                "char_end": batch["char_end"].gather(1, last[:, None])[:, 0],
                "loss": loss,
                "weight": start_positions != IGNORED,
                "correct": hits,
            }
        return HeadOutput(loss_sum=loss.sum(), weight=(start_positions != IGNORED).sum(), correct=hits.sum(), rows=rows)


def best_span(
    starts: torch.Tensor, ends: torch.Tensor, inside: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return score, first and last token, each [batch], of the span of at most `longest` tokens with the highest sum of logits.

    starts, ends: logits [batch, sequence]. inside: tokens that a span may begin and end with, bool [batch, sequence].
    The score is -inf if there is no such span.
    """
    width = starts.shape[1]
    starts, ends = (logits.masked_fill(~inside, -torch.inf) for logits in (starts, ends))
    best = torch.full_like(starts, -torch.inf)
    length = torch.zeros_like(starts, dtype=torch.long)
    for offset in range(min(longest, width)):
        scores = functional.pad(starts[:, : width - offset] + ends[:, offset:], (0, offset), value=-torch.inf)
        length = torch.where(scores > best, offset, length)
        best = torch.maximum(best, scores)
    score, first = best.max(dim=1)
    return score, first, first + length.gather(1, first[:, None])[:, 0]
