"""Copies of a run's files that appear whole, with nothing but creating, writing and removing files: for places that cannot
append, lock, rename or change modes (`dstune.launch.mirror`).

What must not be lost when a copy is cut short (`run.yaml`, `metrics.jsonl`) is written twice: first beside itself, with a
digest at its end, then in its place. Of a checkpoint `COMMITTED` comes last. Of an export its description comes last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

from dstune.checkpoint import store
from dstune.core import paths
from dstune.core.files import INCOMPLETE
from dstune.core.limited_places import refused_operations

BLOCK = 2**22
SPARE = ".spare"
DIGEST_BYTES = 16
CHECKPOINTS = "checkpoints"
DESCRIPTIONS = ("config.json", "adapter_config.json")
"""Of an export: what makes a folder one."""
UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
NOT_COPIED = (".lock", "lease.json", paths.STOP_FILE, paths.SAVE_FILE, paths.PRUNE_FILE, paths.SIGNAL_FILE)
TEMPORARY = (INCOMPLETE, store.REPLACED, store.DAMAGED, SPARE)


def names_in(run: Path) -> Iterator[str]:
    """Yield files below `run` that are copied, relative to it: neither links, nor what is being written, nor checkpoints."""
    for folder, folders, files in os.walk(run):
        folders[:] = [name for name in folders if name != CHECKPOINTS and not name.endswith(TEMPORARY)]
        for name in files:
            path = Path(folder, name)
            if name not in NOT_COPIED and not name.endswith(TEMPORARY) and path.is_file() and not path.is_symlink():
                yield path.relative_to(run).as_posix()


def runs_in(run: Path) -> list[Path]:
    """Return `run` and the stages below it that have checkpoints."""
    return sorted(folder.parent for folder in run.rglob(CHECKPOINTS) if folder.is_dir())


def copy(source: Path, target: Path, *, end: bytes = b"", digest: xxhash.xxh3_64 | None = None) -> None:
    """Write the content of `source`, then `end`, as a new file `target`. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(BLOCK):
            if digest is not None:
                digest.update(block)
            write.write(block)
        write.write(end if digest is None else digest.hexdigest().encode())
        write.flush()
        try:
            os.fsync(write.fileno())
        except OSError as error:
            if error.errno not in UNSYNCABLE:
                raise


def emptied(target: Path) -> BinaryIO:
    """Return `target` open for writing, without what it held; a link in its place goes, what it led to stays."""
    if target.is_symlink():
        target.unlink()
    return target.open("wb")


def spare_of(target: Path) -> Path:
    """Return where `copy_twice` writes first. It is left behind only where the copy was cut short."""
    return target.with_name(f".{target.name}{SPARE}")


def remove(target: Path) -> None:
    """Remove what `copy_twice` wrote, with what is left of a copy that was cut short."""
    spare_of(target).unlink(missing_ok=True)
    target.unlink(missing_ok=True)


def copy_twice(source: Path, target: Path) -> None:
    """Replace `target` by the content of `source`; cut short at any point, `read_back` gives the old or the new."""
    spare = spare_of(target)
    copy(source, spare, digest=xxhash.xxh3_64())
    size = spare.stat().st_size - DIGEST_BYTES
    with spare.open("rb") as read, emptied(target) as write:  # of the spare: the source may have grown since
        while size and (block := read.read(min(BLOCK, size))):
            write.write(block)
            size -= len(block)
    spare.unlink()


def read_back(source: Path, target: Path) -> None:
    """Copy `source`, which `copy_twice` wrote, or its spare where that is whole: then `source` may be cut short."""
    spare = spare_of(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_whole(spare):
        copy(source, target)
        return
    copy(spare, target)
    os.truncate(target, spare.stat().st_size - DIGEST_BYTES)


def is_whole(spare: Path) -> bool:
    """Return whether the digest at the end of `spare` is that of its content."""
    try:
        bytes_left = spare.stat().st_size - DIGEST_BYTES
        if bytes_left < 0:
            return False
        digest = xxhash.xxh3_64()
        with spare.open("rb") as stream:
            while bytes_left and (block := stream.read(min(BLOCK, bytes_left))):
                digest.update(block)
                bytes_left -= len(block)
            return stream.read() == digest.hexdigest().encode()
    except FileNotFoundError:
        return False


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make `target` a copy of the checkpoint `source`, unless it is one. Cut short at any point, `target` or
    `target.incomplete` is what was there before, or the new one, whole. Raises OSError."""
    marker = (source / store.COMMITTED).read_bytes()
    again = target.with_name(target.name + INCOMPLETE)
    if store.is_committed(target):
        if (target / store.COMMITTED).read_bytes() == marker:
            _remove(again)
            return
        _copy_whole(source, again)  # the same step saved once more: what is there goes when this is whole
    _copy_whole(source, target)
    _remove(again)


def _copy_whole(source: Path, target: Path) -> None:
    (target / store.COMMITTED).unlink(missing_ok=True)
    names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for name in names:
        if name.name != store.COMMITTED:
            copy(source / name, target / name)
    stale = [path for path in target.rglob("*") if path.is_file() and path.relative_to(target) not in names]
    for path in stale:
        path.unlink()
    copy(source / store.COMMITTED, target / store.COMMITTED)
    if reasons := store.incomplete_reasons(target):
        raise OSError(f"{target}: {', '.join(reasons)} after it was copied")


def _remove(folder: Path) -> None:
    (folder / store.COMMITTED).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def fetch(place: Path, work: Path) -> None:
    """Bring the run at `place` to `work`, an empty folder: its files, and the checkpoints that it can go on from."""
    spares = {path.relative_to(place) for path in place.rglob(f".*{SPARE}")}
    names = {*names_in(place), *(str(spare.with_name(spare.name[1 : -len(SPARE)])) for spare in spares)}
    for name in sorted(names):
        if (place / name).exists() or is_whole(spare_of(place / name)):
            read_back(place / name, work / name)
    for run in runs_in(place):
        checkpoints = (store.newest(run), store.resumable(run), store.best(run))
        needed = {checkpoint for checkpoint in checkpoints if checkpoint is not None}
        for path in store.folder(run).glob(f"step-*{INCOMPLETE}"):
            final = path.with_name(path.name.removesuffix(INCOMPLETE))
            if store.is_committed(path) and not store.is_committed(final):
                needed.add(path)
        local_run = work / run.relative_to(place)
        for path in needed:
            for file in path.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    copy(file, store.folder(local_run) / path.name / file.relative_to(path))
        store.repair(local_run)


@contextmanager
def folder_for(out: Path) -> Iterator[Path]:
    """Yield the folder that an export to `out` is made in: `out` itself, or where that place cannot rename or change modes, one
    on this machine's disk that is copied when the block ends."""
    if not refused_operations(out):
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="dstune-export-", ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / out.name
        yield made
        for description in DESCRIPTIONS:  # without it, what is left of a former export is none
            (out / description).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(out)
        files = [path for path in made.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: file.name in DESCRIPTIONS):
            copy(file, out / file.relative_to(made))
