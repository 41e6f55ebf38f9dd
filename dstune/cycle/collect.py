"""Collect rows that a person vouched for: a label, a correction, or an accepted answer, never an answer that nobody rated."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.parsing import parse_json, read_file
from dstune.cycle.refusals import shows_images
from dstune.cycle.settings import CycleSettings
from dstune.data.clean.held_out import HeldOutTexts
from dstune.monitor.conversations import Conversation, asked_texts
from dstune.monitor.row_files import conversation_of_row
from dstune.monitor.server_logs import log_folder, read_requests, recorded_requests

LARGEST = 4 << 30
RUN_WORDS = 13
"""Number of consecutive words that a training row may not share with a measured row (Brown and others 2020, appendix C)."""


@dataclass(frozen=True)
class Row:
    """A new row."""

    id: str
    digest: str
    """Digest of the question and answer: identifies a row without storing its text."""
    key: str
    kind: str
    """`label`, `correction` or `rating`."""
    row: dict[str, Any]
    """The row in the form that the task reads."""
    is_held_out: bool
    """Whether models are measured on it; it is then never trained on."""


@dataclass(frozen=True)
class Collected:
    """The new rows, and why others were dropped."""

    rows: list[Row]
    dropped: dict[str, int]
    largest_key: float
    """The largest share of the rows that came from a single key."""


def collect(
    settings: CycleSettings, requests: Sequence[Conversation], labels: Sequence[str], used: set[str], *, writes: bool
) -> Collected:
    """Return the rows that no earlier cycle used.

    requests: those of `read_feedback`. labels: the model's labels; empty if it writes text. used: ids of earlier rows. writes:
    whether the model writes text.
    """
    dropped: Counter[str] = Counter()
    rows: dict[str, Row] = {}
    for request in requests:
        identity = request.requests[0] if request.requests else request.place
        if identity in used:
            continue
        if request.key in settings.exclude_keys:
            dropped["of a key in exclude_keys"] += 1
            continue
        kind, row = _row(request, settings.least_rating, labels, writes=writes)
        if row is None:
            dropped[kind] += 1
            continue
        digest = digest_of_row(row)
        if digest in rows:
            dropped["the same row again"] += 1
            continue
        held_out = _share_of(request) < settings.hold_out
        rows[digest] = Row(identity, digest, request.key or "", kind, row, held_out)
    remaining = _limited(list(rows.values()), settings.share_per_key)
    if len(remaining) < len(rows):
        dropped["more than share_per_key of one key"] = len(rows) - len(remaining)
    largest = max(Counter(row.key for row in remaining).values(), default=0) / max(len(remaining), 1)
    return Collected(remaining, dict(sorted(dropped.items())), largest)


def read_feedback(settings: CycleSettings) -> tuple[list[Conversation], set[str]]:
    """Return all requests, and the ids of everything that the source still has. Raises UserError."""
    folder = log_folder(settings.data)
    if folder is not None:
        return read_requests(folder, 0.0, settings.store), recorded_requests(folder, settings.store)
    from dstune.data import sources

    requests = []
    for file in sources.expand(settings.data, "data", split="train"):
        for raw in sources.read(file):
            fields = raw.fields or {}
            conversation = conversation_of_row(fields, raw.place)
            if conversation is None:
                continue
            identity = str(fields.get("id") or conversation.digest)
            answer = fields.get("answer")
            request = replace(
                conversation,
                key=_name(fields.get("key")),
                fields={name: fields[name] for name in ("messages", "text") if name in fields},
                answer=answer if isinstance(answer, str) else None,
                requests=(identity,),
            )
            requests.append(request)
    return requests, {request.requests[0] for request in requests}


def _name(value: Any) -> str | None:
    return None if value is None else str(value)


def _row(
    request: Conversation, least_rating: float, labels: Sequence[str], *, writes: bool
) -> tuple[str, dict[str, Any] | None]:
    """Return (kind, row); if the request teaches nothing, (reason, None)."""
    if request.is_batch:
        return "of several texts in one request", None
    if not writes:
        label = request.label or request.correction
        if label is None:
            return "without a label", None
        if label not in labels:
            return "a label that the model lacks", None
        return "label", {"text": request.text, "label": label}
    accepted = request.rating is not None and request.rating >= least_rating
    answer = request.correction or (request.answer if accepted else None)
    if answer is None:
        return "without a correction or an accepted answer", None
    if shows_images(request.fields):
        return "with an image, of which the log has the digest alone", None
    messages = request.fields.get("messages")
    if not isinstance(messages, list):
        messages = [{"role": "user", "content": request.text}]
    row = {"messages": [*messages, {"role": "assistant", "content": answer}]}
    return "correction" if request.correction else "rating", row


def _share_of(request: Conversation) -> float:
    """Return a fixed number from 0 to 1 for the user, or for the request if the user is unknown: held-out users stay held out in
    all cycles."""
    name = request.user or request.digest
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2.0**64


def _limited(rows: list[Row], share: float) -> list[Row]:
    """Keep as many rows as possible without giving a key more than `share` of them; with few keys, each may have an equal part."""
    counts = Counter(row.key for row in rows)
    if not rows:
        return rows
    most = _most_per_key([*counts.values()], max(share, 1 / len(counts)))
    taken: Counter[str] = Counter()
    remaining = []
    for row in sorted(rows, key=lambda row: row.digest):
        if taken[row.key] < most:
            taken[row.key] += 1
            remaining.append(row)
    return remaining


def _most_per_key(counts: Sequence[int], share: float) -> int:
    """Return the largest number of rows a key that is within `share` of the rows then left; at least 1."""
    for most in range(max(counts), 1, -1):
        if most <= share * sum(min(count, most) for count in counts):
            return most
    return 1


def digest_of_row(row: Mapping[str, Any]) -> str:
    content = json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()[:24]


# -- what rows share


class Contamination:
    """Detects rows that overlap with those that models are measured on. Raises UserError (at creation) if a package is missing."""

    def __init__(self, measured: Iterable[Mapping[str, Any]]):
        self._texts = HeldOutTexts(([_question(row)] for row in measured), RUN_WORDS, "gates")

    def touched(self, rows: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Return, for each row, whether it asks (nearly) the same as a measured row, or shares RUN_WORDS consecutive words with
        one."""
        return self._texts.repeated_in([_question(row) for row in rows]).tolist()


def _question(row: Mapping[str, Any]) -> str:
    return "\n".join(asked_texts(row))


# -- files of rows, readable by this user only


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.write(path, content.encode("utf-8", "replace"), mode=0o600, sync=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_json(line) for line in read_file(path, LARGEST).splitlines()]
    except FileNotFoundError:
        return []


def save(path: Path, rows: Iterable[Row]) -> None:
    write_rows(path, (asdict(row) for row in rows))


def load(path: Path) -> list[Row]:
    return [Row(**row) for row in read_rows(path)]
