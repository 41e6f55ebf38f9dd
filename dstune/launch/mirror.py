"""A run in a place that cannot append, lock or rename (Volumes, mounts of object stores): it works in a folder on this
machine's disk, and is copied to the place after each checkpoint and at its end.

What is at the place is the run. Who works on it says so in `lease.json` there, and shows by a number that grows that it is
alive. A folder on this machine is gone on with only if nobody has worked on the run since; else it is made anew from the place.
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
from dstune.core.errors import Problem, UserError
from dstune.core.limited_places import refused_operations
from dstune.core.parsing import object_in, read_object
from dstune.core.paths import BEGUN, SAVE_FILE, STOP_FILE
from dstune.core.secrets import publish
from dstune.launch import records

POLL_SECONDS = 1.0
BEAT_SECONDS = 10.0
ALIVE_SECONDS = 30.0
"""A lease that has not changed for so long is that of a launch that died."""
FILES_SECONDS = 10.0
"""Between copies of logs and metrics where no checkpoint comes."""
RESULT = "result.json"
WITH_PATHS = (RESULT, "report.html")
"""Files that name others of the run by their path."""


class Mirror:
    """The working folder `work` of the run at `place`, from before it is looked at to the last copy.

    refused: what cannot be done at the place, with the reasons. message: shows a line to the user.
    """

    def __init__(self, place: Path, refused: dict[str, str], message: Callable[[str], None]):
        self.place, self.refused, self._message = place, refused, message
        self.work = records.working_folder(place)
        self.keep = 1
        """Checkpoints that stay at the place (`checkpoint.keep`)."""
        self._id = uuid.uuid4().hex
        self._own = self.work.with_name(f"{self.work.name}.json")
        self._known: dict[str, tuple[int, int]] = {}
        """Size and time of each file when it was copied."""
        self._markers: dict[Path, bytes] = {}
        self._created = [folder for folder in (place, *place.absolute().parents) if not folder.exists()]
        self._last_copy, self._released = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._beat, self._last_beat, self._copied_at = 0, 0.0, 0.0
        self._lost = False
        """Whether somebody else works on the run by now."""
        self._lock = self._take()

    def _take(self) -> int:
        """Keep others out, on this machine by a lock and elsewhere by the lease, and make the working folder ready."""
        root = self.work.parent
        root.mkdir(parents=True, exist_ok=True)
        if refused_here := ", ".join(refused_operations(root)):
            reason = f"a run works here, since its own place cannot {', '.join(self.refused)}; this one cannot {refused_here}"
            raise UserError(Problem("DSTUNE_CACHE", reason, "export DSTUNE_CACHE=FOLDER on a local disk", str(root)))
        lock = files.open_plain(self.work.with_name(f"{self.work.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(records.in_use(self.place, records.read_launch(self.work))) from None
            if self.work.is_dir():  # until the guard of a launcher that was killed has ended the ranks
                os.close(records.acquire_lock(self.work))
            lease, own_record = self._read_lease(), object_in(self._own)
            if cut_short := lease == {}:  # or being written
                self._watch(lease)
                if (lease := self._read_lease()) == {} and self._has_newest():
                    lease = {"id": own_record.get("id")}
            last = (lease or {}).get("id")
            if last and last in (own_record.get("id"), own_record.get("former")) and (self.work / "run.yaml").is_file():
                self._message(f"dstune: goes on with {self.work}: what it holds was not copied to {self.place} before")
                for run in copied.runs_in(self.work):
                    store.repair(run)
                self._known = {name: (-1, -1) for name in WITH_PATHS if (self.place / name).exists()}
            else:
                if not cut_short:
                    self._watch(lease)
                self._fetch()
                last = None
            # Killed between the two, this folder is still known for the one that the lease means.
            files.write(self._own, json.dumps({"id": self._id, "former": last, "place": str(self.place.absolute())}))
            self._write_lease()
        except BaseException:
            os.close(lock)
            raise
        publish(str(self.work))
        return lock

    def _watch(self, lease: dict[str, Any] | None) -> None:
        """Raises UserError where the lease at the place belongs to a launch that is alive."""
        if lease is None or (lease.get("machine") == _machine() and not psutil.pid_exists(lease.get("pid", 0))):
            return
        host = lease.get("host", "another machine")
        self._message(
            f"dstune: a launch on {host} did not say that it ended: {ALIVE_SECONDS:.0f} s to see whether it lives"
        )
        deadline = time.monotonic() + ALIVE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            lease = lease or self._read_lease() or {}  # it was being written
            now = self._read_lease()
            if now is None:
                return
            if now and lease and now != lease:
                fix = f"wait for it, stop it (create {self.place / STOP_FILE}), or give another run.dir"
                raise UserError(Problem("run.dir", f"a launch on {host} is running here", fix, str(self.place)))

    def _read_lease(self) -> dict[str, Any] | None:
        """Read the lease; None where there is none; empty while it is being written."""
        return read_object(self.place / records.LEASE) or ({} if (self.place / records.LEASE).exists() else None)

    def _has_newest(self) -> bool:
        """Return whether the newest checkpoints at the place are here, as they are there: then nobody has gone on elsewhere."""
        newest_checkpoints = [store.newest(run) for run in copied.runs_in(self.place)]
        return all(
            checkpoint is None or _marker(checkpoint) == _marker(self.work / checkpoint.relative_to(self.place))
            for checkpoint in newest_checkpoints
        )

    def _fetch(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if (self.place / "run.yaml").exists() or any(self.place.glob(f".run.yaml{copied.SPARE}")):
            try:
                copied.fetch(self.place, self.work)
            except OSError as error:
                reason = f"the run cannot be brought to {self.work}: {error}"
                raise UserError(
                    Problem("run.dir", reason, "free some space, or look at the place", str(self.place))
                ) from None
            self._known = {
                name: version for name, version in self._versions() if not copied.spare_of(self.place / name).exists()
            }

    def _versions(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for name in copied.names_in(self.work):
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                yield name, _version(self.work / name)

    @property
    def why(self) -> str:
        """What the place refuses."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())

    def require_one_machine(self, launcher: str) -> None:
        """Raises UserError: ranks elsewhere would not see the working folder. launcher: what starts them there."""
        reason = (
            f"what a run does is refused there ({self.why}), so it would work on this machine's disk and be copied; "
        )
        reason += f"{launcher} has ranks on other machines, which do not see that disk"
        fix = "give a run.dir that all nodes share and that takes it (NFS, Lustre), or train on one machine"
        raise UserError(Problem("run.dir", reason, fix, str(self.place)))

    # -- while the run goes on ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Show from now on that this launch lives, and copy: in a thread each, since a copy may take longer than others wait for
        a sign of life."""
        works = (
            (self._released, self._show_life, "lease of the run"),
            (self._last_copy, self._copy_if_due, "copies of the run"),
        )
        self._threads = [
            threading.Thread(target=self._repeat, args=(until, work), name=name, daemon=True)
            for until, work, name in works
        ]
        for thread in self._threads:
            thread.start()

    def copy_rows(self) -> None:
        """Bring rows from memory to the place now: `data.train` names them there. Raises OSError."""
        for file in (self.work / "data").glob("*"):
            copied.copy(file, self.place / "data" / file.name)

    def _repeat(self, until: threading.Event, work: Callable[[], None]) -> None:
        last = ""
        while not until.wait(POLL_SECONDS):
            try:
                work()
                last = ""
            except Exception as error:  # the place may come back, and everything is here meanwhile
                if str(error) != last:
                    self._message(f"dstune: {self.place} cannot be written now, tried again: {error}")
                last = str(error)

    def _show_life(self) -> None:
        self._pass_on_requests()
        if time.monotonic() - self._last_beat > BEAT_SECONDS:
            self._renew_lease()

    def _copy_if_due(self) -> None:
        due = time.monotonic() - self._copied_at > FILES_SECONDS or self._new_checkpoints()
        if due and (self.work / BEGUN).exists():
            self._copy()

    def _pass_on_requests(self) -> None:
        for name in (STOP_FILE, SAVE_FILE):
            if (self.place / name).exists():
                (self.place / name).unlink()
                files.write(self.work / name, "")

    def _renew_lease(self) -> None:
        lease = read_object(self.place / records.LEASE)
        if lease is not None and lease.get("id") not in (self._id, None):
            self._message(
                f"dstune: {lease.get('host')} has taken the run over: it is stopped here, and not copied any more"
            )
            self._lost = True
            self._last_copy.set()
            self._released.set()
            files.write(self.work / STOP_FILE, "")
            return
        self._write_lease()

    def _write_lease(self) -> None:
        """Raises UserError where nothing can be written."""
        self._beat += 1
        lease: dict[str, Any] = {
            "id": self._id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
        }
        lease["beat"] = self._beat
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            with copied.open_truncated(self.place / records.LEASE) as stream:
                stream.write(json.dumps(lease).encode())
        except OSError as error:
            if self._beat > 1:
                raise
            reason = f"cannot be created or written: {error.strerror}"
            raise UserError(Problem("run.dir", reason, "give a folder of yours", str(self.place))) from None
        self._last_beat = time.monotonic()

    def _new_checkpoints(self) -> list[Path]:
        """Return checkpoints here, by all stages, that are not at the place as they are."""
        whole = [info.path for run in copied.runs_in(self.work) for info in store.listing(run) if info.committed]
        return [path for path in whole if _marker(path) not in (b"", self._markers.get(path))]

    def _copy(self) -> None:
        """Bring the place up to date. Raises OSError.

        Files come first, since a checkpoint stands on the metrics before it; results come last, since a run that says it was
        completed is not continued: cut short before its last checkpoint was there, nobody would notice the loss.
        """
        if self._lost:
            return
        # A result written after this may refer to a checkpoint that is not copied below.
        version_by_name = dict(self._versions())
        changed = [name for name, version in version_by_name.items() if self._known.get(name) != version]
        results = sorted((name for name in changed if Path(name).name == RESULT), key=lambda name: name.count("/"))
        # Before `run.yaml` asks for more steps than the result that is there counts.
        for name in (*results, *(self._known.keys() - version_by_name.keys())):
            copied.remove(self.place / name)
            self._known.pop(name, None)
        self._copy_files([name for name in changed if name not in results], version_by_name)
        self._copy_checkpoints()
        self._copy_files(results[::-1], version_by_name)  # the whole run's after those of its stages
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
                continue  # it was pruned meanwhile: there is a newer one
            self._markers[checkpoint] = marker
            run = self.place / checkpoint.parents[1].relative_to(self.work)
            store.prune(run, self.keep)

    def _copy_files(self, changed: list[str], version_by_name: dict[str, tuple[int, int]]) -> None:
        """Copy files. version_by_name: the files of the working folder, with their versions, as `changed` was made from."""
        exports = {Path(name).parent for name in changed if Path(name).parent.name == "export"}
        for folder in exports:  # without its description an export is none
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
            except FileNotFoundError:  # gone meanwhile
                if (self.work / name).exists():
                    raise
                continue
            self._known[name] = version_by_name[name]

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
        """Copy what is left, and give the place free. Returns False where it could not be copied: it stays here then."""
        self._last_copy.set()
        for thread in self._threads[1:]:
            thread.join()
        try:
            return self._close()
        finally:
            self._end_signs_of_life()
            os.close(self._lock)

    def _end_signs_of_life(self) -> None:
        self._released.set()
        for thread in self._threads:
            thread.join()

    def _close(self) -> bool:
        if self._lost:
            return False
        if not self.work.is_dir():  # refused: nothing was left here, and nothing is left there
            self._leave_no_trace()
            return True
        try:
            if self._known or (self.work / "run.yaml").exists():
                self._copy()
            self._end_signs_of_life()
            if bool(self._lost):  # meanwhile, by the thread that renews the lease
                return False
            (self.place / records.LEASE).unlink(missing_ok=True)
        except OSError as error:
            again = f"`dstune train {self.place}` on {socket.gethostname()} tries again"
            self._message(f"dstune: the run is in {self.work}, and cannot be copied to {self.place}: {error}; {again}")
            return False
        shutil.rmtree(self.work, ignore_errors=True)
        for ending in ("json", "text"):
            self.work.with_name(f"{self.work.name}.{ending}").unlink(missing_ok=True)
        return True

    def _leave_no_trace(self) -> None:
        self._end_signs_of_life()
        self._own.unlink(missing_ok=True)
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
    """Return the mirror of a run whose directory cannot be worked in; None where it can.

    Raises:
        UserError: somebody works on the run, or it cannot be brought here.
    """
    refused = refused_operations(place)
    if not refused:
        return None
    refuse_links(place)
    mirror = Mirror(place, refused, message)
    message(
        f"dstune: {place} refuses what a run does ({mirror.why}): it works in {mirror.work}, and is copied after each save"
    )
    return mirror


def _machine() -> str:
    """Return an identity of the boot and the container: process ids are comparable only where it is the same."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # no other: those who ask have to watch


def _marker(checkpoint: Path) -> bytes:
    """Return what tells one save of a step from another; empty where the checkpoint is gone."""
    try:
        return (checkpoint / store.COMMITTED).read_bytes()
    except FileNotFoundError:
        return b""


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
