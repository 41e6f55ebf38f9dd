"""Scores a model's weights by gradients and by ablation, chooses what to train, and writes a report.

A copy of the model is trained for a few steps and discarded; the run starts from the original weights. Scores of entries stay on
the rank that updates these entries; ranks exchange only sums over tensors, counts and the chosen bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from dstune.config.schema import Precision, RunConfig
from dstune.core import files
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json, read_file
from dstune.data.prepared import PreparedData
from dstune.methods.importance.choice import chosen_tensors, rank_correlation, sortable, threshold
from dstune.methods.importance.config import ImportanceConfig, Selection, Unit
from dstune.models.load import NewWeights
from dstune.protocols.method import Preparation
from dstune.trainer.evaluate import Evaluator
from dstune.trainer.probe import Probe, probing
from dstune.zero.engine import Engine
from dstune.zero.masks import pack_bits, unpack_bits
from dstune.zero.parts import full_count, full_shape
from dstune.zero.restore import Partition

log = logging.getLogger(__name__)

REPORT = "importance.json"
MASKS = "importance.safetensors"
GRADIENT_SCORES = {
    Selection.squared_gradient: lambda weight, gradient: gradient.square(),
    Selection.gradient_weight: lambda weight, gradient: (weight * gradient).abs(),
    Selection.movement: lambda weight, gradient: -weight * gradient,
}
"""Scores of entries, summed over steps: functions of the weight before the update and the gradient of the global batch's mean
loss."""

CONSTANT_SCORES = {Selection.magnitude, Selection.random}
"""Scores that do not depend on gradients."""


@dataclass(frozen=True)
class Selected:
    """The weights to train in addition to new ones."""

    tensors: frozenset[str]
    """Names of the parameters with trained entries."""
    masks: dict[str, torch.Tensor]
    """Mask of the trained entries by parameter, bool in its shape; empty if whole tensors are trained."""


@dataclass(frozen=True)
class Choice(Preparation):
    """The chosen weights; the data stay unchanged."""

    selected: Selected

    def restrict(self, module: nn.Module, new: NewWeights) -> None:
        """Freeze tensors without trained entries, so that they need neither gradients nor optimizer states."""
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in self.selected.tensors or name in new.parameters)

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        return self.selected.masks


def choose(
    config: RunConfig,
    method: ImportanceConfig,
    data: PreparedData,
    tokenizer: Any,
    precision: Precision,
    world: World,
    run_dir: Path,
) -> Choice:
    """Score and choose weights, and write `importance.json` into the run directory. A run that continues reads its earlier choice
    from there, or from the run that `run.resume` names. Every rank must call it."""
    if world.is_main and config.run.resume not in ("auto", "never"):
        take_over(Path(config.run.resume), run_dir)
    if not world.broadcast((run_dir / REPORT).is_file()):
        with probing(config, data, tokenizer, precision, world) as probe:
            _score_and_choose(config, method, probe, run_dir)
        world.barrier()
    local_choice = _read(run_dir) if world.is_main else None
    names, masks = world.broadcast(
        None if local_choice is None else (sorted(local_choice.tensors), local_choice.masks)
    ) or ([], {})
    return Choice(data, Selected(frozenset(names), masks))


def take_over(source: Path, run_dir: Path) -> None:
    """Copy the choice of another run, unless this run has one. Other ranks or devices might choose differently, and the checkpoint
    has states of the chosen weights."""
    if (run_dir / REPORT).is_file() or not (source / REPORT).is_file():
        return
    for name in (MASKS, REPORT):  # the report last: it shows that the copy is complete
        if (source / name).is_file():
            files.write(run_dir / name, (source / name).read_bytes())


def _read(run_dir: Path) -> Selected:
    """Return the choice in `run_dir`. Raises UserError if its files, which somebody else may have written, hold no choice."""
    try:
        report = parse_json(read_file(run_dir / REPORT))
        tensors = {row["name"]: row for row in report["tensors"] if row["trained"]}
        masks = {}
        if report["unit"] == Unit.entries.value:
            bits = load_file(run_dir / MASKS)
            masks = {name: unpack_bits(bits[name], torch.Size(row["shape"])) for name, row in tensors.items()}
        return Selected(frozenset(tensors), masks)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = f"holds no choice of what is trained: {error}"
        raise UserError(Problem(str(run_dir / REPORT), reason, "start a run of your own")) from None


class _Scores:
    """Scores of this rank's elements: the sum over each tensor for every score, and all entries for the selecting score."""

    def __init__(self, method: ImportanceConfig, engine: Engine, new: NewWeights, seed: int):
        self.sums: dict[Selection, dict[str, float]] = {kind: {} for kind in GRADIENT_SCORES}
        self.entries: dict[str, tuple[int, torch.Tensor]] = {}
        self._entries_of = method.selection if method.unit is Unit.entries else None
        self._new = set(new.parameters)
        if method.selection not in CONSTANT_SCORES:
            return
        sums = self.sums.setdefault(method.selection, {})
        for partition in engine.partitions():
            for part in partition.fragments:
                if part.name in self._new:
                    continue
                values = partition.elements[part.offset : part.offset + part.count].detach().abs().float()
                if method.selection is Selection.random:
                    size = full_count(engine.module.get_parameter(part.name))
                    values = _random(part.name, size, seed)[part.start : part.start + part.count].to(values.device)
                sums[part.name] = float(values.double().sum())
                if self._entries_of is not None:
                    self.entries[part.name] = part.start, values

    def add(self, partition: Partition, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        for part in partition.fragments:
            if part.name in self._new:
                continue
            place = slice(part.offset, part.offset + part.count)
            for kind, score in GRADIENT_SCORES.items():
                values = score(partition.elements[place].float(), gradient[place].float())
                sums = self.sums[kind]
                sums[part.name] = sums.get(part.name, 0.0) + float(values.double().sum())
                if kind is self._entries_of:
                    entry = self.entries.get(part.name)
                    self.entries[part.name] = part.start, values if entry is None else entry[1].add_(values)


def _random(name: str, size: int, seed: int) -> torch.Tensor:
    """Draw a score in [0, 1) for each entry of the tensor `name`: the same on every rank and at every stage."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed * 2**32 + crc32(name.encode())))


def _score_and_choose(config: RunConfig, method: ImportanceConfig, probe: Probe, run_dir: Path) -> None:
    engine, world = probe.engine, probe.world
    log.info("scoring weights along %d steps", method.score_steps)
    scores = _Scores(method, engine, probe.new, config.trainer.seed)
    probe.train(method.score_steps, scores.add, config.optimizer.lr)
    parameters = {
        name: parameter
        for name, parameter in engine.module.named_parameters()
        if name not in probe.new.parameters and parameter.requires_grad
    }
    sizes = {name: full_count(parameter) for name, parameter in parameters.items()}
    kinds = dict.fromkeys([*GRADIENT_SCORES, *({method.selection} & CONSTANT_SCORES)])
    means = {kind: _means(scores.sums.get(kind, {}), sizes, world, engine.stage) for kind in kinds}
    ablation = _ablate(config, method, probe, list(parameters)) if method.ablation_rows else {}
    if ablation:
        means[Selection.ablation] = {name: lost["loss"] for name, lost in ablation.items()}

    masks: dict[str, torch.Tensor] = {}
    if method.unit is Unit.tensors:
        count_by_tensor = {name: sizes[name] for name in chosen_tensors(means[method.selection], sizes, method.share)}
    else:
        masks, count_by_tensor = _choose_entries(scores.entries, sizes, method.share, engine, world)
    if not world.is_main:
        return
    order = sorted(sizes, key=lambda name: -means[method.selection][name])
    rows = [
        {
            "name": name,
            "shape": list(full_shape(parameters[name])),
            "trained": count_by_tensor.get(name, 0),
            "scores": {kind.value: means[kind][name] for kind in means},
            **({"lost": ablation[name]} if ablation else {}),
        }
        for name in order
    ]
    report = {
        "selection": method.selection.value,
        "unit": method.unit.value,
        "share": method.share,
        "trained_share": sum(count_by_tensor.values()) / sum(sizes.values()),
        "steps": method.score_steps,
        "ablation_rows": method.ablation_rows,
        "correlation": {
            kind.value: rank_correlation(means[kind], means[Selection.ablation])
            for kind in means
            if kind is not Selection.ablation
        }
        if ablation
        else {},
        "tensors": rows,
    }
    if masks:
        files.write(run_dir / MASKS, save(masks))
    files.write(run_dir / REPORT, json.dumps(report, indent=1))


def _means(sums: Mapping[str, float], sizes: Mapping[str, int], world: World, stage: int) -> dict[str, float]:
    """Return the mean score of each tensor's entries over all ranks; at stage 0 every rank has all entries."""
    if stage > 0:
        totals = world.sum([sums.get(name, 0.0) for name in sizes])
    else:
        totals = world.broadcast([sums.get(name, 0.0) for name in sizes])
    return {name: total / size for (name, size), total in zip(sizes.items(), totals, strict=True)}


def _choose_entries(
    entries: Mapping[str, tuple[int, torch.Tensor]],
    sizes: Mapping[str, int],
    share: float,
    engine: Engine,
    world: World,
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Choose entries; return packed masks of the tensors with chosen entries, and the number of chosen entries in each."""
    keys = {name: (start, sortable(values)) for name, (start, values) in entries.items()}
    shared = engine.stage > 0

    def count_from(key: int) -> int:
        local_count = sum(int((values >= key).sum()) for _, values in keys.values())
        return int(world.sum([local_count])[0]) if shared else world.broadcast(local_count)

    lowest = threshold(count_from, int(share * sum(sizes.values())))
    masks, count_by_tensor = {}, {}
    for name in sizes:
        local_values = keys.get(name)
        bits = engine.assemble(name, local_values and (local_values[0], local_values[1] >= lowest), torch.uint8).bool()
        if count := int(bits.sum()):
            masks[name], count_by_tensor[name] = pack_bits(bits.cpu()), count
    return masks, count_by_tensor


def _ablate(config: RunConfig, method: ImportanceConfig, probe: Probe, names: list[str]) -> dict[str, dict[str, float]]:
    """Return how much worse each metric is without each tensor: by tensor and metric, positive for a worse model."""
    assert probe.data.validation is not None
    few = replace(config, evaluate=replace(config.evaluate, max_rows=method.ablation_rows, generate_rows=0))
    evaluator = Evaluator(few, probe.data, probe.engine, probe.head, probe.world, probe.tokenizer)
    whole = evaluator(probe.data.validation).metrics
    lost = {}
    for number, name in enumerate(names):
        if number % 20 == 0:
            log.info("leaving out tensor %d of %d", number + 1, len(names))
        with probe.engine.zeroed(name):
            metrics = evaluator(probe.data.validation).metrics
        lost[name] = {
            key: (metrics[key] - value if key == "loss" else value - metrics[key])
            for key, value in whole.items()
            if key in ("loss", "accuracy", "token_accuracy")
        }
    return lost
