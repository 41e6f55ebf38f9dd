"""The audit log: each entry is written in the same transaction as the action."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.tables import AuditEntry
from dstune.serve.gateway.request import Request


def note(session: Session, request: Request, action: str, subject: str, **detail: Any) -> None:
    """Add an entry to the audit log. action: such as `file.created`; subject: the id of the object."""
    caller = request.key
    session.add(
        AuditEntry(
            id=new_id("audit_log-"), created_at=unix_time(), organization=caller.organization, project=caller.project,
            key=caller.id, request=request.id, action=action, object=subject, detail=detail,
        )
    )  # fmt: skip
