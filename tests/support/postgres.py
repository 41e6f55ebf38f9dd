"""A PostgreSQL server of its own, on a Unix socket; by another user than root, as whom it does not run."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def postgres() -> Iterator[str]:
    """Yield the URL of an empty database. Skips the test where PostgreSQL is not installed."""
    (programs,) = glob.glob("/usr/lib/postgresql/*/bin")[-1:] or [""]
    if not programs:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    user = {"user": "nobody", "group": "nogroup"} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="dstune-pg-"))  # short, and open to that user
    if user:
        shutil.chown(folder, **user)

    def call(program: str, *words: str) -> None:
        command = [f"{programs}/{program}", "-D", f"{folder}/data", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, **user)

    call("initdb", "-A", "trust", "-U", "dstune", "--no-sync")
    call("pg_ctl", "-o", f"-k {folder} -c listen_addresses= -c fsync=off", "-l", f"{folder}/log", "-w", "start")
    try:
        yield f"postgresql://dstune@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder)
