"""Runs training in a local folder when the run's own place cannot append, lock or rename, and copies the folder there.

Such places are Volumes and mounts of object stores. Copies are made after each checkpoint and at the end of the run. The place has
the authoritative state of the run. The launch that works on it says so in `lease.json` there, and increases a number in it to show
that it is alive. A working folder left on this machine is used again only if nobody else has worked on the run since; otherwise it
is created anew from the place.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from dstune.checkpoint import copied, store
from dstune.config.run_links import refuse_links
from dstune.core import files
from dstune.core.disk import fix_of_unwritable_folder
from dstune.core.errors import Problem, UserError
from dstune.core.limited_places import refused_operations
from dstune.core.parsing import object_in, read_object
from dstune.core.paths import BEGUN, SAVE_FILE, STOP_FILE
from dstune.core.secrets import publish
from dstune.launch import records
from dstune.launch.processes import process_namespace

POLL_SECONDS = 1.0
BEAT_SECONDS = 10.0
"""Seconds between renewals of the lease."""
ALIVE_SECONDS = 30.0
"""A launch whose lease has not changed for this long has died."""
FILES_SECONDS = 10.0
"""Seconds between copies of logs and metrics while there is no new checkpoint."""
RESULT = "result.json"
WITH_PATHS = (RESULT, "report.html")
"""Files that contain paths of other files of the run."""


class Mirror:
    """The working folder `work` of the run at `place`; it exists from before the run is read until the last copy."""

    def __init__(self, place: Path, refused: dict[str, str], message: Callable[[str], None]):
        """refused: operations that fail at the place, with the reasons. message: shows a line to the user."""
        self.place, self.refused, self._message = place, refused, message
        self.work = records.working_folder(place)
        self.keep = 1
        """How many checkpoints stay at the place (`checkpoint.keep`)."""
        self._id = uuid.uuid4().hex
        self._record_file = self.work.with_name(f"{self.work.name}.json")
        """Records which launch made the working folder."""
        self._copied: dict[str, tuple[int, int]] = {}
        """Size and modification time of each file when it was last copied."""
        self._markers: dict[Path, bytes] = {}
        """The marker of each checkpoint when it was copied."""
        self._created = [folder for folder in (place, *place.absolute().parents) if not folder.exists()]
        self._last_copy, self._released = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._beat, self._last_beat, self._copied_at = 0, 0.0, 0.0
        self._lost = False
        """Whether another launch has taken the run over."""
        self._lock = self._take_over()

    def _take_over(self) -> int:
        """Take the lock and the lease, which keep out launches on this machine and on others, and prepare the working folder.

        Returns the descriptor of the lock. Raises UserError if another launch works on the run.
        """
        root = self.work.parent
        root.mkdir(parents=True, exist_ok=True)
        if refused_here := ", ".join(refused_operations(root)):
            reason = (
                f"the run would work in this folder, since its own place cannot {', '.join(self.refused)}; but this folder cannot "
                f"{refused_here}"
            )
            raise UserError(Problem("DSTUNE_CACHE", reason, "export DSTUNE_CACHE=FOLDER on a local disk", str(root)))
        lock = files.open_plain(self.work.with_name(f"{self.work.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(records.in_use(self.place, records.read_launch(self.work))) from None
            if self.work.is_dir():  # waits until the guard of a killed launcher has ended its ranks
                os.close(records.acquire_lock(self.work))
            lease, folder_record = self._read_lease(), object_in(self._record_file)
            if is_truncated := lease == {}:  # by a launch that was killed, or is writing it now
                self._refuse_live_lease(lease)
                if (lease := self._read_lease()) == {} and self._has_newest():
                    lease = {"id": folder_record.get("id")}
            last_id = (lease or {}).get("id")
            was_last_here = last_id and last_id in (folder_record.get("id"), folder_record.get("former"))
            if was_last_here and (self.work / "run.yaml").is_file():
                self._message(f"dstune: continuing in {self.work}, which was not completely copied to {self.place}")
                for run in copied.runs_in(self.work):
                    store.repair(run)
                self._copied = {name: (-1, -1) for name in WITH_PATHS if (self.place / name).exists()}
            else:
                if not is_truncated:
                    self._refuse_live_lease(lease)
                self._fetch()
                last_id = None
            # `former` is for a launch killed before the lease is written: the lease still has the former id then.
            record = {"id": self._id, "former": last_id, "place": str(self.place.absolute())}
            files.write(self._record_file, json.dumps(record))
            self._write_lease()
        except BaseException:
            os.close(lock)
            raise
        publish(str(self.work))
        return lock

    def _refuse_live_lease(self, lease: dict[str, Any] | None) -> None:
        """Raise UserError if the lease at the place belongs to a launch that is alive; waits up to ALIVE_SECONDS to find out."""
        if lease is None or (
            lease.get("machine") == process_namespace() and not psutil.pid_exists(lease.get("pid", 0))
        ):
            return
        host = lease.get("host", "another machine")
        self._message(
            f"dstune: a launch on {host} did not report its end: waiting {ALIVE_SECONDS:.0f} s to see whether it is alive"
        )
        deadline = time.monotonic() + ALIVE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            lease = lease or self._read_lease() or {}  # it was being written
            current_lease = self._read_lease()
            if current_lease is None:
                return
            if current_lease and lease and current_lease != lease:
                fix = f"wait for it, stop it (create {self.place / STOP_FILE}), or give another run.dir"
                raise UserError(Problem("run.dir", f"a launch on {host} is running here", fix, str(self.place)))

    def _read_lease(self) -> dict[str, Any] | None:
        """Read the lease: None if there is none, empty while it is being written."""
        return read_object(self.place / records.LEASE) or ({} if (self.place / records.LEASE).exists() else None)

    def _has_newest(self) -> bool:
        """Return whether the working folder has the newest checkpoints of the place: then no other launch has continued the run."""
        newest_checkpoints = [store.newest(run) for run in copied.runs_in(self.place)]
        return all(
            checkpoint is None or _marker(checkpoint) == _marker(self.work / checkpoint.relative_to(self.place))
            for checkpoint in newest_checkpoints
        )

    def _fetch(self) -> None:
        """Create the working folder anew from the place. Raises UserError."""
        shutil.rmtree(self.work, ignore_errors=True)
        if (self.place / "run.yaml").exists() or any(self.place.glob(f".run.yaml{copied.SPARE}")):
            try:
                copied.fetch(self.place, self.work)
            except OSError as error:
                reason = f"the run cannot be copied to {self.work}: {error}"
                fix = "free some disk space, or check that the place can be read"
                raise UserError(Problem("run.dir", reason, fix, str(self.place))) from None
            self._copied = {
                name: version for name, version in self._versions() if not copied.spare_of(self.place / name).exists()
            }

    def _versions(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the name and version of each file of the working folder."""
        for name in copied.names_in(self.work):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                yield name, _version(self.work / name)

    @property
    def refusals(self) -> str:
        """The operations that fail at the place, with the reasons, as text."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())

    def refuse_other_machines(self, launcher: str) -> None:
        """Raise UserError, since ranks on other machines cannot see the working folder. launcher: what starts them there."""
        reason = (
            f"this place refuses what a run does ({self.refusals}), so the run would work on the disk of this machine; {launcher} "
            "starts ranks on other machines, which do not see that disk"
        )
        fix = "give a run.dir on a file system that all nodes share and that allows this (NFS, Lustre), or train on one machine"
        raise UserError(Problem("run.dir", reason, fix, str(self.place)))

    # -- while the run goes on ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to renew the lease and to copy. Each has a thread, since a copy may take longer than ALIVE_SECONDS."""
        jobs = (
            (self._released, self._show_life, "lease of the run"),
            (self._last_copy, self._copy_if_due, "copies of the run"),
        )
        self._threads = [
            threading.Thread(target=self._repeat, args=(end, job), name=name, daemon=True) for end, job, name in jobs
        ]
        for thread in self._threads:
            thread.start()

    def copy_rows(self) -> None:
        """Copy rows that were given in memory to the place now, since `data.train` has their path there. Raises OSError."""
        for file in (self.work / "data").glob("*"):
            copied.copy(file, self.place / "data" / file.name)

    def _repeat(self, end: threading.Event, job: Callable[[], None]) -> None:
        """Run `job` every POLL_SECONDS until `end` is set."""
        last_error = ""
        while not end.wait(POLL_SECONDS):
            try:
                job()
                last_error = ""
            except Exception as error:  # the place may come back, and everything is in the working folder meanwhile
                if str(error) != last_error:
                    self._message(f"dstune: cannot write to {self.place} now, trying again: {error}")
                last_error = str(error)

    def _show_life(self) -> None:
        self._pass_on_requests()
        if time.monotonic() - self._last_beat > BEAT_SECONDS:
            self._renew_lease()

    def _copy_if_due(self) -> None:
        due = time.monotonic() - self._copied_at > FILES_SECONDS or self._new_checkpoints()
        if due and (self.work / BEGUN).exists():
            self._copy()

    def _pass_on_requests(self) -> None:
        """Move requests to stop or to save from the place to the working folder, where the ranks look for them."""
        for name in (STOP_FILE, SAVE_FILE):
            if (self.place / name).exists():
                (self.place / name).unlink()
                files.write(self.work / name, "")

    def _renew_lease(self) -> None:
        lease = read_object(self.place / records.LEASE)
        if lease is not None and lease.get("id") not in (self._id, None):
            self._message(
                f"dstune: {lease.get('host')} has taken the run over: it is being stopped here, and no longer copied"
            )
            self._lost = True
            self._last_copy.set()
            self._released.set()
            files.write(self.work / STOP_FILE, "")
            return
        self._write_lease()

    def _write_lease(self) -> None:
        """Write the lease. Raises UserError if the first one cannot be written, OSError for a later one."""
        self._beat += 1
        lease = {
            "id": self._id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": process_namespace(),
            "beat": self._beat,
        }
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            with copied.open_truncated(self.place / records.LEASE) as stream:
                stream.write(json.dumps(lease).encode())
        except OSError as error:
            if self._beat > 1:
                raise
            reason = f"cannot be created or written: {error.strerror}"
            raise UserError(Problem("run.dir", reason, fix_of_unwritable_folder(error), str(self.place))) from None
        self._last_beat = time.monotonic()

    def _new_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints of all stages that have not been copied since they were saved."""
        complete = [info.path for run in copied.runs_in(self.work) for info in store.listing(run) if info.committed]
        return [path for path in complete if _marker(path) not in (b"", self._markers.get(path))]

    def _copy(self) -> None:
        """Bring the place up to date. Raises OSError.

        Files are copied first, since a checkpoint needs the metrics before it. Results are copied last: a run with a result is not
        continued, so if the copy ended between the two, the loss of the last checkpoint would go unnoticed.
        """
        if self._lost:
            return
        # Listed before the checkpoints: a result that is written later may refer to a checkpoint that is not copied below.
        version_by_name = dict(self._versions())
        changed = [name for name, version in version_by_name.items() if self._copied.get(name) != version]
        results = sorted((name for name in changed if Path(name).name == RESULT), key=lambda name: name.count("/"))
        # Old results go first: the new `run.yaml` may request more steps than they report.
        for name in (*results, *(self._copied.keys() - version_by_name.keys())):
            copied.remove(self.place / name)
            self._copied.pop(name, None)
        self._copy_files([name for name in changed if name not in results], version_by_name)
        self._copy_checkpoints()
        self._copy_files(results[::-1], version_by_name)  # stages first, then the result of the complete run
        self._copied_at = time.monotonic()

    def _copy_checkpoints(self) -> None:
        for checkpoint in self._new_checkpoints():
            if self._lost:
                return
            try:
                with store.hold(checkpoint):
                    marker = _marker(checkpoint)
                    copied.copy_checkpoint(checkpoint, self.place / checkpoint.relative_to(self.work))
            except FileNotFoundError:
                if _marker(checkpoint):
                    raise
                continue  # it was pruned meanwhile, so there is a newer one
            self._markers[checkpoint] = marker
            run = self.place / checkpoint.parents[1].relative_to(self.work)
            store.prune(run, self.keep)

    def _copy_files(self, changed: list[str], version_by_name: dict[str, tuple[int, int]]) -> None:
        """Copy the files named in `changed`. version_by_name: the version of each file of the working folder when it was listed."""
        exports = {Path(name).parent for name in changed if Path(name).parent.name == "export"}
        for folder in exports:  # without its description an incomplete export is not taken for a model
            for description in copied.DESCRIPTIONS:
                (self.place / folder / description).unlink(missing_ok=True)
                if (name := (folder / description).as_posix()) in version_by_name and name not in changed:
                    changed.append(name)
        for name in sorted(
            changed, key=lambda name: (Path(name).parent in exports, Path(name).name in copied.DESCRIPTIONS)
        ):
            if self._lost:
                return
            try:
                self._copy_file(name, Path(name).parent in exports)
            except FileNotFoundError:  # deleted meanwhile
                if (self.work / name).exists():
                    raise
                continue
            self._copied[name] = version_by_name[name]

    def _copy_file(self, name: str, in_export: bool) -> None:
        source, target = self.work / name, self.place / name
        if in_export:
            copied.copy(source, target)
            return
        if name in WITH_PATHS:
            text = source.read_bytes().replace(os.fsencode(self.work), os.fsencode(self.place.absolute()))
            source = self.work.with_name(f"{self.work.name}.text")
            source.write_bytes(text)
        target.parent.mkdir(parents=True, exist_ok=True)
        copied.copy_twice(source, target)

    # -- at the end ---------------------------------------------------------------------------------------------------

    def close(self) -> bool:
        """Copy what has not been copied, and release the lease. Returns False if that failed: the working folder stays then."""
        self._last_copy.set()
        for thread in self._threads[1:]:
            thread.join()
        try:
            return self._close()
        finally:
            self._stop_threads()
            os.close(self._lock)

    def _stop_threads(self) -> None:
        self._released.set()
        for thread in self._threads:
            thread.join()

    def _close(self) -> bool:
        if self._lost:
            return False
        if not self.work.is_dir():  # the launch was refused before anything was written
            self._leave_no_trace()
            return True
        try:
            if self._copied or (self.work / "run.yaml").exists():
                self._copy()
            self._stop_threads()
            if bool(self._lost):  # meanwhile, by the thread that renews the lease
                return False
            (self.place / records.LEASE).unlink(missing_ok=True)
        except OSError as error:
            retry = f"`dstune train {self.place}` on {socket.gethostname()} tries again"
            self._message(f"dstune: the run is in {self.work} and cannot be copied to {self.place}: {error}; {retry}")
            return False
        shutil.rmtree(self.work, ignore_errors=True)
        for ending in ("json", "text"):
            self.work.with_name(f"{self.work.name}.{ending}").unlink(missing_ok=True)
        return True

    def _leave_no_trace(self) -> None:
        """Remove what this launch has created at the place."""
        self._stop_threads()
        self._record_file.unlink(missing_ok=True)
        (self.place / records.LEASE).unlink(missing_ok=True)
        if not self._created:
            return
        shutil.rmtree(self.place / "data", ignore_errors=True)
        for folder in self._created:
            try:
                folder.rmdir()
            except OSError:
                return


def open_mirror(place: Path, message: Callable[[str], None]) -> Mirror | None:
    """Return the mirror of a run if its directory refuses operations that a run needs; None if it allows them all.

    Raises:
        UserError: another launch works on the run, or the run cannot be copied to this machine.
    """
    refused = refused_operations(place)
    if not refused:
        return None
    refuse_links(place)
    mirror = Mirror(place, refused, message)
    message(
        f"dstune: {place} refuses what a run does ({mirror.refusals}): the run works in {mirror.work} and is copied after each save"
    )
    return mirror


def _marker(checkpoint: Path) -> bytes:
    """Return the content that distinguishes one save of a step from another; empty if the checkpoint is gone."""
    try:
        return (checkpoint / store.COMMITTED).read_bytes()
    except FileNotFoundError:
        return b""


def _version(file: Path) -> tuple[int, int]:
    """Return the size and the modification time in nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
