"""The guard's decision log, one line per decision: the caller, the detections and the action, but never any text. One file per day
in `STATE/guard`, mode 0600, removed after its retention."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dstune.guard.check import Verdict

DAY = 86400.0


class Audit:
    def __init__(self, folder: Path, retention_days: float = 30.0):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self._retention = folder, retention_days
        self._file: tuple[str, int] | None = None

    def add(self, decision: str, verdict: Verdict | None, **facts: Any) -> None:
        """Log a decision. decision: `passed`, `flagged`, `masked`, `blocked`, `unchecked` or `refused`. facts: ids and names, no
        text of a client."""
        moment = datetime.datetime.now(datetime.UTC)
        line: dict[str, Any] = {"time": moment.isoformat(timespec="milliseconds"), "decision": decision, **facts}
        if verdict is not None:
            count_by_detection = Counter(
                (entry.detector, entry.level, entry.action, entry.label) for entry in verdict.detected
            )
            line |= {
                "policy": verdict.policy.name,
                "found": [
                    {"detector": detector, "level": level, "action": action, "count": count}
                    | ({"label": label} if label else {})
                    for (detector, level, action, label), count in sorted(count_by_detection.items())
                ],
                "not_run": verdict.not_run,
                "windows": verdict.windows,
                "variants": verdict.variants,
            }
        os.write(self._descriptor(moment.strftime("%Y-%m-%d")), json.dumps(line).encode() + b"\n")

    def _descriptor(self, day: str) -> int:
        if self._file is None or self._file[0] != day:
            self.close()
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            self._file = (day, os.open(self.folder / f"audit-{day}.jsonl", flags, 0o600))
            oldest = time.time() - self._retention * DAY
            for file in self.folder.glob("audit-*.jsonl"):
                if file.stat().st_mtime < oldest:
                    file.unlink(missing_ok=True)
        return self._file[1]

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file[1])
            self._file = None
