"""What ranks send each other: values as JSON, with tensors and arrays as bytes behind it. Nothing that is received is executed.

`torch.distributed` sends objects as pickles, which run code where they are read. Plain values keep their types here, tuples and
floats bit for bit; anything else is refused where it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist

PLAIN = (str, int, float, bool, type(None))


def encode(value: Any) -> bytes:
    """Raises TypeError: a value that is not made of None, booleans, numbers, texts, bytes, paths, lists, tuples, mappings,
    arrays and tensors."""
    blocks: list[bytes] = []

    def block(content: bytes) -> int:
        blocks.append(content)
        return len(content)

    def array(one: np.ndarray) -> list[Any]:
        if one.dtype.hasobject:
            raise TypeError(f"ranks send no arrays of objects: {one.dtype}")
        return [one.dtype.str, list(one.shape), block(one.tobytes())]

    def packed(one: Any) -> Any:
        kind = type(one)
        if kind in PLAIN:
            return one
        if kind is list:
            return [packed(part) for part in one]
        # A mapping is always marked, so that no mapping that is sent is taken for a mark.
        if isinstance(one, dict):
            return {"map": [[packed(key), packed(part)] for key, part in one.items()]}
        if isinstance(one, tuple):
            return {"tuple": [packed(part) for part in one]}
        if isinstance(one, torch.Tensor):
            content = one.detach().cpu().contiguous()
            as_bytes = content.reshape(-1).view(torch.uint8).numpy().tobytes() if content.numel() else b""
            return {"tensor": [str(one.dtype).removeprefix("torch."), list(one.shape), block(as_bytes)]}
        if isinstance(one, np.ndarray):
            return {"array": array(one)}
        if isinstance(one, np.generic):
            return {"number": array(np.asarray(one))}
        if isinstance(one, bytes):
            return {"bytes": block(one)}
        if isinstance(one, Path):
            return {"path": str(one)}
        if isinstance(one, str):  # of the environment
            return str(one)
        raise TypeError(f"ranks send no {kind.__module__}.{kind.__qualname__}")

    text = json.dumps(packed(value), ensure_ascii=True, check_circular=False, separators=(",", ":")).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *blocks])


def decode(message: bytes) -> Any:
    """Rebuild the value that `encode` wrote."""
    end = 8 + int.from_bytes(message[:8], "little")
    position, whole = end, memoryview(message)

    def block(size: int) -> bytearray:
        nonlocal position
        position += size
        return bytearray(whole[position - size : position])

    def array(given: list[Any]) -> np.ndarray:
        kind, shape, size = given
        return np.frombuffer(block(size), dtype=np.dtype(kind)).reshape(shape)

    def tensor(given: list[Any]) -> torch.Tensor:
        kind, shape, size = given
        dtype = getattr(torch, kind)
        flat = torch.frombuffer(block(size), dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return flat.reshape(shape)

    read: dict[str, Callable[[Any], Any]] = {
        "map": lambda parts: {unpacked(key): unpacked(part) for key, part in parts},
        "tuple": lambda parts: tuple(unpacked(part) for part in parts),
        "tensor": tensor,
        "array": array,
        "number": lambda given: array(given)[()],
        "bytes": lambda size: bytes(block(size)),
        "path": Path,
    }

    def unpacked(one: Any) -> Any:
        if type(one) is list:
            return [unpacked(part) for part in one]
        if type(one) is not dict:
            return one
        ((kind, given),) = one.items()
        return read[kind](given)

    return unpacked(json.loads(message[8:end]))


def gather(value: Any, group: Any = None) -> list[Any]:
    """Gather the value of every rank of the group, in rank order, on every rank."""
    device = device_of(group)
    mine = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8).to(device)
    size = torch.tensor([len(mine)], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(size) for _ in range(torch_dist.get_world_size(group))]
    torch_dist.all_gather(sizes, size, group=group)
    lengths = [int(one) for one in sizes]
    padded = torch.empty(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in lengths]
    torch_dist.all_gather(everyone, padded, group=group)
    return [decode(_bytes(one[:length])) for one, length in zip(everyone, lengths, strict=True)]


def broadcast(value: Any, group: Any = None) -> Any:
    """Send the value of rank 0 to every rank."""
    device = device_of(group)
    first = torch_dist.get_rank() == 0
    content = (
        torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8) if first else torch.empty(0, dtype=torch.uint8)
    )
    size = torch.tensor([len(content)], dtype=torch.int64, device=device)
    torch_dist.broadcast(size, src=0, group=group)
    sent = content.to(device) if first else torch.empty(int(size), dtype=torch.uint8, device=device)
    torch_dist.broadcast(sent, src=0, group=group)
    return decode(_bytes(sent))


def device_of(group: Any) -> torch.device:
    """Return where tensors have to be for the group to send them."""
    on_cpu = torch_dist.get_backend(group) == "gloo"
    return torch.device("cpu") if on_cpu else torch.empty(0, device=torch.accelerator.current_accelerator()).device


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
