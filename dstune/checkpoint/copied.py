"""Copies a run's files atomically by only creating, writing and removing files, for file systems that cannot append, lock, rename
or change modes (`dstune.launch.mirror`).

Files that must survive an interrupted copy (`run.yaml`, `metrics.jsonl`) are written twice: first to a spare file with a digest
at its end, then to their own path. `COMMITTED` is the last file of a checkpoint; the description is the last one of an export.
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
"""Files whose presence makes a folder an export."""
UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
NOT_COPIED = (".lock", "lease.json", paths.STOP_FILE, paths.SAVE_FILE, paths.PRUNE_FILE, paths.SIGNAL_FILE)
TEMPORARY = (INCOMPLETE, store.REPLACED, store.DAMAGED, SPARE)


def names_in(run: Path) -> Iterator[str]:
    """Yield the files below `run` that are copied, relative to it: no links, temporary files or checkpoints."""
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


def open_truncated(target: Path) -> BinaryIO:
    """Open `target` for writing, truncated. A link is replaced; the file that it leads to stays."""
    if target.is_symlink():
        target.unlink()
    return target.open("wb")


def spare_of(target: Path) -> Path:
    """Return the path that `copy_twice` writes first, which remains only if the copy was interrupted."""
    return target.with_name(f".{target.name}{SPARE}")


def remove(target: Path) -> None:
    """Remove a file that `copy_twice` wrote, and its spare file."""
    spare_of(target).unlink(missing_ok=True)
    target.unlink(missing_ok=True)


def copy_twice(source: Path, target: Path) -> None:
    """Replace `target` by the content of `source`. If this is interrupted, `read_back` returns the old or the new content."""
    spare = spare_of(target)
    copy(source, spare, digest=xxhash.xxh3_64())
    size = spare.stat().st_size - DIGEST_BYTES
    with (
        spare.open("rb") as read,
        open_truncated(target) as write,
    ):  # from the spare file: the source may have grown since
        while size and (block := read.read(min(BLOCK, size))):
            write.write(block)
            size -= len(block)
    spare.unlink()


def read_back(source: Path, target: Path) -> None:
    """Copy `source`, which `copy_twice` wrote; or its spare file if that is complete, since `source` may then be incomplete."""
    spare = spare_of(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_whole(spare):
        copy(source, target)
        return
    copy(spare, target)
    os.truncate(target, spare.stat().st_size - DIGEST_BYTES)


def is_whole(spare: Path) -> bool:
    """Return whether the spare file ends with the digest of its content."""
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
    """Make `target` a copy of the checkpoint `source`, unless it is one already. If this is interrupted, `target` or
    `target.incomplete` is still a complete checkpoint, the old or the new one. Raises OSError."""
    marker = (source / store.COMMITTED).read_bytes()
    again = target.with_name(target.name + INCOMPLETE)
    if store.is_committed(target):
        if (target / store.COMMITTED).read_bytes() == marker:
            _remove(again)
            return
        _copy_whole(source, again)  # the same step was saved again: keep the old copy until this one is complete
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
    """Copy the run at `place` into the empty folder `work`: its files, and the checkpoints that it can continue from."""
    spares = {path.relative_to(place) for path in place.rglob(f".*{SPARE}")}
    names = {*names_in(place), *(str(spare.with_name(spare.name[1 : -len(SPARE)])) for spare in spares)}
    for name in sorted(names):
        if (place / name).is_symlink() or spare_of(place / name).is_symlink():
            continue  # a stranger's link to a private file, which would be copied back to the place
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
    """Yield the folder to write an export into: `out`, or, if its file system cannot rename or change modes, a local folder that is
    copied to `out` when the block ends."""
    if not refused_operations(out):
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="dstune-export-", ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / out.name
        yield made
        for description in DESCRIPTIONS:  # removed first, so that a half-removed former export is no export
            (out / description).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(out)
        files = [path for path in made.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: file.name in DESCRIPTIONS):
            copy(file, out / file.relative_to(made))
