"""The current `models.yaml`, which is read again when it changes; an invalid new version leaves the previous content in effect."""

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
        """path: None if no models are offered; a missing file is read once it exists. Raises UserError if the file is invalid at
        the start."""
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._presets = Presets()
        self._busy = threading.Lock()
        if path is not None and (stamp := _stamp(path)) is not None:
            self._stamp, self._presets = stamp, presets.read(path)

    def __call__(self) -> Presets:
        if self._path is None:
            return self._presets
        with self._busy:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._presets = presets.read(self._path)
                except UserError as error:
                    log.error("models are as before: %s", error)
        return self._presets


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
