"""Files of a checkpoint: written, hashed and read back; copied first where they are written in the background."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import deepspeed  # noqa: F401  (shard_files is for processes that have it)
import pytest
import torch
from safetensors.torch import load_file
from support.configs import run_config

from dstune.checkpoint import store
from dstune.checkpoint.saves import Saves
from dstune.checkpoint.shards import Shards
from dstune.config.schema import CheckpointConfig, SaveMode
from dstune.core.errors import TrainingFailed, UserError
from dstune.core.files import hash_file
from dstune.core.lease import LEASE, Lease, LeaseRecord
from dstune.trainer.state import TrainState
from dstune.zero import shard_files
from dstune.zero.safe_load import load
from dstune.zero.shard_files import AT_ONCE, SafeTensors, ShardFiles, read_back, write_file


def test_a_file_is_what_was_saved_and_its_entry_is_that_of_the_marker(tmp_path):
    state = {"weights": torch.arange(1000.0), "step": 3}
    entry = write_file(state, tmp_path / "shard.pt")
    assert entry == {"bytes": (tmp_path / "shard.pt").stat().st_size, "xxh3_64": hash_file(tmp_path / "shard.pt")}
    again = load(tmp_path / "shard.pt", mmap=True)
    assert torch.equal(again["weights"], state["weights"]) and again["step"] == 3
    write_file(SafeTensors({"w": state["weights"][2:5]}, {"a": "b"}), tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.tensor([2.0, 3.0, 4.0]))


def test_a_disk_that_gives_something_else_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "read_back", lambda path: {**read_back(path), "xxh3_64": "0"})
    with pytest.raises(OSError, match=r"shard.pt: reads back differently"):
        write_file({"weights": torch.ones(3)}, tmp_path / "shard.pt")


def test_a_full_disk_is_named_as_such():
    with pytest.raises(OSError, match=r"full: .*No space left on device"):
        write_file({"weights": torch.ones(2**20)}, Path("/dev/full"))


class Harmful:
    def __reduce__(self):
        return (print, ("run while loading",))


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="it holds no weights"):
        Shards(tmp_path)


def test_what_is_in_a_file_does_not_run(tmp_path, capsys):
    torch.save({"x": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="more than tensors and settings"):
        load(tmp_path / "bad.pt")
    assert "run while" not in capsys.readouterr().out
    pickle.loads(pickle.dumps(Harmful()))
    assert "run while" in capsys.readouterr().out, "it would have"


def test_a_save_in_the_background_has_the_states_of_its_moment(tmp_path):
    """Large tensors are copied by the thread, before the next update; the rest at once. Shared memory stays shared."""
    large, small = torch.zeros(AT_ONCE // 4 + 1), torch.zeros(4)
    files = ShardFiles()
    save = files.begin(tmp_path, background=True)
    group = {"lr": 0.1, "betas": [0.9]}
    files.save({"large": large, "part": large[:8], "small": small, "group": group}, str(tmp_path / "shard.pt"))
    files.end()
    small += 1
    group["lr"] = 0.2
    group["betas"].append(0.0)
    thread = threading.Timer(0.2, save.work_off)
    thread.start()
    files.wait_for_copies()
    large += 1  # what the optimizer does now is too late for the save
    thread.join()
    saved = torch.load(tmp_path / "shard.pt")
    assert not saved["large"].any() and not saved["small"].any()
    assert saved["group"] == {"lr": 0.1, "betas": [0.9]}
    assert saved["part"].untyped_storage().data_ptr() == saved["large"].untyped_storage().data_ptr()
    assert save.entries["shard.pt"] == read_back(tmp_path / "shard.pt")

    buffers = [buffer.data_ptr() for buffer in files._host._buffers]
    files.begin(tmp_path, background=True)
    files.save({"large": large, "part": large[:8], "small": small}, str(tmp_path / "next.pt"))
    files.end()
    assert [buffer.data_ptr() for buffer in files._host._buffers] == buffers, "host memory is used again"


class OneRank(SimpleNamespace):
    rank, size, is_main = 0, 1, True

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value]


class FakeEngine:
    """Saves one tensor; `refuses` is the errno of a disk that does not take it."""

    def __init__(self):
        self.files, self.refuses, self.running, self.most = ShardFiles(), False, 0, 0

    def checkpoint_bytes(self, weights_only=False):
        return 1000

    def save(self, directory, tag, background):
        save = self.files.begin(directory / tag, background=background)
        self.files.save({"w": torch.ones(10)}, "/dev/full" if self.refuses else str(directory / tag / "w.pt"))
        self.files.end()
        return save


def saves(tmp_path, mode: str) -> tuple[Saves, FakeEngine, list[str]]:
    engine, messages = FakeEngine(), []
    config = run_config(checkpoint=CheckpointConfig(mode=SaveMode[mode], keep=2))
    return Saves(config, tmp_path, engine, OneRank(), {"world_size": 1}, messages.append), engine, messages  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_refused_save_costs_nothing_but_itself(tmp_path, mode):
    writer, engine, messages = saves(tmp_path, mode)
    assert writer.save(TrainState(step=1))
    engine.refuses = True
    writer.save(TrainState(step=2))
    assert not writer.wait_for_pending_save() if mode == "async" else writer.refusal
    assert "rank 0: full" in writer.refusal
    assert "step 2 is not saved: rank 0: full" in messages[-1] and "step-00000001 is whole" in messages[-1]
    assert [path.name for path in store.folder(tmp_path).iterdir()] == ["step-00000001"]
    assert not writer.save(TrainState(step=2), now=True)  # as the end of a run tries again
    assert len([message for message in messages if "step 2 is not saved" in message]) == 1
    engine.refuses = False
    assert writer.save(TrainState(step=3), now=True)
    assert store.newest(tmp_path).name == "step-00000003"
    assert store.damaged_files(store.newest(tmp_path)) == []


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("taken", ["before", "meanwhile"])
def test_a_group_whose_run_was_taken_over_saves_nothing_and_removes_nothing(tmp_path, monkeypatch, mode, taken):
    (tmp_path / "launch").mkdir()
    lease = Lease(tmp_path)
    record = LeaseRecord("holder", "node1", "10.0.0.1", 4000, "mark", "job")
    assert lease.take(0, record) == 1
    monkeypatch.setenv(LEASE, str(lease.file(1)))
    writer, engine, _ = saves(tmp_path, mode)
    assert writer.save(TrainState(step=1), now=True)
    theirs = store.folder(tmp_path) / "step-00000002.incomplete" / "theirs"
    save = engine.save

    def save_meanwhile(*arguments, **keys):
        assert lease.take(1, record) == 2
        theirs.touch()
        return save(*arguments, **keys)

    if taken == "before":
        theirs.parent.mkdir()
        theirs.touch()
        assert lease.take(1, record) == 2
        with pytest.raises(TrainingFailed):
            writer.save(TrainState(step=2))
    else:
        engine.save = save_meanwhile
        writer.save(TrainState(step=2))
        writer.wait_for_pending_save()
        assert writer.refusal
    assert theirs.exists()
    assert [info.step for info in store.listing(tmp_path)] == [1]


def test_saves_in_the_background_come_one_after_the_other(tmp_path, monkeypatch):
    writer, _, _ = saves(tmp_path, "async")
    running, most, real = [], [], store.commit

    def slow(*arguments):
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.1)
        running.pop()
        return real(*arguments)

    monkeypatch.setattr(store, "commit", slow)
    state = TrainState()
    for step in (1, 2, 3):
        state.step = step
        assert writer.save(state)
    assert writer.wait_for_pending_save()
    assert most == [1, 1, 1]
    assert state.save_seconds > 0.1
    assert [info.step for info in store.listing(tmp_path)] == [2, 3]
    assert not list(store.folder(tmp_path).rglob("*.written"))


def test_older_checkpoints_that_cannot_be_removed_do_not_cost_the_new_one(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    writer, _, messages = saves(tmp_path, "sync")
    monkeypatch.setattr(store, "prune", refuse)
    assert writer.save(TrainState(step=1))
    assert store.newest(tmp_path).name == "step-00000001"
    assert "older checkpoints could not be removed" in messages[-1]


def test_whatever_goes_wrong_in_the_background_is_no_save(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("something else")

    writer, _, messages = saves(tmp_path, "async")
    monkeypatch.setattr(store, "commit", fail)
    writer.save(TrainState(step=1))
    assert not writer.wait_for_pending_save()
    assert "step 1 is not saved: RuntimeError: something else" in messages[-1]
