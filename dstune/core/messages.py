"""Messages between ranks: values as JSON, followed by the bytes of tensors and arrays. Decoding executes nothing.

`torch.distributed` sends objects as pickles, which run code when they are read. Here plain values keep their types, including
tuples, and floats are bit-equal; other types are refused on sending.
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
    """Encode a value of None, booleans, numbers, texts, bytes, paths, lists, tuples, mappings, arrays and tensors. Raises TypeError
    for anything else."""
    blocks: list[bytes] = []

    def block(content: bytes) -> int:
        blocks.append(content)
        return len(content)

    def array(value: np.ndarray) -> list[Any]:
        if value.dtype.hasobject:
            raise TypeError(f"ranks send no arrays of objects: {value.dtype}")
        return [value.dtype.str, list(value.shape), block(value.tobytes())]

    def packed(value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind is list:
            return [packed(part) for part in value]
        # Mappings are always wrapped, so that no mapping can be mistaken for a wrapper.
        if isinstance(value, dict):
            return {"map": [[packed(key), packed(part)] for key, part in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [packed(part) for part in value]}
        if isinstance(value, torch.Tensor):
            content = value.detach().cpu().contiguous()
            as_bytes = content.reshape(-1).view(torch.uint8).numpy().tobytes() if content.numel() else b""
            return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), block(as_bytes)]}
        if isinstance(value, np.ndarray):
            return {"array": array(value)}
        if isinstance(value, np.generic):
            return {"number": array(np.asarray(value))}
        if isinstance(value, bytes):
            return {"bytes": block(value)}
        if isinstance(value, Path):
            return {"path": str(value)}
        if isinstance(value, str):  # of the environment
            return str(value)
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

    def array(fields: list[Any]) -> np.ndarray:
        kind, shape, size = fields
        return np.frombuffer(block(size), dtype=np.dtype(kind)).reshape(shape)

    def tensor(fields: list[Any]) -> torch.Tensor:
        kind, shape, size = fields
        dtype = getattr(torch, kind)
        flat = torch.frombuffer(block(size), dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return flat.reshape(shape)

    read: dict[str, Callable[[Any], Any]] = {
        "map": lambda parts: {unpacked(key): unpacked(part) for key, part in parts},
        "tuple": lambda parts: tuple(unpacked(part) for part in parts),
        "tensor": tensor,
        "array": array,
        "number": lambda fields: array(fields)[()],
        "bytes": lambda size: bytes(block(size)),
        "path": Path,
    }

    def unpacked(value: Any) -> Any:
        if type(value) is list:
            return [unpacked(part) for part in value]
        if type(value) is not dict:
            return value
        ((kind, content),) = value.items()
        return read[kind](content)

    return unpacked(json.loads(message[8:end]))


def gather(value: Any, group: Any = None) -> list[Any]:
    """Gather the value of every rank of the group, in rank order, on every rank."""
    device = device_of(group)
    encoded = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8).to(device)
    size = torch.tensor([len(encoded)], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(size) for _ in range(torch_dist.get_world_size(group))]
    torch_dist.all_gather(sizes, size, group=group)
    lengths = [int(row) for row in sizes]
    padded = torch.empty(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(encoded)] = encoded
    gathered = [torch.empty_like(padded) for _ in lengths]
    torch_dist.all_gather(gathered, padded, group=group)
    return [decode(_bytes(row[:length])) for row, length in zip(gathered, lengths, strict=True)]


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
    """Return the device that tensors must be on for the group to send them."""
    on_cpu = torch_dist.get_backend(group) == "gloo"
    return torch.device("cpu") if on_cpu else torch.empty(0, device=torch.accelerator.current_accelerator()).device


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
