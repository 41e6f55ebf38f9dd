"""Record every decision of all cycles with its reason, one line of JSON each; each is written once, even after a kill."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.parsing import parse_json, read_file

LEDGER = "ledger.jsonl"
LARGEST = 1 << 30


class Ledger:
    """The lines of a folder's ledger, each with its own key."""

    def __init__(self, folder: Path):
        self._path = folder / LEDGER
        self.lines = self._read()

    def _read(self) -> list[dict[str, Any]]:
        """Return the complete lines. A truncated last line is removed, so that the next one does not continue it."""
        try:
            content = read_file(self._path, LARGEST)
        except FileNotFoundError:
            return []
        complete, _, cut = content.rpartition(b"\n")
        if cut:
            files.write(self._path, complete + b"\n" if complete else b"", mode=0o600)
        return [parse_json(line) for line in complete.splitlines()]

    def note(self, cycle: int, step: str, decision: str, reason: str, **facts: Any) -> None:
        """Append a line unless this step of this cycle already has one."""
        if not any((line["cycle"], line["step"]) == (cycle, step) for line in self.lines):
            self.append(cycle, step, decision, reason, **facts)

    def append(self, cycle: int, step: str, decision: str, reason: str, **facts: Any) -> None:
        """Append a line, with the time in UTC."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = {"cycle": cycle, "step": step, "decision": decision, "reason": reason, "time": now, **facts}
        with files.append(self._path, mode=0o600) as stream:
            stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self.lines.append(line)
