"""A forked rank is what a started one is, and whatever is wrong with the fork server, the rank starts cold."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.command import ROOT, wait_until
from support.forks import Asking, asking_fixture, is_gone  # noqa: F401 (a fixture)

from dstune.core.rank_env import FORK_SERVER
from dstune.launch.local import fork_server, forking, warm
from dstune.launch.local.warm import import_environment


def test_a_fork_has_what_a_started_rank_has_and_nothing_of_an_earlier_one(asking, tmp_path) -> None:
    rank = asking()
    first, own, code = rank.ask(MINE_TOKEN="secret-of-another", RANK="1", TZ_OF_ONE_RUN_TOKEN="x")
    assert code == 7 and first.pop("loaded before") and first["leads its session"]
    cores, mask = os.sched_getaffinity(0), os.umask(0o027)
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held, where = os.open(os.devnull, os.O_RDONLY), os.getcwd()
    os.set_inheritable(held, True)
    try:
        os.chdir(tmp_path)
        os.sched_setaffinity(0, [min(cores)])
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
        forked, forked_own, code = rank.ask("one", "word")
        started, started_own, cold_code = rank.start_cold("one", "word")
    finally:
        os.chdir(where)
        os.close(held)
        os.sched_setaffinity(0, cores)
        os.umask(mask)
        signal.signal(signal.SIGUSR2, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (forked.pop("loaded before"), started.pop("loaded before")) == (True, False)
    assert forked == started and code == cold_code == 7
    assert forked != first and "TZ_OF_ONE_RUN_TOKEN" not in forked["variables"]
    # What processes draw for themselves.
    assert len({own["random"], forked_own["random"], started_own["random"]}) == 3
    assert len({own["key"], forked_own["key"]}) == len({own["drawn"], forked_own["drawn"]}) == 2
    assert rank.messages == []


def test_an_exception_is_in_the_log_and_the_exit_code(asking, tmp_path) -> None:
    assert asking().ask("raise")[2] == 1
    assert "RuntimeError: as asked" in (tmp_path / "log").read_text()


def test_a_rank_ends_with_its_launcher_and_a_server_with_its_owner(tmp_path) -> None:
    """All of them, when the launcher is killed in a moment in which it cannot do anything about it."""
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom dstune.launch.local import warm\n"
        "from support.forks import Asking\nwarm.SERVER = 'support.light_fork_server'\n"
        "with warm.offer() as variables:\n"
        "    rank = Asking(Path(variables[warm.FORK_SERVER]), Path(sys.argv[1]))\n"
        "    process = rank.fork('sleep')\n"
        "    print(process.pid, process.stdout.readline()[:0], rank.process.pid, flush=True)\n    time.sleep(60)\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", code, str(tmp_path)]
    launcher = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    pid, *_, server = launcher.stdout.readline().split()
    rank = psutil.Process(int(pid))
    family = [rank, rank.parent(), psutil.Process(int(server))]
    assert not any(map(is_gone, family))
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: all(map(is_gone, family)), timeout=10)


def test_a_server_ends_with_its_owner_also_if_another_process_has_started_it(tmp_path) -> None:
    """As a sweep's, which its first trial starts."""
    of_trial = (
        "import os, sys, time\nfrom pathlib import Path\nfrom dstune.launch.local import warm\n"
        "from support.forks import Asking\nwarm.SERVER = 'support.light_fork_server'\n"
        "rank = Asking(Path(sys.argv[1]), Path(sys.argv[2]))\nassert rank.ask()[2] == 7\nprint(rank.process.pid)\n"
    )
    of_owner = (
        "import subprocess, sys, time\nfrom dstune.launch.local import warm\n"
        "with warm.offer() as variables:\n"
        "    command = [sys.executable, '-c', sys.argv[1], variables[warm.FORK_SERVER], sys.argv[2]]\n"
        "    print(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout, flush=True)\n"
        "    sys.stdin.readline()\nsys.stdin.readline()\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", of_owner, of_trial, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for end in (subprocess.Popen.kill, lambda owner: print(file=owner.stdin, flush=True)):  # dies; offers it no longer
        with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, text=True, **pipes) as owner:
            server = psutil.Process(int(owner.stdout.readline()))
            assert not is_gone(server)
            end(owner)
            wait_until(lambda server=server: is_gone(server), timeout=10)


def test_a_keeper_that_is_killed_takes_its_rank_along(asking) -> None:
    process = asking().fork("sleep", "careless")  # it does not look after its parent itself
    rank = psutil.Process(process.pid)
    rank.parent().kill()
    wait_until(lambda: process.poll() is not None, timeout=10)
    assert process.returncode == -signal.SIGKILL and is_gone(rank)


# ---- what may be wrong with the server ----


def test_a_killed_server_costs_no_running_rank_and_the_next_one_starts_cold(asking) -> None:
    rank = asking()
    process = rank.fork("sleep")
    server = rank.process
    server.kill()
    rank.server._server.wait()
    assert rank.declines() and process.poll() is None
    assert rank.ask()[2] == 7  # a new server
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: process.poll() is not None)
    assert process.returncode == -signal.SIGTERM


def test_a_server_that_is_killed_while_it_imports(asking, monkeypatch) -> None:
    rank = asking()
    monkeypatch.setattr(warm, "SERVER", "support.light_fork_server_that_is_not_there")
    assert rank.declines()
    monkeypatch.setattr(warm, "SERVER", "support.light_fork_server")
    assert rank.declines()  # who finds it gone starts cold too, and makes room for another
    assert rank.ask()[2] == 7


def test_an_import_that_fails_is_named(asking) -> None:
    assert "a library is missing" in asking("support.import_that_fails").declines()


def test_a_source_that_changed_ends_the_server(asking, tmp_path) -> None:
    (tmp_path / "edited_module.py").write_text("VALUE = 1\n")
    rank = asking("edited_module")
    rank.env["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    os.utime(tmp_path / "edited_module.py", (time.time() - 60,) * 2)
    assert rank.ask()[2] == 7
    (tmp_path / "edited_module.py").write_text("VALUE = 2\n")
    server = rank.process
    assert "edited_module.py" in rank.declines()
    wait_until(lambda: is_gone(server))


def test_a_source_that_changes_during_the_imports(asking, tmp_path) -> None:
    (tmp_path / "late_module.py").write_text("import os\n\nos.utime(__file__)\n")
    rank = asking("late_module")
    rank.env["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    assert "late_module.py" in rank.declines()


def test_another_package_ends_the_server(asking, tmp_path) -> None:
    site = tmp_path / "site-packages"
    site.mkdir()
    rank = asking()
    rank.env["PYTHONPATH"] += f"{os.pathsep}{site}"
    assert rank.ask()[2] == 7
    (site / "torch-9.9.dist-info").mkdir()
    assert "torch-9.9.dist-info" in rank.declines()


def test_another_environment_starts_cold_and_the_server_goes_on(asking) -> None:
    rank = asking()
    assert rank.ask()[2] == 7
    assert "LD_PRELOAD_OF_IT" in rank.declines(LD_PRELOAD_OF_IT="x.so")
    assert rank.ask(RANK="3", WANDB_MODE="offline")[2] == 7


def test_a_leaked_descriptor_starts_cold(asking) -> None:
    rank = asking("support.import_that_leaks")
    assert "descriptor" in rank.declines()


def test_a_thread_starts_cold(asking) -> None:
    assert "thread" in asking("support.import_with_thread").declines()


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_memory_limit_starts_cold(asking, name) -> None:
    rank, number = asking(), getattr(resource, name)
    assert rank.ask()[2] == 7
    soft, hard = resource.getrlimit(number)
    resource.setrlimit(number, (1 << 40, hard))
    try:
        assert name in rank.declines()
    finally:
        resource.setrlimit(number, (soft, hard))


def test_a_limit_that_a_fork_cannot_have_starts_cold(asking) -> None:
    """As one of a server that was started with a lower hard limit; root may raise most."""
    rank = asking()
    assert rank.ask()[2] == 7
    described = forking.describe()
    described["limits"]["RLIMIT_NOFILE"] = [1 << 40, 1 << 40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm.forking, "describe", lambda: described)
        assert rank.declines()


def test_signals_while_a_rank_is_forked(asking) -> None:
    """What a scheduler sends to every process of a job ends neither the server nor a keeper, and no rank before it is one."""
    rank = asking()
    assert rank.ask()[2] == 7
    ended = threading.Event()

    def strike() -> None:
        while not ended.is_set():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.killpg(rank.process.pid, number)

    striking = threading.Thread(target=strike)
    striking.start()
    try:
        for _ in range(10):
            process = rank.fork("sleep")
            assert process is not None, rank.messages
            psutil.Process(process.pid).parent().send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda process=process: process.poll() is not None, timeout=10)
            assert process.returncode == -signal.SIGTERM
    finally:
        ended.set()
        striking.join()


def test_without_a_place_for_the_socket_a_run_starts_cold(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(warm.tempfile, "TemporaryDirectory", _full_disk)
    messages: list[str] = []
    with warm.fork_server((), messages.append, warm=True, restarts=1) as server:
        assert server is None
    assert len(messages) == 1


def _full_disk(**_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_when_the_server_starts(asking, monkeypatch) -> None:
    rank = asking()
    shutil.rmtree(rank.folder)
    assert rank.declines()
    rank.folder.mkdir(mode=0o700)
    assert rank.declines()  # nobody owns it


def test_a_client_that_makes_no_sense_keeps_nobody_waiting(asking, monkeypatch) -> None:
    rank = asking()
    assert rank.ask()[2] == 7
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(str(rank.folder / fork_server.SOCKET))
        silent.send(b"no JSON")
        assert rank.ask()[2] == 7


def test_when_a_server_is_used(monkeypatch) -> None:
    monkeypatch.delenv(FORK_SERVER, raising=False)

    def used(*, warm_key: bool = True, restarts: int = 0) -> bool:
        with warm.fork_server((), lambda text: None, warm=warm_key, restarts=restarts) as server:
            return server is not None

    assert used(restarts=1) and not used() and not used(restarts=1, warm_key=False)
    with warm.offer() as variables:
        monkeypatch.setenv(FORK_SERVER, variables[FORK_SERVER])
        assert used() and not used(warm_key=False)


def test_what_imports_may_read() -> None:
    base = {"PATH": "/bin", "OMP_NUM_THREADS": "1"}
    apart = {"RANK": "1", "DSTUNE_CACHE": "x", "WANDB_API_KEY": "k", "HF_TOKEN": "t", "URL": "http://user:pw@host"}
    assert import_environment(base | apart) == base
    for name in ("LD_PRELOAD", "MY_OWN", "DSTUNE_FAULT", "HF_HOME", "PYTHONHASHSEED"):
        assert import_environment(base | {name: "x"}) == base | {name: "x"}
    one, other, none = (import_environment({"CUDA_VISIBLE_DEVICES": value}) for value in ("3", "1,2", ""))
    assert one == other != none


def test_a_server_without_requests_makes_room(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(warm, "SERVER", "support.light_fork_server")
    with warm.offer(idle_seconds=1) as variables:
        rank = Asking(Path(variables[FORK_SERVER]), tmp_path)
        assert rank.ask()[2] == 7
        wait_until(lambda: is_gone(rank.process), timeout=10)
        assert rank.ask()[2] == 7 and rank.messages == []
