"""Row format of questions with their answers in a text."""

from __future__ import annotations

from typing import Any, ClassVar

from dstune.data.answers import answers_of, check_answers_in
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

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        config = task.config if task is not None else None
        no_answer = isinstance(config, QuestionAnsweringConfig) and config.no_answer
        prefix = f"question {values['id']!r}: " if isinstance(values.get("id"), str) else ""
        try:
            answers = [] if values.get("is_impossible") is True else answers_of(values["answers"])
            check_answers_in(values["context"], answers, no_answer=no_answer)
        except RowError as error:  # many files have all questions in one line
            raise RowError(f"{prefix}{error}") from None
        return {"question": values["question"], "context": values["context"], "answers": answers}
