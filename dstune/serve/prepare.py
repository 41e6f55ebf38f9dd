"""Exports a run's newest checkpoint with its reference, in a separate process, which needs torch; the gateway does not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dstune.config.trust import flags_for, from_flags
from dstune.core.child_python import child_environment
from dstune.core.errors import EXIT_DONE, DstuneError, from_json, to_json
from dstune.core.paths import REFERENCE_FILE
from dstune.serve.source import Source


def prepare(run: Path, state: Path) -> Path:
    """Export the run in a separate process and return the folder. Raises UserError if it has nothing to export."""
    print(f"dstune: exporting {run} with a reference to hold the engine against", file=sys.stderr, flush=True)
    scratch = state / "exports"
    scratch.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-m", "dstune.serve.prepare", str(run), str(scratch), *flags_for(run)]
    code, outcome = _run_process(command)
    if outcome is None:
        raise DstuneError(f"{run} could not be exported: the process that does it ended with {code}")
    if "error" in outcome:
        raise from_json(outcome["error"])
    return Path(outcome["folder"])


def prove_base(source: Source, state: Path) -> Source:
    """Return the source with a reference if it is a language model without one; transformers computes it in a separate process.
    Raises UserError if transformers cannot load the model."""
    has_one = source.folder is not None and (source.folder / REFERENCE_FILE).is_file()
    if has_one or source.adapter or not source.generates:
        return source
    print(f"dstune: asking transformers what {source.name} answers", file=sys.stderr, flush=True)
    folder = state / "references" / quote(source.name, safe="")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    model = {"path": source.load_from, "trust_remote_code": source.trust_remote_code}
    command = [sys.executable, "-m", "dstune.serve.base_reference", json.dumps(model), str(folder / REFERENCE_FILE)]
    code, error = _run_process(command)
    if code == EXIT_DONE:
        return replace(source, reference=folder)
    if error is None:
        raise DstuneError(f"{source.name} has no reference: the process that makes it ended with {code}")
    raise from_json(error)


def _run_process(command: list[str]) -> tuple[int, Any]:
    """Run a process. Returns its exit code and the JSON of the last line that it printed; None if it printed nothing."""
    process = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True, check=False)
    lines = process.stdout.strip().splitlines()
    return process.returncode, json.loads(lines[-1]) if lines else None


def main(run: Path, scratch: Path) -> int:
    from dstune.checkpoint import store
    from dstune.checkpoint.export import current_export, export_checkpoint, find_checkpoint, refuse_damaged
    from dstune.checkpoint.record import NAME as RECORD
    from dstune.config.run_links import refuse_links
    from dstune.inference.reference import add_reference

    try:
        refuse_links(run)  # a reference is written into the export
        folder = current_export(run)
        if folder is None:
            checkpoint = find_checkpoint(run, "last")
            refuse_damaged(run, checkpoint)
            folder = scratch / f"{run.resolve().parent.name}-{run.resolve().name}-{checkpoint.name}"
            export_folder, saved = folder / RECORD, checkpoint / store.COMMITTED
            # A run that continued from an earlier step may have saved this step again since.
            if not export_folder.is_file() or export_folder.stat().st_mtime_ns < saved.stat().st_mtime_ns:
                export_checkpoint(run, checkpoint, folder, force=True)
        is_prepared = (folder / REFERENCE_FILE).is_file()
        note = add_reference(folder, run)
        if not is_prepared and not note:
            note = (
                f"{folder / REFERENCE_FILE} holds held-out rows of your data: leave it out where you publish the folder"
            )
        if note:
            print(f"dstune: {note}", file=sys.stderr, flush=True)
    except DstuneError as error:
        print(json.dumps({"error": to_json(error)}))
        return error.exit_code
    print(json.dumps({"folder": str(folder)}))
    return 0


if __name__ == "__main__":
    with from_flags(sys.argv[1:]) as (_run, _scratch):
        sys.exit(main(Path(_run), Path(_scratch)))
