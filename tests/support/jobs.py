"""Jobs without processes: a launcher that tells what it was asked to start, and folders as processes leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.finetuning.blobs import Blobs
from dstune.finetuning.files import Files
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.jobs.device_queue import Machine
from dstune.finetuning.jobs.folder import JobFolder, write
from dstune.finetuning.jobs.planner import Estimate
from dstune.finetuning.jobs.presets import Limits, Preset, Presets, QueueSettings
from dstune.finetuning.jobs.reconciler import Reconciler
from dstune.finetuning.jobs.results import Results
from dstune.finetuning.jobs.states import State
from dstune.finetuning.jobs.store import JobStore
from dstune.finetuning.jobs.tables import Job
from dstune.finetuning.settings import ApiSettings
from dstune.serve.store.database import Database
from dstune.serve.store.tables import DEFAULT_ORGANIZATION, DEFAULT_PROJECT, Organization, Project

ROWS = 12
HYPERPARAMETERS = {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 1.0}


@dataclass
class StubLauncher:
    """Starts nothing; a test says when a process ends."""

    alive: set[str] = field(default_factory=set)
    started: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    environments: list[Mapping[str, str]] = field(default_factory=list)
    validates: bool = True
    """Whether files are good at once."""

    def start(self, folder: JobFolder, task: Mapping[str, Any], env: Mapping[str, str]) -> bool:
        job = folder.path.name
        if job in self.alive:
            return False
        self.environments.append(env)  # first: tests wait for what is started
        self.started.append((job, dict(task)))
        write(folder.task, dict(task))
        if task["phase"] == "validate" and self.validates:
            write(folder.validated, {"training_file": {"rows": ROWS}, "warnings": []})
            return True
        folder.stop.unlink(missing_ok=True)
        folder.ended.unlink(missing_ok=True)
        self.alive.add(job)
        return True

    def is_alive(self, folder: JobFolder) -> bool:
        return folder.path.name in self.alive

    def reap(self) -> None:
        return

    def trainings(self) -> list[str]:
        return [job for job, task in self.started if task["phase"] == "train"]


class StubPlans:
    def __init__(self, estimate: Estimate | None = None):
        self.estimate: Estimate | None = estimate or Estimate(fits=True, row_seconds=0.01)
        """None while it is planned."""

    def ask(self, preset: Preset, method: str) -> Estimate | None:
        return self.estimate


class Bench:
    """A reconciler over a store, with a launcher that starts nothing."""

    def __init__(self, folder: Path, *, devices: int = 2, limits: Limits | None = None, url: str = ""):
        folder.chmod(0o700)
        self.database = Database(url) if url else Database.open_folder(folder)
        self.folder = folder / "jobs"
        self.folder.mkdir(exist_ok=True)
        self.presets = Presets({"tiny": Preset("tiny", "base")}, QueueSettings(organization=limits or Limits()))
        self.store = JobStore(self.database)
        self.files = Files(self.database, Blobs(folder), ApiSettings())
        self.launcher = StubLauncher()
        self.devices = devices
        self.reconciler = self.another()

    def another(self) -> Reconciler:
        """Start one more process that looks after the same jobs, as after a restart."""
        results = Results(self.database, self.files, self.folder, lambda: self.presets)
        return Reconciler(
            self.store,
            self.folder,
            lambda: self.presets,
            self.launcher,
            results,
            Machine(self.devices),
            pause_seconds=0.0,
        )

    def organization(self, name: str) -> str:
        with self.database.writing.begin() as session:
            session.add(Organization(id=f"org-{name}", name=name, created_at=1))
            session.flush()
            session.add(Project(id=f"proj_{name}", organization=f"org-{name}", name="default", created_at=1))
        return f"org-{name}"

    def row(self, organization: str = DEFAULT_ORGANIZATION, **changes: Any) -> Job:
        project = DEFAULT_PROJECT if organization == DEFAULT_ORGANIZATION else organization.replace("org-", "proj_")
        fields: dict[str, Any] = {
            "id": new_id("ftjob-"), "created_at": unix_time(), "organization": organization, "project": project, "key": "k",
            "model": "tiny", "preset": "tiny", "method": "supervised", "hyperparameters": dict(HYPERPARAMETERS),
            "training_file": "file-x", "seed": 1, "state": State.VALIDATING, "step_seconds": 0.01,
        }  # fmt: skip
        return Job(**(fields | changes))

    def add(self, organization: str = DEFAULT_ORGANIZATION, **changes: Any) -> str:
        row = self.row(organization, **changes)
        folder = JobFolder.of(self.folder, row.id)
        folder.create()
        folder.snapshot("training_file").write_text("{}\n")
        with self.database.writing.begin() as session:
            self.store.add(session, row, [f"Created fine-tuning job: {row.id}"])
        return row.id

    def read(self, job: str) -> Job:
        with self.database.session() as session:
            return self.store.lock_row(session, job)

    def state(self, job: str) -> str:
        return self.read(job).state

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.reconciler.step()

    def of(self, job: str) -> JobFolder:
        return JobFolder.of(self.folder, job)

    def train(self, job: str, first: int, last: int, per_epoch: int = 4) -> None:
        """Append rows of metrics as a training does."""
        file = self.of(job).run / "metrics.jsonl"
        file.parent.mkdir(exist_ok=True)
        with file.open("a") as stream:
            for step in range(first, last + 1):
                row = {
                    "step": step,
                    "epoch": step / per_epoch,
                    "loss": 2.0 - step / 10,
                    "tokens": 10 * step,
                    "step_seconds": 0.5,
                }
                stream.write(json.dumps(row) + "\n")

    def end(self, job: str, code: int, *, exports: tuple[int, ...] = (), **values: Any) -> None:
        """End the process of a job by itself."""
        folder = self.of(job)
        for step in exports:
            (folder.models / f"step-{step}").mkdir(parents=True, exist_ok=True)
        attempt = self.read(job).attempt
        write(folder.ended, {"attempt": attempt, "code": code, "problems": [], **values})
        self.launcher.alive.discard(job)

    def kill(self, job: str) -> None:
        self.launcher.alive.discard(job)

    def messages(self, job: str) -> list[str]:
        from dstune.finetuning.pages import Page

        row = self.read(job)
        rows, _ = self.store.events(row.project, job, Page(limit=10_000, ascending=True))
        return [row.message for row in rows]
