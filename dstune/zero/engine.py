"""The only `deepspeed.initialize`, and what dstune does with an engine beyond its documented interface."""

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
from dstune.zero.fewer_gathers import gather_persistent_together, handle_layers_whole, wait_for_copies_only
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
"""Key of the parameter names of each group in what DeepSpeed saves: at stage 0 its optimizer has numbers only."""

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Callable[..., Any], Batch], Any]
"""(forward, batch) -> an output whose `loss_sum` is the sum of the losses of the batch. See `models.heads`."""


def _announce_borrowed_weights(model: nn.Module) -> None:
    """Tell ZeRO-3 of the modules that read a weight of another one without calling it: peft's trained rows of a vocabulary
    (`TrainableTokensLayer`) read that of the layer below, which is cut in pieces unless it is gathered for them too. DeepSpeed
    finds that out by itself the first time only."""
    import deepspeed

    for module in model.modules():
        if hasattr(module, "trainable_tokens_delta"):
            layer: Any = module.base_layer
            deepspeed.zero.register_external_parameter(module, layer.weight)


@contextmanager
def _no_word_of_overflow() -> Iterator[None]:
    """Silence DeepSpeed, which says `OVERFLOW! Skipping step` of a step that is left out on purpose."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _other_names_of_frozen(model: nn.Module) -> list[str]:
    """Return names under which a frozen parameter is in the module's state beside its own: a vocabulary projection that is tied
    to the embedding. DeepSpeed leaves frozen ones out of checkpoints by their own names alone: 57 MB more a save for SmolLM2."""
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
    """What one optimizer step did."""

    grad_norm: float
    """Norm of the global gradient before clipping; not finite where the step was skipped."""
    applied: bool
    loss_scale: float = 1.0
    lowest_loss_scale: float = 1.0
    """What overflows can lower it to: to itself where it is fixed."""
    vetoed: bool = False
    """Not applied because `accumulate` was told so."""
    read: Mapping[str, float] = field(default_factory=dict)
    """Of what `update` was to read, what came with the norm."""


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
        """optimizer: None for an engine that only evaluates, at stage 0 or 3. groups: the parameters that it trains. one_pass:
        the model is a decoder that each micro-batch goes through once, and what trains of it is the same at every step. slices:
        how ranks share the weights of `model`, below stage 3."""
        self._world = world
        self.slices = slices
        self._replica = world.rank if slices is None else slices.replica
        """This rank among those that partition the same parameters."""
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
            if one_pass:
                handle_layers_whole(model)
        self.swaps = swap.device(settings) == "nvme"
        """Whether optimizer states are on a disk, and in memory a part at a time."""
        shares = [
            -(-full_count(parameter) // world.size) for parameter in model.parameters() if parameter.requires_grad
        ]
        swap.check_disk_space(settings, shares, self._moments, world)
        self._engine = self._initialize(model, groups or [], settings)
        if self.stage == 3 and optimizer is not None:
            gather_persistent_together(self._engine.optimizer)
        from dstune.zero.shard_files import ShardFiles

        self._files = self._engine.checkpoint_engine = ShardFiles(_other_names_of_frozen(model))
        # A script beside the checkpoints; what it does is `dstune export`, and a full disk must not stop one rank there.
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
        self._written = not self.swaps
        """Whether it is known that the disk took all states."""
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._gradients = swap.FirstGradients(trained) if self.swaps else None
        self._has_frozen = any(not parameter.requires_grad for parameter in self.module.parameters())

    def _initialize(self, model: nn.Module, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
        import deepspeed

        built = None if self._optimizer is None else self._optimizer.build(groups)
        fewer_reads.install()
        deepspeed.utils.groups.mpu = None  # of an engine before this one
        with redirect_stdout(io.StringIO()):  # figures of memory that its bf16 optimizer prints
            engine, *_ = deepspeed.initialize(model=model, optimizer=built, config=settings, mpu=self.slices)
        if self.stage == 0 and engine.dp_world_size == 1:
            # It would copy all gradients into one buffer and back to take their mean over one rank: 0.4 of 1.4 s of the backward
            # pass of 102 tokens by SmolLM2-135M. What comes before, zeros for parameters without a gradient, stays.
            engine._reduce_non_expert_gradients = lambda grads, elements_per_buffer: None
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
            # The callback `NonFinite` stops the run, with a result and a reason.
            scaler.raise_error_at_min_scale = False
        return engine

    @property
    def trained_count(self) -> int:
        """Elements of the parameters that the optimizer has, those that wait to be unfrozen included; of shared ones those of
        this rank's slices."""
        return sum(full_count(parameter) for parameter in self._trained)

    def whole_count(self, parameter: nn.Parameter) -> int:
        """Return the parameter's number of elements before stage 3 partitioned it, or ranks shared it."""
        return full_count(parameter) * (1 if self.slices is None else self.slices.parts_of(parameter))

    @property
    def whole_trained_count(self) -> int:
        """As `trained_count`, of whole parameters."""
        return sum(map(self.whole_count, self._trained))

    @property
    def states_to_come(self) -> int:
        """Bytes of the optimizer's tensors that its first step makes: at stage 0 all of them, at the others none, which
        DeepSpeed makes at once."""
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
        """Run forward and backward pass of one micro-batch; return its loss sum, detached.

        veto: asked between the forward and the backward pass, with the loss sum; where it says True (on all ranks), the
        step is not applied: its gradient is made not a number, as a non-finite loss does.

        The gradient is that of `sum of all losses / batch_weight` over the step's micro-batches on all ranks: DeepSpeed
        averages over the ranks (those that share weights are one), so the loss is multiplied by their number, and its own
        division by the accumulation steps is off. Exact to 1.7e-7 in fp32 at stages 0-3.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        loss_sum = loss(self._engine, batch).loss_sum
        scale = self._engine.dp_world_size / batch_weight
        if veto is not None and veto(loss_sum.detach()):
            scale, self._vetoed = float("nan"), True
        # 0 * inf is nan: a non-finite loss makes this rank's gradients non-finite, hence the global norm, hence every
        # rank skips the update, without a message of its own and without waiting for the device.
        self._engine.backward(loss_sum * (scale + 0.0 * loss_sum.detach()), scale_wrt_gas=False)
        return loss_sum.detach()

    def update(self, scalars: Mapping[str, torch.Tensor] | None = None) -> Update:
        """Update the weights; skipped on all ranks where the global gradient is not finite.

        scalars: on the device, to read with the norm, before the update is launched: later the host would wait for it.
        """
        self._files.wait_for_copies()
        vetoed, self._vetoed = self._vetoed, False
        reads = fewer_reads.reads
        reads.begin_step(scalars)
        if self.stage == 0:
            norm = reads.value(self._unpartitioned_norm())
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return Update(norm, applied=False, vetoed=vetoed, read=reads.beside)
            self._engine.step()
            return Update(norm, applied=True, read=reads.beside)
        if self._gradients is not None and not vetoed:
            self._gradients.refuse_missing(self._world)
            self._gradients = None
        loss_scale, lowest = self._loss_scale()
        scaler = dict(vars(self._engine.optimizer.loss_scaler)) if vetoed and self._fp16 else {}
        with _no_word_of_overflow() if vetoed else nullcontext():
            self._engine.step()
        if scaler:  # a veto is no overflow that the scale should fall for
            vars(self._engine.optimizer.loss_scaler).update(scaler)
        applied = self._engine.was_step_applied()
        read = None if self._fp16 or not applied else reads.last  # a loss scale is divided out
        norm = float(self._engine.get_global_grad_norm()) if read is None else read
        if applied and not self._written:
            swap.check_written(self._engine.optimizer, self._world)
            self._written = True
        return Update(norm, applied, loss_scale, lowest, vetoed, reads.beside)

    def _loss_scale(self) -> tuple[float, float]:
        """Return the loss scale of this step, and the lowest that there can be."""
        if not self._fp16:
            return 1.0, 1.0
        scaler = self._engine.optimizer.loss_scaler
        scale = float(scaler.loss_scale)
        return scale, float(scaler.min_scale) if scaler.dynamic else scale

    def _unpartitioned_norm(self) -> torch.Tensor:
        # Stage 0 in fp32 reports no norm; the gradients are already averaged here and the same on every rank.
        if self.slices is not None:
            return self.slices.norm(self._trained)
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def forget_micro_batch(self) -> None:
        """Finish what the backward pass of a failed micro-batch has begun to reduce, below stage 3 on a single rank, so that the
        next one can begin. The step has to be left out."""
        wrapper = self._engine.optimizer
        if any(bucket.elements for bucket in getattr(wrapper, "ipg_buckets", {}).values()):
            wrapper.independent_gradient_partition_epilogue()

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next update; a parameter group with a factor of its own (`rate`) gets that share of it."""
        for number, group in enumerate(self._engine.optimizer.param_groups):
            # A frozen group has no gradients, but stages 1 to 3 apply weight decay and old momentum: 4.6e-4 of drift.
            group["lr"] = 0.0 if number in self._frozen_groups else rate * group.get("rate", 1.0)

    # -- unfreezing ---------------------------------------------------------------------------------------------------

    @property
    def frozen_groups(self) -> int:
        """How many of the optimizer's groups are frozen now."""
        return len(self._frozen_groups)

    def freeze(self, names: Collection[str]) -> None:
        """Leave the parameters of these names as they are, to the bit, until `unfreeze`. They are whole groups of the
        optimizer: DeepSpeed never trains a parameter that was frozen when the engine was made."""
        for number in self._groups_with(names):
            self._frozen_groups.add(number)
            self._require_gradients(number, False)

    def unfreeze(self, names: Collection[str], *, fresh: bool) -> None:
        """Train the parameters of these names from the next update on.

        fresh: their optimizer starts to count its steps now. It counted on while they were frozen, without a moment, and
        would take its first moments for biased by nothing: AdamW's first step would be a third as large.
        """
        for number in self._groups_with(names):
            self._frozen_groups.discard(number)
            self._require_gradients(number, True)
            if fresh:
                reset_counters(self._engine, self.stage, set(self._group_names[number]), self._replica)

    def _groups_with(self, names: Collection[str]) -> list[int]:
        chosen_names = set(names)
        numbers = [number for number, group in enumerate(self._group_names) if chosen_names & set(group)]
        assert chosen_names == {name for number in numbers for name in self._group_names[number]}, "a part of a group"
        return numbers

    def _require_gradients(self, number: int, required: bool) -> None:
        for name in self._group_names[number]:
            self._parameters[name].requires_grad_(required)

    @contextmanager
    def _all_trained(self) -> Iterator[None]:
        """Count all parameters as trained: DeepSpeed files one without gradients under those that are never trained."""
        for number in self._frozen_groups:
            self._require_gradients(number, True)
        try:
            yield
        finally:
            for number in self._frozen_groups:
                self._require_gradients(number, False)

    # -- what is done to gradients and weights on the side ------------------------------------------------------------

    def before_update(self, change: Change) -> None:
        """Call `change(partition, gradient, group)` for all that this rank updates, each time before the optimizer does.

        gradient: of the step's mean loss, clipped, a vector of `partition.elements`' size that may be changed. group:
        the optimizer's, with `lr` and `weight_decay`. Every element of every trained parameter comes once over all ranks,
        at stage 0 once on each.
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
        """Return what this rank updates."""
        assert not self.swaps, "states on a disk are in memory one after the other"
        return partitions_of(self._engine, self.stage, self._replica)

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The one that computes updates, below what partitions its states."""
        return self._inner

    @property
    def _inner(self) -> torch.optim.Optimizer:
        wrapper = self._engine.optimizer
        inner = wrapper if self.stage == 0 else wrapper.optimizer
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def assemble(self, name: str, fragment: tuple[int, torch.Tensor] | None, dtype: torch.dtype) -> torch.Tensor:
        """Assemble a tensor of a parameter's size as a vector, the same on every rank, from the fragments of all ranks.

        fragment: (first element, values) that this rank has, None for nothing. Every rank must call it.
        """
        whole = torch.zeros(full_count(self._parameters[name]), dtype=dtype, device=self.device)
        if fragment is not None and (self.stage > 0 or self._world.is_main):
            start, values = fragment
            whole[start : start + values.numel()] = values.to(whole.device, dtype)
        torch.distributed.all_reduce(whole)
        return whole

    def mask(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Train only the entries of these parameters whose mask is true; the others keep every bit.

        masks: bool tensors of the parameters' full size, by name. Gradients of the others are zero from the start, so they
        have no moments and no share in the norm; weight decay is taken from the optimizer and applied here. Masks cost a
        bit for each entry on every rank.
        """
        zero_gradients(self._parameters, masks, self.device)
        assert self._optimizer is not None
        decoupled = self._optimizer.decoupled_weight_decay
        self.before_update(masked_weight_decay(masks, self.partitions(), self._inner, decoupled=decoupled))

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Put zeros in place of the parameter `name` within the block. Every rank must enter and leave it."""
        parameter = self._parameters[name]
        with torch.no_grad():
            with gathered([parameter], modified_by_rank=0):
                values_before = parameter.detach().clone()
                parameter.zero_()
            yield
            with gathered([parameter], modified_by_rank=0):
                parameter.copy_(values_before)

    def evaluate(self, loss: Loss, batch: Batch) -> Any:
        """Return the head's answer for one micro-batch without gradients. At stage 3 every rank must call it equally often."""
        with torch.no_grad():
            return loss(self._engine, batch)

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Return the model's own output. At stage 3 every rank must call it equally often."""
        return self._engine(**inputs)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    # -- whole weights ------------------------------------------------------------------------------------------------

    @contextmanager
    def whole_module(self) -> Iterator[nn.Module]:
        """Yield the module with all weights in memory on every rank, callable without collectives.

        At stage 3 the weights are gathered once and DeepSpeed's hooks are taken off, so that one rank can generate text
        of any length while the others wait. Needs room for the whole model on every rank.
        """
        if self.stage < 3:
            yield self.module
            return
        with gathered(list(self.module.parameters())), without_hooks(self._engine, self.module):
            yield self.module

    @contextmanager
    def partly_whole(self, room: int) -> Iterator[None]:
        """Gather once, at stage 3, as many weights as fit into `room` bytes, from the first layer on: forward passes within the
        block gather the others alone. Every rank must give the same room."""
        chosen: list[Any] = []
        for parameter in filter(is_partitioned, self.module.parameters()):
            room -= full_count(parameter) * parameter.element_size()
            if room < 0:
                break
            chosen.append(parameter)
        gathered_once = [parameter for parameter in chosen if not parameter.is_external_param]
        with gathered(chosen):
            for parameter in gathered_once:
                parameter.is_external_param = True  # DeepSpeed's hooks do not give such ones back
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
        """Estimate how many bytes `save` writes over all ranks: fp32 weights, the optimizer's tensors, the module's weights; or
        `save_weights`."""
        elements = self.trained_count * (1 if self.slices is None else self.slices.parts)
        if weights_only:
            return 4 * elements
        in_module = 0 if self.stage == 3 else next(iter(self._trained)).element_size()
        parts = 1 if self.slices is None else self.slices.parts
        return elements * (in_module + (0 if self.stage == 0 else 4)) + round(parts * self._state_bytes)

    def save(self, directory: Path, tag: str, *, background: bool = False) -> Save:
        """Write this rank's shards below `directory/tag`, which exists. Every rank must call it.

        What the disk refused is in the returned `error`. background: the caller lets a thread `work_off` the returned save;
        the next `update` waits until it has copied the states.
        """
        if self.swaps:
            assert not background, "states on a disk are never in memory as a whole"
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
        """Save as `save`, but the trained weights and the buffers alone, as safetensors. No rank waits for another one."""
        return self._save_pieces(directory, tag, background=background)

    def _save_pieces(self, directory: Path, tag: str, *, states: bool = False, background: bool = False) -> Save:
        """Write pieces of weights as safetensors: a file for each rank, and for each part of it where they are on a disk."""
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
        """Read the files that `load` needs on this rank, so that they are hashed before anything changes.

        Returns their hashes (XXH3, 64 bits) by their names in `directory/tag`. Raises OSError.
        """
        paths = [Path(self._engine._get_ckpt_name(str(directory), tag))]
        if self.stage > 0:
            paths.append(Path(self._engine._get_zero_ckpt_name(str(directory), tag)))
        hashes = self._files.read_ahead(paths)
        return {path.name: hashed for path, hashed in zip(paths, hashes, strict=True)}

    def load(self, directory: Path, tag: str) -> None:
        """Read this rank's shards from `directory/tag`, written by as many ranks at the same stage, with the same slices."""
        with redirect_stdout(io.StringIO()):  # `_load_legacy_checkpoint`, which its bf16 optimizer prints
            loaded, _ = self._engine.load_checkpoint(
                str(directory), tag=tag, load_module_strict=not self._has_frozen, load_lr_scheduler_states=False
            )
        assert loaded is not None, f"DeepSpeed found no checkpoint in {directory / tag}"
        self._files.read_ahead([])

    def restore(self, source: Source) -> None:
        """Take over a checkpoint of another number of ranks, or of another stage, with other slices or none: without the
        optimizer's states where `why_no_other_layout` says that they depend on the layout. Every rank must call it."""
        self._files.read_ahead([])
        rank_source = source if self.slices is None else SlicedSource(source, self.slices)
        states = self._optimizer is None or not self._optimizer.why_no_other_layout
        restore(self._engine, self.stage, rank_source, self._replica, states=states)

    def close(self) -> None:
        """Leave nothing that keeps the model's memory, or the optimizer's, once the caller has let go of both."""
        self._engine.destroy()
        forget(self._engine, self.module)
