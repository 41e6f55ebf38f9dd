"""Creates, looks up and revokes clients' keys."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from dstune.core.errors import Problem, UserError
from dstune.serve.store.database import Database, now
from dstune.serve.store.tables import DEFAULT_PROJECT, Key, Organization, Project

PREFIX = "sk-dstune"
ROLES = ("read_only", "member", "owner")
"""Roles of a key in its project, each with more rights than the one before: read; create and run; also delete and share models, and
see the organization's usage and audit log."""
KEY_CACHE_SECONDS = 2.0
"""How long a looked-up key is cached; a revoked key works no longer than that."""
_FORM = re.compile(rf"{PREFIX}-([0-9a-f]{{16}})-([A-Za-z0-9_-]{{43}})")
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).hexdigest()


@dataclass(frozen=True)
class Limit:
    """Limits of a key; None means unlimited."""

    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent: int | None = None


@dataclass(frozen=True)
class Caller:
    """The authenticated caller of a request."""

    id: str
    name: str
    admin: bool
    models: frozenset[str] | None
    limit: Limit
    organization: str = ""
    project: str = DEFAULT_PROJECT
    role: str = "member"

    def has_role(self, role: str) -> bool:
        """Return whether the caller has at least the rights of `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def may_use(self, model: str) -> bool:
        return self.admin or self.models is None or model in self.models


class Keys:
    """The keys of a database."""

    def __init__(self, database: Database):
        self._database = database
        self._remembered: dict[str, tuple[float, Caller]] = {}

    def add(
        self,
        name: str,
        *,
        admin: bool = False,
        models: Sequence[str] | None = None,
        limit: Limit = Limit(),
        project: str = DEFAULT_PROJECT,
        role: str = "member",
    ) -> str:
        """Create a key and return it; it cannot be read again later. project: its id. Raises UserError if the name is taken."""
        assert role in ROLES
        if not re.fullmatch(r"[\w.@ -]{1,128}", name):
            raise UserError(Problem("NAME", "must be 1 to 128 letters, digits, spaces and . _ @ -", value=name))
        key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        key = f"{PREFIX}-{key_id}-{secret}"
        row = Key(
            id=key_id,
            name=name,
            hash=_hash(key),
            admin=admin,
            models=None if models is None else list(models),
            requests_per_minute=limit.requests_per_minute,
            tokens_per_day=limit.tokens_per_day,
            concurrent=limit.concurrent,
            project=project,
            role="owner" if admin else role,
            created=now(),
        )
        try:
            with self._database.writing.begin() as session:
                session.add(row)
        except IntegrityError as error:
            raise UserError(Problem("NAME", "a key has this name already", "revoke it first", name)) from error
        return key

    def find(self, key: str) -> Caller | None:
        """Return the caller of a key; None if the key does not exist or is revoked."""
        if (remembered := self.remembered(key)) is not None:
            return remembered
        caller = self._look_up(key, digest := _hash(key))
        if len(self._remembered) > 4096:
            self._remembered.clear()
        if caller is not None:
            self._remembered[digest] = (time.monotonic(), caller)
        return caller

    def remembered(self, key: str) -> Caller | None:
        """Return the caller of a recently used key from the cache, without querying the database."""
        entry = self._remembered.get(_hash(key))
        return entry[1] if entry is not None and time.monotonic() - entry[0] < KEY_CACHE_SECONDS else None

    def _look_up(self, key: str, digest: str) -> Caller | None:
        form = _FORM.fullmatch(key)
        row = project = None
        if form is not None:
            with self._database.session() as session:
                row = session.get(Key, form[1])
                project = None if row is None else session.get(Project, row.project)
        # Compared in constant time, also for a key that does not exist, against a hash that matches nothing.
        is_same = hmac.compare_digest(row.hash if row is not None else _NOBODY, digest)
        if row is None or not is_same or row.revoked is not None or project is None:
            return None
        return _caller(row, project)

    def by_id(self, key_id: str) -> Caller | None:
        """Return the caller whose key has this id; None if it was revoked."""
        with self._database.session() as session:
            row = session.get(Key, key_id)
            project = None if row is None else session.get(Project, row.project)
        return None if row is None or project is None or row.revoked is not None else _caller(row, project)

    def project(self, organization: str, name: str) -> str:
        """Return the id of a project by its names, creating the project and its organization if they do not exist."""
        with self._database.writing.begin() as session:
            self._database.exclusive(session, "projects")
            owner = session.scalar(select(Organization).where(Organization.name == organization))
            if owner is None:
                owner = Organization(id=f"org-{secrets.token_hex(12)}", name=organization, created_at=int(time.time()))
                session.add(owner)
                session.flush()
            of_this_name = (Project.organization == owner.id, Project.name == name)
            row = session.scalar(select(Project).where(*of_this_name))
            if row is None:
                new_project = f"proj_{secrets.token_hex(12)}"
                row = Project(id=new_project, organization=owner.id, name=name, created_at=int(time.time()))
                session.add(row)
            return row.id

    def organizations(self) -> dict[str, str]:
        """Return organization ids by project id."""
        with self._database.session() as session:
            return {row.id: row.organization for row in session.scalars(select(Project))}

    def all(self) -> list[Key]:
        with self._database.session() as session:
            return list(session.scalars(select(Key).order_by(Key.created)))

    def revoke(self, name: str) -> None:
        """Revoke a key. Raises UserError if there is no such key."""
        with self._database.writing.begin() as session:
            row = session.scalar(select(Key).where(Key.name == name, Key.revoked.is_(None)))
            if row is None:
                raise UserError(Problem("NAME", "there is no such key", "`dstune serve-keys list` shows them", name))
            row.revoked = now()
            row.name = f"{row.name} revoked {row.id}"[:128]
        self._remembered.clear()


def _caller(row: Key, project: Project) -> Caller:
    models = None if row.models is None else frozenset(row.models)
    limit = Limit(row.requests_per_minute, row.tokens_per_day, row.concurrent)
    return Caller(row.id, row.name, row.admin, models, limit, project.organization, project.id, row.role)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
