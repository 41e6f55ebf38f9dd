"""Runs whose ranks are forked, and runs in which something is wrong with the fork server: the curves are equal to the bit."""

from __future__ import annotations

import hashlib
import os
import resource
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.command import ROOT, Commands, at_step, exact, overrides_of_run, ranks_of, result, wait_until
from support.tiny import save_decoder, write_dialogues

from dstune.launch.local import warm
from dstune.launch.local.warm import COLD, FORK_SERVER

pytestmark = [pytest.mark.cold, pytest.mark.ci]
STEPS = 10
PLUGIN = """
from dstune.protocols import callback
from dstune.protocols.callback import Callback

@callback
class Says(Callback):
    name = "says"

    def results(self):
        return {{"says": {value}}}
"""


def overrides(name: str, *further: str) -> list[str]:
    return overrides_of_run(name, STEPS, "launch.processes=2", *further)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("forked")
    save_decoder(folder / "model")
    write_dialogues(folder / "dialogues.jsonl", 300)
    return Commands(folder)


@pytest.fixture(scope="module")
def cold(workplace) -> list[dict]:
    done = workplace.run("train", *overrides("cold"))
    assert done.returncode == 0, done.stdout + done.stderr
    return exact(workplace.folder / "cold")


@pytest.fixture(scope="module")
def offered(workplace, cold) -> Iterator[Commands]:
    """Commands to which one fork server is offered, which the first of them starts."""
    with warm.offer() as variables:
        commands = Commands(workplace.folder)
        commands.env |= variables
        assert trained(commands, "first") == cold
        yield commands


def trained(commands: Commands, name: str, *further: str, forked: bool = True) -> list[dict]:
    """The rows of a run whose ranks start as expected."""
    done = commands.run("train", *overrides(name, *further))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (COLD not in done.stderr) is forked, done.stderr
    return exact(commands.folder / name)


def servers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "dstune: fork server" in " ".join(child.cmdline())]


def test_later_runs_of_one_server_are_runs_of_their_own(offered, cold) -> None:
    assert trained(offered, "second") == cold
    lora = trained(offered, "lora", "method=lora", "launch.processes=1")
    assert lora == trained_cold(offered, "lora-cold", "method=lora", "launch.processes=1") != cold


def trained_cold(commands: Commands, name: str, *further: str) -> list[dict]:
    return trained(commands, name, "launch.warm=false", *further)


def test_a_plugin_is_the_one_that_the_run_names(offered, workplace) -> None:
    for value in (1, 2):
        (workplace.folder / "plugin.py").write_text(PLUGIN.format(value=value))
        trained(offered, f"plugin-{value}", "plugins=[plugin.py]", "trainer.callbacks=[says]")
        assert result(workplace.folder / f"plugin-{value}")["says"] == value


SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY", "DSTUNE_TRUST_KEY", "DSTUNE_ROLLOUT_KEY", "ENGINE_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET", "DATABRICKS_TOKEN", "PGPASSWORD", "GITHUB_TOKEN", "NPM_AUTH", "MY_PASS", "HTTPS_PROXY", "HTTP_PROXY",
)  # fmt: skip
SEARCH = """
import hashlib
from dstune.protocols import callback
from dstune.protocols.callback import Callback

@callback
class Searches(Callback):
    name = "searches"

    def results(self):
        return {"planted": sorted(hashlib.sha256(secret.encode()).hexdigest() for secret in planted_in("self"))}
"""
"""Digests, because secrets themselves are written by their references."""


def test_a_run_finds_no_secret_of_an_earlier_one_in_its_memory(offered, workplace, monkeypatch) -> None:
    """The first run has all of them, which shows that they can be found."""
    memory = ROOT / "tests" / "support" / "memory_of_a_rank.py"
    (workplace.folder / "search.py").write_text(memory.read_text().partition("\nif __name__")[0] + SEARCH)
    searching = ("plugins=[search.py]", "trainer.callbacks=[searches]", "launch.processes=1")

    def planted(name: str) -> str:
        secret = f"planted-{secrets.token_hex(16)}"
        monkeypatch.setitem(offered.env, name, f"http://me:{secret}@proxy.invalid" if "PROXY" in name else secret)
        return hashlib.sha256(secret.encode()).hexdigest()

    theirs = {planted(name) for name in SECRETS}
    trained(offered, "secrets", *searching, f"launch.export_env=[{','.join(SECRETS)}]")
    assert set(result(workplace.folder / "secrets")["planted"]) == theirs
    for name in SECRETS:
        monkeypatch.delitem(offered.env, name, raising=False)
    mine = planted("HF_TOKEN")
    trained(offered, "without", *searching, "launch.export_env=[HF_TOKEN]")
    assert result(workplace.folder / "without")["planted"] == [mine]


def test_other_threads_start_cold(offered, workplace, cold, monkeypatch) -> None:
    monkeypatch.setitem(offered.env, "OMP_NUM_THREADS", "2")
    trained(offered, "threads", forked=False)  # sums have another order
    assert len(exact(workplace.folder / "threads")) == len(cold)


def test_a_memory_limit_starts_cold(offered, cold, monkeypatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 45, hard))
    try:
        assert trained(offered, "limited", forked=False) == cold
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_server_that_is_killed_costs_no_run(workplace, cold) -> None:
    """Neither the one whose ranks it has forked, nor the next start of it."""
    run_dir = workplace.folder / "unlucky"
    command = workplace.start("train", *overrides("unlucky", "launch.restarts=1"))
    wait_until(lambda: at_step(run_dir, 6), timeout=200)
    (server,) = servers_of(psutil.Process(command.pid))
    server.kill()
    ranks_of(run_dir)[0].kill()
    assert command.wait(timeout=200) == 0, workplace.log
    assert COLD in workplace.log and "starting again from step-" in workplace.log
    assert exact(run_dir) == cold


def test_a_rank_that_is_killed_is_forked_again_and_nothing_is_left(workplace, cold) -> None:
    run_dir = workplace.folder / "again"
    command = workplace.start("train", *overrides("again", "launch.restarts=1"))
    wait_until(lambda: at_step(run_dir, 6), timeout=200)
    family = psutil.Process(command.pid).children(recursive=True)
    ranks_of(run_dir)[0].kill()
    wait_until(lambda: "starting again from step-" in workplace.log)
    assert command.wait(timeout=200) == 0, workplace.log
    assert COLD not in workplace.log
    assert exact(run_dir) == cold
    wait_until(lambda: not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE])
    assert not ranks_of(run_dir)


def test_a_signal_saves_and_a_killed_launcher_leaves_nothing(workplace, offered, cold) -> None:
    run_dir = workplace.folder / "asked"
    command = offered.start("train", *overrides("asked"))
    wait_until(lambda: at_step(run_dir, 2), timeout=200)
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=100) == 75, offered.log
    command = offered.start("train", "asked")
    wait_until(lambda: ranks_of(run_dir), timeout=100)
    ranks = ranks_of(run_dir)
    command.kill()
    command.wait()
    wait_until(lambda: not any(rank.is_running() for rank in ranks), timeout=10)
    assert offered.run("train", "asked").returncode == 0
    assert exact(run_dir) == cold


def test_without_a_folder_for_the_socket_it_starts_cold(workplace, cold, tmp_path, monkeypatch) -> None:
    """A disk that has no room for the socket: one of no inode."""
    monkeypatch.setitem(workplace.env, "DSTUNE_FORK_SERVER", str(tmp_path / "gone"))
    assert trained(workplace, "nowhere", "launch.restarts=1", forked=False) == cold


def test_the_second_trial_of_a_sweep_is_forked(workplace, cold) -> None:
    words = [word for word in overrides("x") if not word.startswith(("run.dir", "optimizer.lr"))]
    sweep = workplace.folder / "sweep"
    done = workplace.run("train", "--multirun", *words, "optimizer.lr=2e-3,1e-3", "sweep.dir=sweep", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = sorted((sweep / "logs").glob("*.log"))
    assert len(logs) == 2 and not any(COLD in log.read_text() for log in logs)
    curves = [exact(log.with_suffix("").parents[1] / log.stem) for log in logs]
    assert cold in curves
    seconds = [result(sweep / log.stem)["start_seconds"]["imports"] for log in logs]
    assert min(seconds) < 3, seconds


def test_the_environment_names_no_server_of_another_user(workplace, cold, tmp_path, monkeypatch) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open" / "owner").write_text(f"{os.getpid()} 0")
    monkeypatch.setitem(workplace.env, FORK_SERVER, str(tmp_path / "open"))
    assert trained(workplace, "open", forked=False) == cold
    assert not Path(tmp_path, "open", "socket").exists()
