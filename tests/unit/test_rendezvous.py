"""Where ranks meet: kept, told by rank 0 through the run directory, or derived from the job; and over which interface."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from dstune.core import rendezvous
from dstune.core.errors import TrainingFailed, UserError
from dstune.core.rank_env import RankEnv

JOB = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


def of_slurm(rank: int, nodes: int = 2) -> RankEnv:
    return RankEnv(rank, 2, 0 if nodes == 2 else rank, 1 if nodes == 2 else 2, "slurm")


def test_what_the_launcher_set_is_kept(tmp_path):
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4"}
    rendezvous.meet(of_slurm(1), tmp_path, variables)
    rendezvous.set_address(of_slurm(1), variables)
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("127.0.0.1", "4")


def test_ranks_find_rank_0_of_their_own_start(tmp_path):
    """Not the one of the start before, whose file is still there."""
    before = JOB | {"SLURM_RESTART_COUNT": "0"}
    rendezvous.meet(of_slurm(0), tmp_path, dict(before))
    old = json.loads((tmp_path / "launch" / "meeting.json").read_text())
    first, second = JOB | {"SLURM_RESTART_COUNT": "1"}, JOB | {"SLURM_RESTART_COUNT": "1"}
    waiting = threading.Thread(target=rendezvous.meet, args=(of_slurm(1), tmp_path, second))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    rendezvous.meet(of_slurm(0), tmp_path, first)
    waiting.join(5)
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == (second["MASTER_ADDR"], second["MASTER_PORT"])
    with socket.socket() as server:
        server.bind(("", int(first["MASTER_PORT"])))
    assert old["identity"] == "7 0 0"


@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_of_another_launcher_meet_in_private(nodes, tmp_path, monkeypatch):
    """In a folder of this user on one machine, at a random port on several; never where the job's number leads."""
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    first, second = dict(JOB), dict(JOB)
    waiting = threading.Thread(target=rendezvous.set_address, args=(of_slurm(1, nodes), second))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    rendezvous.set_address(of_slurm(0, nodes), first)
    left = [*tmp_path.glob(".dstune-*"), *(tmp_path / "cache").iterdir()]
    assert [oct(file.stat().st_mode & 0o777) for file in left] == ["0o600"] * 2
    waiting.join(5)
    assert (
        first[rendezvous.GROUP_SECRET] == second[rendezvous.GROUP_SECRET] and len(first[rendezvous.GROUP_SECRET]) == 64
    )
    if nodes == 1:
        folder = Path(first[rendezvous.STORE]).parent
        assert first[rendezvous.STORE] == second[rendezvous.STORE] and oct(folder.stat().st_mode & 0o777) == "0o700"
        assert "MASTER_PORT" not in first
    else:
        assert first["MASTER_PORT"] == second["MASTER_PORT"]
        again = dict(JOB)
        rendezvous.set_address(of_slurm(0, nodes), again)
        assert again["MASTER_PORT"] != first["MASTER_PORT"]
        first = again
    rendezvous.remove_meeting_files(of_slurm(0, nodes), first)
    assert not [*tmp_path.glob(".dstune-*"), *(tmp_path / "cache").iterdir()]
    rendezvous.leave_store(of_slurm(0, nodes), first)
    if nodes == 1:
        assert not folder.exists()


def test_what_another_user_or_an_ended_launch_left_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rendezvous.set_address(of_slurm(0), dict(JOB))
    places = [*tmp_path.glob(".dstune-*"), *(tmp_path / "cache").iterdir()]
    identity = json.loads(places[0].read_text())["identity"]
    assert rendezvous._wait_for_private_meeting(places, identity, 0.2)
    for place in places:
        place.chmod(0o644)
    with pytest.raises(TrainingFailed, match="rank 0 did not say"):
        rendezvous._wait_for_private_meeting(places, identity, 0.2)
    for place in places:
        place.chmod(0o600)
        place.write_text(json.dumps(json.loads(place.read_text()) | {"pid": 2**22 + 1}))
    with pytest.raises(TrainingFailed, match="rank 0 did not say"):
        rendezvous._wait_for_private_meeting(places, identity, 0.2)


def test_starts_without_a_number_are_distinguished_by_their_launcher(tmp_path):
    """MPICH's mpiexec gives its ranks none: two of them on one machine must not meet each other's ranks."""
    rank = (
        "import os; from dstune.core import rendezvous as r; from dstune.core.rank_env import RankEnv;"
        "print(r._identity(RankEnv(int(os.environ['PMI_RANK']), 2, 0, 2, 'pmi'), os.environ))"
    )
    # The second rank is started by a script.
    mpiexec = (
        "import os, subprocess, sys\n"
        "for number, command in enumerate(([sys.executable, '-c', sys.argv[1]],"
        " ['sh', '-c', '\"$@\"; true', 'sh', sys.executable, '-c', sys.argv[1]])):\n"
        "    subprocess.run(command, env=os.environ | {'PMI_RANK': str(number)}, check=True)"
    )
    starts = [
        subprocess.run([sys.executable, "-c", mpiexec, rank], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        for _ in range(2)
    ]
    assert all(first and first == second for first, second, _ in starts) and starts[0] != starts[1]


def test_ranks_on_several_nodes_need_a_number_of_their_start(tmp_path):
    rank = RankEnv(0, 4, 0, 2, "pmi")
    with pytest.raises(UserError, match="DSTUNE_LAUNCH_ID"):
        rendezvous.meet(rank, tmp_path, {"PMI_ID": "0"})
    variables = {"DSTUNE_LAUNCH_ID": "7"}
    rendezvous.meet(rank, tmp_path, variables)
    assert variables["MASTER_PORT"]


def test_two_runs_of_one_rank_do_not_share_a_port(tmp_path):
    ports = set()
    for _ in range(8):
        variables: dict[str, str] = {}
        rendezvous.meet(RankEnv(0, 1, 0, 1, "alone"), tmp_path, variables)
        ports.add(variables["MASTER_PORT"])
    assert len(ports) > 1


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    (tmp_path / "launch").mkdir()
    with pytest.raises(UserError, match="does every node see this folder"):
        rendezvous._wait_for_address(tmp_path / "launch" / "meeting.json", "x", seconds=0.2, pause=lambda _: None)


def test_the_interface_is_that_which_leads_to_rank_0(monkeypatch):
    class Entry:
        family = socket.AF_INET

        def __init__(self, address: str):
            self.address = address

    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [Entry("127.0.0.1")], "eth7": [Entry("127.0.0.5")]})
    monkeypatch.setattr(socket.socket, "getsockname", lambda _: ("127.0.0.5", 1))
    several, one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4"}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4"}
    rendezvous.choose_interface(of_slurm(0), several)
    assert several["GLOO_SOCKET_IFNAME"] == "eth7"
    rendezvous.choose_interface(of_slurm(0, nodes=1), one)
    assert "GLOO_SOCKET_IFNAME" not in one
    chosen = several | {"GLOO_SOCKET_IFNAME": "ib0"}
    rendezvous.choose_interface(of_slurm(0), chosen)
    assert chosen["GLOO_SOCKET_IFNAME"] == "ib0"
    assert rendezvous.own_address("eth7") == "127.0.0.5"
    with pytest.raises(UserError, match=r"launch.interface=ib0[\s\S]*one of lo, eth7"):
        rendezvous.own_address("ib0")


def test_ranks_of_another_mpi_than_mpi4pys_are_refused(monkeypatch):
    """Each of them is alone to its own MPI, which says nothing about it."""
    mpi = pytest.importorskip("mpi4py.MPI", exc_type=ImportError)

    class Alone:
        @staticmethod
        def Get_size() -> int:
            return 1

    monkeypatch.setattr(mpi, "COMM_WORLD", Alone())
    with pytest.raises(UserError, match=r"started 2 ranks, but to mpi4py .* each is alone"):
        rendezvous.set_address_over_mpi(RankEnv(0, 2, 0, 1, "openmpi"), {})
