"""The lease of a run: one holder at a time, and ranks of an earlier one save no more."""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import replace

import pytest

from dstune.core.errors import TrainingFailed
from dstune.core.lease import KEPT_FILES, LEASE, Lease, LeaseRecord, refuse_if_superseded
from dstune.launch.agents.leader import LeaseKeeper


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "launch").mkdir()
    return tmp_path


RECORD = LeaseRecord("holder", "node1", "10.0.0.1", 4000, "mark", "job")


def test_a_generation_has_one_holder(run_dir):
    lease = Lease(run_dir)
    assert lease.newest() == 0
    takers = [replace(RECORD, holder=str(number)) for number in range(8)]
    start, taken = threading.Barrier(len(takers)), []

    def take(record: LeaseRecord) -> None:
        start.wait()
        if lease.take(0, record) is not None:
            taken.append(record)

    threads = [threading.Thread(target=take, args=[record]) for record in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert lease.read(1) == taken[0]


def test_who_is_late_does_not_take_an_old_generation(run_dir):
    lease = Lease(run_dir)
    generation = 0
    for _ in range(KEPT_FILES + 5):
        taken = lease.take(generation, RECORD)
        assert taken == generation + 1
        generation = taken
    assert len(list(lease.folder.iterdir())) == KEPT_FILES
    assert lease.take(2, RECORD) is None  # generation 3 has been removed by now, and is over all the same
    assert lease.take(generation - 1, RECORD) is None


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"holder": 3}', '{"holder": "h", "node": "n"}'])
def test_a_record_that_is_being_written_or_damaged_is_none(run_dir, content):
    lease = Lease(run_dir)
    lease.folder.mkdir()
    lease.file(1).write_text(content)
    assert (lease.newest(), lease.read(1)) == (1, None)


def test_a_rank_of_an_earlier_generation_is_refused(run_dir):
    lease = Lease(run_dir)
    lease.take(0, RECORD)
    variables = {LEASE: str(lease.file(1))}
    refuse_if_superseded(variables)
    refuse_if_superseded({})
    lease.take(1, RECORD)
    with pytest.raises(TrainingFailed):
        refuse_if_superseded(variables)
    refuse_if_superseded({LEASE: str(lease.file(2))})


def test_a_full_disk_does_not_end_a_lease(run_dir, monkeypatch):
    lease = Lease(run_dir)
    generation = lease.take(0, RECORD)
    keeper = LeaseKeeper(lease, generation, RECORD)
    states = {lease.renewed(generation)}

    def refuse(error: int) -> None:
        def write(*arguments: object, **named: object) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr("dstune.core.lease.files.write", write)

    refuse(errno.ENOSPC)
    for _ in range(3):
        before = keeper.renewed
        time.sleep(0.02)
        keeper.renew()
        assert keeper.renewed > before
        states.add(lease.renewed(generation))
    assert len(states) == 4
    assert lease.read(generation) == RECORD
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        keeper.renew()
