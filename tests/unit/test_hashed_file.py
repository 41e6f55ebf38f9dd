"""Shards are hashed while torch reads them: each byte once, whatever is in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstune.core.files import hash_file
from dstune.zero.safe_load import BLOCK, HashedFile, load_and_hash


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def states() -> dict[str, object]:
    shared = torch.randn(300_000)
    large = torch.randn(2_000_000)
    return {
        "empty": {},
        "numbers": {"step": 3, "names": ["a", "b"]},
        "small": {str(number): torch.randn(number) for number in range(200)},
        "large": {"weights": large, "state": {"exp_avg": large + 1, "step": torch.tensor(3.0)}},
        "shared": {"whole": shared, "view": shared[100:200], "again": [shared]},
        "bf16": {"module": {"a": torch.randn(1000, 1000).bfloat16()}},
    }


def assert_equal(left: object, right: object) -> None:
    if isinstance(right, dict):
        assert isinstance(left, dict) and left.keys() == right.keys()
        for key in right:
            assert_equal(left[key], right[key])
    elif isinstance(right, list):
        assert isinstance(left, list)
        for pair in zip(left, right, strict=True):
            assert_equal(*pair)
    elif isinstance(right, torch.Tensor):
        assert isinstance(left, torch.Tensor) and torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("name", states())
def test_the_hash_is_that_of_the_file_and_the_state_what_was_saved(tmp_path, name):
    path, state = tmp_path / "shard.pt", states()[name]
    torch.save(state, path)
    loaded = load_and_hash(path)
    assert loaded.error is None
    assert loaded.xxh3_64 == hash_file(path)
    assert_equal(loaded.state, state)


def test_each_byte_is_read_once(tmp_path):
    path = tmp_path / "shard.pt"
    torch.save(states()["large"], path)
    load_and_hash(path)  # whatever is imported by it
    size, before = path.stat().st_size, bytes_read()
    load_and_hash(path)
    assert size <= bytes_read() - before < 1.02 * size


def test_reads_in_any_order_give_the_hash(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(torch.randint(0, 256, (3 * BLOCK,), dtype=torch.uint8).numpy().tobytes())
    for order in ([0, 1, 2], [2, 1, 0], [2], [1, 0, 1], []):
        with HashedFile(path) as file:
            for place in order:
                file.seek(place * BLOCK)
                assert len(file.read(BLOCK)) == BLOCK
            assert file.hexdigest() == hash_file(path)


@pytest.mark.parametrize("place", [0, 0.001, 0.5, 0.999])
def test_damage_is_in_the_hash_wherever_it_is(tmp_path, place):
    """In the structure the file cannot be read any more; in the numbers only the hash tells."""
    path = tmp_path / "shard.pt"
    torch.save(states()["large"], path)
    expected = hash_file(path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    loaded = load_and_hash(path)
    assert loaded.xxh3_64 != expected
    assert loaded.xxh3_64 == hash_file(path)
    assert (loaded.error is None) == (loaded.state is not None)
