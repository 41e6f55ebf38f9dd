"""Checkpoint folders: whole or not at all, and which ones are kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.configs import run_config

from dstune.checkpoint import store
from dstune.checkpoint.export import refuse_damaged
from dstune.checkpoint.session import Checkpoints
from dstune.core.errors import UserError
from dstune.core.files import hash_file


def write(run_dir, step, *, best_step=None, size=100, weights_only=False):
    incomplete = store.folder(run_dir) / (store.tag(step) + store.INCOMPLETE)
    (incomplete / "shards").mkdir(parents=True)
    (incomplete / "shards" / "rank0.pt").write_bytes(bytes(size))
    best = None if best_step is None else {"metric": "loss", "value": 1.0, "step": best_step}
    return store.commit(incomplete, {"step": step, "best": best, "weights_only": weights_only})


def steps(run_dir):
    return [info.step for info in store.listing(run_dir) if info.committed]


def test_committed_checkpoint_is_found_and_undamaged(tmp_path):
    path = write(tmp_path, 40)
    assert path == tmp_path / "checkpoints" / "step-00000040"
    assert store.newest(tmp_path) == path
    assert store.damaged_files(path) == []
    assert store.read_state(path)["step"] == 40


@pytest.mark.parametrize("damage", ["missing", "truncated", "no marker", "torn marker"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    older, newer = write(tmp_path, 10), write(tmp_path, 20)
    shard = newer / "shards" / "rank0.pt"
    match damage:
        case "missing":
            shard.unlink()
        case "truncated":
            shard.write_bytes(bytes(99))
        case "no marker":
            (newer / store.COMMITTED).unlink()
        case "torn marker":
            (newer / store.COMMITTED).write_text('{"files": {"sha')
    assert not store.is_committed(newer)
    assert store.newest(tmp_path) == older
    words = {
        "missing": "is gone",
        "truncated": "has 99 of 100 bytes",
        "no marker": "no COMMITTED",
        "torn marker": "is torn",
    }
    assert words[damage] in store.incomplete_reasons(newer)[0]


def test_a_flipped_bit_is_named(tmp_path):
    path = write(tmp_path, 10)
    data = bytearray((path / "shards" / "rank0.pt").read_bytes())
    data[50] ^= 1
    (path / "shards" / "rank0.pt").write_bytes(data)
    assert store.is_committed(path)  # sizes agree
    assert store.damaged_files(path) == ["shards/rank0.pt"]


def test_an_unfinished_save_is_no_checkpoint_and_is_cleaned(tmp_path):
    kept = write(tmp_path, 10)
    incomplete = store.folder(tmp_path) / (store.tag(20) + store.INCOMPLETE)
    incomplete.mkdir()
    assert store.newest(tmp_path) == kept
    assert store.prune(tmp_path, keep=2) == [incomplete]
    assert not incomplete.exists()


def test_a_damaged_checkpoint_that_was_moved_costs_no_complete_one(tmp_path):
    write(tmp_path, 40, best_step=40)
    store.quarantine(write(tmp_path, 60, best_step=40))
    write(tmp_path, 50, best_step=40)
    store.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [40, 50]
    assert sorted(path.name for path in store.folder(tmp_path).iterdir()) == ["step-00000040", "step-00000050"]


@pytest.mark.parametrize("ending", [store.INCOMPLETE, store.REPLACED])
def test_a_whole_checkpoint_without_its_name_gets_it_back(tmp_path, ending):
    path = write(tmp_path, 10)
    path.rename(path.with_name(path.name + ending))
    incomplete = store.folder(tmp_path) / (store.tag(20) + store.INCOMPLETE)
    incomplete.mkdir()
    assert store.newest(tmp_path) is None
    store.repair(tmp_path)
    assert store.newest(tmp_path) == path
    assert incomplete.exists()  # not whole: left to the next pruning


def test_a_checkpoint_that_is_read_is_not_pruned(tmp_path):
    first = write(tmp_path, 10)
    write(tmp_path, 20)
    reader = store.hold(first)
    assert store.prune(tmp_path, keep=1) == []
    reader.close()
    assert store.prune(tmp_path, keep=1) == [first]


def test_a_checkpoint_is_not_pruned_while_its_files_are_compared(tmp_path, monkeypatch):
    older = write(tmp_path, 10)
    write(tmp_path, 20)

    def prune_and_hash(path):
        assert store.prune(tmp_path, 1) == []
        return hash_file(path)

    monkeypatch.setattr(store, "hash_file", prune_and_hash)
    assert store.damaged_files(older) == []
    assert store.prune(tmp_path, 1) == [older]
    with pytest.raises(UserError, match="has removed it"):
        refuse_damaged(tmp_path, older)


def test_a_checkpoint_whose_removal_had_begun_is_gone_and_not_damaged(tmp_path, monkeypatch):
    path = write(tmp_path, 10)

    def remove_and_hash(file):
        (path / store.COMMITTED).unlink()
        return ""

    monkeypatch.setattr(store, "hash_file", remove_and_hash)
    with pytest.raises(FileNotFoundError):
        store.damaged_files(path)


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    write(tmp_path, 10, best_step=10)
    for step in (20, 30, 40):
        write(tmp_path, step, best_step=10)
    store.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [10, 30, 40]
    write(tmp_path, 50, best_step=50)  # a new best one: the old one has no privilege any more
    store.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [50]
    assert store.best(tmp_path) == store.newest(tmp_path)


def test_the_same_step_again_replaces_the_checkpoint(tmp_path):
    write(tmp_path, 10, size=100)
    path = write(tmp_path, 10, size=200)
    assert store.is_committed(path)
    assert (path / "shards" / "rank0.pt").stat().st_size == 200


def test_weights_alone_are_no_place_to_continue_from_and_cost_none(tmp_path):
    write(tmp_path, 10)
    for step in (20, 30, 40):
        write(tmp_path, step, weights_only=True)
    store.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [10, 30, 40]
    assert store.resumable(tmp_path).name == store.tag(10)
    assert store.newest(tmp_path).name == store.tag(40)


def test_entries_of_the_writers_are_compared_with_the_files(tmp_path):
    incomplete = store.folder(tmp_path) / (store.tag(10) + store.INCOMPLETE)
    incomplete.mkdir(parents=True)
    (incomplete / "rank0.pt").write_bytes(bytes(100))
    entry = {"bytes": 100, "xxh3_64": hash_file(incomplete / "rank0.pt")}
    with pytest.raises(OSError, match=r"rank1\.pt is not what was written"):
        store.commit(incomplete, {"step": 10}, {"rank0.pt": entry, "rank1.pt": entry})
    with pytest.raises(OSError, match=r"rank0\.pt is not what was written"):
        store.commit(incomplete, {"step": 10}, {"rank0.pt": {**entry, "bytes": 101}})
    assert store.newest(tmp_path) is None
    path = store.commit(incomplete, {"step": 10}, {"rank0.pt": entry})
    assert store.damaged_files(path) == []


def test_a_folder_that_not_all_ranks_see_is_refused(tmp_path, monkeypatch):
    write(tmp_path, 10)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    world = SimpleNamespace(
        is_main=False, rank=0, size=2, broadcast=lambda value: value, gather=lambda value: [value, None]
    )
    with pytest.raises(UserError, match="is there on the first rank, and not on all"):
        Checkpoints(run_config(), tmp_path, SimpleNamespace(swaps=True), world, {}, print).resume()


@pytest.mark.parametrize(
    ("ranks", "shares"),
    [
        (1, ["0 1 2 10 m s"]),
        (2, ["0 1 m s", "2 10"]),
        (4, ["0 m s", "1", "2", "10"]),
        (8, ["0 m s", "", "1", "", "2", ""]),
    ],
)
def test_ranks_hash_neighbours_and_every_file_once(ranks, shares):
    """Of another number of ranks, a rank needs most of what is in the files beside each other."""
    names = {number: f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt" for number in (10, 2, 0, 1)}
    names |= {"m": "mp_rank_00_model_states.pt", "s": "state.json"}
    found = [store.share_of_files(names.values(), rank, ranks) for rank in range(ranks)]
    for share, expected in zip(found, shares, strict=False):
        assert share == {names[int(word) if word.isdecimal() else word] for word in expected.split()}
    assert sum(len(share) for share in found) == len(set.union(*found)) == len(names)


def test_a_checkpoint_of_other_trained_weights_is_refused_and_other_errors_are_not(tmp_path, monkeypatch):
    """As an adapter that an earlier version put on more layers."""
    engine = SimpleNamespace(swaps=False, trained_names={"a.lora_A", "b.lora_A"})
    checkpoints = Checkpoints(run_config(), tmp_path, engine, SimpleNamespace(), {}, print)
    saved = {"a.lora_A": None, "b.lora_A": None, "c.lora_A": None}
    monkeypatch.setattr("dstune.checkpoint.session.Shards", lambda checkpoint: SimpleNamespace(shapes=saved))

    def load() -> None:
        with checkpoints._refused_other_weights(tmp_path / "checkpoints" / "step-00000002"):
            raise RuntimeError("The size of tensor a (2) must match the size of tensor b (3)")

    with pytest.raises(
        UserError, match=r"step-00000002 has other trained weights than the model: c\.lora_A is only in"
    ):
        load()
    del saved["c.lora_A"]
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        load()
