"""The database, which is migrated to the newest version when it is opened."""

from __future__ import annotations

import datetime
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from dstune.core.errors import Problem, UserError, first_line

DATABASE = "store.sqlite"
LOCK = 0x6473_7475
"""Number of PostgreSQL's advisory lock that is held during a migration."""


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Database:
    """Opens a database and creates its sessions. Raises UserError if it cannot be opened."""

    def __init__(self, url: str):
        """url: in SQLAlchemy's form, `sqlite:///FILE` or `postgresql://...`."""
        if url.startswith("postgresql://"):
            url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        try:
            self.engine: Engine = create_engine(
                url,
                pool_pre_ping=not url.startswith("sqlite"),
                hide_parameters=True,  # errors are logged, and could contain clients' texts
            )
            if self.engine.dialect.name == "sqlite":
                event.listen(self.engine, "connect", _tune)
                event.listen(self.engine, "begin", _begin)
            with self._file_lock():
                self._migrate()
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            fix = "sqlite:///FILE, or postgresql://USER@HOST/NAME with `pip install 'psycopg[binary]'`"
            raise UserError(Problem("--store", f"cannot be used: {first_line(error)}", fix)) from error
        except (OperationalError, OSError) as error:
            reason = first_line(getattr(error, "orig", None) or error)
            raise UserError(Problem("--store", f"cannot be opened: {reason}")) from error
        self.session = sessionmaker(self.engine, expire_on_commit=False)
        self.writing = sessionmaker(self.engine.execution_options(writes=True), expire_on_commit=False)
        """Creates sessions for writing transactions. SQLite admits one at a time, from its start: a transaction that began by
        reading could not write after another one's commit, and would fail at once instead of waiting."""

    @staticmethod
    def open_folder(folder: Path) -> Database:
        """Open the SQLite file of a server's folder, which only this user can read."""
        file = folder / DATABASE
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        return Database(f"sqlite:///{file}")

    def _file_lock(self) -> AbstractContextManager[Any]:
        """Let one process at a time open the file: SQLite would not wait to create a new file's log, but fail at once."""
        file = self.engine.url.database
        if self.engine.dialect.name != "sqlite" or file in (None, "", ":memory:") or not Path(file).parent.is_dir():
            return nullcontext()
        return FileLock(f"{file}.lock", mode=0o600)

    def _migrate(self) -> None:
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.engine.begin() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def exclusive(self, session: Session, name: str) -> None:
        """Hold an exclusive lock with this name until the transaction ends. SQLite has only one writer anyway."""
        if self.engine.dialect.name == "postgresql":
            session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})

    def close(self) -> None:
        self.engine.dispose()


def _begin(connection: Any) -> None:
    kind = "BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN"
    connection.exec_driver_sql(kind)


def _tune(connection: Any, record: Any) -> None:
    """Allow readers beside one writer; committed data survives a crash of the process."""
    connection.isolation_level = None  # SQLAlchemy's event begins transactions, instead of the driver
    for pragma in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


__all__ = ["Database", "Session", "now"]
