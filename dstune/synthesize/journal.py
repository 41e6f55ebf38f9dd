"""The teacher's answers so far, one per line, from which an interrupted synthesis continues."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json

FILE = "answers.jsonl"
SETTINGS = "synthesis.json"


@dataclass(frozen=True)
class Answer:
    """The teacher's answer to one request."""

    key: str
    """ITEM/SAMPLE."""
    text: str
    finish: str
    """Why it ended: `stop`, or `length` if it was truncated."""
    model: str
    """The model's name in the server's answer."""
    version: str
    """The server's `system_fingerprint`, if it has one."""
    seed: int
    tokens: int
    """Tokens of prompt and answer, as the server counts them; 0 if it does not report them."""


class Journal:
    """The answers in `folder`. One process at a time may use it, from any thread."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """settings: what the requests follow from.

        Raises:
            UserError: the folder has answers to other requests, or another process writes to it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._lock = threading.Lock()
        self._stream = self._path.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            reason = "another synthesis writes to it"
            raise UserError(Problem("--output", reason, "wait for it, or another folder", str(folder))) from None
        self._check_settings(folder / SETTINGS, settings)
        self.answers: dict[str, Answer] = {}
        self._read()

    def _check_settings(self, path: Path, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        if not path.exists():
            temporary = path.with_name(f"{path.name}.incomplete")
            temporary.write_text(text, encoding="utf-8")
            temporary.rename(path)
            return
        settings_before = parse_json(path.read_bytes())
        settings_before = settings_before if isinstance(settings_before, dict) else {}
        if changed := sorted(
            name for name in {*settings_before, *settings} if settings_before.get(name) != settings.get(name)
        ):
            reason = f"it has answers to other requests: {', '.join(changed)} changed"
            fix = "another folder, or the settings of before (synthesis.json)"
            raise UserError(Problem("--output", reason, fix, str(path.parent)))

    def _read(self) -> None:
        self._stream.seek(0)
        end = 0
        for line in self._stream:
            if not line.endswith(b"\n"):
                break  # an incomplete line that a killed process left
            try:
                answer = Answer(**parse_json(line))
            except (TypeError, ValueError):
                break
            self.answers[answer.key] = answer
            end += len(line)
        self._stream.truncate(end)
        self._stream.seek(0, os.SEEK_END)

    def add(self, answer: Answer) -> None:
        """Write an answer to the journal before it is used."""
        line = json.dumps(asdict(answer), ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._stream.write(line)
            self._stream.flush()
            self.answers[answer.key] = answer

    @property
    def tokens(self) -> int:
        with self._lock:
            return sum(answer.tokens for answer in self.answers.values())

    def close(self) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()
