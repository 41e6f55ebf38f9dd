"""Names of models: ids of the hub, or folders."""

from __future__ import annotations

import re
from pathlib import Path

from dstune.core.errors import Problem, UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""`NAME` or `OWNER/NAME`."""


def refuse_ambiguous_folder(path: str, where: str, *, trusts_code: bool) -> None:
    """Raise UserError if `path` has the form of a hub id, there is a folder of that name, and its code would run.

    Trusting the code of `OWNER/NAME` means the hub's model; it must not extend to anybody who can create a folder here.
    """
    if trusts_code and HUB_ID.fullmatch(path) and Path(path).is_dir():
        reason = "names a model of the hub and a folder here, and its Python code is to run: it must be clear whose"
        fix = f"./{path} for the folder, or start where there is no such folder"
        raise UserError(Problem(where, reason, fix, path))
