"""Reads complete parameters and their optimizer states from DeepSpeed's shards, on a CPU, one at a time.

What the shards hold, as of DeepSpeed 0.19 (its own `zero_to_fp32` joins all of them in memory first):

- Stage 0: `mp_rank_00_model_states.pt` has the module's weights.
- Stages 1 and 2: the fp32 weights of a parameter group lie end to end in one vector, which is cut into a piece for each
  rank (`*zero_pp_rank_R_mp_rank_00_optim_states.pt`). A parameter may lie across two ranks.
- Stage 3: every parameter is cut into an equal piece for each rank, the last one padded. A rank's pieces lie end to end
  in its vectors.

Names and shapes, in that order, are in the model states. Frozen parameters are not saved at all.

Where ranks share weights (`dstune.zero.slices`), there are such files for each slice (`mp_rank_00`, `mp_rank_01`, ...), and the
model states tell which parameters are cut, and along which dimension.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dstune.checkpoint import store
from dstune.core.errors import Problem, UserError
from dstune.zero.engine import PARAMETER_GROUPS
from dstune.zero.restore import WEIGHT
from dstune.zero.safe_load import load
from dstune.zero.slices import CUTS
from dstune.zero.weight_files import BUFFER, weights_file


class Shards:
    """The trained parameters of a checkpoint, their optimizer's tensors and the buffers, by the names of the module's.

    The files are mapped into memory: a read costs the elements that it returns. Weights are fp32 where the optimizer
    keeps fp32 weights (at stages 1 to 3 it always does), else as the module has them.
    """

    buffers: dict[str, Tensor]
    loss_scaler: Any
    global_steps: int

    def __init__(self, checkpoint: Path):
        self._held = store.hold(checkpoint) if store.is_committed(checkpoint) else None
        self._layout: _Layout
        if files := sorted(checkpoint.glob(weights_file("*"))):
            slices = _pieces_by_slice(files)
            self.buffers = {key: value for pieces in slices for key, value in pieces.buffers.items()}
            self.loss_scaler, self.global_steps = None, slices[0].global_steps
            self._layout = _joined(slices, slices[0].cuts)
            return
        model_files = _by_rank(checkpoint, "*_model_states.pt")
        if not model_files:
            reason = "it holds no weights: neither *_model_states.pt nor those of a save with weights alone"
            raise UserError(Problem("checkpoint", reason, "give another checkpoint of the run", str(checkpoint)))
        optim_files = _by_rank(checkpoint, "*_optim_states.pt")
        first = _load(model_files[0][0])
        all_optims = [[_load(path)["optimizer_state_dict"] for path in of_slice] for of_slice in optim_files]
        self.loss_scaler = all_optims[0][0].get("loss_scaler") if all_optims else None
        self.global_steps = first["global_steps"]
        names = set(first["buffer_names"])
        self.buffers = {key: value for key, value in first["module"].items() if key in names}
        layouts: list[_Layout]
        if not all_optims:
            layouts = [_Whole(_load(path)) for path, *_ in model_files]
        elif "fp32_flat_groups" in all_optims[0][0]:
            layouts = [_Parameters(first["param_shapes"], optims) for optims in all_optims]
        else:
            layouts = [_Groups(first["param_shapes"], optims) for optims in all_optims]
        self._layout = _joined(layouts, first.get(CUTS, {}))

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shapes of the trained parameters; at stage 0 a tied weight has each of its names."""
        return self._layout.shapes

    def read(self, name: str, kind: str = WEIGHT, start: int = 0, count: int | None = None) -> Tensor:
        """Return elements [start, start + count) of a flattened parameter, or of the optimizer's tensor `kind` for it."""
        size = math.prod(self.shapes[name])
        return self._layout.read(name, kind, start, size - start if count is None else count)

    def kinds(self, name: str) -> tuple[str, ...]:
        """Return the optimizer's tensors of the parameter's size: `exp_avg` and `exp_avg_sq` of AdamW, ..."""
        state = self._layout.state(name)
        return tuple(key for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0)

    def scalars(self, name: str) -> dict[str, Any]:
        """Return what else the optimizer keeps for a parameter: `step` of AdamW."""
        kinds = self.kinds(name)
        return {key: value for key, value in self._layout.state(name).items() if key not in kinds}


def in_pieces(checkpoint: Path) -> bool:
    """Return whether the checkpoint is in dstune's safetensors files, which DeepSpeed cannot read."""
    return any(checkpoint.glob(weights_file("*")))


class Weights(Mapping[str, Tensor]):
    """The trained parameters and the buffers of a checkpoint; each is read on access."""

    def __init__(self, checkpoint: Path):
        self._shards = Shards(checkpoint)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._shards.buffers:
            return self._shards.buffers[name]
        return self._shards.read(name).view(self._shards.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter({**self._shards.buffers, **self._shards.shapes})

    def __len__(self) -> int:
        return len({**self._shards.buffers, **self._shards.shapes})

    @property
    def parameters(self) -> set[str]:
        return set(self._shards.shapes) - set(self._shards.buffers)


class _Layout(ABC):
    """Maps the elements of a parameter to the files."""

    shapes: dict[str, torch.Size]

    @abstractmethod
    def read(self, name: str, kind: str, start: int, count: int) -> Tensor: ...

    @abstractmethod
    def state(self, name: str) -> dict[str, Any]:
        """Return the first rank's optimizer state of the partition with this parameter."""


class _Whole(_Layout):
    """Stage 0. The optimizer numbers the parameters in the order of its groups (`PARAMETER_GROUPS`)."""

    def __init__(self, model: dict[str, Any]):
        buffers = set(model["buffer_names"])
        self._weights = {name: weight for name, weight in model["module"].items() if name not in buffers}
        self.shapes = {name: weight.shape for name, weight in self._weights.items()}
        states = (model.get("optimizer") or {}).get("state", {})
        ordered = [name for group in model.get(PARAMETER_GROUPS, ()) for name in group]
        self._states = {name: states[index] for index, name in enumerate(ordered) if index in states}

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        tensor = self._weights[name] if kind == WEIGHT else self._states[name][kind]
        return tensor.reshape(-1)[start : start + count]

    def state(self, name: str) -> dict[str, Any]:
        return self._states.get(name, {})


class _Groups(_Layout):
    """Stages 1 and 2."""

    def __init__(self, param_shapes: list[dict[str, Any]], optims: list[dict[str, Any]]):
        self._optims = optims
        self.shapes = {}
        self._places: dict[str, tuple[int, int]] = {}
        paddings = optims[0].get("param_alignment_paddings")
        for group, shapes in enumerate(param_shapes):
            offset = 0
            for index, (name, shape) in enumerate(shapes.items()):
                self.shapes[name] = torch.Size(shape)
                self._places[name] = group, offset
                offset += math.prod(shape) + (paddings[group][index] if paddings else 0)

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        group, offset = self._places[name]
        if kind == WEIGHT:
            pieces = [optim["single_partition_of_fp32_groups"][group] for optim in self._optims]
        else:
            pieces = [optim["base_optimizer_state"]["state"][group][kind] for optim in self._optims]
        return cut(pieces, offset + start, count)

    def state(self, name: str) -> dict[str, Any]:
        group, _ = self._places[name]
        return self._optims[0]["base_optimizer_state"]["state"].get(group, {})


class _Parameters(_Layout):
    """Stage 3."""

    def __init__(self, param_shapes: list[dict[str, Any]], optims: list[dict[str, Any]]):
        self._weights = [optim["fp32_flat_groups"] for optim in optims]
        self._states = [optim["optimizer_state_dict"]["state"] for optim in optims]
        self.shapes = {}
        self._places: dict[str, tuple[int, int]] = {}
        offset = 0
        for shapes in param_shapes:
            for name, shape in shapes.items():
                share = math.ceil(math.prod(shape) / len(optims))
                self.shapes[name] = torch.Size(shape)
                self._places[name] = offset, share
                offset += share
        element_count = sum(piece.numel() for piece in self._weights[0])
        assert offset == element_count, f"the shards hold {element_count} elements a rank, the parameters take {offset}"

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        offset, share = self._places[name]
        parts, end = [], start + count
        for rank, weights in enumerate(self._weights):
            first, last = max(start, rank * share), min(end, (rank + 1) * share)
            if first < last:
                pieces = weights
                if kind != WEIGHT:
                    pieces = [self._states[rank][index][kind] for index in range(len(weights))]
                parts.append(cut(pieces, offset + first - rank * share, last - first))
        return torch.cat(parts) if parts else torch.empty(0)

    def state(self, name: str) -> dict[str, Any]:
        offset, _ = self._places[name]
        for index, piece in enumerate(self._weights[0]):
            if offset < piece.numel():
                return self._states[0].get(index, {})
            offset -= piece.numel()
        raise AssertionError(f"{name} lies behind the end of the shards")


class _Pieces(_Layout):
    """The safetensors of a save of weights alone (`Engine.save_weights`), or of states on a disk: at any stage, pieces of
    flattened parameters and of what the optimizer keeps of them (`dstune.zero.restore.pieces`)."""

    def __init__(self, files: list[Any]):
        """files: of one slice, opened."""
        metadata = files[0].metadata()
        self.cuts: dict[str, int] = json.loads(metadata.get("cuts", "{}"))
        self.shapes = {name: torch.Size(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        self.global_steps = int(metadata["global_steps"])
        self.buffers: dict[str, Tensor] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self._counters: dict[str, dict[str, Tensor]] = {}
        for opened in files:
            for key in opened.keys():  # noqa: SIM118  (it is no mapping)
                if key.startswith(BUFFER):
                    self.buffers[key.removeprefix(BUFFER)] = opened.get_tensor(key)
                    continue
                kind, _, name_and_start = key.rpartition(":")
                name, at, start = name_and_start.rpartition("@")
                if at:
                    self._pieces.setdefault((name, kind or WEIGHT), []).append((int(start), opened.get_slice(key)))
                else:
                    self._counters.setdefault(name_and_start, {})[kind] = opened.get_tensor(key)

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        values = torch.empty(count)
        filled = 0
        for begin, piece in self._pieces[name, kind]:
            first, last = max(start, begin), min(start + count, begin + piece.get_shape()[0])
            if first < last:
                values[first - start : last - start] = piece[first - begin : last - begin]
                filled += last - first
        assert filled == count, f"{count - filled} elements of {name} are in no file"
        return values

    def state(self, name: str) -> dict[str, Any]:
        # Their elements are in several files: only the shape says that they are tensors of the parameter's size.
        size = math.prod(self.shapes[name])
        kinds = (kind for key, kind in self._pieces if key == name and kind != WEIGHT)
        return {kind: torch.empty(size, device="meta") for kind in kinds} | self._counters.get(name, {})


class _Slices(_Layout):
    """Joins complete parameters from slices of equal shape. Each read assembles the complete parameter."""

    def __init__(self, slices: Sequence[_Layout], cuts: Mapping[str, int]):
        self._slices, self._cuts = slices, cuts
        self.shapes = {}
        for name, shape in slices[0].shapes.items():
            whole = list(shape)
            if name in cuts:
                whole[cuts[name]] *= len(slices)
            self.shapes[name] = torch.Size(whole)

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        if name not in self._cuts:
            return self._slices[0].read(name, kind, start, count)
        shape = self._slices[0].shapes[name]
        parts = [part.read(name, kind, 0, math.prod(shape)).view(shape) for part in self._slices]
        return torch.cat(parts, dim=self._cuts[name]).view(-1)[start : start + count]

    def state(self, name: str) -> dict[str, Any]:
        return self._slices[0].state(name)


def _joined(slices: Sequence[_Layout], cuts: Mapping[str, int]) -> _Layout:
    return slices[0] if len(slices) == 1 else _Slices(slices, cuts)


def _pieces_by_slice(files: list[Path]) -> list[_Pieces]:
    by_slice: dict[int, list[Any]] = {}
    for opened in (safe_open(file, framework="pt") for file in files):
        by_slice.setdefault(int(opened.metadata().get("slice", 0)), []).append(opened)
    return [_Pieces(by_slice[number]) for number in sorted(by_slice)]


def cut(pieces: Sequence[Tensor], start: int, count: int) -> Tensor:
    """Return elements [start, start + count) of the one-dimensional `pieces` laid end to end, as a new tensor [count]."""
    parts = []
    for piece in pieces:
        first, last = max(start, 0), min(start + count, piece.numel())
        if first < last:
            parts.append(piece[first:last])
        start -= piece.numel()
    values = torch.cat(parts) if parts else torch.empty(0)
    assert values.numel() == count, f"the shards end {count - values.numel()} elements early"
    return values


def _by_rank(checkpoint: Path, pattern: str) -> list[list[Path]]:
    """Return the files of each slice in numerical order of their ranks: rank 10 comes after rank 9."""

    def numbers(path: Path) -> tuple[int, int]:
        matches = (re.search(form, path.name) for form in (r"mp_rank_(\d+)_", r"zero_pp_rank_(\d+)_"))
        of_slice, rank = (int(each[1]) if each else 0 for each in matches)
        return of_slice, rank

    by_slice: dict[int, list[Path]] = {}
    for path in sorted(checkpoint.glob(pattern), key=numbers):
        by_slice.setdefault(numbers(path)[0], []).append(path)
    return list(by_slice.values())


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = load(path, mmap=True)
    return loaded
