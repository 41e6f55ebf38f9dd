"""What clusters do to a run: files that ask it to stop, damaged checkpoints, a full disk, a rank that hangs."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from distributed.test_runs import STEPS, overrides, undisturbed, workplace  # noqa: F401 (fixtures)
from support.command import at_step, exact, ranks_of, result, wait_until

from dstune.checkpoint import store

pytestmark = pytest.mark.cold  # the lives of processes: as users start them


def test_files_named_save_and_stop_and_a_damaged_checkpoint(workplace, undisturbed):  # noqa: F811
    """SAVE saves and goes on, STOP saves and leaves; a flipped bit is named, and the checkpoint before it is used."""
    run_dir = workplace.folder / "asked"
    command = workplace.start("train", *overrides("asked", "checkpoint.every=0", "checkpoint.keep=3"))
    wait_until(lambda: at_step(run_dir, 5))
    (run_dir / "SAVE").touch()
    wait_until(lambda: store.newest(run_dir) is not None)
    first = store.newest(run_dir)
    wait_until(lambda: at_step(run_dir, int(first.name.removeprefix("step-")) + 3))
    (run_dir / "STOP").touch()
    assert command.wait(timeout=60) == 75
    assert "STOP" in result(run_dir)["reason"]
    assert not list(run_dir.glob("S[AT]*"))
    second = store.newest(run_dir)
    assert second != first

    shard = max(second.glob("*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    again = workplace.run("train", "asked", "checkpoint.every=5")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"skipping damaged checkpoint {second.name}: {shard.name}" in again.stdout
    assert exact(run_dir) == undisturbed


@pytest.mark.ci
def test_a_killed_rank_is_started_again(workplace, undisturbed):  # noqa: F811
    run_dir = workplace.folder / "again"
    command = workplace.start("train", *overrides("again", "launch.restarts=1"))
    wait_until(lambda: at_step(run_dir, 8))
    next(rank for rank in ranks_of(run_dir) if rank.environ()["RANK"] == "1").kill()
    assert command.wait(timeout=120) == 0, workplace.log
    assert "starting again from step-" in workplace.log
    assert exact(run_dir) == undisturbed


def test_a_rank_that_hangs_is_ended_with_stacks(workplace):  # noqa: F811
    run_dir = workplace.folder / "hangs"
    # Without saves, in which a rank may take ten times as long.
    command = workplace.start("train", *overrides("hangs", "trainer.stall_seconds=3", "checkpoint.every=0"))
    wait_until(lambda: at_step(run_dir, 3))
    victim = next(rank for rank in ranks_of(run_dir) if rank.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGSTOP)  # as a hung device or file system would
    stopped = time.monotonic()
    assert command.wait(timeout=60) == 1
    assert time.monotonic() - stopped < 45
    assert not ranks_of(run_dir)
    log = (run_dir / "logs" / "rank-0.log").read_text()
    assert "rank 0 made no progress for 3 s" in log
    assert "loop.py" in log.split("made no progress")[1]
    # Rank 1, which is let go to be ended, may still say that it waited there too.
    assert re.search(r"ranks? 0.* waited in the collective|it is in ", workplace.log + log)
    assert "rank 1 was stopped (SIGSTOP, or a debugger)" in workplace.log
    assert result(run_dir)["status"] == "failed"
    assert "closed by peer" not in workplace.log, "what gloo says of a rank that was woken to be ended is no cause"


DIES = """
import os, socket, time
import dstune, psutil

@dstune.callback
class Dies(dstune.Callback):
    name = "dies"

    def on_step_end(self, run, step):
        if step.number == 3 and run.world.rank == 1:
            for connection in psutil.Process().net_connections("tcp"):  # as at the end of a process, which takes longer than usual
                if connection.status == psutil.CONN_ESTABLISHED:
                    socket.socket(fileno=os.dup(connection.fd)).shutdown(socket.SHUT_RDWR)
            time.sleep(1)
            raise ArithmeticError("this rank alone fails")
        return super().on_step_end(run, step)
"""


@pytest.mark.ci
def test_a_rank_that_lost_its_peer_is_not_blamed_and_the_cause_is_said_once(workplace):  # noqa: F811
    (workplace.folder / "dies.py").write_text(DIES)
    own_callback = ["plugins=[./dies.py]", "trainer.callbacks=[{dies: {}}]"]
    failed = workplace.run("train", *overrides("dies", *own_callback, "launch.restarts=1", "checkpoint.every=0"))
    assert failed.returncode == 1
    assert result(workplace.folder / "dies")["reason"].startswith("rank 1 ended with exit code 1"), failed.stderr
    assert "starting again from the beginning" in failed.stderr
    # The announcement of the restart, the last lines of the log, and the diagnosis.
    assert failed.stderr.count("ArithmeticError: this rank alone fails") == 3, failed.stderr
    assert "GLHF" not in failed.stderr


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small disk is a tmpfs: run as root, with mount installed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(2**16))


def test_a_full_disk_costs_no_checkpoint_that_is_there(workplace, small_disk):  # noqa: F811
    run_dir = small_disk / "full"
    command = workplace.start("train", *overrides("full", f"run.dir={run_dir}"))
    wait_until(lambda: store.newest(run_dir) is not None)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        fill(filler)
    kept = store.newest(run_dir)
    wait_until(lambda: "is not saved" in workplace.log)
    filler.unlink()
    assert command.wait(timeout=120) == 0, workplace.log
    assert result(run_dir)["steps"] == STEPS
    assert kept is not None


@pytest.mark.parametrize("restarts", [2, pytest.param(0, marks=pytest.mark.ci)])
def test_a_disk_that_stays_full_ends_the_run_with_its_reason(workplace, undisturbed, small_disk, restarts):  # noqa: F811
    run_dir = small_disk / "full"
    command = workplace.start("train", *overrides("full", f"run.dir={run_dir}", f"launch.restarts={restarts}"))
    wait_until(lambda: store.newest(run_dir) is not None)
    with pytest.raises(OSError, match="No space left"):
        fill(small_disk / "filler")
    assert command.wait(timeout=120) == 1
    reason = next(line for line in workplace.log.splitlines() if f"step {STEPS} could not be saved" in line)
    assert reason.startswith("dstune: ") and "0.0 MB are free" in reason
    assert reason.count(f"`dstune train {run_dir}`") == 1
    assert workplace.log.count(f"step {STEPS} is not saved") == 1
    assert "starting again" not in workplace.log, "another start would meet the same disk"
    assert "Traceback" not in workplace.log
    (small_disk / "filler").unlink()
    again = workplace.run("train", str(run_dir))  # the command that the reason names
    assert again.returncode == 0, again.stdout + again.stderr
    assert exact(run_dir) == undisturbed


def test_a_disk_without_room_for_two_checkpoints_is_refused(workplace, small_disk):  # noqa: F811
    (small_disk / "filler").write_bytes(bytes(24 * 2**20 - 2**17))
    refused = workplace.run("train", *overrides("small", f"run.dir={small_disk / 'small'}"))
    assert refused.returncode == 2
    assert "there must be room for two" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout
