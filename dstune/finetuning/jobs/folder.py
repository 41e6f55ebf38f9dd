"""The folder of a job: what the server hands to its process, and what that leaves. The two never speak otherwise.

```
ftjob-.../
  training_file validation_file  snapshots of the client's files
  start/                         the tuned model that training begins with
  train.jsonl validation.jsonl   the same as dstune reads them, once they are validated
  grader.json                    of a reinforcement job
  task.json                      what the process is to do: no text of the request but numbers, ids and names
  lock                           held by the process, and by a training that outlives it
  validated.json                 rows and tokens of the files, or the error that they have
  configuration/experiment/job.yaml
  run/                           the run directory of dstune
  models/step-N/                 exports
  stop                           `save` or `now`: the process is to end
  ended.json                     what the newest attempt came to
  log                            what the process printed
```
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.parsing import read_object

JOB_ID = re.compile(r"ftjob-[A-Za-z0-9]{24}")
SAVE, NOW = "save", "now"
STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class JobFolder:
    path: Path

    @classmethod
    def of(cls, jobs: Path, job: str) -> JobFolder:
        assert JOB_ID.fullmatch(job), "ids of jobs are made here, and are the only names of folders"
        return cls(jobs / job)

    @property
    def train(self) -> Path:
        return self.path / "train.jsonl"

    @property
    def validation(self) -> Path:
        return self.path / "validation.jsonl"

    def snapshot(self, param: str) -> Path:
        """Return the snapshot of a client's file. param: `training_file` or `validation_file`."""
        return self.path / param

    def of_param(self, param: str) -> Path:
        """Return the file in dstune's form that replaces the snapshot."""
        return self.train if param == "training_file" else self.validation

    @property
    def grader(self) -> Path:
        """The grader of a reinforcement job."""
        return self.path / "grader.json"

    @property
    def client_rows(self) -> tuple[Path, ...]:
        """Return the files that hold the client's rows, answers to them, or its grader; the snapshots come last."""
        answers = (self.run / "rollouts", self.run / "samples.jsonl", self.run / "report.html")
        snapshots = (self.snapshot("validation_file"), self.snapshot("training_file"))
        return (self.train, self.validation, self.grader, *answers, *snapshots)

    @property
    def start(self) -> Path:
        return self.path / "start"

    def keep_start(self, model: Path) -> None:
        """Copy the files of a tuned model, which may be deleted afterwards."""
        if not self.start.is_dir():
            part = self.start.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(model, part, copy_function=link)
            part.rename(self.start)

    @property
    def report(self) -> Path:
        """The output of `dstune train --json`."""
        return self.path / "report.json"

    @property
    def task(self) -> Path:
        return self.path / "task.json"

    @property
    def validated(self) -> Path:
        return self.path / "validated.json"

    @property
    def configuration(self) -> Path:
        return self.path / "configuration"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def ended(self) -> Path:
        return self.path / "ended.json"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    # -- state

    def create(self) -> None:
        self.path.mkdir(mode=0o700, parents=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def acquire(self) -> int | None:
        """Take the folder's lock and return its descriptor; None while a process of the job is alive. A process that inherits the
        descriptor holds the lock."""
        return files.try_lock(files.open_plain(self.lock, os.O_RDWR | os.O_CREAT, 0o600))

    def is_alive(self) -> bool:
        """Return whether a process of the job is alive, including one started by an earlier server."""
        if not self.path.is_dir():
            return False
        descriptor = self.acquire()
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    def size(self) -> int:
        """Return the size of its files in bytes. A file with hard links elsewhere counts in full."""
        return sum(_size(Path(folder, name)) for folder, _, names in os.walk(self.path) for name in names)

    def exports(self) -> dict[int, Path]:
        """Return complete exports by step."""
        export_by_step = {}
        for folder in self.models.glob("step-*"):
            if (match := STEP.fullmatch(folder.name)) and folder.is_dir() and not folder.is_symlink():
                export_by_step[int(match[1])] = folder
        return dict(sorted(export_by_step.items()))

    def request_stop(self, how: str) -> None:
        files.write(self.stop, how)

    def stop_requested(self) -> str:
        try:
            request = self.stop.read_text()
        except OSError:
            return ""
        return request if request in (SAVE, NOW) else ""


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # it has just been removed
        return 0


def link(source: str | Path, target: str | Path) -> None:
    """Make `target` a hard link to `source`, or a copy on another disk: it stays when `source` is removed."""
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copyfile(source, target)


def write(path: Path, value: Any) -> None:
    """Write the file atomically and durably."""
    files.write(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n", mode=0o600, sync=True)


def read(path: Path) -> dict[str, Any] | None:
    return read_object(path)
