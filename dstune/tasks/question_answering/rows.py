"""Row format of questions with their answers in a text."""

from __future__ import annotations

from typing import Any, ClassVar

from dstune.data.answers import answers_of, checked_answers
from dstune.data.problems import RowError
from dstune.data.values import text
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task
from dstune.tasks.question_answering.config import QuestionAnsweringConfig


@row_format
class Squad(RowFormat):
    name = "squad"
    required = ("question", "context", "answers")
    optional = ("id", "is_impossible")
    checks: ClassVar[dict[str, Check]] = {"question": text, "context": text}

    def row(self, found: dict[str, Any], task: Task | None) -> dict[str, Any]:
        config = task.config if task is not None else None
        no_answer = isinstance(config, QuestionAnsweringConfig) and config.no_answer
        named = f"question {found['id']!r}: " if isinstance(found.get("id"), str) else ""
        try:
            answers = [] if found.get("is_impossible") is True else answers_of(found["answers"])
            checked_answers(answers, found["context"], no_answer=no_answer)
        except RowError as error:  # many files have all questions in one line
            raise RowError(f"{named}{error}") from None
        return {"question": found["question"], "context": found["context"], "answers": answers}
