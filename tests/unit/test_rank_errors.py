"""An error of several ranks reaches the one terminal of an outer launch once."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from contextlib import suppress

import pytest

from dstune.core import files
from dstune.core.errors import EXIT_FAILED, Problem, UserError, from_json
from dstune.core.rank_env import STORE, RankEnv
from dstune.core.rank_errors import error_file, leave_error, report_once, report_to_launcher
from dstune.launch import attempt
from dstune.launch.attempt import read_errors
from dstune.rank.process import guarded

ALIKE = UserError(Problem("data.train", "no rows"))
OWN = UserError(Problem("launch", "no GPU here"))


def rank(number: int, size: int = 3) -> RankEnv:
    return RankEnv(number, size, number, size, "environment")


def tell(run_dir, errors, patience=5.0):
    """All ranks at once, each with its error (None: this rank found nothing); the seconds that each took."""
    took = {}

    def one(number, error):
        started = time.monotonic()
        report_once(run_dir, rank(number, len(errors)), error, patience)
        took[number] = time.monotonic() - started

    # Rank 0 last, as a slow one would be.
    threads = [
        threading.Thread(target=one, args=(number, error)) for number, error in enumerate(errors) if error is not None
    ]
    for thread in reversed(threads):
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return took


def test_what_all_ranks_found_is_reported_by_rank_0(tmp_path, capsys):
    took = tell(tmp_path, [ALIKE, ALIKE, ALIKE])
    assert capsys.readouterr().err == f"dstune: {ALIKE}\n"
    assert max(took.values()) < 3  # nobody waited in vain
    assert isinstance(from_json(error_file(tmp_path, 2).read_text()), UserError)


def test_a_rank_with_an_error_of_its_own_reports_it(tmp_path, capsys):
    tell(tmp_path, [ALIKE, OWN, ALIKE])
    assert sorted(capsys.readouterr().err.splitlines()) == sorted([f"dstune: {ALIKE}", f"dstune: rank 1: {OWN}"])


def test_a_rank_that_failed_alone_reports_after_a_while(tmp_path, capsys):
    tell(tmp_path, [None, OWN, None], patience=0.2)
    assert capsys.readouterr().err == f"dstune: rank 1: {OWN}\n"


@pytest.mark.parametrize("size", [1, 2])
def test_rank_0_waits_for_the_others_only(tmp_path, capsys, size):
    took = tell(tmp_path, [ALIKE] + [None] * (size - 1), patience=0.2)
    assert capsys.readouterr().err == f"dstune: {ALIKE}\n"
    assert took[0] < 1


def test_on_a_full_disk_an_error_goes_to_the_folder_of_the_launch(tmp_path, monkeypatch, capsys):
    run_dir, launch_folder = tmp_path / "run", tmp_path / "launch"
    launch_folder.mkdir()
    written = files.write

    def refuse(path, *arguments, **settings):
        if path.is_relative_to(run_dir):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(path, *arguments, **settings)

    monkeypatch.setattr(files, "write", refuse)
    leave_error(run_dir, 1, OWN)  # another program's launch has no such folder: the rank ends all the same
    assert not read_errors(run_dir, 2, launch_folder)
    monkeypatch.setenv(STORE, str(launch_folder / "store"))
    leave_error(run_dir, 1, OWN)
    assert {rank: str(error) for rank, error in read_errors(run_dir, 2, launch_folder).items()} == {1: str(OWN)}


def test_only_files_of_errors_are_opened_and_ranks_come_in_order(tmp_path, monkeypatch):
    for number in (400, 3, 511, 512):
        leave_error(tmp_path, number, OWN)
    for name in ("rank-03.error", "rank-4.error.part", "rank-5.log"):
        (tmp_path / "logs" / name).touch()
    opened, read = [], attempt.read_file
    monkeypatch.setattr(attempt, "read_file", lambda file: opened.append(file.name) or read(file))
    assert list(attempt.read_errors(tmp_path, 512)) == [3, 400, 511]  # rank 512 is of an earlier, larger launch
    assert sorted(opened) == ["rank-3.error", "rank-400.error", "rank-511.error"]


def test_a_rank_that_a_full_disk_ends_says_so(monkeypatch, capsys):
    """Its traceback goes to a log on that disk."""
    reported = []

    def work():
        raise RuntimeError("Error writing file: No space left on device (os error 28)")  # as libraries in Rust say it

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert guarded(work, reported.append) == EXIT_FAILED
        with suppress(OSError):
            full.close()
    assert [str(error) for error in reported] == [
        "a full disk refused a write: Error writing file: No space left on device (os error 28)"
    ]


def test_a_rank_of_dstune_leaves_its_error_to_the_launcher(tmp_path, capsys):
    report_to_launcher(tmp_path, 1, OWN)
    assert str(from_json(error_file(tmp_path, 1).read_text())) == str(OWN)
    assert capsys.readouterr().err == f"dstune: {OWN}\n"
    leave_error(tmp_path, 1, ALIKE)
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["rank-1.error"]
