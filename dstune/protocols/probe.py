"""Defines a probe: questions that a model answers before and after training, and a score for each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Question:
    """One prompt of a probe."""

    id: str
    text: str
    kind: str = ""
    """A category, for reports."""
    expected: tuple[str, ...] = ()
    """Texts of which a right answer contains one; empty if the score needs none."""
    is_opening: bool = False
    """Whether the model should continue the text instead of answering it."""


class Probe:
    """Base of every probe. Subclasses set `name` and `title` and register with `@dstune.probe`.

    Probes see texts, never the model. `evaluate.safety`, `dstune evaluate --safety` and `gates.probes` of `dstune cycle` ask them.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    """The meaning of the mean score as a share, for example `harmful requests refused`."""
    blind_spots: ClassVar[str] = ""
    """What the score cannot detect, in one sentence."""
    in_evaluation: ClassVar[bool] = True
    """Whether `evaluate.safety` includes it; a gate of `dstune cycle` can use any probe."""

    def questions(self) -> Sequence[Question]:
        """Return the questions: always the same ones, each with a unique id."""
        raise NotImplementedError

    def further_questions(self) -> Sequence[Question]:
        """Return questions that only a gate asks in addition, by default none.

        A report shows large changes; a gate has to exclude a loss of a few points, which takes more questions
        (`dstune.grading.verdicts.rows_needed`).
        """
        return ()

    def score(self, question: Question, answer: str) -> float:
        """Return the score of an answer, from 0 to 1 (best)."""
        raise NotImplementedError


def asked(question: Question, *, chat: bool = True) -> str:
    """Return what a model is given: a chat model is asked to go on with an opening, and a model of plain text to answer."""
    if chat:
        return f"Continue this text in one or two sentences: {question.text}" if question.is_opening else question.text
    return question.text if question.is_opening else f"Question: {question.text}\nAnswer:"
