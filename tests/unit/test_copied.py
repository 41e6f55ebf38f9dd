"""Copies of runs to places that can only create, write and remove files: cut short anywhere, what was there stays usable."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest
import xxhash
from support.command import wait_until

from dstune.checkpoint import copied, store
from dstune.core import limited_places
from dstune.core.errors import UserError
from dstune.core.paths import BEGUN
from dstune.launch import mirror, records


class Cut(BaseException):
    """The process ends here."""


@pytest.fixture
def cut_at(monkeypatch):
    """Ends the copying at the n-th change below a folder, which is half done."""

    def arm(root: Path, number: int) -> None:
        left = [number]
        opened, unlinked = Path.open, os.unlink

        def counted(path) -> bool:
            if not Path(path).is_relative_to(root):
                return False
            left[0] -= 1
            return left[0] == 0

        def open_(self, mode="r", *arguments, **keywords):
            stream = opened(self, mode, *arguments, **keywords)
            if mode == "wb" and counted(self):
                stream.write(b"half")
                stream.flush()
                raise Cut
            return stream

        def unlink(path, *arguments, **keywords):
            unlinked(path, *arguments, **keywords)
            if "dir_fd" not in keywords and counted(path):
                raise Cut

        monkeypatch.setattr(Path, "open", open_)
        monkeypatch.setattr(os, "unlink", unlink)

    return arm


def save(run: Path, step: int, content: str = "12345") -> Path:
    folder = store.folder(run) / f"{store.tag(step)}.incomplete"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    (folder / "more").write_text("more")
    return store.commit(folder, {"step": step, "best": None, "train": {}, "format": 2})


def readable(place: Path, tmp_path: Path) -> Path:
    """The run as another machine gets it."""
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    (tmp_path / "elsewhere").mkdir()
    copied.fetch(place, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("again", [False, True], ids=["another step", "the same step again"])
def test_a_copy_of_a_checkpoint_cut_short_anywhere_leaves_one_to_go_on_from(tmp_path, cut_at, monkeypatch, again):
    cuts = 0
    for number in range(1, 60):
        work, place = tmp_path / "work", tmp_path / "place"
        for folder in (work, place):
            shutil.rmtree(folder, ignore_errors=True)
        copied.copy_checkpoint(save(work, 10, "before"), place / "checkpoints" / store.tag(10))
        new = save(work, 10 if again else 20, "afterwards")
        cut_at(place, number)
        try:
            copied.copy_checkpoint(new, place / "checkpoints" / new.name)
            ended = False
        except Cut:
            ended = True
        monkeypatch.undo()
        found = store.newest(readable(place, tmp_path))
        assert found is not None, number
        assert (found / "weights").read_text() in ("before", "afterwards")
        assert not store.damaged_files(found)
        # Whatever was left is no obstacle to the next copy.
        copied.copy_checkpoint(new, place / "checkpoints" / new.name)
        assert (store.newest(place) / "weights").read_text() == "afterwards"
        assert not list(place.rglob("*.incomplete"))
        if not ended:
            break
        cuts += 1
    assert cuts >= 4


def test_a_file_cut_short_is_read_back_as_it_was_or_as_it_shall_be(tmp_path, cut_at, monkeypatch):
    source, place = tmp_path / "source", tmp_path / "place"
    seen = set()
    for number in range(1, 6):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        source.write_text("before" * 1000)
        copied.copy_twice(source, place / "run.yaml")
        source.write_text("afterwards" * 1000)
        cut_at(place, number)
        with contextlib.suppress(Cut):
            copied.copy_twice(source, place / "run.yaml")
        monkeypatch.undo()
        content = (readable(place, tmp_path) / "run.yaml").read_text()
        assert content in ("before" * 1000, "afterwards" * 1000)
        seen.add(content[:6])
    assert seen == {"before", "afterw"}


def test_what_a_place_cannot_do_is_found_by_trying(tmp_path, monkeypatch):
    assert limited_places.refused_operations(tmp_path / "new" / "run") == {}

    def refuse(*arguments, **keywords):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("dstune.core.limited_places.fcntl.flock", refuse)
    assert limited_places.refused_operations(tmp_path) == {"lock": "Operation not supported"}
    monkeypatch.setattr("dstune.core.limited_places.fcntl.flock", lambda *_: None)
    assert limited_places.refused_operations(tmp_path) == {"lock": "a lock keeps nobody out"}
    assert not list(tmp_path.iterdir())


@pytest.fixture
def without_locks(monkeypatch, tmp_path):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "ALIVE_SECONDS", 0.3)
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.1)
    found = mirror.refused_operations
    limited = tmp_path / "volume"
    monkeypatch.setattr(
        mirror, "refused_operations", lambda path: {"lock": "no"} if path.is_relative_to(limited) else found(path)
    )
    return limited / "run"


def opened_mirror(place, message=lambda text: None):
    """A mirror whose working folder holds a run."""
    opened = mirror.open_mirror(place, message)
    opened.work.mkdir()
    (opened.work / "run.yaml").write_text("run: 1")
    return opened


def test_a_run_works_here_and_is_at_its_place_in_the_end(without_locks):
    place, said = without_locks, []
    first = opened_mirror(place, said.append)
    (first.work / "export").mkdir()
    (first.work / "export" / "config.json").write_text("{}")
    (first.work / "result.json").write_text(f'{{"checkpoint": "{first.work}/checkpoints/x"}}')
    save(first.work, 10)
    assert "lock: no" in said[0]
    assert first.close()
    assert store.newest(place).name == store.tag(10)
    assert (place / "result.json").read_text() == f'{{"checkpoint": "{place}/checkpoints/x"}}'
    assert (place / "export" / "config.json").exists()
    assert not first.work.exists() and not (place / records.LEASE).exists()

    again = mirror.open_mirror(place, said.append)
    assert store.newest(again.work).name == store.tag(10)
    (again.work / "result.json").unlink()
    again.keep = 1
    save(again.work, 20)
    assert again.close()
    assert [info.step for info in store.listing(place)] == [20]
    assert not (place / "result.json").exists()


def test_a_refused_start_leaves_nothing(without_locks):
    opened = mirror.open_mirror(without_locks, lambda text: None)
    assert (without_locks / records.LEASE).exists()
    assert opened.close()
    assert not without_locks.parent.exists()


def test_two_launches_never_work_on_one_run(without_locks, monkeypatch, tmp_path):
    place = without_locks
    first = mirror.open_mirror(place, lambda text: None)
    with pytest.raises(UserError, match="running here"):
        mirror.open_mirror(place, lambda text: None)
    # From another machine nothing but the lease is seen.
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache of another machine"))
    first._last_beat, beats = 0.0, []

    def beat(seconds):
        beats.append(seconds)
        first._write_lease()

    monkeypatch.setattr(mirror.time, "sleep", beat)
    with pytest.raises(UserError, match="is running here"):
        mirror.open_mirror(place, lambda text: None)
    monkeypatch.undo()
    assert first.close()


def test_a_launch_that_died_is_taken_over_and_stops_if_it_did_not(without_locks, monkeypatch, tmp_path):
    place, said = without_locks, []
    first = opened_mirror(place, said.append)
    first._copy()
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache of another machine"))
    second = mirror.open_mirror(place, said.append)
    assert (second.work / "run.yaml").read_text() == "run: 1"
    first._renew_lease()
    assert (first.work / "STOP").exists()
    (first.work / "run.yaml").write_text("run: 2")
    assert not first.close()
    assert (place / "run.yaml").read_text() == "run: 1"
    assert second.close()


@pytest.mark.parametrize("cut_short", [False, True], ids=["whole", "killed while it wrote the lease"])
def test_what_was_not_copied_when_this_machine_stopped_is_not_lost(without_locks, cut_short):
    place, said = without_locks, []
    first = opened_mirror(place, said.append)
    save(first.work, 10)
    first._copy()
    save(first.work, 20)
    os.close(first._lock)  # killed
    if cut_short:
        (place / records.LEASE).write_text("")
    again = mirror.open_mirror(place, said.append)
    assert "continuing in" in said[-2]
    assert store.newest(again.work).name == store.tag(20)
    assert again.close()
    assert store.newest(place).name == store.tag(20)


def test_a_lease_that_was_cut_short_hides_no_run_that_went_on_elsewhere(without_locks):
    first = opened_mirror(without_locks)
    save(first.work, 10)
    first._copy()
    os.close(first._lock)  # killed
    save(without_locks, 20)
    (without_locks / records.LEASE).write_text("")
    again = mirror.open_mirror(without_locks, lambda text: None)
    assert store.newest(again.work).name == store.tag(20)
    assert again.close()


def test_a_copy_that_takes_long_is_no_silence(without_locks, monkeypatch):
    """Others take a run over whose lease does not grow; a large checkpoint takes minutes to copy."""
    place, seen = without_locks, set()
    monkeypatch.setattr(mirror, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.02)
    opened = opened_mirror(place)
    (opened.work / BEGUN).write_text("{}")
    save(opened.work, 10)
    copy = copied.copy_checkpoint

    def slowly(source: Path, target: Path) -> None:
        for _ in range(30):
            time.sleep(0.02)
            seen.add((place / records.LEASE).read_text())
        copy(source, target)

    monkeypatch.setattr(copied, "copy_checkpoint", slowly)
    opened.start()
    assert opened.close()
    assert len(seen) > 2
    assert store.newest(place).name == store.tag(10)
    time.sleep(0.1)
    assert not (place / records.LEASE).exists()


def test_errors_while_copying_are_reported_and_retried(without_locks, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.02)
    opened = mirror.open_mirror(without_locks, said.append)
    opened.work.mkdir()
    (opened.work / BEGUN).write_text("{}")
    left = [3]

    def fails(run: Path) -> list[Path]:
        left[0] -= 1
        if left[0] >= 0:
            raise ValueError("a marker that is no JSON")
        return []

    monkeypatch.setattr(copied, "runs_in", fails)
    opened._copied_at = time.monotonic()
    opened.start()
    wait_until(lambda: left[0] < -1, timeout=5)
    assert len([line for line in said if "a marker that is no JSON" in line]) == 1
    assert opened.close()


def test_killed_while_it_takes_the_run_over_this_machine_loses_nothing(without_locks, monkeypatch):
    first = opened_mirror(without_locks)
    (without_locks / "result.json").write_text("{}")  # of the launch before
    save(first.work, 10)
    os.close(first._lock)  # killed before anything was copied

    write = mirror.Mirror._write_lease

    def killed_before(self: mirror.Mirror) -> None:
        raise Cut

    def killed_behind(self: mirror.Mirror) -> None:
        write(self)
        raise Cut

    for killed in (killed_before, killed_behind, killed_before):
        with monkeypatch.context() as during:
            during.setattr(mirror.Mirror, "_write_lease", killed)
            with pytest.raises(Cut):
                mirror.open_mirror(without_locks, lambda text: None)
    again = mirror.open_mirror(without_locks, lambda text: None)
    assert store.newest(again.work).name == store.tag(10)
    assert again.close()
    assert not (without_locks / "result.json").exists()


def test_answers_and_other_files_where_nothing_is_renamed_or_appended(tmp_path, monkeypatch):
    from dstune.core import files
    from dstune.inference import answers_file

    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    volume = tmp_path / "volume"
    volume.mkdir()
    renamed = os.replace

    def replace(source, target):
        if Path(target).is_relative_to(volume):
            raise OSError(95, "Operation not supported")
        renamed(source, target)

    monkeypatch.setattr(os, "replace", replace)
    files.write(volume / "report.html", "a page")
    files.write(volume / "report.html", "b")
    assert (volume / "report.html").read_text() == "b"
    assert [file.name for file in volume.iterdir()] == ["report.html"]
    (volume / "report.html").unlink()

    def begin(**more):
        return answers_file.answers_file(volume / "out.jsonl", {"model": "m"}, 1, force=False, **more)

    begun = begin()
    begun.append([{"a": 1}])
    assert begin().done == 1, "it goes on"
    again = begin()
    again.append([{"a": 2}])
    again.finish()
    assert (volume / "out.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
    assert [file.name for file in volume.iterdir()] == ["out.jsonl"]
    with pytest.raises(UserError, match="exists already"):
        begin()


def test_a_file_whose_copy_was_cut_short_is_whole_at_the_place_after_the_next_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    place, source = tmp_path / "run", tmp_path / "source"
    place.mkdir()
    source.write_text("steps: 1\n")
    copied.copy(source, copied.spare_of(place / "run.yaml"), digest=xxhash.xxh3_64())
    (place / "run.yaml").write_text("ste")
    assert mirror.Mirror(place, {"append": "refused"}, print).close()
    assert (place / "run.yaml").read_text() == "steps: 1\n"
    assert not copied.spare_of(place / "run.yaml").exists()
