"""The keys of `task=question_answering`."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols.task import TaskConfig


@dataclass(frozen=True)
class QuestionAnsweringConfig(TaskConfig):
    """The answer to a question as a span of a text (SQuAD, Rajpurkar et al. 2016 and 2018)."""

    name: str = "question_answering"
    no_answer: bool = False
    """Some questions have no answer in their text, as in SQuAD 2, and the model has to say so. Metrics are then those of SQuAD 2's
    script: of an answer that is nothing but articles and punctuation no word is left, so that only an empty answer is right;
    without this key SQuAD 1.1's script gives it an F1 of 0."""
    threshold: float = 0.0
    """With `no_answer`: predict no answer if its score exceeds that of the best span by more than this, in logits."""
    max_answer_tokens: int = setting(30, at_least=1)
    """Longest span that is predicted, in tokens."""
    stride: int = setting(128, at_least=0)
    """Overlap of two chunks of a long text, in tokens; at most half of the room that the question leaves."""
