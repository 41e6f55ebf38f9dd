"""Read questions whose answers are spans of a text: SQuAD's nested files, and the check that each answer is where it claims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dstune.core.parsing import parse_json
from dstune.data.problems import RowError, format_value

if TYPE_CHECKING:
    from dstune.data.files import RawRow

Answer = dict[str, Any]
"""`text`, and `start`: the character of the context at which it begins."""


def flat(rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """Yield `rows` of JSON, with SQuAD's nested form (articles, paragraphs, questions) flattened to one row for each question.

    All questions of an object keep its line number: the line where the article, or the complete file, begins. Other rows stay
    as they are.
    """
    for row in rows:
        articles = _articles(row.fields or {})
        if articles is None:
            yield row
            continue
        for article in articles:
            for paragraph in _listed(article, "paragraphs", [article]):
                for question in _listed(paragraph, "qas", [paragraph]):
                    yield _row_of_question(row, article, paragraph, question)


def is_nested(fields: Mapping[str, Any]) -> bool:
    """Return whether a row of JSON has SQuAD's nested form, which `flat` splits into questions."""
    return _articles(fields) is not None


def _articles(fields: Mapping[str, Any]) -> list[Any] | None:
    """Return the articles, paragraphs or questions of an object in SQuAD's form; None if it has another form."""
    data = fields.get("data")
    articles = data if isinstance(data, list) else [fields]
    pairs = [(article, paragraph) for article in articles for paragraph in _listed(article, "paragraphs", [article])]
    # Rows of any task may have a column `data` or `paragraphs`. They are SQuAD's only if questions are nested in them, or if they
    # hold nothing but a title and contexts.
    if any(_listed(paragraph, "qas") is not None for _, paragraph in pairs):
        return articles
    if articles and (all(map(_is_article, articles)) or (data is articles and all(map(_is_question, articles)))):
        return articles
    return None


def _row_of_question(row: RawRow, article: Any, paragraph: Any, question: Any) -> RawRow:
    if question is article and _is_question(question):
        return replace(row, fields=question)
    if question is paragraph:
        return replace(row, fields=None, error="a paragraph without a list of questions (qas)")
    if not isinstance(question, dict):
        return replace(row, fields=None, error=f"a question must be an object, it is {format_value(question)}")
    title = article.get("title", paragraph.get("title"))
    return replace(row, fields={"title": title, "context": paragraph.get("context")} | question)


def _is_question(value: Any) -> bool:
    return isinstance(value, dict) and {"question", "context"} <= set(value)


def _is_article(value: Any) -> bool:
    paragraphs = _listed(value, "paragraphs")
    if paragraphs is None or not set(value) <= {"title", "paragraphs"}:
        return False
    return all(isinstance(paragraph, dict) and "context" in paragraph for paragraph in paragraphs)


def _listed(value: Any, key: str, default: Any = None) -> Any:
    """Return the list that an object has under `key`; otherwise `default`."""
    entries = value.get(key) if isinstance(value, dict) else None
    return entries if isinstance(entries, list) else default


def answers_of(value: Any) -> list[Answer]:
    """Return the different answers of a row: `{text: [...], answer_start: [...]}`, or a list of `{text, answer_start}`, either
    also as JSON text, as in a CSV file. Raises RowError."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise RowError(f"answers must be an object or a list, they are {format_value(value)}") from None
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise RowError("answers need as many answer_start as text")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if value is None:
        value = []
    if not isinstance(value, list):
        raise RowError(f"answers must be an object or a list, they are {format_value(value)}")
    answers: list[Answer] = []
    for answer in value:
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"an answer must have a text, it is {format_value(answer)}")
        if isinstance(start, float) and start.is_integer():
            start = int(start)
        if not isinstance(start, int) or isinstance(start, bool):
            raise RowError(f"answer_start of answer {format_value(text)} must be a number, it is {format_value(start)}")
        if {"text": text, "start": start} not in answers:
            answers.append({"text": text, "start": start})
    return answers


def check_answers_in(context: str, answers: Sequence[Answer], *, no_answer: bool) -> None:
    """Check that each answer is in `context` at its `start`, and that there is one unless `no_answer`. Raises RowError."""
    if not answers and not no_answer:
        raise RowError("there is no answer; task.no_answer=true trains on questions without one")
    for answer in answers:
        text, start = answer["text"], answer["start"]
        if start < 0 or context[start : start + len(text)] != text:
            place = context.find(text)
            actual_place = f"it is at {place}" if place >= 0 else "it is nowhere in it"
            raise RowError(f"answer {format_value(text)} is not at character {start} of its context ({actual_place})")
