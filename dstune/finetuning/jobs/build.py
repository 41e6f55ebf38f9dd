"""Assembles the components of jobs and models for a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dstune.core.errors import Problem, UserError
from dstune.finetuning.files import Files
from dstune.finetuning.jobs.device_queue import Machine
from dstune.finetuning.jobs.launcher import Launcher, ProcessLauncher
from dstune.finetuning.jobs.planner import Planner, Plans
from dstune.finetuning.jobs.preset_file import PresetFile
from dstune.finetuning.jobs.presets import Presets
from dstune.finetuning.jobs.reconciler import Reconciler
from dstune.finetuning.jobs.results import Results
from dstune.finetuning.jobs.service import Jobs
from dstune.finetuning.jobs.store import JobStore
from dstune.finetuning.jobs.tables import Job
from dstune.finetuning.models.service import Models
from dstune.finetuning.models.store import ModelStore
from dstune.serve.store.database import Database


@dataclass
class Parts:
    """Components that tests, or a server without jobs, replace."""

    presets: Path | None = None
    """`models.yaml`, which may be created later."""
    launcher: Launcher | None = None
    planner: Plans | None = None
    machine: Machine | None = None
    keys: Callable[[Job], Mapping[str, str]] | None = None
    """Returns the environment variables of a project's accounts (W&B)."""
    has_wandb: Callable[[str], bool] | None = None
    runs: bool = True
    """Whether this process runs jobs, not another one."""


def build(database: Database, files: Files, folder: Path, parts: Parts) -> tuple[JobStore, Jobs, Models]:
    """Build the stores and services of jobs. folder: of the fine-tuning API. Raises UserError for an invalid `models.yaml`."""
    jobs, scratch = folder / "jobs", folder / "plans"
    for path in (jobs, scratch):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    presets = PresetFile(parts.presets)
    store, models = JobStore(database), ModelStore(database, jobs)
    served = Models(database, models, presets)
    results = Results(database, files, jobs, presets)
    results.published = served.notify_new_model
    store.ended.append(lambda session, job: None if job.active else results.count(session, job))
    launcher = parts.launcher or ProcessLauncher(lambda: presets().prefix)
    machine = parts.machine or (this_machine(presets()) if parts.presets and parts.runs else Machine(0))
    keys = parts.keys or (lambda job: {})
    plans = parts.planner or Planner(scratch, here=parts.runs)
    reconciler = Reconciler(
        store, jobs, presets, launcher, results, machine, keys, has_space=files.has_space, plans=plans
    )
    files.counted.append(store.bytes_of)
    service = Jobs(
        store,
        files,
        models,
        jobs,
        presets,
        plans,
        reconciler,
        has_wandb=parts.has_wandb or (lambda project: False),
        runs=parts.runs,
    )
    return store, service, served


def this_machine(presets: Presets) -> Machine:
    """Return the devices of this machine that jobs may use. Raises UserError if `queue.devices` asks for more GPUs than there
    are."""
    from dstune.sweep.devices import here

    gpus, requested = here().gpus, presets.queue.devices
    if gpus and requested is not None and requested > len(gpus):
        reason = f"this machine has {len(gpus)} GPUs, and jobs do not share one"
        raise UserError(Problem("models.yaml: queue.devices", reason, f"at most {len(gpus)}", str(requested)))
    return Machine(max(1, len(gpus)), gpus)
