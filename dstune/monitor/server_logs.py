"""Reads conversations from the logs of `dstune serve --log-requests`, with feedback and the guard's decisions."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json
from dstune.monitor.conversations import Conversation, asked_texts, is_batch, joined

REQUESTS = "requests"
"""The logs' folder inside the server's folder."""
COLUMNS = frozenset({"id", "created", "request", "answer", "status", "route"})
PASSED = frozenset({"passed", "unchecked"})
MOST_TEXT = 32 << 20
"""The most characters of a request's JSON; longer requests are left out."""


def log_folder(place: str) -> Path | None:
    """Return the folder with a server's log files: `place` itself, or the one inside if `place` is a server's folder; None if it is
    neither."""
    for folder in (Path(place) / REQUESTS, Path(place)):
        if folder.is_dir() and ((folder / "user-key").is_file() or folder.name == REQUESTS):
            return folder
    return None


def read_log(folder: Path, since: float, store: str | None = None) -> list[Conversation]:
    """Return the conversations since a time (seconds since the epoch), in time order; see `read_requests`."""
    return joined(read_requests(folder, since, store))


def read_requests(folder: Path, since: float, store: str | None = None) -> list[Conversation]:
    """Return the requests since a time, in time order, without joining them. store: URL of the server's database; by default the
    one next to the logs, if any. Raises UserError if a file is damaged."""
    feedback = _feedback(folder.parent, store)
    flagged = _flagged(folder.parent / "guard")
    turns = []
    for row in _rows(folder, since):
        conversation = _conversation(row)
        if conversation is not None:
            turns.append(_with_feedback(conversation, feedback, flagged))
    turns.sort(key=lambda turn: (turn.time or 0.0, turn.place))
    return turns


def recorded_requests(folder: Path, store: str | None = None) -> set[str]:
    """Return the ids of all answers in the server's database; those of users who were deleted are gone."""
    from dstune.serve import extra
    from dstune.serve.state import open_database

    extra.require()
    from sqlalchemy import select

    from dstune.serve.store.tables import AnswerRow

    database = open_database(folder.parent, store, create=False)
    try:
        with database.session() as session:
            return set(session.scalars(select(AnswerRow.id)))
    finally:
        database.close()


def _rows(folder: Path, since: float) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for file in sorted(folder.glob("*.parquet")):
        try:
            table = pq.read_table(file)
        except FileNotFoundError:  # it expired, or its user was deleted, after the folder was listed
            continue
        except (pa.ArrowException, OSError) as error:
            raise UserError(Problem(str(file), f"cannot be read: {error}", "remove the file")) from error
        if missing := sorted(COLUMNS - set(table.column_names)):
            reason = f"is not a log of requests: it lacks the column {missing[0]}"
            raise UserError(Problem(str(file), reason, "remove the file"))
        begin = datetime.datetime.fromtimestamp(since, datetime.UTC)
        yield from table.filter(pc.greater_equal(table["created"], pa.scalar(begin, table["created"].type))).to_pylist()


def _conversation(row: Mapping[str, Any]) -> Conversation | None:
    """Return the conversation of a request; None if the request failed, or contains no text to compare."""
    if row["status"] != 200 or not isinstance(row["request"], str) or len(row["request"]) > MOST_TEXT:
        return None
    try:
        body = parse_json(row["request"])
        answer = parse_json(row["answer"])
    except (ValueError, TypeError):
        return None
    texts = asked_texts(body) if isinstance(body, dict) else ()
    if not texts:
        return None
    fields = _fields(body, texts)
    return Conversation(
        str(row["id"]),
        texts,
        time=_seconds(row["created"]),
        user=row.get("user_hash") or row.get("user"),
        key=row.get("key"),
        version=row.get("version"),
        fields=fields,
        answer=_answer_text(answer),
        requests=tuple(str(name) for name in (row["id"], row.get("response")) if name),
        is_batch=is_batch(body),
    )


def _fields(body: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Return the question of a request: its messages (for `/v1/responses`, after its instructions) or its first text."""
    if isinstance(body.get("messages"), list):
        return {"messages": body["messages"]}
    if isinstance(items := body.get("input"), list) and all(isinstance(item, dict) for item in items):
        instructions = body.get("instructions")
        return {"messages": [*([{"role": "system", "content": instructions}] if instructions else ()), *items]}
    return {"text": texts[0]}


def _seconds(moment: datetime.datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _answer_text(answer: Any) -> str | None:
    """Return the model's text, in any form of the server's routes and its log of streams; None for several answers, since a rating
    does not say which one it is about."""
    if isinstance(answer, list):
        return answer[0] if len(answer) == 1 and isinstance(answer[0], str) else None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    message = choices[0].get("message")
    text = message.get("content") if isinstance(message, dict) else choices[0].get("text")
    return text if isinstance(text, str) else None


def _with_feedback(
    conversation: Conversation, feedback: Mapping[str, Mapping[str, Any]], flagged: Mapping[str, bool]
) -> Conversation:
    entry = next((feedback[name] for name in conversation.requests if name in feedback), {})
    return replace(
        conversation,
        label=None if conversation.is_batch else entry.get("label"),
        correction=None if conversation.is_batch else entry.get("correction"),
        rating=entry.get("rating"),
        is_flagged=flagged.get(conversation.place) if flagged else None,
    )


def _feedback(state: Path, store: str | None) -> dict[str, dict[str, Any]]:
    """Return clients' feedback, by the id of the request and by that of the answer."""
    from dstune.serve import extra
    from dstune.serve.state import open_database

    if not store and not any(state.glob("*.sqlite")):
        return {}
    extra.require()
    from sqlalchemy import select

    from dstune.serve.store.tables import AnswerRow, Feedback

    database = open_database(state, store, create=False)
    try:
        with database.session() as session:
            rows = session.execute(
                select(AnswerRow.id, AnswerRow.response, Feedback.rating, Feedback.label, Feedback.correction).join(
                    Feedback, Feedback.answer == AnswerRow.id
                )
            ).all()
    finally:
        database.close()
    return {
        name: {"rating": row.rating, "label": row.label, "correction": row.correction}
        for row in rows
        for name in (row.id, row.response)
        if name
    }


def _flagged(folder: Path) -> dict[str, bool]:
    """Return whether the guard flagged each request, by its id; empty without a guard."""
    flagged: dict[str, bool] = {}
    for file in sorted(folder.glob("audit-*.jsonl")):
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # a line that is still being written
                continue
            if isinstance(entry, dict) and isinstance(entry.get("request"), str):
                name = entry["request"]
                flagged[name] = flagged.get(name, False) or entry.get("decision") not in PASSED
    return flagged
