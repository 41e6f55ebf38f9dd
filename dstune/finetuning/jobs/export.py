"""Exports a job's checkpoints: `python -m dstune.finetuning.jobs.export FOLDER`.

It runs as a separate process because it needs torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from dstune.checkpoint import store
from dstune.core.errors import EXIT_DONE, DstuneError
from dstune.finetuning.jobs.configuration import VISIBLE_EPOCHS
from dstune.finetuning.jobs.folder import JobFolder
from dstune.finetuning.jobs.metrics import epoch_ends


def visible_checkpoints(folder: JobFolder) -> list[Path]:
    """Return the checkpoints that clients see: those of the last epochs, and the newest one (the end, or the start of a pause)."""
    complete = {info.step: info.path for info in store.listing(folder.run) if info.committed}
    if not complete:
        return []
    ends = [step for step in epoch_ends(folder.run) if step in complete][-VISIBLE_EPOCHS:]
    return [complete[step] for step in sorted({*ends, max(complete)})]


def main(argv: Iterable[str]) -> int:
    from dstune.checkpoint.export import export_checkpoint, refuse_damaged
    from dstune.inference.reference import add_reference

    folder = JobFolder(Path(next(iter(argv))))
    folder.models.mkdir(mode=0o700, exist_ok=True)
    try:
        for checkpoint in visible_checkpoints(folder):
            out = folder.models / f"step-{int(checkpoint.name.removeprefix('step-'))}"
            with store.hold(checkpoint):
                if not out.is_dir():
                    refuse_damaged(folder.run, checkpoint)
                    export_checkpoint(folder.run, checkpoint, out)
                if note := add_reference(out, folder.run):
                    print(f"dstune: {note}", file=sys.stderr, flush=True)
    except DstuneError as error:
        print(f"dstune: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
