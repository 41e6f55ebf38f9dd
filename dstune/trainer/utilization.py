"""Computes the model FLOPs utilisation of steps, and how many of their positions were tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PreTrainedModel

from dstune.config.precision import FIRST_BF16
from dstune.config.schema import Precision, RunConfig
from dstune.core.distributed import World
from dstune.core.errors import UserError
from dstune.data.collate import NO_TARGET
from dstune.data.prepared import Split
from dstune.data.sampler import MicroBatch
from dstune.models.load import load_config
from dstune.parallel.none import NoParallelConfig
from dstune.planning import calibration
from dstune.planning.architecture import LANGUAGE_MODEL, architecture
from dstune.planning.flops import Work, step_flops, work_of
from dstune.planning.hardware import known_device
from dstune.planning.setup import Setup, added_length, head_of, labels_of, prefetch, setup
from dstune.protocols import method_of, task_of
from dstune.zero import accelerator

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Counted:
    """Counts over a rank's micro-batches of one step."""

    texts: tuple[int, ...] = ()
    """Tokens of each text that the model reads, without padding and fillers."""
    positions: int = 0
    """Positions that are computed, padding and fillers included."""
    targets: int = 0
    """Tokens that count in the loss; 0 where rows do."""


def counted(config: RunConfig, split: Split, batches: Iterable[tuple[MicroBatch, Batch]]) -> Counted:
    """Count texts, positions and targets of `batches`, which `data.batches.batch_of` made from `split`, in host memory."""
    texts: list[int] = []
    positions = targets = 0
    for micro_batch, batch in batches:
        positions += sum(value.numel() for name, value in batch.items() if name.endswith("input_ids"))
        labels = batch.get("labels") if task_of(config.task).token_targets else None
        if labels is not None and labels.shape != batch["input_ids"].shape:
            positions += labels.numel()  # a decoder beside an encoder
        if micro_batch.filler:
            continue
        if "position_ids" in batch:
            texts += split.lengths[micro_batch.samples].tolist()
        for name in batch:
            if name.endswith("attention_mask"):
                texts += batch[name].sum(dim=1).tolist()
        targets += 0 if labels is None else int((labels != NO_TARGET).sum())
    return Counted(tuple(texts), positions, targets)


@dataclass(frozen=True)
class Needs:
    """Everything from which the operations of a run's steps are computed."""

    setup: Setup
    projects: bool
    """Whether targets are projected onto the vocabulary."""
    prompt: int
    """Positions of a trained prompt in front of each text."""
    module: torch.nn.Module | None = None
    """The module whose parameters say what is trained; None if `setup` does."""

    def now(self) -> Needs:
        """Return the needs for the currently trained parameters: no configuration has gradual unfreezing and chosen tensors."""
        if self.module is None:
            return self
        prefix = getattr(self.module, "base_model_prefix", "")  # which a body alone has not in its names
        names = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        trained = {*names, *(f"{prefix}.{name}" for name in names)}
        tensors = tuple(tensor for tensor in self.setup.model.tensors if tensor.name in trained)
        return replace(self, setup=replace(self.setup, trained=tensors))

    def flops(self, counted: Counted) -> float:
        """Return the operations of forward and backward pass over a rank's part of a step."""
        lengths = [length + self.prompt for length in counted.texts]
        projected = counted.targets if self.projects else 0
        work = work_of(lengths, window=self.setup.model.window, projected=projected)
        grown = (work.positions, work.pairs, work.windowed_pairs, work.projected)
        return sum(each * count for each, count in zip(self._of_each, grown, strict=True))

    @cached_property
    def _of_each(self) -> tuple[float, ...]:
        """Operations of one unit of each kind of work, so that a step does not iterate over all tensors."""
        units = (Work(positions=1), Work(pairs=1), Work(windowed_pairs=1), Work(projected=1))
        return tuple(step_flops(self.setup, unit) for unit in units)


class Utilization:
    """Model FLOPs utilisation of a run's steps (`planning.flops`).

    needs: None if operations cannot be counted. peak: floating-point operations a second in matrix products of one rank while all
    `ranks` are busy; None if unknown. If either is None, there is no utilisation.
    """

    def __init__(self, needs: Needs | None, peak: float | None, ranks: int):
        self._needs = needs if peak else None
        self._peak = peak or 0.0
        self._ranks = ranks
        self._frozen_groups: int | None = None

    def flops(self, counted: Counted, frozen_groups: int = 0) -> float:
        """Return the operations of a rank's part of a step; 0 without utilisation.

        frozen_groups: number of the optimizer's frozen groups; if it has changed, other parameters train now.
        """
        if self._needs is None:
            return 0.0
        if frozen_groups != self._frozen_groups:
            self._needs, self._frozen_groups = self._needs.now(), frozen_groups
        return self._needs.flops(counted)

    def capacity(self, seconds: float) -> float:
        """Return the operations that all ranks could have done in `seconds`; 0 where there is no utilisation."""
        return 0.0 if self._needs is None else seconds * self._ranks * self._peak


def utilization_of(
    config: RunConfig, model: PreTrainedModel, module: torch.nn.Module, precision: Precision, world: World, labels: int
) -> Utilization:
    """Prepare the utilisation of a run. model: the one that `module` trains, or trains adapters of. Every rank must call it.

    If something is unknown, the run only lacks its utilisation.
    """
    on_gpu = accelerator.present()
    try:
        needs = _needs(config, model, module, precision, world, labels)
    except (UserError, AttributeError, LookupError, TypeError, ValueError):  # not an architecture of the planner
        needs = None
    peak = world.broadcast(peak_flops(precision, world.local_size, on_gpu=on_gpu))
    return Utilization(needs, peak, world.size)


def prefetch_of(config: RunConfig) -> tuple[int, int] | None:
    """Return what stage 3 gathers ahead and holds of this run's model (`planning.setup.prefetch`); None for an architecture that
    the planner does not know."""
    try:
        values = load_config(config.model).get_text_config().to_dict()
        return prefetch(architecture(values, head_of(config), labels_of(config)))
    except (UserError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _needs(
    config: RunConfig, model: PreTrainedModel, module: torch.nn.Module, precision: Precision, world: World, labels: int
) -> Needs | None:
    method, task = method_of(config.method), task_of(config.task)
    # Passes of a reference model; two streams of tokens that the formula has as one.
    if not method.flops_known or not task.countable_flops or model.config.is_encoder_decoder:
        return None
    values = model.config.get_text_config().to_dict()
    whole = replace(config, parallel=NoParallelConfig())  # whose operations are shared evenly
    planned = setup(
        whole,
        architecture(values, head_of(config), labels or labels_of(config)),
        ranks=world.size,
        ranks_per_node=world.local_size,
        on_gpu=accelerator.present(),
        precision=precision,
        values=values,
    )
    needs = Needs(planned, head_of(config) == LANGUAGE_MODEL, added_length(method), None if planned.adapter else module)
    if needs.module is not None and not needs.now().setup.trained:
        return None  # its parameters have other names than those of the architecture
    return needs


def peak_flops(precision: Precision, ranks: int, *, on_gpu: bool) -> float | None:
    """Return floating-point operations a second of matrix products of one of this machine's `ranks` ranks while all are busy: as
    measured here by `dstune plan --calibrate`, else as published for this GPU; None where neither is known."""
    size = 4 if precision is Precision.fp32 else 2
    name = accelerator.name()
    measured = calibration.speeds(ranks, on_gpu=on_gpu, device=name, threads=torch.get_num_threads())
    if size in measured:
        return measured[size].flops
    # Published are peaks of 16 bits, of whole GPUs, and of the fastest kind of a name (an H100 is slower as a PCIe card).
    other = any(word in f"{name} ".upper() for word in (" MIG ", "PCIE", "NVL"))
    device = known_device(name) if on_gpu and size == 2 and not other else None
    emulated = device is not None and precision is Precision.bf16 and (device.capability or FIRST_BF16) < FIRST_BF16
    return None if device is None or emulated else device.tflops * 1e12
