"""Where ranks meet: kept, told by rank 0 through the run directory, or derived from the job; and over which interface."""

from __future__ import annotations

import json
import socket
import threading

import psutil
import pytest

from dstune.core import rendezvous
from dstune.core.errors import UserError
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
        rendezvous._found(tmp_path / "launch" / "meeting.json", "x", seconds=0.2, pause=lambda _: None)


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
        rendezvous.over_mpi(RankEnv(0, 2, 0, 1, "openmpi"), {})
