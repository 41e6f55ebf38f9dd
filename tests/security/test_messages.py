"""Ranks send each other values as they are, bit for bit, and execute nothing of what they receive."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dstune.core.messages import decode, encode

VALUES: list[Any] = [
    None,
    True,
    -(2**80),
    0.1,
    -0.0,
    5e-324,
    float("inf"),
    "a \ud800 \x00 ü",
    b"\x00\xff",
    Path("/a b"),
    [],
    (),
    {},
    [(1, [2, (3,)]), {"tuple": [1], 2: None, (1, "a"): {}}],
    {"map": 1},
    {"bytes": 3},
    np.float32(0.1),
    np.int64(-1),
    np.bool_(True),
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.zeros((0, 4), dtype=np.float64),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array(["a", "üb"]),
    torch.arange(6, dtype=torch.int64).reshape(2, 3).T,
    torch.tensor([0.1, math.nan, -0.0], dtype=torch.bfloat16),
    torch.tensor([True, False]),
    torch.tensor(1.5, dtype=torch.float16, requires_grad=True),
    torch.zeros(3, 0, dtype=torch.float64),
]


def same(one: Any, other: Any) -> bool:
    assert type(one) is type(other) or (isinstance(one, Path) and isinstance(other, Path)), (type(one), type(other))
    if isinstance(one, torch.Tensor):
        bits = [part.detach().contiguous().reshape(-1).view(torch.uint8) for part in (one, other) if part.numel()]
        return one.dtype == other.dtype and one.shape == other.shape and (not bits or torch.equal(*bits))
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__} {str(value)[:12]!r}")
def test_what_is_sent_is_received_bit_for_bit(value: Any) -> None:
    assert same(decode(encode(value)), value)
    together = {"a": [value, value], "b": (value, {"c": value})}
    assert same(decode(encode(together)), together)


def test_what_is_received_can_be_changed() -> None:
    array, tensor = decode(encode((np.zeros(3), torch.zeros(3))))
    array[0] = tensor[0] = 1
    assert array.tolist() == tensor.tolist() == [1, 0, 0]


RAN: list[int] = []


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (RAN.append, (1,))


@pytest.mark.parametrize(
    "value",
    [Evil(), {1, 2}, np.array([Evil()], dtype=object), object, len],
    ids=["reduced", "set", "array of objects", "class", "function"],
)
def test_objects_are_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="ranks send no"):
        encode([value])


def framed(text: bytes, further: bytes = b"12345678") -> bytes:
    return len(text).to_bytes(8, "little") + text + further


@pytest.mark.parametrize(
    "message",
    [
        pickle.dumps(Evil()),
        framed(b'{"array":["O",[1],8]}'),
        framed(b'{"array":["O",[1],99]}', pickle.dumps(Evil())),
        framed(b'{"eval":1}'),
        framed(b'{"tensor":["load",[1],8]}'),
        framed(b"", pickle.dumps(Evil())),
    ],
)
def test_what_others_send_runs_nothing(message: bytes) -> None:
    RAN.clear()
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, OverflowError)):
        decode(message)
    assert RAN == []


def test_no_part_of_dstune_sends_pickles() -> None:
    """`*_object*` of torch.distributed are pickles."""
    package = Path(__file__).parents[2] / "dstune"
    sending = ("gather_object", "broadcast_object", "scatter_object", "send_object", "recv_object")
    found = [str(file) for file in package.rglob("*.py") if any(name in file.read_text() for name in sending)]
    assert found == []
