"""Whole fp32 weights out of DeepSpeed's shards, on a CPU, one parameter at a time.

What the shards hold, as of DeepSpeed 0.19 (its own `zero_to_fp32` joins all of them in memory first):

- Stage 0: `mp_rank_00_model_states.pt` has the module's weights.
- Stages 1 and 2: the fp32 weights of a parameter group lie end to end in one vector, which is cut into a piece for each
  rank (`*zero_pp_rank_R_mp_rank_00_optim_states.pt`). A parameter may lie across two ranks.
- Stage 3: every parameter is cut into an equal piece for each rank, the last one padded. A rank's pieces lie end to end
  in its vectors.

Names and shapes, in that order, are in the model states. Frozen parameters are not saved at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Weights(Mapping[str, Tensor]):
    """The trained parameters and the buffers of a checkpoint by the names of the module's; read when asked for.

    The files are mapped into memory, so a lookup costs the one tensor: fp32 where the optimizer keeps fp32 weights (at
    stages 1 to 3 it always does), else as the module has it.
    """

    def __init__(self, checkpoint: Path):
        states = [_load(path) for path in _by_rank(checkpoint, "*_model_states.pt")]
        shards = [_load(path)["optimizer_state_dict"] for path in _by_rank(checkpoint, "*_optim_states.pt")]
        state = states[0]
        if shards:
            buffers = set(state["buffer_names"])
            self._read = {name: _constant(state["module"][name]) for name in buffers if name in state["module"]}
            stage3 = "fp32_flat_groups" in shards[0]
            self._read |= _partitioned_parameters(state, shards) if stage3 else _partitioned_groups(state, shards)
        else:
            self._read = {name: _constant(weight) for name, weight in state["module"].items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


Reader = Callable[[], Tensor]


def _partitioned_groups(state: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Reader]:
    """Stages 1 and 2."""
    readers: dict[str, Reader] = {}
    paddings = shards[0].get("param_alignment_paddings")
    for group, shapes in enumerate(state["param_shapes"]):
        pieces = [shard["single_partition_of_fp32_groups"][group] for shard in shards]
        offset = 0
        for index, (name, shape) in enumerate(shapes.items()):
            readers[name] = _part(pieces, offset, torch.Size(shape))
            offset += math.prod(shape) + (paddings[group][index] if paddings else 0)
    return readers


def _part(pieces: Sequence[Tensor], offset: int, shape: torch.Size) -> Reader:
    return lambda: cut(pieces, offset, math.prod(shape)).view(shape)


def _partitioned_parameters(state: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Reader]:
    """Stage 3."""
    readers: dict[str, Reader] = {}
    ranks = [shard["fp32_flat_groups"] for shard in shards]
    offset = 0
    for shapes in state["param_shapes"]:
        for name, shape in shapes.items():
            share = math.ceil(math.prod(shape) / len(ranks))
            readers[name] = _joined(ranks, offset, share, torch.Size(shape))
            offset += share
    held = sum(piece.numel() for piece in ranks[0])
    assert offset == held, f"the shards hold {held} elements a rank, the parameters take {offset}"
    return readers


def _joined(ranks: Sequence[Sequence[Tensor]], offset: int, share: int, shape: torch.Size) -> Reader:
    def read() -> Tensor:
        whole = torch.cat([cut(pieces, offset, share) for pieces in ranks])
        return whole[: math.prod(shape)].view(shape)

    return read


def cut(pieces: Sequence[Tensor], start: int, count: int) -> Tensor:
    """Elements [start, start + count) of the one-dimensional `pieces` laid end to end, as a new tensor [count]."""
    parts = []
    for piece in pieces:
        first, last = max(start, 0), min(start + count, piece.numel())
        if first < last:
            parts.append(piece[first:last])
        start -= piece.numel()
    found = torch.cat(parts) if parts else torch.empty(0)
    assert found.numel() == count, f"the shards end {count - found.numel()} elements early"
    return found


def _constant(tensor: Tensor) -> Reader:
    return lambda: tensor


def _by_rank(checkpoint: Path, pattern: str) -> list[Path]:
    """The files in the order of the rank in their name: rank 10 comes after rank 9."""

    def rank(path: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)_", path.name)
        return int(found[1]) if found else 0

    return sorted(checkpoint.glob(pattern), key=rank)


def _load(path: Path) -> dict[str, Any]:
    # DeepSpeed pickles objects of its own, which the safe unpickler refuses; a run's checkpoints are the user's own.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
