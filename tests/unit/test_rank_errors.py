"""An error of several ranks reaches the one terminal of an outer launch once."""

from __future__ import annotations

import threading
import time

import pytest

from dstune.core.errors import Problem, UserError, from_json
from dstune.core.rank_env import RankEnv
from dstune.core.rank_errors import error_file, leave_error, report_once, report_to_launcher

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


def test_a_rank_of_dstune_leaves_its_error_to_the_launcher(tmp_path, capsys):
    report_to_launcher(tmp_path, 1, OWN)
    assert str(from_json(error_file(tmp_path, 1).read_text())) == str(OWN)
    assert capsys.readouterr().err == f"dstune: {OWN}\n"
    leave_error(tmp_path, 1, ALIKE)
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["rank-1.error"]
