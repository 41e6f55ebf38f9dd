"""Computes the teacher's hidden states of all targets once, before the model is loaded, and caches them on disk."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from dstune.config.schema import Precision, RunConfig
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.core.paths import cache_root
from dstune.data import cache
from dstune.data.collate import NO_TARGET, collate
from dstune.data.inputs import PARTS
from dstune.data.prepared import PreparedData, Split, TargetStates
from dstune.data.sampler import MicroBatch, padded_batches, share
from dstune.models.cross_entropy import chunk_rows
from dstune.models.heads.base import Batch
from dstune.models.logit_transform import LogitTransform
from dstune.tasks.distillation.teacher import ChunkedLogits, LoadedTeacher, TeacherLogits, load_teacher, run_of_teacher
from dstune.tasks.preference.reference import identity_at_start

activity = logging.getLogger(__name__)

STATES = "teacher_states"
"""Key of a batch: the teacher's last hidden states, [targets, hidden size], as float32, or bits of bfloat16 or float16 as int16."""
PROJECTION, DESCRIPTION = "projection.safetensors", "description.json"


class CachedTeacher:
    """A teacher with only its projection in memory; each batch brings the hidden states."""

    def __init__(self, folder: Path):
        """folder: an entry of the cache."""
        described = json.loads((folder / DESCRIPTION).read_text())
        weights = load_file(folder / PROJECTION)
        self._weight, self._bias = weights["weight"], weights.get("bias")
        self._dtype: torch.dtype = getattr(torch, described["dtype"])
        self._transform = LogitTransform(described["scale"], described["cap"])

    def observe(self, forward: Any, batch: Batch, positions: Tensor, width: int) -> TeacherLogits:
        states = batch[STATES]
        assert len(states) == len(positions), f"{len(states)} hidden states for {len(positions)} targets"
        if self._weight.device != states.device:
            self._weight = self._weight.to(states.device)
            self._bias = None if self._bias is None else self._bias.to(states.device)
        hidden = states if states.is_floating_point() else states.view(self._dtype)
        return ChunkedLogits(hidden, self._project, self._transform, chunk_rows(hidden, len(self._weight)))

    def _project(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self._weight, self._bias)

    def close(self) -> None:
        pass


def batch_with_states(
    config: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool
) -> dict[str, np.ndarray]:
    """Return the arrays of a micro-batch (`data.collate`) with the hidden states of its samples, in the order of their targets."""
    states = split.target_states
    assert states is not None
    packing = config.data.packing
    batch = collate(split, micro_batch, pad_token_id=pad_token_id, packing=packing, with_index=with_index)
    rows = [states.of(split.row(index)) for row in micro_batch.rows for index in row]
    values = states.values[:0] if micro_batch.filler else np.concatenate(rows)
    return {**{name: tensor.numpy() for name, tensor in batch.items()}, STATES: values}


def with_cached_teacher(
    config: RunConfig, data: PreparedData, tokenizer: Any, world: World, precision: Precision
) -> tuple[PreparedData, CachedTeacher]:
    """Return `data` with the teacher's hidden states of every sample. If any node lacks them in its cache, all ranks load the
    teacher, compute the states and close the teacher again.

    Raises:
        UserError: from `load_teacher`, or because the disk of the cache has no room for the states.
    """
    root = cache_root() / "teachers"
    parts = [data.fingerprint, identity_at_start(run_of_teacher(config), world), precision.name]
    key = xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())
    splits = _splits_by_name(data)
    if world.any(not (root / key).is_dir()):
        teacher = load_teacher(config, tokenizer, world, precision)
        try:
            _compute(config, splits, teacher, tokenizer.pad_token_id, world, root, key)
        finally:
            teacher.close()
        world.barrier()
    folder = root / key
    states = {
        name: TargetStates(np.load(folder / f"{name}.npy", mmap_mode="r"), _starts(split))
        for name, split in splits.items()
    }
    parts_with_states: dict[str, Any] = {
        part: replace(splits[part], target_states=states[part]) for part in PARTS if part in splits
    }
    swapped = {
        part: replace(rows, split=replace(rows.split, target_states=states[f"swapped-{part}"]))
        for part, rows in data.swapped.items()
    }
    return replace(data, **parts_with_states, swapped=swapped), CachedTeacher(folder)


def _splits_by_name(data: PreparedData) -> dict[str, Split]:
    named = {part: split for part in PARTS if (split := getattr(data, part)) is not None}
    return named | {f"swapped-{part}": rows.split for part, rows in data.swapped.items()}


def _starts(split: Split) -> np.ndarray:
    """Return the offset of each table row's targets among all targets of the split, int64 [rows + 1]."""
    counts = np.zeros(len(split.table), dtype=np.int64)
    counts[slice(None) if split.rows is None else split.rows] = split.weights
    return np.concatenate([[0], np.cumsum(counts)])


def _compute(
    config: RunConfig,
    splits: Mapping[str, Split],
    teacher: LoadedTeacher,
    pad_token_id: int,
    world: World,
    root: Path,
    key: str,
) -> None:
    """Write the entry `key` on every node: each rank computes a share of the states, and the first rank of a node writes all."""
    with _unfinished_entry(root, key) if world.local_rank == 0 else nullcontext() as folder:
        targets = sum(int(_starts(split)[-1]) for split in splits.values())
        done, size = 0, None
        for name, split in splits.items():
            starts, array = _starts(split), None
            local_batches = share(padded_batches(split.lengths, config), world.rank, world.size)
            for number, micro_batch in enumerate(local_batches):
                activity.info(
                    "the teacher reads the %s rows", name, extra={"done": number + 1, "total": len(local_batches)}
                )
                batch = collate(split, micro_batch, pad_token_id=pad_token_id, packing=False)
                states = teacher.states_of({part: value.to(teacher.device) for part, value in batch.items()})
                counts = (batch["labels"] != NO_TARGET).sum(dim=1).tolist()
                rows = [] if micro_batch.filler else [split.row(index) for index in micro_batch.samples]
                for of_rank, values in world.gather((list(zip(rows, counts, strict=False)), _as_array(states))):
                    if folder is None:
                        continue
                    if array is None:
                        size = values.shape[1]
                        if not done:
                            _check_room(root, targets * size * values.itemsize)
                        shape = (int(starts[-1]), size)
                        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", values.dtype, shape)
                    begin = 0
                    for row, count in of_rank:
                        assert starts[row + 1] - starts[row] == count, "a weight is not the number of targets"
                        array[starts[row] : starts[row + 1]] = values[begin : begin + count]
                        begin += count
                    done += begin
            if array is not None:
                array.flush()
        if folder is not None:
            save_file(teacher.projection(), folder / PROJECTION)
            transform = teacher.transform
            described = {"dtype": teacher.dtype, "scale": transform.scale, "cap": transform.cap}
            (folder / DESCRIPTION).write_text(json.dumps(described))
            cache.entry(root, key, _moved_from(folder))


@contextmanager
def _unfinished_entry(root: Path, key: str) -> Iterator[Path]:
    """Yield a temporary folder for this process, since several runs may compute the entry `key` at once; it is removed after the
    block. Folders of killed processes, whose locks nobody holds, are removed first."""
    root.mkdir(parents=True, exist_ok=True)
    for path in root.glob(f"{key}.*.unfinished.lock"):
        with suppress(Timeout), FileLock(path, timeout=0):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)
    folder = root / f"{key}.{secrets.token_hex(8)}.unfinished"
    lock = folder.with_name(f"{folder.name}.lock")
    with FileLock(lock):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _moved_from(folder: Path) -> Callable[[Path], None]:
    def move(into: Path) -> None:
        for file in folder.iterdir():
            os.replace(file, into / file.name)

    return move


def _as_array(states: Tensor) -> np.ndarray:
    """Copy states [targets, hidden size] to the host. numpy has no bfloat16, so numbers of two bytes become the bits, as int16."""
    states = states.detach().cpu().contiguous()
    return (states if states.dtype is torch.float32 else states.view(torch.int16)).numpy()


def _check_room(root: Path, size: int) -> None:
    free = shutil.disk_usage(root).free
    if size > free:
        gib = 1024**3
        reason = f"the hidden states need {size / gib:.1f} GiB, and {root} has {free / gib:.1f} GiB left"
        raise UserError(
            Problem("task.teacher_cache", reason, "task.teacher_cache=false, or DSTUNE_CACHE on a larger disk", "true")
        )
