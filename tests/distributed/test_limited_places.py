"""Whole runs in places that refuse what a run does: a file system double is preloaded into every process."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed.test_runs import STEPS, overrides, undisturbed, workplace  # noqa: F401 (fixtures)
from support.command import ROOT, Commands, exact, ranks_of, result

from dstune.checkpoint import copied, store
from dstune.core.parsing import read_object

pytestmark = pytest.mark.slow

OPERATIONS = ("append", "lock", "rename-file", "rename-folder", "chmod", "sync")


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler for the file system double (Debian: apt-get install gcc libc6-dev)")
    library = tmp_path_factory.mktemp("double") / "limited_place.so"
    source = Path(__file__).parents[1] / "support" / "limited_place.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def limited(workplace: Commands, double: Path) -> Iterator[Commands]:  # noqa: F811
    """Commands under which `volume/` of the folder refuses everything."""
    (workplace.folder / "volume").mkdir()
    before = dict(workplace.env)
    workplace.env |= {
        "LD_PRELOAD": str(double),
        "DSTUNE_LIMITED_ROOT": str(workplace.folder / "volume"),
        "DSTUNE_LIMITED_REFUSE": ",".join(OPERATIONS),
    }
    yield workplace
    workplace.env = before
    shutil.rmtree(workplace.folder / "volume")


def forget_this_machine(workplace: Commands) -> None:  # noqa: F811
    shutil.rmtree(workplace.folder / "cache" / "runs")


def test_a_run_where_nothing_but_writing_whole_files_works(limited, undisturbed):  # noqa: F811
    run_dir = limited.folder / "volume" / "run"
    done = limited.run("train", *overrides("volume/run", "run.export=last"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refuses what a run does (append: Operation not supported; lock:" in done.stderr
    assert exact(run_dir) == undisturbed
    assert result(run_dir)["checkpoint"] == str(store.newest(run_dir))
    assert not any(store.damaged_files(info.path) for info in store.listing(run_dir))
    assert (run_dir / "export" / "model.safetensors").is_file()
    assert (run_dir / "report.html").is_file()
    again = limited.run("train", "volume/run")
    assert "was completed already" in again.stderr
    status = limited.run("status", "volume/run")
    assert "completed" in status.stdout, status.stderr
    exported = limited.run("export", "volume/run", "--out", "volume/exported")
    assert exported.returncode == 0, exported.stderr
    assert (limited.folder / "volume" / "exported" / "config.json").is_file()
    reported = limited.run("report", "volume/run", "--output", "volume/page.html")
    assert reported.returncode == 0, reported.stderr
    assert (limited.folder / "volume" / "page.html").is_file()
    longer = limited.run("train", "volume/run", "trainer.max_steps=42")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert "continues from" in longer.stderr
    assert result(run_dir)["steps"] == 42


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_run_where_one_operation_is_refused(limited, operation):
    limited.env["DSTUNE_LIMITED_REFUSE"] = operation
    done = limited.run("train", *overrides("volume/one", "trainer.max_steps=3", "run.export=last", "evaluate.every=0"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("Operation not supported") == 1, done.stderr
    assert result(limited.folder / "volume" / "one")["steps"] == 3


COPYING = """
import sys
from pathlib import Path
from dstune.checkpoint import store
from dstune.launch import mirror
place, steps = Path(sys.argv[1]), map(int, sys.argv[2:])
opened = mirror.open_mirror(place, print)
assert opened.refused, "the double refuses nothing"
found = store.newest(opened.work)
print("from", found and found.name, (found / "weights").read_text() if found else "")
opened.work.mkdir(exist_ok=True)
for step in steps:
    (opened.work / "run.yaml").write_text(f"step: {step}")
    (opened.work / "metrics.jsonl").write_text("row\\n" * step)
    folder = store.folder(opened.work) / f"{store.tag(step)}.incomplete"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(f"of {step}")
    store.commit(folder, {"step": step, "train": {}, "best": None, "format": 2})
    opened.work.joinpath("result.json").unlink(missing_ok=True)
    if step % 30 == 0:
        (opened.work / "result.json").write_text('{"status": "completed", "steps": %d}' % step)
    opened._copy()
"""


def test_a_process_that_copies_is_killed_at_every_place(double, tmp_path):
    """Checkpoints are copied one after the other: whatever was written last, another machine finds one that is whole, and
    a run counts as completed only with its last one, also where it was prolonged."""
    place, found, completed = tmp_path / "volume" / "run", set(), set()
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": str(double),
        "DSTUNE_LIMITED_ROOT": str(tmp_path / "volume"),
        "DSTUNE_LIMITED_REFUSE": ",".join(OPERATIONS),
    }
    for kill_at in itertools.count(17):
        shutil.rmtree(tmp_path / "volume", ignore_errors=True)
        (tmp_path / "volume").mkdir()
        env |= {"DSTUNE_CACHE": str(tmp_path / f"machine-{kill_at}"), "DSTUNE_LIMITED_KILL_AT": str(kill_at)}
        words = [sys.executable, "-c", COPYING, str(place), "10", "20", "30", "60"]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, (kill_at, done.stdout, done.stderr)
        other = tmp_path / f"another-machine-{kill_at}"
        other.mkdir()
        copied.fetch(place, other)
        newest = store.newest(other)
        assert newest is not None, kill_at
        assert not store.damaged_files(newest)
        step = int(newest.name.removeprefix("step-"))
        assert (newest / "weights").read_text() == f"of {step}"
        assert (other / "run.yaml").read_text() in ("step: 10", "step: 20", "step: 30", "step: 60")
        assert len((other / "metrics.jsonl").read_text().splitlines()) >= step
        found.add(step)
        if says := read_object(other / "result.json"):
            assert says["steps"] == step, kill_at
            assert (other / "run.yaml").read_text() == f"step: {step}", kill_at
            completed.add(step)
    assert kill_at > 40
    assert found == {10, 20, 30, 60}
    assert completed == {30, 60}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_operation_that_is_refused_is_found_and_not_needed_for_copies(double, tmp_path, operation):
    (tmp_path / "volume").mkdir()
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": str(double),
        "DSTUNE_LIMITED_ROOT": str(tmp_path / "volume"),
        "DSTUNE_LIMITED_REFUSE": operation,
        "DSTUNE_CACHE": str(tmp_path / "cache"),
    }
    place = tmp_path / "volume" / "run"
    done = subprocess.run(
        [sys.executable, "-c", COPYING, str(place), "10", "20"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Operation not supported") == 1
    assert store.newest(place).name == store.tag(20)
    assert (place / "run.yaml").read_text() == "step: 20"


def test_killed_while_copying_at_many_places_it_goes_on_from_the_copy(limited, undisturbed):  # noqa: F811
    """Each time on another machine: nothing is left but the place. How many files a launch opens depends on how many saves
    come between two copies, so the last places may lie behind its end."""
    run_dir = limited.folder / "volume" / "killed"
    begun = 0
    for number, place in enumerate((9, 14, 19, 23, 27, 30, 33, 36, 39, 42)):
        limited.env["DSTUNE_LIMITED_KILL_AT"] = str(place)
        done = limited.run("train", *overrides("volume/killed", "checkpoint.keep=1"))
        if done.returncode == 0:
            assert number > 6, done.stdout + done.stderr
            break
        assert done.returncode == -9, done.stdout + done.stderr
        assert not ranks_of(run_dir)
        forget_this_machine(limited)
        newest = store.newest(run_dir)
        step = int(newest.name.removeprefix("step-")) if newest else 0
        assert step >= begun
        begun = step
    del limited.env["DSTUNE_LIMITED_KILL_AT"]
    done = limited.run("train", *overrides("volume/killed", "checkpoint.keep=1"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert exact(run_dir) == undisturbed
    assert read_object(run_dir / "result.json")["status"] == "completed"
    assert store.newest(run_dir).name == store.tag(STEPS)


@pytest.mark.parametrize(
    "words", [("launch=slurm", "launch.nodes=2"), ("launch=spark", "launch.master=spark://127.0.0.1:7077")]
)
def test_several_machines_without_a_shared_folder_are_refused(limited, words):
    done = limited.run("train", *overrides("volume/several"), *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{words[0]} has ranks on other machines" in done.stderr
    assert not (limited.folder / "volume" / "several").exists()
