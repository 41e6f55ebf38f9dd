"""Folders of a run directory that are links: normal where they lead to a scratch disk, and a way to have a command write
elsewhere where the run comes from somebody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dstune.config.run_file import read_run_content
from dstune.config.trust import FLAG, LINKS, SIGNATURE, believed
from dstune.core import signing
from dstune.core.errors import Problem, UserError


def refuse_links(run: Path) -> None:
    """Raises UserError where a folder in the run directory, or in that of one of its stages, is a link, unless the run is signed
    and the link is this user's, or the run is the team's."""
    if not (run / "run.yaml").is_file() or LINKS in believed(run):
        return
    links = [link for folder in (run, *(file.parent for file in run.glob("*/run.yaml"))) for link in _links_in(folder)]
    if not links:
        return
    _, whose, why = signing.signed_by(read_run_content(run / "run.yaml").get(SIGNATURE))
    for link in links:
        if whose == signing.TEAM or (whose and link.lstat().st_uid in (0, os.getuid())):
            continue
        doubt = f"the run is not known to be yours: {why}" if why else "another user made it"
        reason = f"this is a link to {os.readlink(link)}, and {doubt}"
        raise UserError(Problem(str(link), reason, f"look where it leads; then remove it, or add {FLAG} {LINKS}"))


def _links_in(folder: Path) -> Iterator[Path]:
    """Yield all links but those of files: who writes a file replaces a link in its place, or refuses it."""
    for entry in os.scandir(folder):
        if entry.is_symlink() and not os.path.isfile(entry.path):
            yield Path(entry.path)
