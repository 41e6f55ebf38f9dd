"""Encrypts the secrets of projects in the database.

The key is in a separate file, so that a copy of the database alone reveals no secret.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from dstune.core.errors import DstuneError
from dstune.finetuning.ids import unix_time
from dstune.finetuning.tables import Secret

FILE = "vault-key"


class Vault:
    """Encrypts and stores secrets. folder: the server's, accessible to this user only."""

    def __init__(self, folder: Path):
        path = folder / FILE
        if not path.exists():
            new_key = folder / f"{FILE}-{secrets.token_hex(8)}"
            with os.fdopen(os.open(new_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(Fernet.generate_key())
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process created it at the same moment
                os.link(new_key, path)
            new_key.unlink()
        self._fernet = Fernet(path.read_bytes())

    def seal(self, text: str) -> str:
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str:
        """Decrypt a secret. Raises DstuneError if it was encrypted with another key."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise DstuneError(f"a secret in the database was encrypted with another {FILE}") from None

    def keep(self, session: Session, project: str, name: str, value: str) -> None:
        session.execute(delete(Secret).where(Secret.project == project, Secret.name == name))
        session.add(Secret(project=project, name=name, value=self.seal(value), created_at=unix_time()))

    def read(self, session: Session, project: str, name: str) -> str | None:
        """Return a project's secret, such as its W&B key; None if there is none."""
        row = session.scalar(select(Secret).where(Secret.project == project, Secret.name == name))
        return None if row is None else self.open(row.value)
