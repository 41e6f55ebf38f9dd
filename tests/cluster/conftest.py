"""A small cluster for a whole file of tests: machines, SLURM on them, and commands given on its login node."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from cluster import machines as machines_module
from cluster import slurm as slurm_module
from cluster.machines import Machines
from cluster.slurm import Slurm
from support.command import Commands, exact, overrides_of_run, result
from support.routes import missing_packages, refused_skip, routes
from support.tiny import save_decoder, write_dialogues

STEPS = 40


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail the test of a route that was skipped although its packages are installed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if problem := refused_skip(f"cluster/{item.path.name}::{item.name}", reason, missing_packages(), routes()):
            report.outcome, report.longrepr = "failed", problem
    return report


@pytest.fixture(scope="session")
def cluster_root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:  # short: sockets and keys lie in it
        yield Path(folder)


@pytest.fixture(scope="session")
def machines(cluster_root) -> Iterator[Machines]:
    if reason := machines_module.missing():
        pytest.skip(reason)
    with Machines(cluster_root / "machines", count=3) as started:
        yield started


@pytest.fixture(scope="session")
def slurm(cluster_root, machines) -> Iterator[Slurm]:
    if reason := slurm_module.missing():
        pytest.skip(reason)
    with Slurm(cluster_root / "slurm", machines) as started:
        yield started


class Login(Commands):
    """Runs commands on `head`, in a folder with a tiny model and its rows."""

    def __init__(self, folder: Path, machines: Machines):
        super().__init__(folder)
        self.machines = machines
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}"
        self.env["DS_ACCELERATOR"] = "cpu"

    def call(self, *words: str, timeout: float = 240) -> subprocess.CompletedProcess:
        """Any program, in `folder` on the head."""
        command = self.machines.command("head", words, self.folder)
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout)

    def run(self, *arguments: str, program: tuple[str, ...] = (), timeout: float = 240) -> subprocess.CompletedProcess:
        return self.call(*(program or (sys.executable, "-m", "dstune")), *arguments, timeout=timeout)

    def start(self, *arguments: str) -> subprocess.Popen:
        log = (self.folder / "command.log").open("w")
        # Not nsenter itself, which would take signals meant for the command.
        command = self.machines.command("head", [sys.executable, "-m", "dstune", *arguments], self.folder)
        return subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)


@pytest.fixture(scope="session")
def login(tmp_path_factory, machines) -> Login:
    folder = tmp_path_factory.mktemp("login")
    save_decoder(folder / "model")
    write_dialogues(folder / "dialogues.jsonl", 300)
    return Login(folder, machines)


@pytest.fixture(scope="session")
def on_slurm(login, slurm) -> Login:
    login.env |= slurm.env
    return login


def overrides(name: str, *further: str) -> list[str]:
    # In bf16 another number of ranks sums in another order, which moves a weight by a rounding step now and then.
    return overrides_of_run(name, STEPS, "trainer.precision=fp32", *further)


@pytest.fixture(scope="session")
def undisturbed(login) -> list[dict]:
    """The rows of the same run on two ranks of one machine."""
    done = login.run("train", *overrides("undisturbed", "launch.processes=2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(login.folder / "undisturbed")["status"] == "completed"
    return exact(login.folder / "undisturbed")


def first_difference(rows: list[dict], others: list[dict]) -> str:
    """Where two curves part, for the message of a failed assertion."""
    if len(rows) != len(others):
        return f"{len(rows)} rows and {len(others)}"
    return next((f"{one} and {other}" for one, other in zip(rows, others, strict=True) if one != other), "")
