"""Refuses links in a run directory that the user does not trust.

A folder that is a link is normal if it leads to a scratch disk; in a run from somebody else, it makes a command write elsewhere.
A file that is a link makes a report show what only its reader may read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dstune.config.run_file import read_run_content
from dstune.config.trust import FLAG, LINKS, SIGNATURE, believed
from dstune.core import signing
from dstune.core.errors import Problem, UserError


def refuse_links(run: Path) -> None:
    """Refuse links, except to files, in a run directory or in that of one of its stages.

    Links are allowed in a run that the team signed; in another signed run, those that this user or root made.

    Raises UserError for the first other link.
    """
    if not (run / "run.yaml").is_file() or LINKS in believed(run):
        return
    _refuse(
        run, [link for folder in (run, *(file.parent for file in run.glob("*/run.yaml"))) for link in _links_in(folder)]
    )


def refuse_files_elsewhere(run: Path, folder: str) -> None:
    """Refuse links to files outside of a run directory, in it and in its `folder`, before a page shows them: whoever made the run
    may read the page, but not these files.

    Links are allowed in the same runs as by `refuse_links`. Raises UserError for the first other link.
    """
    root = run.resolve()
    links = [Path(entry.path) for entry in os.scandir(run) if entry.is_symlink() and os.path.isfile(entry.path)]
    if (run / folder).is_symlink():
        links.append(run / folder)
    elif (run / folder).is_dir():
        links += [Path(entry.path) for entry in os.scandir(run / folder) if entry.is_symlink()]
    links = [link for link in links if not link.resolve().is_relative_to(root)]
    if LINKS not in believed(run):
        _refuse(run, links)


def _refuse(run: Path, links: list[Path]) -> None:
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
    """Yield all links except those to files, since code that writes a file replaces or refuses a link in its place."""
    for entry in os.scandir(folder):
        if entry.is_symlink() and not os.path.isfile(entry.path):
            yield Path(entry.path)
