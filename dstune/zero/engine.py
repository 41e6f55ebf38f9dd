"""The only call of `deepspeed.initialize`, and everything that dstune does with an engine beyond its documented interface."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dstune.core.distributed import World
from dstune.protocols import Optimizer
from dstune.zero import fewer_reads, swap
from dstune.zero.even_gradients import EvenGradients
from dstune.zero.fewer_gathers import (
    gather_persistent_together,
    handle_layers_whole,
    handle_repeating_modules_whole,
    wait_for_copies_only,
)
from dstune.zero.hooks import forget, without_hooks
from dstune.zero.masks import Change, masked_weight_decay, zero_gradients
from dstune.zero.matrices import Matrices, UsesMatrices
from dstune.zero.parts import full_count, full_shape, gathered, is_partitioned
from dstune.zero.restore import Partition, Source, partitions_of, pieces, reset_counters, restore
from dstune.zero.slices import CUTS, SlicedSource, Slices
from dstune.zero.weight_files import BUFFER, persistent_buffers, weights_file

if TYPE_CHECKING:
    from dstune.zero.shard_files import Save

PARAMETER_GROUPS = "dstune_parameter_groups"
"""Key of each group's parameter names in DeepSpeed's checkpoints: at stage 0 its optimizer state has only numbers."""

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Callable[..., Any], Batch], Any]
"""Maps (forward, batch) to an output whose `loss_sum` is the sum of the batch's losses. See `models.heads`."""


def _announce_borrowed_weights(model: nn.Module) -> None:
    """Register with ZeRO-3 the modules that read another module's weight without calling that module.

    peft's `TrainableTokensLayer`, which trains rows of a vocabulary, reads the weight of its base layer, which would still be
    partitioned. DeepSpeed itself detects such a read only the first time.
    """
    import deepspeed

    for module in model.modules():
        if hasattr(module, "trainable_tokens_delta"):
            layer: Any = module.base_layer
            deepspeed.zero.register_external_parameter(module, layer.weight)


@contextmanager
def _without_overflow_message() -> Iterator[None]:
    """Silence DeepSpeed, which logs `OVERFLOW! Skipping step` for a step that is skipped on purpose."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _aliases_of_frozen(model: nn.Module) -> list[str]:
    """Return the second names of tied frozen parameters in the module's state, for example of a vocabulary projection that is tied
    to the embedding. DeepSpeed leaves out frozen parameters only under their first name: a save of SmolLM2 would be 57 MB
    larger."""
    parameter_by_name = dict(model.named_parameters())
    frozen = {id(parameter) for parameter in parameter_by_name.values() if not parameter.requires_grad}
    state = model.state_dict(keep_vars=True)
    return [name for name, value in state.items() if name not in parameter_by_name and id(value) in frozen]


def _state_bytes(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> float:
    return sum(
        optimizer.state_bytes(group["kind"]) * full_count(parameter)
        for group in groups
        for parameter in group["params"]
    )


@dataclass(frozen=True)
class Update:
    """Result of one optimizer step."""

    grad_norm: float
    """Norm of the global gradient before clipping; not finite if the step was skipped."""
    applied: bool
    loss_scale: float = 1.0
    lowest_loss_scale: float = 1.0
    """The lowest value that overflows can bring `loss_scale` to; `loss_scale` itself if it is fixed."""
    vetoed: bool = False
    """Not applied because the `veto` of `accumulate` returned True."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Those of `update`'s `scalars` that could be read together with the norm."""


class Engine:
    """DeepSpeed's engine with the optimizer step as its unit: `accumulate` for each micro-batch, then `update`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        settings: dict[str, Any],
        world: World,
        *,
        groups: list[dict[str, Any]] | None = None,
        one_pass: bool = False,
        slices: Slices | None = None,
    ):
        """Build the engine.

        optimizer: None for an engine that only evaluates, at stage 0 or 3. groups: the parameters that it trains. one_pass:
        the model is a decoder that each micro-batch passes once, and the same parameters train at every step. slices: how
        ranks share the weights of `model`, below stage 3.
        """
        self._world = world
        self.slices = slices
        self._replica = world.rank if slices is None else slices.replica
        """This rank's number among those that partition the same parameters."""
        self.stage: int = settings["zero_optimization"]["stage"]
        self._fp16: bool = settings["fp16"]["enabled"]
        self._vetoed = False
        self._optimizer = optimizer
        self._moments = 0 if optimizer is None else optimizer.states_per_parameter
        self._state_bytes = 0.0 if optimizer is None else _state_bytes(optimizer, groups or ())
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._group_names = [[names[id(parameter)] for parameter in group["params"]] for group in groups or ()]
        if self.stage == 3:
            wait_for_copies_only()
            _announce_borrowed_weights(model)
            handle_repeating_modules_whole(model)
            if one_pass:
                handle_layers_whole(model)
        self.swaps = swap.device(settings) == "nvme"
        """Whether optimizer states are on a disk, with only a part of them in memory at a time."""
        trained_counts = [full_count(parameter) for parameter in model.parameters() if parameter.requires_grad]
        swap.check_disk_space(settings, [-(-count // world.size) for count in trained_counts], self._moments, world)
        self._engine = self._initialize(model, groups or [], settings)
        if self.stage == 3 and optimizer is not None:
            gather_persistent_together(self._engine.optimizer)
        from dstune.zero.shard_files import ShardFiles

        self._files = self._engine.checkpoint_engine = ShardFiles(_aliases_of_frozen(model))
        # Skips copying DeepSpeed's recovery script: `dstune export` does the same, and a full disk must not stop one rank here.
        self._engine._copy_recovery_script = lambda folder: None
        self._engine.train()  # transformers hands a loaded model over in evaluation mode, without dropout
        self.module: nn.Module = self._engine.module
        self.device: torch.device = torch.device(self._engine.device)
        self._parameters = dict(self.module.named_parameters())
        if optimizer is not None and self.stage > 0 and isinstance(self._inner, UsesMatrices):
            shapes = {name: full_shape(parameter) for name, parameter in self._parameters.items()}
            self._inner.use_matrices(Matrices(self.partitions(), shapes, world, self.device))
        self._frozen_groups: set[int] = set()
        self._trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self._has_checked_swap = not self.swaps
        """Whether the first update has been checked to have written all states to the disk."""
        trained_by_name = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._first_gradients = swap.FirstGradients(trained_by_name) if self.swaps else None
        self._even_gradients: EvenGradients | None = None
        if optimizer is not None and self.stage in (1, 2) and self._engine.dp_world_size > 1:
            self._even_gradients = EvenGradients(self._engine.optimizer)
        self._has_frozen = any(not parameter.requires_grad for parameter in self.module.parameters())

    def _initialize(self, model: nn.Module, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
        import deepspeed

        built = None if self._optimizer is None else self._optimizer.build(groups)
        fewer_reads.install()
        deepspeed.utils.groups.mpu = None  # may be left from an earlier engine
        with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory figures
            engine, *_ = deepspeed.initialize(model=model, optimizer=built, config=settings, mpu=self.slices)
        if self.stage == 0 and engine.dp_world_size == 1:
            # To average over a single rank, DeepSpeed copies all gradients into one buffer and back: 0.4 of the 1.4 s of a backward
            # pass of SmolLM2-135M over 102 tokens. Its preceding step, which fills missing gradients with zeros, stays.
            engine._reduce_non_expert_gradients = lambda grads, elements_per_buffer: None
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
            # The callback `NonFinite` stops the run, with a result and a reason.
            scaler.raise_error_at_min_scale = False
        return engine

    @property
    def trained_count(self) -> int:
        """Elements of the optimizer's parameters, including those that will be unfrozen later; where ranks share weights, only
        those of this rank's slices."""
        return sum(full_count(parameter) for parameter in self._trained)

    @property
    def trained_names(self) -> set[str]:
        """Names of the optimizer's parameters, including those that will be unfrozen later; a tied weight has each of its names."""
        trained = {id(parameter) for parameter in self._trained}
        names = self.module.named_parameters(remove_duplicate=False)
        return {name for name, parameter in names if id(parameter) in trained}

    def whole_count(self, parameter: nn.Parameter) -> int:
        """Return how many elements the complete parameter has: before stage 3 partitioned it, and over all slices."""
        return full_count(parameter) * (1 if self.slices is None else self.slices.parts_of(parameter))

    @property
    def whole_trained_count(self) -> int:
        """`trained_count` of complete parameters, over all slices."""
        return sum(map(self.whole_count, self._trained))

    @property
    def unallocated_state_bytes(self) -> int:
        """Bytes of optimizer states that the first step will still allocate: all of them at stage 0; none at stages 1 to 3, where
        DeepSpeed allocates them at the start."""
        if self.stage > 0 or getattr(self._engine.optimizer, "state", None):
            return 0
        return round(self._state_bytes)

    # -- the step -----------------------------------------------------------------------------------------------------

    def accumulate(
        self,
        loss: Loss,
        batch: Batch,
        *,
        batch_weight: float,
        last: bool,
        veto: Callable[[torch.Tensor], bool] | None = None,
    ) -> torch.Tensor:
        """Run the forward and backward pass of one micro-batch; return its loss sum, detached.

        veto: called with the loss sum between the forward and the backward pass. If it returns True (on all ranks), the step
        is not applied: its gradient becomes NaN, as after a non-finite loss.

        The gradient is that of `sum of all losses / batch_weight` over the step's micro-batches on all ranks. DeepSpeed
        averages over the ranks (ranks that share weights count as one), so the loss is multiplied by their number; DeepSpeed's
        division by the accumulation steps is off. Exact to 1.7e-7 in fp32 at stages 0 to 3.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        loss_sum = loss(self._engine, batch).loss_sum
        scale = self._engine.dp_world_size / batch_weight
        if veto is not None and veto(loss_sum.detach()):
            scale, self._vetoed = float("nan"), True
        # 0 * inf is nan: a non-finite loss makes this rank's gradients non-finite, hence the global norm, hence every
        # rank skips the update, without an extra message and without waiting for the device.
        self._engine.backward(loss_sum * (scale + 0.0 * loss_sum.detach()), scale_wrt_gas=False)
        return loss_sum.detach()

    def update(self, scalars: Mapping[str, torch.Tensor] | None = None) -> Update:
        """Update the weights; skip the update, on all ranks, if the global gradient is not finite.

        scalars: tensors on the device to read together with the norm, before the update is launched: reading them later would
        make the host wait for the update.
        """
        self._files.wait_for_copies()
        vetoed, self._vetoed = self._vetoed, False
        reads = fewer_reads.reads
        reads.begin_step(scalars)
        if self.stage == 0:
            norm = reads.value(self._unpartitioned_norm())
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return Update(norm, applied=False, vetoed=vetoed, scalars=reads.beside)
            self._engine.step()
            return Update(norm, applied=True, scalars=reads.beside)
        if self._first_gradients is not None and not vetoed:
            self._first_gradients.refuse_missing(self._world)
            self._first_gradients = None
        loss_scale, lowest = self._loss_scale()
        scaler = dict(vars(self._engine.optimizer.loss_scaler)) if vetoed and self._fp16 else {}
        if self._even_gradients is not None:
            self._even_gradients.before_step()
        with _without_overflow_message() if vetoed else nullcontext():
            self._engine.step()
        if scaler:  # a veto is no overflow: it must not lower the loss scale
            vars(self._engine.optimizer.loss_scaler).update(scaler)
        applied = self._engine.was_step_applied()
        norm_read = None if self._fp16 or not applied else reads.last  # in fp16, the loss scale is still in that norm
        norm = float(self._engine.get_global_grad_norm()) if norm_read is None else norm_read
        if applied and not self._has_checked_swap:
            swap.check_written(self._engine.optimizer, self._world)
            self._has_checked_swap = True
        return Update(norm, applied, loss_scale, lowest, vetoed, reads.beside)

    def _loss_scale(self) -> tuple[float, float]:
        """Return the loss scale of this step, and the lowest value that it can fall to."""
        if not self._fp16:
            return 1.0, 1.0
        scaler = self._engine.optimizer.loss_scaler
        scale = float(scaler.loss_scale)
        return scale, float(scaler.min_scale) if scaler.dynamic else scale

    def _unpartitioned_norm(self) -> torch.Tensor:
        # DeepSpeed reports no norm at stage 0 in fp32. The gradients are averaged already, so every rank has the same.
        if self.slices is not None:
            return self.slices.norm(self._trained)
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def forget_micro_batch(self) -> None:
        """Finish the reduction that the backward pass of a failed micro-batch has begun, so that the next micro-batch can run.
        Only for a single rank below stage 3. The caller must not apply this step."""
        wrapper = self._engine.optimizer
        if any(bucket.elements for bucket in getattr(wrapper, "ipg_buckets", {}).values()):
            wrapper.independent_gradient_partition_epilogue()

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next update; a parameter group with a factor (`rate`) gets that multiple of it."""
        for number, group in enumerate(self._engine.optimizer.param_groups):
            # A frozen group has no gradients, but stages 1 to 3 apply weight decay and old momentum: 4.6e-4 of drift.
            group["lr"] = 0.0 if number in self._frozen_groups else rate * group.get("rate", 1.0)

    # -- unfreezing ---------------------------------------------------------------------------------------------------

    @property
    def frozen_groups(self) -> int:
        """How many of the optimizer's groups are currently frozen."""
        return len(self._frozen_groups)

    def freeze(self, names: Collection[str]) -> None:
        """Keep the named parameters unchanged, to the bit, until `unfreeze`. They must make up complete groups of the optimizer.
        (Freezing them before the engine is built would not do: DeepSpeed would never train them.)"""
        for number in self._groups_with(names):
            self._frozen_groups.add(number)
            self._require_gradients(number, False)

    def unfreeze(self, names: Collection[str], *, fresh: bool) -> None:
        """Train the named parameters from the next update on.

        fresh: restart the optimizer's step count for them. It ran on while they were frozen and got no moments, so AdamW would not
        correct the bias of their first moments: its first step would be a third as large.
        """
        for number in self._groups_with(names):
            self._frozen_groups.discard(number)
            self._require_gradients(number, True)
            if fresh:
                reset_counters(self._engine, self.stage, set(self._group_names[number]), self._replica)

    def _groups_with(self, names: Collection[str]) -> list[int]:
        chosen_names = set(names)
        numbers = [number for number, group in enumerate(self._group_names) if chosen_names & set(group)]
        assert chosen_names == {name for number in numbers for name in self._group_names[number]}, (
            "parameters can only be frozen and unfrozen in complete groups"
        )
        return numbers

    def _require_gradients(self, number: int, required: bool) -> None:
        for name in self._group_names[number]:
            self._parameters[name].requires_grad_(required)
        if self._even_gradients is not None:
            self._even_gradients.restart()

    @contextmanager
    def _all_trained(self) -> Iterator[None]:
        """Mark all parameters as trained within the block: DeepSpeed saves one that needs no gradient as if never trained."""
        for number in self._frozen_groups:
            self._require_gradients(number, True)
        try:
            yield
        finally:
            for number in self._frozen_groups:
                self._require_gradients(number, False)

    # -- changing gradients and weights outside of the step -----------------------------------------------------------

    def before_update(self, change: Change) -> None:
        """Call `change(partition, gradient, group)` for each partition that this rank updates, before every optimizer step.

        gradient: of the step's mean loss, after clipping; a vector of the size of `partition.elements` that may be changed in
        place. group: the optimizer's parameter group, with `lr` and `weight_decay`. Over all ranks, each element of each trained
        parameter is passed once; at stage 0, once on every rank.
        """
        partitions = {id(partition.key): partition for partition in self.partitions()}

        def on_step(inner: torch.optim.Optimizer, *unused: Any) -> None:
            for group in inner.param_groups:  # stages 1 to 3 step the groups one by one
                for key in group["params"]:
                    if key.grad is not None:
                        with torch.no_grad():
                            change(partitions[id(key)], key.grad.view(-1), group)

        self._inner.register_step_pre_hook(on_step)

    def partitions(self) -> list[Partition]:
        """Return the partitions that this rank updates."""
        assert not self.swaps, "states on a disk are in memory only one after another"
        return partitions_of(self._engine, self.stage, self._replica)

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that computes the updates, inside DeepSpeed's wrapper, which partitions its states."""
        return self._inner

    @property
    def _inner(self) -> torch.optim.Optimizer:
        wrapper = self._engine.optimizer
        inner = wrapper if self.stage == 0 else wrapper.optimizer
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def assemble(self, name: str, fragment: tuple[int, torch.Tensor] | None, dtype: torch.dtype) -> torch.Tensor:
        """Assemble a parameter-sized tensor, as a vector that is the same on every rank, from the fragments of all ranks.

        fragment: this rank's (first element, values); None if the rank has none of its elements. Every rank must call this.
        """
        whole = torch.zeros(full_count(self._parameters[name]), dtype=dtype, device=self.device)
        if fragment is not None and (self.stage > 0 or self._world.is_main):
            start, values = fragment
            whole[start : start + values.numel()] = values.to(whole.device, dtype)
        torch.distributed.all_reduce(whole)
        return whole

    def mask(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Train only those entries of these parameters whose mask is true; all other entries keep every bit.

        masks: bool tensors of the parameters' full size, by name. Gradients of masked-out entries are zeroed before the
        reduction, so these entries have no moments and no share in the norm. Weight decay is turned off in the optimizer and
        applied here. Masks take one bit per entry on every rank.
        """
        zero_gradients(self._parameters, masks, self.device)
        assert self._optimizer is not None
        decoupled = self._optimizer.decoupled_weight_decay
        self.before_update(masked_weight_decay(masks, self.partitions(), self._inner, decoupled=decoupled))

    @contextmanager
    def zeroed(self, name: str) -> Iterator[None]:
        """Replace the parameter `name` by zeros within the block. Every rank must enter and leave it."""
        parameter = self._parameters[name]
        with torch.no_grad():
            with gathered([parameter], modified_by_rank=0):
                values_before = parameter.detach().clone()
                parameter.zero_()
            yield
            with gathered([parameter], modified_by_rank=0):
                parameter.copy_(values_before)

    def evaluate(self, loss: Loss, batch: Batch) -> Any:
        """Return the head's output for one micro-batch, without gradients. At stage 3 all ranks must call it equally often."""
        with torch.no_grad():
            return loss(self._engine, batch)

    def forward(self, **inputs: Any) -> Any:
        """Return the model's output for `inputs`. At stage 3 all ranks must call it equally often."""
        return self._engine(**inputs)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    # -- whole weights ------------------------------------------------------------------------------------------------

    @contextmanager
    def whole_module(self) -> Iterator[nn.Module]:
        """Yield the module with all weights in memory on every rank, so that calling it needs no collectives.

        At stage 3 the weights are gathered once and DeepSpeed's hooks are removed, so that one rank can generate text of any
        length while the others wait. Every rank needs memory for the complete model.
        """
        if self.stage < 3:
            yield self.module
            return
        with gathered(list(self.module.parameters())), without_hooks(self._engine, self.module):
            yield self.module

    @contextmanager
    def partly_gathered(self, max_bytes: int) -> Iterator[None]:
        """Gather once, at stage 3, as many weights as fit into `max_bytes`, from the first layer on; forward passes within the
        block gather only the remaining ones. All ranks must pass the same `max_bytes`."""
        chosen: list[Any] = []
        for parameter in filter(is_partitioned, self.module.parameters()):
            max_bytes -= full_count(parameter) * parameter.element_size()
            if max_bytes < 0:
                break
            chosen.append(parameter)
        gathered_once = [parameter for parameter in chosen if not parameter.is_external_param]
        with gathered(chosen):
            for parameter in gathered_once:
                parameter.is_external_param = True  # DeepSpeed's hooks do not release such parameters
            try:
                yield
            finally:
                for parameter in gathered_once:
                    parameter.is_external_param = False

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _cuts(self) -> dict[str, Any]:
        return {} if self.slices is None else {CUTS: self.slices.cuts}

    def checkpoint_bytes(self, *, weights_only: bool = False) -> int:
        """Estimate how many bytes `save` writes over all ranks: fp32 weights, optimizer states and the module's weights.
        weights_only: estimate for `save_weights` instead."""
        parts = 1 if self.slices is None else self.slices.parts
        elements = self.trained_count * parts
        if weights_only:
            return 4 * elements
        in_module = 0 if self.stage == 3 else next(iter(self._trained)).element_size()
        return elements * (in_module + (0 if self.stage == 0 else 4)) + round(parts * self._state_bytes)

    def save(self, directory: Path, tag: str, *, background: bool = False) -> Save:
        """Write this rank's shards into `directory/tag`, which must exist. Every rank must call it.

        If the disk fails, the reason is in the returned save's `error`. background: the caller must run `work_off` of the returned
        save in a thread; the next `update` waits until it has copied the states.
        """
        if self.swaps:
            assert not background, "states on a disk are never all in memory"
            return self._save_pieces(directory, tag, states=True)
        save = self._files.begin(directory / tag, background=background)
        try:
            with self._all_trained():
                self._engine.save_checkpoint(
                    str(directory),
                    tag=tag,
                    client_state={PARAMETER_GROUPS: self._group_names, **self._cuts},
                    save_latest=False,
                    exclude_frozen_parameters=self._has_frozen,
                )
        finally:
            self._files.end()
        return save

    def save_weights(self, directory: Path, tag: str, *, background: bool = False) -> Save:
        """Save like `save`, but only the trained weights and the buffers, as safetensors. No rank waits for another."""
        return self._save_pieces(directory, tag, background=background)

    def _save_pieces(self, directory: Path, tag: str, *, states: bool = False, background: bool = False) -> Save:
        """Write this rank's pieces of the weights as safetensors: in one file, or one for each part if states are on a disk."""
        save = self._files.begin(directory / tag, background=background)
        try:
            if self.stage > 0 or self._replica == 0:
                trained_ids = {id(parameter) for parameter in self._trained}
                trained = {n: list(full_shape(p)) for n, p in self.module.named_parameters() if id(p) in trained_ids}
                metadata = {"shapes": json.dumps(trained), "global_steps": str(self._engine.global_steps)}
                if self.slices is not None:
                    metadata |= {"slice": str(self.slices.part), "cuts": json.dumps(self.slices.cuts)}
                first: dict[str, torch.Tensor] = {}
                if self._world.is_main:
                    first = {f"{BUFFER}{name}": buffer for name, buffer in persistent_buffers(self.module)}
                parts = pieces(self._engine, self.stage, self._replica, states=states)
                if not self.swaps:
                    parts = iter([{key: value for part in parts for key, value in part.items()}])
                for number, part in enumerate(parts):
                    path = directory / tag / weights_file(self._world.rank, number)
                    self._files.save_tensors(part if number else first | part, metadata, path)
        finally:
            self._files.end()
        return save

    def read_ahead(self, directory: Path, tag: str) -> dict[str, str]:
        """Read the files that `load` needs on this rank, so that they are verified before anything changes.

        Returns their hashes (64-bit XXH3) by file name. Raises OSError.
        """
        paths = [Path(self._engine._get_ckpt_name(str(directory), tag))]
        if self.stage > 0:
            paths.append(Path(self._engine._get_zero_ckpt_name(str(directory), tag)))
        hashes = self._files.read_ahead(paths)
        return {path.name: hashed for path, hashed in zip(paths, hashes, strict=True)}

    def load(self, directory: Path, tag: str) -> None:
        """Load this rank's shards from `directory/tag`. The same number of ranks must have written them, at the same stage and
        with the same slices."""
        with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints `_load_legacy_checkpoint`
            loaded, _ = self._engine.load_checkpoint(
                str(directory), tag=tag, load_module_strict=not self._has_frozen, load_lr_scheduler_states=False
            )
        assert loaded is not None, f"DeepSpeed found no checkpoint in {directory / tag}"
        self._files.read_ahead([])

    def restore(self, source: Source) -> None:
        """Load a checkpoint that was written by another number of ranks, at another stage or with other slices. Optimizer states
        that depend on the layout are not loaded (`why_no_other_layout`). Every rank must call it."""
        self._files.read_ahead([])
        rank_source = source if self.slices is None else SlicedSource(source, self.slices)
        states = self._optimizer is None or not self._optimizer.why_no_other_layout
        restore(self._engine, self.stage, rank_source, self._replica, states=states)

    def close(self) -> None:
        """Drop all references to the model and the optimizer, so that their memory is freed once the caller drops its own."""
        self._engine.destroy()
        forget(self._engine, self.module)
