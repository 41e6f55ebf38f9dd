"""Checkpoint folders of a run: `checkpoints/step-00000040/` with DeepSpeed's shards, `state.json` and `COMMITTED`.

A checkpoint is written into a folder with another name, its files are counted and hashed into `COMMITTED`, and the folder
is renamed last. What has no `COMMITTED`, or files that differ from it in size, is not a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TextIO

from dstune.core.errors import Problem, UserError
from dstune.core.files import INCOMPLETE as INCOMPLETE
from dstune.core.files import hash_file, sync_path
from dstune.core.parsing import parse_json, read_file
from dstune.trainer.state import FORMAT, upgrade_state

COMMITTED = "COMMITTED"
STATE = "state.json"
REPLACED = ".replaced"
DAMAGED = ".damaged"


@dataclass(frozen=True)
class CheckpointInfo:
    path: Path
    step: int
    committed: bool
    bytes: int
    best: bool
    """Whether it was saved at the step of the best evaluation so far."""
    weights_only: bool = False
    """Whether a run cannot be continued from it (`checkpoint.weights_only`)."""


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def tag(step: int) -> str:
    return f"step-{step:08d}"


def commit(written: Path, state: dict[str, Any], entries: Mapping[str, dict[str, Any]] = MappingProxyType({})) -> Path:
    """Turn the folder `.../step-N.incomplete`, whose shards are all written, into the checkpoint `.../step-N`.

    Called by one process. Files reach the disk before the marker does, and the marker before the name.
    entries: `bytes` and `xxh3_64` of the files that their writers have synced and hashed; the others are here.
    Raises OSError, also where a file is not there with its size.
    """
    (written / STATE).write_text(json.dumps(state, indent=1))
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        local_entries = dict(
            zip(names, pool.map(lambda name: entries.get(name) or _sync_and_hash(written / name), names), strict=True)
        )
    listing = {name: local_entries.get(name, entry) for name, entry in entries.items()} | local_entries
    for name, entry in listing.items():
        if not (written / name).is_file() or (written / name).stat().st_size != entry["bytes"]:
            raise OSError(f"{name} is not what was written")
    marker = written / COMMITTED
    marker.write_text(json.dumps({"files": listing}, indent=1))
    sync_path(marker)
    final = written.with_name(written.name.removesuffix(INCOMPLETE))
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():  # the same step saved again: with its evaluation, or after a resume
        final.rename(replaced)
    written.rename(final)
    sync_path(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def upgrade(checkpoint: Path) -> int | None:
    """Write the `state.json` of a complete checkpoint in the present format: at once, and without touching its shards.

    Returns the format it had; None if it has the present one already. Raises OSError, and UserError (`upgrade_state`).
    """
    try:
        saved = _state_object(checkpoint)
    except ValueError as error:
        raise _unreadable(checkpoint, error) from None
    if (former := saved.get("format", 1)) == FORMAT:
        return None
    entries: dict[str, dict[str, Any]] = json.loads((checkpoint / COMMITTED).read_text())["files"]
    del entries[STATE]
    written = checkpoint.with_name(checkpoint.name + INCOMPLETE)
    if written.exists():
        shutil.rmtree(written)
    for name in entries:
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(checkpoint / name, written / name)
        except OSError:  # a file system without hard links
            shutil.copy2(checkpoint / name, written / name)
    commit(written, upgrade_state(saved), entries)
    return former


def repair(run_dir: Path) -> None:
    """Rename complete checkpoints that a crash between the two renames of `commit` left under a temporary name."""
    for ending in (INCOMPLETE, REPLACED):
        for path in folder(run_dir).glob(f"step-*{ending}"):
            final = path.with_name(path.name.removesuffix(ending))
            if is_committed(path) and not is_committed(final):
                if final.exists():
                    shutil.rmtree(final)
                path.rename(final)


def quarantine(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that it is neither the newest one nor counted among those that pruning keeps. The next
    pruning removes it."""
    quarantined = checkpoint.with_name(checkpoint.name + DAMAGED)
    if quarantined.exists():
        shutil.rmtree(quarantined)
    checkpoint.rename(quarantined)


def is_committed(checkpoint: Path) -> bool:
    """Return whether every file that was committed is there with its size."""
    return not incomplete_reasons(checkpoint)


def _is_inside(name: str) -> bool:
    """Return whether a name of a marker stays in the checkpoint's folder."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def incomplete_reasons(checkpoint: Path) -> list[str]:
    """Return why a folder is no complete checkpoint, as texts: the marker or files are missing or have another size."""
    try:
        files = parse_json(read_file(checkpoint / COMMITTED))["files"]
        sizes = {name: entry["bytes"] for name, entry in files.items()}
    except OSError:
        return [f"it has no {COMMITTED}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{COMMITTED} is torn"]
    reasons = [f"{COMMITTED} names a file elsewhere: {name}" for name in sizes if not _is_inside(name)]
    for name, size in () if reasons else sizes.items():
        path = checkpoint / name
        try:
            if not path.is_file():
                reasons.append(f"{name} is gone")
            elif path.stat().st_size != size:
                reasons.append(f"{name} has {path.stat().st_size} of {size} bytes")
        except OSError as error:
            reasons.append(f"{name} cannot be looked at: {error.strerror}")
    return reasons


def damaged_files(
    checkpoint: Path, names: Collection[str] | None = None, hashes: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Return names of committed files that are absent or differ from what was written, by their hash.

    names: the files to look at; all when not given. hashes: of files that have been read already.

    Raises FileNotFoundError where its run has pruned it.
    """

    def differs(name: str) -> bool:
        path = checkpoint / name
        return not path.is_file() or (hashes.get(name) or hash_file(path)) != files[name].get("xxh3_64")

    with hold(checkpoint) as marker, ThreadPoolExecutor() as pool:
        files = json.load(marker)["files"]
        chosen = [name for name in files if names is None or name in names]
        damaged = [name for name, bad in zip(chosen, pool.map(differs, chosen), strict=True) if bad]
    if damaged and not (checkpoint / COMMITTED).exists():  # its removal had begun before it was held
        raise FileNotFoundError(checkpoint)
    return damaged


def committed_files(checkpoint: Path) -> list[str]:
    """Return names of the files that were committed. Raises FileNotFoundError where its run has pruned it."""
    return list(parse_json(read_file(checkpoint / COMMITTED))["files"])


def share_of_files(names: Iterable[str], rank: int, ranks: int) -> set[str]:
    """Return the files that `rank` of `ranks` verifies.

    Files whose names differ only in numbers are assigned in contiguous runs: a rank's run has most of what it needs from a
    checkpoint of another number of ranks (`dstune.zero.restore`).
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "", name), []).append(name)
    share: set[str] = set()
    for files in alike.values():
        files.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        share.update(name for place, name in enumerate(files) if place * ranks // len(files) == rank)
    return share


def hold(checkpoint: Path) -> TextIO:
    """Keep `checkpoint` from being pruned by another process until the returned file is closed, where files can be locked."""
    marker = (checkpoint / COMMITTED).open()
    with suppress(OSError):
        fcntl.flock(marker, fcntl.LOCK_SH)
    return marker


def _is_held(checkpoint: Path) -> bool:
    try:
        with (checkpoint / COMMITTED).open() as marker:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no marker, or a file system without locks
        return False
    return False


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is (or would be) a checkpoint of a run."""
    return path.parent.name == "checkpoints" and (path.parent.parent / "run.yaml").is_file()


def run_and_step(checkpoint: Path, key: str) -> tuple[Path, str]:
    """Return the run that a checkpoint is of, and its step. Raises UserError for what a torn save has left."""
    run_dir, step = checkpoint.parent.parent, re.fullmatch(r"step-(\d+)", checkpoint.name)
    if step is None:
        fix = f"give {run_dir}, which is its newest whole checkpoint, or {run_dir}/checkpoints/step-N"
        raise UserError(Problem(key, "is no whole checkpoint", fix, str(checkpoint)))
    return run_dir, str(int(step[1]))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of `state.json`, in the present format. Raises UserError where it cannot be read, or is newer."""
    try:
        return upgrade_state(_state_object(checkpoint))
    except ValueError as error:
        raise _unreadable(checkpoint, error) from None


def _unreadable(checkpoint: Path, error: ValueError) -> UserError:
    fix = "give another checkpoint, or take it out of the way"
    return UserError(Problem(str(checkpoint / STATE), f"cannot be read: {error}", fix))


def _state_object(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint. Raises ValueError where it is no JSON object, OSError where it is not
    there."""
    state = parse_json(read_file(checkpoint / STATE))
    if not isinstance(state, dict):
        raise ValueError("is no JSON object")
    return state


def listing(run_dir: Path) -> list[CheckpointInfo]:
    """Return all checkpoint folders of a run, oldest first, including incomplete ones."""
    infos = []
    for path in sorted(folder(run_dir).glob("step-*")):
        number = path.name.removeprefix("step-")
        if not number.isdecimal() or not path.is_dir():
            continue
        try:
            committed = is_committed(path)
            state = upgrade_state(_state_object(path)) if committed else {}
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        except FileNotFoundError:  # the run it belongs to is removing it now
            continue
        except ValueError:  # somebody else's, whose state cannot be read
            committed, state, size = False, {}, 0
        best = state.get("best")
        is_best = isinstance(best, dict) and best.get("step") == int(number)
        weights_only = bool(state.get("weights_only"))
        infos.append(CheckpointInfo(path, int(number), committed, size, is_best, weights_only))
    return infos


def newest(run_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of a run."""
    whole = [info.path for info in listing(run_dir) if info.committed]
    return whole[-1] if whole else None


def resumable(run_dir: Path) -> Path | None:
    """Return the newest whole checkpoint that a run can be continued from."""
    whole = [info.path for info in listing(run_dir) if info.committed and not info.weights_only]
    return whole[-1] if whole else None


def best(run_dir: Path) -> Path | None:
    """Return the newest checkpoint that was the best one when it was saved."""
    whole = [info.path for info in listing(run_dir) if info.committed and info.best]
    return whole[-1] if whole else None


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Remove all checkpoints except the newest `keep`, the best one and the newest one to continue from, and remove the remains of
    interrupted saves. Returns the removed folders.

    A checkpoint that another process reads (`hold`) stays until the next time.
    """
    infos = listing(run_dir)
    whole = [info.path for info in infos if info.committed]
    kept_paths = {*whole[-keep:], best(run_dir), resumable(run_dir)}
    doomed = [info.path for info in infos if info.path not in kept_paths and not _is_held(info.path)]
    for ending in (INCOMPLETE, REPLACED, DAMAGED):
        doomed += [path for path in folder(run_dir).glob(f"*{ending}") if path.is_dir()]
    doomed = [path for path in doomed if not path.is_symlink()]  # it may be another run's
    for path in doomed:
        # The marker goes first: a removal that is cut short leaves no half checkpoint that looks whole.
        (path / COMMITTED).unlink(missing_ok=True)
        shutil.rmtree(path)
    return doomed


def _sync_and_hash(path: Path) -> dict[str, Any]:
    sync_path(path)
    return {"bytes": path.stat().st_size, "xxh3_64": hash_file(path)}
