"""Reads a checkpoint of transformers' Trainer with DeepSpeed's shards: `checkpoint-50/global_step50/*_optim_states.pt`.

TRL, axolotl, LLaMA-Factory and ms-swift write it too. It comes from a stranger: shards and settings are pickles, which only
`dstune.zero.safe_load` reads, and the files of random states are not opened.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dstune.checkpoint.shards import Shards
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json, read_file
from dstune.zero.restore import WEIGHT
from dstune.zero.safe_load import Settings, load, load_settings, refuse_compressed

STATE, ARGUMENTS, LATEST = "trainer_state.json", "training_args.bin", "latest"
ADAPTER = "adapter_config.json"
MOMENTS = {"exp_avg", "exp_avg_sq"}
WHERE = "CHECKPOINT"
CLIPS_SINCE = (0, 19, 3)
"""Release of DeepSpeed from which on a file without `gradient_clipping` means 1.0; it was off before."""
MAX_STEPS = 10_000_000
"""Most steps of a run: each has a line in the file of its order."""


@dataclass(frozen=True)
class ParameterGroup:
    """A group of the optimizer's settings."""

    initial_lr: float | None
    """The peak of the rate; None if no schedule has noted it."""
    betas: list[float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class TrainerCheckpoint:
    """A checkpoint that another tool's run left."""

    folder: Path
    step: int
    total_steps: int
    state: Mapping[str, Any]
    """The content of `trainer_state.json`."""
    arguments: Settings
    deepspeed: Mapping[str, Any]
    """DeepSpeed's configuration, with numbers in the place of `auto`."""
    gradient_clipping: float
    """Largest norm of a gradient; 0 is off."""
    stage: int
    ranks: int
    groups: list[ParameterGroup]
    members: list[dict[str, torch.Size]]
    """Shapes of the trained parameters, in the parts of DeepSpeed's optimizer, none of which spans two of `groups`."""
    shards: Shards

    @property
    def has_adapter(self) -> bool:
        return (self.folder / ADAPTER).is_file()

    @property
    def precision(self) -> str:
        sections = [name for name in ("bf16", "fp16") if _section(self.deepspeed, name).get("enabled")]
        return sections[0] if sections else "fp32"

    def counter(self, name: str) -> float:
        """Return the steps that the optimizer has done with a parameter. Raises UserError if it does not say."""
        step = self.shards.scalars(name).get("step", self._group_step)
        if not isinstance(step, (int, float, torch.Tensor)) or (isinstance(step, torch.Tensor) and step.numel() != 1):
            raise _damaged(self.folder, f"the optimizer counts no steps for {name}")
        return float(step)

    _group_step: Any = None


def read(folder: Path) -> TrainerCheckpoint:
    """Read a checkpoint; tensors stay in their files until they are asked for.

    Raises UserError for a folder that is no such checkpoint, or is damaged.
    """
    state = _state(folder)
    shard_folder = _shard_folder(folder)
    with refused_damage(shard_folder):
        first = next(iter(sorted(shard_folder.glob("*_model_states.pt"))), None)
        optim_files = sorted(shard_folder.glob("*_optim_states.pt"))
        if first is None or not optim_files:
            reason = "it has no DeepSpeed shards of stage 1, 2 or 3 (*_optim_states.pt)"
            fix = "start a new run from its weights: model.path=CHECKPOINT, or method.adapter=CHECKPOINT for an adapter"
            raise UserError(Problem(WHERE, reason, fix, str(folder)))
        _refuse_other_layout(folder, [path.name for path in optim_files])
        for path in sorted(shard_folder.glob("*.pt")):
            refuse_compressed(path)
        model_states, optim_states = load(first, mmap=True), load(optim_files[0], mmap=True)["optimizer_state_dict"]
        optimizer = optim_states.get("base_optimizer_state") or optim_states["optimizer_state_dict"]
        checkpoint = TrainerCheckpoint(
            folder,
            state["global_step"],
            state["max_steps"],
            state,
            _arguments(folder),
            _config_of(model_states),
            _clipping(model_states, optim_states),
            int(getattr(optim_states["zero_stage"], "value", optim_states["zero_stage"])),
            len(optim_files),
            [_group(group) for group in optimizer["param_groups"]],
            [{name: torch.Size(shape) for name, shape in shapes.items()} for shapes in model_states["param_shapes"]],
            Shards(shard_folder),
            optimizer["param_groups"][0].get("step"),
        )
        _check_tensors(checkpoint, optim_files)
    return checkpoint


@contextmanager
def refused_damage(folder: Path) -> Iterator[None]:
    """Within the block, raise UserError for files that are not as DeepSpeed writes them."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = f"{Path(error.filename or folder).name} cannot be read: {error.strerror or error}"
        raise UserError(Problem(WHERE, reason, "give another checkpoint", str(folder))) from None
    except (
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        OverflowError,
    ) as error:
        raise _damaged(folder, (str(error) or type(error).__name__).splitlines()[0][:300]) from None


def _damaged(folder: Path, reason: str) -> UserError:
    reason = f"it is damaged, or no checkpoint of DeepSpeed: {reason}"
    return UserError(Problem(WHERE, reason, "give another checkpoint", str(folder)))


def _state(folder: Path) -> dict[str, Any]:
    if not (folder / STATE).is_file():
        newest = sorted(folder.glob("checkpoint-*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
        fix = (
            f"give {newest[-1]}"
            if newest
            else "give the folder checkpoint-N that the Trainer wrote, or a configuration"
        )
        raise UserError(Problem("FILE", f"this folder is no checkpoint of a Trainer (no {STATE})", fix, str(folder)))
    try:
        state = parse_json(read_file(folder / STATE))
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{STATE}: {error}") from None
    step, total = (state.get("global_step"), state.get("max_steps")) if isinstance(state, dict) else (None, None)
    if type(step) is not int or type(total) is not int or total > MAX_STEPS:
        raise _damaged(folder, f"{STATE} has no steps, or more than {MAX_STEPS:,}")
    if not 0 < step < total:
        reason = f"its run has no step left: {step} of {total} steps are done"
        fix = "start a new run from its weights: model.path=CHECKPOINT, or method.adapter=CHECKPOINT for an adapter"
        raise UserError(Problem(WHERE, reason, fix, str(folder)))
    return dict(state)


def _shard_folder(folder: Path) -> Path:
    tag = None
    if (folder / LATEST).is_file():
        with refused_damage(folder):
            tag = read_file(folder / LATEST, 1000).decode("utf-8", "replace").strip()
    if tag is None:
        reason = f"it has no DeepSpeed shards (no file {LATEST})"
        fix = (
            "only checkpoints of DeepSpeed are continued: start a new run from its weights with model.path=CHECKPOINT, or "
            "method.adapter=CHECKPOINT for an adapter"
        )
        raise UserError(Problem(WHERE, reason, fix, str(folder)))
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", tag) or tag in (".", "..") or not (folder / tag).is_dir():
        raise _damaged(folder, f"{LATEST} names {tag!r:.100}, which is no folder in it")
    return folder / tag


def _refuse_other_layout(folder: Path, names: list[str]) -> None:
    ranks = [re.fullmatch(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt", name) for name in names]
    if any(each is None or int(each[2]) for each in ranks):
        reason = f"its shards are split in more ways than ZeRO splits them: {names[-1]}"
        fix = "only runs without tensor, pipeline or expert parallelism are continued"
        raise UserError(Problem(WHERE, reason, fix, str(folder)))
    missing = sorted(set(range(len(names))) - {int(each[1]) for each in ranks if each})
    if missing:
        raise _damaged(folder, f"the shards of rank {missing[0]} are missing")


def _arguments(folder: Path) -> Settings:
    try:
        return load_settings(folder / ARGUMENTS)
    except OSError as error:
        reason = f"{ARGUMENTS} cannot be read: {error.strerror or error}"
    except ValueError as error:
        reason = f"{ARGUMENTS} is not read: {error}"
    raise UserError(Problem(WHERE, reason, "give a checkpoint as the Trainer wrote it", str(folder)))


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _config_of(model_states: Mapping[str, Any]) -> Mapping[str, Any]:
    if config := _section(model_states, "ds_config"):
        return config
    raise ValueError("it does not hold the configuration, as releases of DeepSpeed before 0.6 did")


def _clipping(model_states: Mapping[str, Any], optim_states: Mapping[str, Any]) -> float:
    """Return the largest norm of a gradient: of the file, else of the optimizer (stages 1 and 2), else DeepSpeed's default."""
    for value in (_config_of(model_states).get("gradient_clipping"), optim_states.get("clip_grad")):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    release = re.match(r"(\d+)\.(\d+)\.(\d+)", str(model_states.get("ds_version")))
    if release is None:
        raise ValueError("it says neither how gradients were clipped nor which DeepSpeed wrote it")
    return 1.0 if tuple(map(int, release.groups())) >= CLIPS_SINCE else 0.0


def _group(group: Mapping[str, Any]) -> ParameterGroup:
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise UserError(Problem(WHERE, f"its optimizer has {name}, which dstune's AdamW has not", "", ""))
    betas = [float(beta) for beta in group["betas"]]
    rate = group.get("initial_lr")
    return ParameterGroup(
        None if rate is None else float(rate), betas, float(group["eps"]), float(group["weight_decay"])
    )


def _check_tensors(checkpoint: TrainerCheckpoint, optim_files: list[Path]) -> None:
    """Check that every tensor is what its file has room for, and that names and shapes describe them. Raises ValueError."""
    shapes = list(chain.from_iterable(members.items() for members in checkpoint.members))
    for name, shape in shapes:
        if not re.fullmatch(r"[\w.-]{1,1000}", name) or any(size < 0 for size in shape):
            raise ValueError(f"a parameter is named {name!r:.100}, or has no possible shape")
    if len({name for name, _ in shapes}) < len(shapes) or set(checkpoint.shards.shapes) != {name for name, _ in shapes}:
        raise ValueError("a parameter is named twice")
    if any(not re.fullmatch(r"[\w.-]{1,1000}", name) for name in checkpoint.shards.buffers):
        raise ValueError("a buffer has no possible name")
    elements = [sum(math.prod(shape) for shape in members.values()) for members in checkpoint.members]
    flat = [_elements(load(path, mmap=True)["optimizer_state_dict"]) for path in optim_files]
    stored = [sum(of_rank) for of_rank in zip(*flat, strict=True)]
    if checkpoint.stage == 3:  # whose parts are of another cut, and each parameter is padded
        elements, stored = [sum(elements)], [sum(stored)]
    if len(elements) != len(stored) or any(
        there < described for described, there in zip(elements, stored, strict=True)
    ):
        raise ValueError(f"its parameters take {elements} elements, and {stored} are stored")
    for path in optim_files:
        for tensor in _tensors(load(path, mmap=True)["optimizer_state_dict"], 0):
            # A view may repeat one element any number of times.
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise ValueError(f"{path.name} has a tensor that is larger than its file")
    for buffer in checkpoint.shards.buffers.values():
        if buffer.untyped_storage().nbytes() < buffer.numel() * buffer.element_size():
            raise ValueError("a buffer is larger than its file")
    for name, shape in shapes:
        kinds = set(checkpoint.shards.kinds(name))
        if kinds != MOMENTS:
            states = ", ".join(sorted(kinds)) or "nothing"
            reason = f"its optimizer keeps {states} for {name}, and AdamW {', '.join(sorted(MOMENTS))}"
            fix = (
                "only runs of AdamW in fp32 are continued; start a new run from the weights with model.path=CHECKPOINT"
            )
            raise UserError(Problem(WHERE, reason, fix, str(checkpoint.folder)))
        for kind in (WEIGHT, *kinds):  # the last elements are there, and they are numbers
            last = checkpoint.shards.read(name, kind, max(0, math.prod(shape) - 1), min(1, math.prod(shape)))
            if not last.is_floating_point():
                raise ValueError(f"{name} holds no numbers")


def _elements(state: Mapping[str, Any]) -> list[int]:
    """Return the number of weights in each part of a rank's optimizer."""
    parts = state["fp32_flat_groups"] if "fp32_flat_groups" in state else state["single_partition_of_fp32_groups"]
    return [part.numel() for part in parts]


def _tensors(value: Any, level: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif level > 10:
        raise ValueError("its states are nested too deeply")
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry, level + 1)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry, level + 1)
