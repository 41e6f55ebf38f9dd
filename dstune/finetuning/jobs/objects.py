"""Jobs, events and checkpoints in the form of the API."""

from __future__ import annotations

from typing import Any

from dstune.finetuning.jobs.states import State
from dstune.finetuning.jobs.tables import Job, JobCheckpoint, JobEvent


def job(row: Job) -> dict[str, Any]:
    hyperparameters = dict(row.hyperparameters)
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "created_at": row.created_at,
        "error": row.error if row.state == State.FAILED else None,
        "estimated_finish": row.estimated_finish if row.state == State.RUNNING else None,
        "fine_tuned_model": row.fine_tuned_model,
        "finished_at": row.finished_at,
        "hyperparameters": hyperparameters if row.method == "supervised" else {},
        "integrations": [_integration(integration, row.id) for integration in row.integrations],
        "metadata": row.meta,
        "method": {"type": row.method, row.method: _options(row, hyperparameters)},
        "model": row.model,
        "organization_id": row.organization,
        "result_files": [row.result_file] if row.result_file else [],
        "seed": row.seed,
        "status": row.state,
        "trained_tokens": row.trained_tokens,
        "training_file": row.training_file,
        "user_provided_suffix": row.suffix,
        "validation_file": row.validation_file,
    }


def _options(row: Job, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    graded = {} if row.grader is None else {"grader": row.grader}
    return {**graded, "hyperparameters": hyperparameters}


def _integration(integration: dict[str, Any], job_id: str) -> dict[str, Any]:
    wandb = integration["wandb"]
    described = {"project": wandb["project"], "entity": wandb.get("entity"), "run_id": job_id}
    return {"type": "wandb", "wandb": {**described, "name": wandb.get("name"), "tags": wandb.get("tags") or []}}


def event(row: JobEvent) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.event",
        "created_at": row.created_at,
        "level": row.level,
        "message": row.message,
        "type": row.type,
        "data": row.data,
    }


def checkpoint(row: JobCheckpoint) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": row.created_at,
        "fine_tuned_model_checkpoint": row.model,
        "fine_tuning_job_id": row.job,
        "metrics": {"step": row.step, **row.metrics},
        "step_number": row.step,
    }
