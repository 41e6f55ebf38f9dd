"""What is planted in the environment of a command is in no process list, log, report, tracker's file or file that others can read,
whoever starts the ranks."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from cluster.conftest import Login, overrides
from support.command import metrics, wait_until

from dstune.core.rank_env import GROUP_SECRET

pytestmark = pytest.mark.cluster

PLANTED = {
    "HF_TOKEN": "plantedhf0123456789",
    "WANDB_API_KEY": "plantedwandb0123456789abcdef0123456789abcd",
    "MLFLOW_TRACKING_PASSWORD": "plantedmlflow0123456789",
    "MINE_TOKEN": "plantedmine0123456789",
    "HIDDEN_TAG": "plantedtag0123456789",
    "HTTPS_PROXY": "http://me:plantedproxy0123456789@proxy.example:3128",
    "DSTUNE_TRUST_KEY": "plantedtrust" * 4,
}
VALUES = [value for name, value in PLANTED.items() if name != "HTTPS_PROXY"] + ["plantedproxy0123456789"]
LAUNCHERS = {
    "local": ["launch.processes=2"],
    "hostfile": ["launch=hostfile", "launch.hostfile=hosts", "launch.interface=eth0"],
    "openmpi": ["launch=openmpi", "launch.hostfile=hosts", "launch.interface=eth0"],
    "slurm": ["launch=slurm", "launch.nodes=2"],
}
PROGRAM = {"openmpi": "mpirun", "slurm": "srun"}


class Watch(threading.Thread):
    """Looks again and again at what any user of these machines sees of their processes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.words: set[str] = set()
        self.secrets: set[str] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            for process in psutil.process_iter(["cmdline", "name"]):
                self.words.update([*(process.info["cmdline"] or []), process.info["name"] or ""])
                try:
                    if secret := process.environ().get(GROUP_SECRET):  # this test is root: nobody else reads it
                        self.secrets.add(secret)
                except (psutil.Error, OSError):
                    pass
            time.sleep(0.05)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def readable_by_others(folder: Path, values: list[str], since: float) -> list[str]:
    """Files of this user below `folder` that hold one of the values and that a mode above 0600 shows to others."""
    found = []
    # Unlike `rglob`, `os.walk` skips folders that disappear meanwhile: other tests write beside this one.
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    for path in paths:
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_mtime < since or status.st_size > 2**26:
                continue
            content = path.read_bytes()
        except OSError:
            continue
        held = [value for value in values if value.encode() in content or value in str(path)]
        if held and stat.S_IMODE(status.st_mode) & 0o177:
            found.append(f"{path} ({stat.S_IMODE(status.st_mode):o}): {held}")
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_planted_values_are_seen_nowhere(launcher: str, login: Login, request: pytest.FixtureRequest) -> None:
    if (program := PROGRAM.get(launcher)) and shutil.which(program) is None:
        pytest.skip(f"not installed: {program}")
    if launcher == "openmpi":
        pytest.importorskip("mpi4py", reason="not installed (pip install '.[mpi]' in a clone of dstune)")
    if launcher == "slurm":
        request.getfixturevalue("on_slurm")
    (login.folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    run_dir, began, before = login.folder / f"secrets-{launcher}", time.time(), dict(login.env)
    login.env |= PLANTED
    further = [
        *LAUNCHERS[launcher],
        "launch.export_env=[MINE_TOKEN]",
        "tracking.notes='about ${oc.env:HIDDEN_TAG}'",
        "tracking.wandb.mode=offline",
        "tracking.tensorboard=true",
        f"tracking.mlflow.uri={login.folder / 'mlruns'}",
        "trainer.max_steps=8",
    ]
    with Watch() as watch:
        command = login.start("train", *overrides(run_dir.name, *further))
        wait_until(lambda: metrics(run_dir) or command.poll() is not None, timeout=300)
        code = command.wait(timeout=300)
    login.env.clear()
    login.env.update(before)
    assert code == 0, login.log
    assert watch.secrets, "no rank had a secret of its launch"
    values = [*VALUES, *watch.secrets]
    assert [word for word in watch.words if any(value in word for value in values)] == []
    assert [value for value in values if value in login.log] == []
    assert {"wandb", "tensorboard", "report.html", "logs", "run.yaml"} <= {path.name for path in run_dir.iterdir()}
    places = [login.folder, Path("/dev/shm"), *{Path(os.environ.get("TMPDIR", "/tmp"))}]
    assert [line for place in places for line in readable_by_others(place, values, began)] == []
    # Of what is written to stay, the run directory has none whatever its mode: it is copied, and its modes with it.
    kept = [
        str(path)
        for path in run_dir.rglob("*")
        if path.is_file() and path.name != "secret" and any(value.encode() in path.read_bytes() for value in values)
    ]
    assert kept == []
    assert sys.executable in watch.words
