"""Tuned models in the database: ownership, deletion, and permissions of other projects."""

from __future__ import annotations

import shutil
from pathlib import Path

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from dstune.finetuning import pages
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.jobs.folder import JobFolder
from dstune.finetuning.jobs.store import JobStore
from dstune.finetuning.jobs.tables import ModelPermission, TunedModel
from dstune.serve.errors import ApiError
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Caller
from dstune.serve.store.tables import Project


class ModelStore:
    def __init__(self, database: Database, jobs: Path):
        """jobs: the parent of the job folders, which contain the exports."""
        self._database, self._jobs = database, jobs

    def folder(self, model: TunedModel) -> Path:
        return self._jobs / model.folder

    def find(self, caller: Caller, name: str) -> TunedModel | None:
        """Return the model of this name if it is not deleted and the caller's project may use it, else None."""
        with self._database.session() as session:
            return session.scalar(select(TunedModel).where(TunedModel.name == name, *_usable(caller)))

    def usable(self, caller: Caller) -> list[TunedModel]:
        """Return all models that the caller may use, oldest first."""
        with self._database.session() as session:
            return list(session.scalars(select(TunedModel).where(*_usable(caller)).order_by(TunedModel.number)))

    def final(self, most: int) -> list[TunedModel]:
        """Return the newest final models of all projects, at most `most`."""
        query = select(TunedModel).where(TunedModel.deleted_at.is_(None), TunedModel.step.is_(None))
        with self._database.session() as session:
            return list(session.scalars(query.order_by(TunedModel.number.desc()).limit(most)))

    def delete(self, session: Session, caller: Caller, name: str, *, repeated: bool) -> tuple[TunedModel, bool]:
        """Delete a model. Returns it and whether it still existed. repeated: whether an earlier attempt of this request may have
        deleted it. Raises ApiError if the caller's own project has no such model."""
        row = self._find_own(session, caller, name, deleted=repeated)
        was_there = row.deleted_at is None
        row.deleted_at = row.deleted_at or unix_time()
        return row, was_there

    def remove_files(self, model: TunedModel) -> None:
        """Remove the files of a model that no listed model uses; the final model may also be listed as a checkpoint."""
        with self._database.session() as session:
            others = select(TunedModel.id).where(TunedModel.folder == model.folder, TunedModel.deleted_at.is_(None))
            if session.scalar(others) is None:
                shutil.rmtree(self.folder(model), ignore_errors=True)
        JobStore(self._database).measure(model.job, JobFolder.of(self._jobs, model.job))

    # -- permissions

    def share(self, session: Session, caller: Caller, name: str, projects: list[str]) -> list[ModelPermission]:
        """Let projects use a model and return the permissions. Raises ApiError if the model is not the caller's own, or a project
        is not in its organization."""
        self._find_own(session, caller, name)
        permissions = []
        for place, project in enumerate(dict.fromkeys(projects)):
            project_row = session.get(Project, project)
            if project_row is None or project_row.organization != caller.organization:
                message = f"No such project: {project[:128]}"
                raise ApiError(400, message, param=f"project_ids.{place}", code="project_not_found")
            pair = (ModelPermission.model == name, ModelPermission.project == project)
            row = session.scalar(select(ModelPermission).where(*pair))
            if row is None:
                row = ModelPermission(
                    id=new_id("cp_"), created_at=unix_time(), model=name, project=project, key=caller.id
                )
                session.add(row)
                session.flush()
            permissions.append(row)
        return permissions

    def permissions(
        self, session: Session, caller: Caller, name: str, page: pages.Page, project: str | None
    ) -> tuple[list[ModelPermission], bool]:
        self._find_own(session, caller, name)
        filters = [] if project is None else [ModelPermission.project == project]
        return pages.rows_of(session, ModelPermission, page, [ModelPermission.model == name], *filters)

    def unshare(self, session: Session, caller: Caller, name: str, permission: str) -> None:
        self._find_own(session, caller, name)
        row = session.scalar(
            select(ModelPermission).where(ModelPermission.model == name, ModelPermission.id == permission)
        )
        if row is None:
            raise ApiError(404, f"No such permission: {permission[:64]}", param="permission_id", code="not_found")
        session.delete(row)

    @staticmethod
    def _find_own(session: Session, caller: Caller, name: str, *, deleted: bool = False) -> TunedModel:
        of_caller = (TunedModel.name == name, TunedModel.project == caller.project)
        row = session.scalar(select(TunedModel).where(*of_caller).with_for_update())
        if row is None or (row.deleted_at is not None and not deleted):
            raise missing(name)
        return row


def missing(name: str) -> ApiError:
    return ApiError(404, f"The model {name[:128]!r} does not exist.", param="model", code="model_not_found")


def _usable(caller: Caller) -> list[ColumnElement[bool]]:
    shared = select(ModelPermission.model).where(ModelPermission.project == caller.project)
    return [TunedModel.deleted_at.is_(None), or_(TunedModel.project == caller.project, TunedModel.name.in_(shared))]
