"""Two users on one machine: what runs, secrets, ports and caches of the first the second can read, take or redirect."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support.command import ROOT, Commands, metrics, ranks_of, result, wait_until
from support.tiny import save_decoder, write_dialogues

from dstune.core.rank_env import GROUP_SECRET, STORE

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two other users")

FIRST, SECOND = 61_001, 61_002
STRANGER = Path(__file__).with_name("stranger.py")
PLANTED = {"HF_TOKEN": "plantedhf0123456789", "MINE_TOKEN": "plantedmine0123456789"}


BECOME = """\
if [ -n "$1" ]; then  # this Python lies in a folder that other users may not enter: for these processes it is a folder of its own
  mount -t tmpfs none /mnt && mkdir /mnt/kept && mount --bind "$2" /mnt/kept
  mount -t tmpfs -o mode=755 none "$1" && mkdir -p "$2" && mount --bind /mnt/kept "$2" || exit 9
fi
user="$3"; shift 3
exec setpriv --reuid="$user" --regid="$user" --clear-groups -- "$@"
"""


def as_user(number: int, *words: str) -> list[str]:
    """The command line that runs `python WORDS` as another user."""
    kept = Path(sys.base_prefix).resolve()
    hidden = next((folder for folder in reversed(kept.parents) if not folder.stat().st_mode & stat.S_IXOTH), "")
    apart = ["unshare", "--mount", "--propagation", "private", "bash", "-c", BECOME, "bash"]
    return [*apart, str(hidden), str(kept), str(number), sys.executable, *words]


class First(Commands):
    """The first user's commands, in a home that others may look into (0755), as many systems make them."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.env |= {"HOME": str(folder), "USER": "first", **PLANTED}
        self.started: list[subprocess.Popen] = []
        for name in ("XDG_CONFIG_HOME", "DSTUNE_CACHE", "DSTUNE_TRUST_KEY"):
            self.env.pop(name, None)

    def start(self, *arguments: str) -> subprocess.Popen:
        log = (self.folder / "command.log").open("w")
        command = as_user(FIRST, "-m", "dstune", *arguments)
        self.started.append(
            subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT, umask=0o022)
        )
        return self.started[-1]


@pytest.fixture(scope="module")
def first() -> Iterator[First]:
    # Not pytest's own folder, which is root's alone.
    with tempfile.TemporaryDirectory(prefix="two-users-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        probe = as_user(FIRST, "-c", "import dstune, numpy; print('can')")
        env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
        seen = subprocess.run(probe, cwd=folder, env=env, capture_output=True, text=True)
        if seen.stdout != "can\n":
            pytest.skip(f"another user cannot run {sys.prefix} or {ROOT}: {seen.stderr.strip()[-200:]}")
        save_decoder(folder / "model")
        write_dialogues(folder / "dialogues.jsonl", 200)
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, FIRST, FIRST)
        commands = First(folder)
        yield commands
        for command in commands.started:  # a test that failed meanwhile
            command.kill()
            command.wait()
        wait_until(lambda: not [one for one in psutil.process_iter(["uids"]) if (one.info["uids"] or (0,))[0] == FIRST])
        for path in found_of(FIRST):
            if path != folder:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def found_of(user: int) -> list[Path]:
    """What the user owns in folders that all users share."""
    shared = [Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path(tempfile.gettempdir())]
    found = []
    for path in [path for folder in {*shared} if folder.is_dir() for path in folder.iterdir()]:
        with suppress(OSError):  # others come and go
            found += [path] if path.lstat().st_uid == user else []
    return found


def tried(given: Mapping[str, object], secrets: Sequence[str] = ()) -> str:
    """What the second user could do."""
    done = subprocess.run(
        as_user(SECOND, str(STRANGER), json.dumps(given)),
        input=json.dumps(secrets),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_second_user_gets_nothing_of_a_running_launch(first: First) -> None:
    run_dir, sentinel = first.folder / "run", Path(tempfile.gettempdir()) / f"sentinel-{os.getpid()}"
    command = first.start(
        *("train", "model.path=model", "data.train=dialogues.jsonl", "data.max_length=64", "data.packing=false"),
        *("zero=stage2", "trainer.micro_batch_size=2", "trainer.global_batch_size=8", "trainer.max_steps=40"),
        *("checkpoint.every=5", "evaluate.every=20", "launch.processes=2", "run.dir=run", "run.export=last"),
        *("tracking.notes=${oc.env:MINE_TOKEN}", "launch.export_env=[MINE_TOKEN]"),
    )
    wait_until(lambda: command.poll() is not None or metrics(run_dir)[3:], timeout=400)
    assert command.poll() is None, first.log
    family = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    [environment, *_] = [rank.environ() for rank in ranks_of(run_dir)]
    secret, store = environment[GROUP_SECRET], Path(environment[STORE])
    listening = [one.laddr for process in family for one in process.net_connections("tcp") if one.status == "LISTEN"]
    shared = [path for path in found_of(FIRST) if path != first.folder]
    key = first.folder / ".config" / "dstune" / "trust.key"
    given = {
        "pids": [process.pid for process in family],
        "kept": [str(store.parent), str(store), str(key), *map(str, shared)],
        "public": [str(path) for path in (run_dir, *run_dir.rglob("*"), first.folder / ".cache" / "dstune")],
        "ports": sorted({address.port for address in listening}),
        "sentinel": str(sentinel),
    }
    assert tried(given, [secret, *PLANTED.values(), key.read_text().strip()]) == ""
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}, "a port that the network can reach"
    assert command.wait(timeout=400) == 0, first.log
    assert result(run_dir)["status"] == "completed" and len([row for row in metrics(run_dir) if "loss" in row]) == 40
    assert not sentinel.exists()
    assert not store.parent.exists()
    held = [path for path in run_dir.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert held == []
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    # Names in shared folders that somebody could have taken before are random, or this user's own.
    assert [path.name for path in shared if "dstune" in path.name and len(path.name) < len("dstune-") + 8] == []
    # As the umask has it others may look into the run; run.mode closes it, also one that has ended.
    kept = [str(run_dir), *map(str, run_dir.glob("*.json*")), str(run_dir / "checkpoints")]
    looked = {"pids": [], "kept": kept, "public": [], "ports": [], "sentinel": str(sentinel)}
    assert f"could read {run_dir / 'metrics.jsonl'}\n" in tried(looked)
    assert first.start("train", "run", "run.mode=private").wait(timeout=200) == 0, first.log
    assert tried(looked) == ""


def test_the_second_user_redirects_nothing_by_being_first(first: First) -> None:
    """Files and folders with the names that a launch would use lie in the working directory, a folder of all, before it starts."""
    place = first.folder / "everybody"
    place.mkdir()
    place.chmod(0o1777)
    code = (
        "import os, sys; from dstune.core import rendezvous; from dstune.core.rank_env import RankEnv\n"
        "env = RankEnv(int(sys.argv[1]), 2, 0, 1, 'slurm'); variables = {'SLURM_JOB_ID': '7', 'SLURM_STEP_ID': '0'}\n"
        "print('looks', flush=True)\n"
        "rendezvous._meet_in_private(env, variables, seconds=20); print(*sorted(variables.values()), flush=True)\n"
        "sys.stdin.read()\n"  # what it said holds as long as it lives
    )
    environment = {**first.env, "GLOO_SOCKET_IFNAME": "lo"}

    def rank(number: int, user: int, **changes: str) -> subprocess.Popen:
        command = as_user(user, "-c", code, str(number))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, cwd=place, env=environment | changes, text=True, **pipes)

    theirs = rank(0, SECOND, HOME="/nonexistent", DSTUNE_CACHE="/nonexistent").communicate(timeout=60)[0]
    planted = list(place.glob(".dstune-meeting-*"))
    assert len(planted) == 1 and planted[0].stat().st_uid == SECOND
    # Everybody can read it, and its process is alive: nothing but its owner speaks against it.
    content = json.loads(planted[0].read_text()) | {"pid": os.getpid()}
    planted[0].unlink()  # the system lets nobody write to a file of others in a folder of all
    planted[0].write_text(json.dumps(content))
    planted[0].chmod(0o644)
    os.chown(planted[0], SECOND, SECOND)
    early = rank(1, FIRST)
    assert early.stdout is not None and early.stdout.readline() == "looks\n"
    time.sleep(0.5)  # it has looked before its own rank 0 says anything
    first_rank = rank(0, FIRST)
    assert first_rank.stdout is not None and first_rank.stdout.readline() == "looks\n"
    own = first_rank.stdout.readline()
    second = early.communicate(timeout=60)[0]
    first_rank.communicate(timeout=60)
    assert second == own and own and own not in theirs
    # The key of signatures, where somebody has put one into the place.
    folder = first.folder / ".config" / "dstune"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trust.key").write_text("0123456789abcdef" * 4)
    os.chown(folder / "trust.key", SECOND, SECOND)
    (folder / "trust.key").chmod(0o600)
    sign = "from dstune.core import signing; signing.sign({})"
    done = subprocess.run(as_user(FIRST, "-c", sign), env=first.env, cwd=first.folder, capture_output=True, text=True)
    assert done.returncode != 0 and "nobody else can read" in done.stderr
    (folder / "trust.key").unlink()
