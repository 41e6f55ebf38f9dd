"""Links and foreign files in the places where dstune writes or trusts what it reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dstune.checkpoint import copied, store
from dstune.core import files, handoff
from dstune.core.errors import UserError
from dstune.launch import mirror, records
from dstune.launch.rundir import Before
from dstune.rank.finalize import write_result
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.served_sampler import ServedSampler, claim, weights_folder
from dstune.tracking.jsonl import JsonLines
from dstune.zero import swap

VICTIM = "precious\n"
ALONE: Any = SimpleNamespace(is_main=True, broadcast=lambda value: value)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "elsewhere" / "bashrc"
    file.parent.mkdir()
    file.write_text(VICTIM)
    return file


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["launch.json", "launch.json.incomplete", "result.json", "result.json.incomplete"])
def test_records_replace_links_and_do_not_follow_them(name: str, run_dir: Path, victim: Path) -> None:
    (run_dir / name).symlink_to(victim)
    records.write_json(run_dir / name.removesuffix(".incomplete"), {"a": 1})
    write_result(run_dir, {"status": "completed"})
    assert victim.read_text() == VICTIM
    assert not (run_dir / name.removesuffix(".incomplete")).is_symlink()


@pytest.mark.parametrize("name", ["run.yaml", "launch.json", "result.json"])
def test_a_start_that_is_undone_copies_no_private_file_into_the_run(name: str, run_dir: Path, victim: Path) -> None:
    """What a start has replaced is restored if no training begins: in a folder that the maker of the link reads."""
    (run_dir / name).symlink_to(victim)
    (run_dir / "plugins").mkdir()
    (run_dir / "plugins" / "a.py").symlink_to(victim)
    before = Before.of(run_dir)
    files.write(run_dir / name, "of the start")
    files.write(run_dir / "plugins" / "a.py", "of the start")
    assert before.restore()
    assert (run_dir / name).read_text() == (run_dir / "plugins" / "a.py").read_text() == "of the start"
    assert victim.read_text() == VICTIM


def test_a_link_that_a_start_left_alone_stays(run_dir: Path, victim: Path) -> None:
    (run_dir / "result.json").symlink_to(victim)
    (run_dir / "launch.json").write_text("before")
    before = Before.of(run_dir)
    files.write(run_dir / "launch.json", "of the start")
    files.write(run_dir / "run.yaml", "of the start")
    assert before.restore()
    assert (run_dir / "result.json").is_symlink()
    assert (run_dir / "launch.json").read_text() == "before" and not (run_dir / "run.yaml").exists()


def test_rows_are_not_appended_through_a_link(run_dir: Path, victim: Path) -> None:
    (run_dir / "metrics.jsonl").symlink_to(victim)
    lines = JsonLines(run_dir / "metrics.jsonl", keep_until=None)  # begins the file anew
    lines.append({"step": 1})
    lines.close()
    assert victim.read_text() == VICTIM


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_logs_are_plain_files(kind: str, run_dir: Path, victim: Path) -> None:
    log = run_dir / "logs" / "rank-0.log"
    if kind == "pipe":
        os.mkfifo(log)
    else:
        log.symlink_to(victim if kind == "link" else victim.with_name("new"))
    with pytest.raises(UserError, match="link or not a regular file"):
        files.append(log)
    assert victim.read_text() == VICTIM
    assert not victim.with_name("new").exists()


def test_a_copied_run_is_written_through_no_link(
    run_dir: Path, victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a place that cannot lock: the lease, files of the run, and folders that are links."""
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "refused_operations", lambda path: {"lock": "no"} if path == run_dir else {})
    monkeypatch.setattr(mirror, "ALIVE_SECONDS", 0.0)
    for name in (records.LEASE, "result.json"):
        (run_dir / name).symlink_to(victim)
    opened = mirror.open_mirror(run_dir, lambda text: None)
    assert opened is not None
    opened.work.mkdir()
    (opened.work / "run.yaml").write_text("run: 1")
    (opened.work / "result.json").write_text("{}")
    assert opened.close()
    assert victim.read_text() == VICTIM
    assert (run_dir / "result.json").read_text() == "{}"
    (run_dir / "run.yaml").write_text("config: {}")
    (run_dir / "checkpoints").symlink_to(victim.parent)
    with pytest.raises(UserError, match="this is a link"):
        mirror.open_mirror(run_dir, lambda text: None)
    assert not (run_dir / records.LEASE).exists()


@pytest.mark.parametrize("linked", [("notes.txt", ".notes.txt.spare"), ("notes.txt",), (".notes.txt.spare",)])
def test_a_copied_run_is_read_through_no_link(
    linked: tuple[str, ...], tmp_path: Path, run_dir: Path, victim: Path
) -> None:
    """What is read is written again, into a folder that whoever made the links reads."""
    (run_dir / "run.yaml").write_text("config: {}")
    (run_dir / "notes.txt").write_text("theirs")
    (run_dir / ".notes.txt.spare").write_text("")
    for name in linked:
        (run_dir / name).unlink()
        (run_dir / name).symlink_to(victim)
    copied.fetch(run_dir, tmp_path / "work")
    assert (tmp_path / "work" / "run.yaml").exists()
    assert VICTIM not in [file.read_text() for file in (tmp_path / "work").rglob("*") if file.is_file()]


def test_the_lock_is_no_link(run_dir: Path, victim: Path) -> None:
    (run_dir / records.LOCK).symlink_to(victim.with_name("made"))
    with pytest.raises(UserError, match="link"):
        records.acquire_lock(run_dir)
    assert not victim.with_name("made").exists()


@pytest.mark.parametrize("linked", ["the lock", "the folder"])
def test_the_lock_of_swapped_states_is_no_link(linked: str, victim: Path, tmp_path: Path) -> None:
    """What an earlier run left on the disk of a node is locked before it is removed; others may write there too."""
    place = tmp_path / "nvme"
    place.mkdir()
    abandoned, planted = place / f"{swap._prefix()}0", place / f"{swap._prefix()}1"
    abandoned.mkdir()
    if linked == "the lock":
        planted.mkdir()
        (planted / "lock").symlink_to(victim.with_name("made"))
    else:
        planted.symlink_to(victim.parent)
    swap._remove_abandoned(place)
    assert [path.name for path in victim.parent.iterdir()] == [victim.name]
    assert not abandoned.exists()
    assert planted.exists()


def test_the_lock_of_a_copied_run_is_no_link(
    run_dir: Path, victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "refused_operations", lambda path: {"lock": "no"} if path == run_dir else {})
    opened = mirror.open_mirror(run_dir, lambda text: None)
    assert opened is not None
    lock = opened.work.with_name(f"{opened.work.name}.lock")
    opened.close()
    lock.unlink()
    lock.symlink_to(victim.with_name("made"))
    with pytest.raises(UserError, match="link"):
        mirror.open_mirror(run_dir, lambda text: None)
    assert not victim.with_name("made").exists()


@pytest.mark.parametrize("fault", ["mode", "link", "owner"])
def test_handoff_files_are_this_users_own(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "handoff.json"
    monkeypatch.setattr(handoff, "handoff_file", lambda name: file)
    target = tmp_path / "theirs.json"
    target.write_text(json.dumps({"all": {"PATH": "/tmp/evil"}}))
    target.chmod(0o600)
    if fault == "link":
        file.symlink_to(target)
    else:
        target.rename(file)
    if fault == "mode":
        file.chmod(0o666)
    if fault == "owner":
        if os.getuid() != 0:
            pytest.skip("needs root, to make a file of another user")
        os.chown(file, 65534, 65534)
    variables = {"PATH": "/bin", handoff.HANDOFF_FILE: "x"}
    with pytest.raises(UserError, match="cannot read the environment"):
        handoff.take(1, variables)
    assert variables["PATH"] == "/bin"


@pytest.mark.parametrize("fault", ["link", "owner"])
def test_weights_for_a_server_are_in_a_folder_of_this_user(fault: str, tmp_path: Path) -> None:
    """Its name can be guessed, and others may write to the shared folder: whoever made it first could swap the weights."""
    run, shared = tmp_path / "run", tmp_path / "shared"
    assert (
        claim(weights_folder(str(shared), tmp_path / "mine"))
        == claim(weights_folder(str(shared), tmp_path / "mine"))
        == ""
    )
    planted = weights_folder(str(shared), run)
    if fault == "link":
        planted.symlink_to(tmp_path)
    else:
        if os.getuid() != 0:
            pytest.skip("needs root, to make a folder of another user")
        planted.mkdir()
        os.chown(planted, 65534, 65534)
    task = ReinforcementConfig(rollout_url="http://127.0.0.1:1", rollout_folder=str(shared))
    with pytest.raises(UserError, match="is a link or belongs to another user"):
        ServedSampler(task, SimpleNamespace(module=SimpleNamespace()), ALONE, run, {0})


def test_a_node_does_not_write_through_a_link(tmp_path: Path, victim: Path) -> None:
    code = (
        "import sys, pathlib; from dstune.launch import node; "
        f"node.handoff_file = lambda name: pathlib.Path({str(tmp_path)!r}) / name; node.main('no-such-launch')"
    )
    (tmp_path / "guessed").symlink_to(victim)
    given = json.dumps({"all": {"A": "1"}, "file": {"name": "guessed"}})
    done = subprocess.run([sys.executable, "-c", code], input=f"{given}\n", capture_output=True, text=True, timeout=120)
    assert "ready" not in done.stdout
    assert victim.read_text() == VICTIM


def checkpoint(run_dir: Path, step: int) -> Path:
    written = store.folder(run_dir) / f"{store.tag(step)}.incomplete"
    written.mkdir(parents=True)
    (written / "shard.pt").write_bytes(b"weights")
    return store.commit(written, {"step": step})


def test_pruning_leaves_the_checkpoint_behind_a_link(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "another run", 1)
    mine = tmp_path / "run"
    for step in (2, 3, 4):
        checkpoint(mine, step)
    (store.folder(mine) / store.tag(1)).symlink_to(theirs)
    (store.folder(mine) / "step-00000009.incomplete").symlink_to(theirs)
    store.prune(mine, 1)
    assert store.is_committed(theirs)
    assert [info.step for info in store.listing(mine) if not info.path.is_symlink()] == [4]


def test_names_in_a_marker_stay_in_their_checkpoint(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "run", 1)
    outside = tmp_path / "run" / "secret"
    outside.write_bytes(b"12345")
    marker = json.loads((whole / store.COMMITTED).read_text())
    marker["files"]["../../secret"] = {"bytes": 5, "xxh3_64": "0"}
    (whole / store.COMMITTED).write_text(json.dumps(marker))
    assert not store.is_committed(whole)
