"""`models.yaml` as it is now: read again when it changes; one that cannot be read leaves what was there before."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from dstune.core.errors import UserError
from dstune.finetuning.jobs import presets
from dstune.finetuning.jobs.presets import Presets

log = logging.getLogger("dstune.serve")


class PresetFile:
    def __init__(self, path: Path | None):
        """Raises UserError for a file that is wrong from the start. path: None where no models are offered; a file that is not
        there yet is read when it comes."""
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._found = Presets()
        self._busy = threading.Lock()
        if path is not None and (stamp := _stamp(path)) is not None:
            self._stamp, self._found = stamp, presets.read(path)

    def __call__(self) -> Presets:
        if self._path is None:
            return self._found
        with self._busy:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._found = presets.read(self._path)
                except UserError as error:
                    log.error("models are as before: %s", error)
        return self._found


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
