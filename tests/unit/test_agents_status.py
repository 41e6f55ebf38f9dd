"""What `dstune status` and `cancel` know of nodes."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, replace

import pytest

from dstune.core.paths import STOP_FILE
from dstune.launch import manage, records
from dstune.launch.agents.status import GROUP_FILE, GroupStatus, read_group

STATUS = GroupStatus(3, "node1", ["node1", "node2"], ["node3"], [], 2, False)


def write(run_dir, status) -> None:
    (run_dir / "launch").mkdir(exist_ok=True)
    records.write_json(run_dir / GROUP_FILE, status)


@pytest.mark.parametrize(
    "change",
    [
        {"leader": 3},
        {"training": "node1"},
        {"training": [1]},
        {"lost": ["\x1b[2Jnode"]},
        {"restarts": "2"},
        {"is_over": 1},
        {"more": 1},
    ],
)
def test_a_file_that_no_leader_wrote_is_none(tmp_path, change):
    write(tmp_path, asdict(STATUS))
    assert read_group(tmp_path) == STATUS
    write(tmp_path, asdict(STATUS) | change)
    assert read_group(tmp_path) is None


@pytest.fixture
def run_elsewhere(tmp_path, monkeypatch):
    """A run that a command on another machine started."""
    (tmp_path / "run.yaml").write_text("")
    monkeypatch.setattr(records.socket, "gethostname", lambda: "head")
    records.begin(tmp_path, "id", 2)
    monkeypatch.setattr(records.socket, "gethostname", lambda: "node7")
    write(tmp_path, asdict(STATUS))
    return tmp_path


def test_status_shows_the_nodes(run_elsewhere, capsys):
    manage.status([str(run_elsewhere), "--json"])
    assert json.loads(capsys.readouterr().out)["nodes"] == asdict(STATUS)
    manage.status([str(run_elsewhere)])
    assert str(STATUS) in capsys.readouterr().out


def test_cancel_reaches_nodes_from_any_machine(run_elsewhere, monkeypatch):
    monkeypatch.setattr(manage, "JOB_SECONDS", 0.01)

    def obey() -> None:
        while not (run_elsewhere / STOP_FILE).exists():
            time.sleep(0.01)
        records.write_result(run_elsewhere, "preempted", "asked", 2)
        write(run_elsewhere, asdict(replace(STATUS, is_over=True)))

    nodes = threading.Thread(target=obey)
    nodes.start()
    assert manage.cancel([str(run_elsewhere)]) == 0
    nodes.join()
