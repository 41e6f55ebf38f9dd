"""`dstune upgrade`: converts a run directory of an earlier format to the current one.

Every verb reads earlier formats, so nobody has to upgrade; an upgraded run no longer depends on that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dstune.checkpoint import store
from dstune.config.run_file import RUN_FORMAT, read_run, read_run_content, write_signed
from dstune.config.run_links import refuse_links
from dstune.config.trust import SIGNATURE
from dstune.core import signing
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE
from dstune.launch import records
from dstune.launch.rundir import RUN_FILE, run_directory
from dstune.trainer.state import FORMAT


def main(argv: list[str]) -> int:
    """Run `dstune upgrade RUN [--json]`. Raises UserError if a launch is using the run or this version cannot read its format."""
    parser = VerbParser(prog="dstune upgrade", description="Convert the files of a run to the current format.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, for example runs/NAME/DATE_TIME")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    run_dir = run_directory(arguments.run)
    lock = records.acquire_lock(run_dir)
    try:
        stages = [
            file.parent for file in (run_dir / RUN_FILE, *sorted(run_dir.glob(f"*/{RUN_FILE}"))) if file.is_file()
        ]
        refuse_links(run_dir)
        for folder in stages:
            read_run(folder / RUN_FILE)  # so that a run that cannot be read is refused before anything is written
        upgraded = [line for folder in stages for line in upgrade(folder, run_dir)]
    finally:
        os.close(lock)
    if arguments.json:
        print(json.dumps({"run": str(run_dir), "upgraded": upgraded}))
    else:
        print("\n".join(upgraded) or f"{run_dir} already has the current format")
    return EXIT_DONE


def upgrade(folder: Path, run_dir: Path) -> Iterator[str]:
    """Upgrade the files of an earlier format in `folder`, and yield a line about each. Every file is replaced atomically.

    Checkpoints come first, so that the next call completes an upgrade that was interrupted.
    """
    store.repair(folder)
    for info in store.listing(folder):
        if not info.committed:
            continue
        if former := store.upgrade(info.path):
            yield f"{(info.path / store.STATE).relative_to(run_dir)}: format {former} -> {FORMAT}"
    content = read_run_content(folder / RUN_FILE)
    name = (folder / RUN_FILE).relative_to(run_dir)
    unsigned = not signing.signed_by(content.get(SIGNATURE))[1]
    if unsigned or content.get("format") != RUN_FORMAT:
        unsigned = write_signed(folder / RUN_FILE, content) and unsigned
    if (written := content.get("format", 1)) != RUN_FORMAT:
        yield f"{name}: format {written} -> {RUN_FORMAT}"
    if unsigned:
        yield f"{name}: signed with your key"
