"""The only `deepspeed.initialize`, and every use of an undocumented DeepSpeed attribute."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dstune.dist import World
from dstune.errors import Problem, UserError
from dstune.rank_env import RankEnv
from dstune.zero.restore import Source, restore

PARAMETER_GROUPS = "dstune_parameter_groups"
"""Key of the parameter names of each group in what DeepSpeed saves: at stage 0 its optimizer has numbers only."""

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Callable[..., Any], Batch], Any]
"""(forward, batch) -> an output whose `loss_sum` is the sum of the losses of the batch. See `models.heads`."""


def start_process_group(env: RankEnv, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the ranks of this run: gloo on CPUs, nccl on GPUs. Sets the device of this rank."""
    os.environ.update(
        RANK=str(env.rank),
        WORLD_SIZE=str(env.world_size),
        LOCAL_RANK=str(env.local_rank),
        LOCAL_WORLD_SIZE=str(env.local_size),
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others and warns that it found none
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed's shared-memory collective for CPUs is compiled at first use, 30-60 s with a compiler and an error
    # without; it brought nothing measurable over gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(_device_of(env))
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return World(env)


def _device_of(env: RankEnv) -> int:
    """The index of this rank's GPU; tells DeepSpeed too. Raises UserError where there are fewer GPUs than ranks."""
    visible = torch.cuda.device_count()
    # srun --gpus-per-task=1 shows each rank its own GPU only, as number 0.
    device = 0 if visible == 1 and env.source == "slurm" else env.local_rank
    if device >= visible:
        raise UserError(
            Problem(
                "launch",
                value=f"{env.local_size} ranks",
                reason=f"this node shows {visible} GPU(s), and every rank needs one of its own",
                fix="start fewer ranks on a node, or CUDA_VISIBLE_DEVICES= to train on the CPU",
            )
        )
    os.environ["LOCAL_RANK"] = str(device)
    return device


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """While open, `from_pretrained` at stage 3 partitions each parameter as it is loaded.

    transformers keeps only a weak reference to this object: it has to outlive the loading.
    """
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(settings)
    yield
    del keep_alive


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape before stage 3 partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def full_count(parameter: nn.Parameter) -> int:
    """The parameter's number of elements before stage 3 partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether stage 3 keeps this parameter in parts."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Sequence[nn.Parameter], *, modified_by_rank: int | None = None) -> Any:
    """Context in which stage 3 parameters are whole on every rank; a collective on entry and on exit.

    With `modified_by_rank`, what that rank writes into them is kept.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modified_by_rank)


def _moments(optimizer: torch.optim.Optimizer) -> int:
    """Tensors of a parameter's size that the optimizer keeps."""
    if "betas" in optimizer.defaults:
        return 2
    return 1 if optimizer.defaults.get("momentum") else 0


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    grad_norm: float
    """Norm of the global gradient before clipping; not finite where the step was skipped."""
    applied: bool
    loss_scale: float = 1.0


class Engine:
    """DeepSpeed's engine with the window as its step: `accumulate` for each micro-batch, then `update`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, settings: dict[str, Any], world: World
    ):
        """optimizer: None for an engine that only evaluates, at stage 0 or 3."""
        import deepspeed

        self._world = world
        self.stage: int = settings["zero_optimization"]["stage"]
        self._fp16: bool = settings["fp16"]["enabled"]
        self._moments = 0 if optimizer is None else _moments(optimizer)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._group_names = [
            [names[id(parameter)] for parameter in group["params"]]
            for group in (optimizer.param_groups if optimizer is not None else ())
        ]
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # `hooks.NonFinite` stops the run, with a result and a reason
        self._engine.train()  # transformers hands a loaded model over in evaluation mode, without dropout
        self.module: nn.Module = self._engine.module
        self.device: torch.device = torch.device(self._engine.device)
        self._trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self._has_frozen = any(not parameter.requires_grad for parameter in self.module.parameters())

    # -- the step -----------------------------------------------------------------------------------------------------

    def accumulate(self, loss: Loss, batch: Batch, *, window_weight: float, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its loss sum, detached.

        The gradient is that of `sum of all losses / window_weight` over the window's micro-batches on all ranks: DeepSpeed
        averages over the ranks, so the loss is multiplied by their number, and its own division by the accumulation
        steps is off. Exact to 1.7e-7 in fp32 at stages 0-3.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        loss_sum = loss(self._engine, batch).loss_sum
        scale = self._world.size / window_weight
        # 0 * inf is nan: a non-finite loss makes this rank's gradients non-finite, hence the global norm, hence every
        # rank skips the update, without a message of its own and without waiting for the device.
        self._engine.backward(loss_sum * (scale + 0.0 * loss_sum.detach()), scale_wrt_gas=False)
        return loss_sum.detach()

    def update(self) -> Update:
        """The optimizer step of the window; skipped on all ranks where the global gradient is not finite."""
        if self.stage == 0:
            norm = self._unpartitioned_norm()
            if not torch.isfinite(norm):
                self._engine.zero_grad()
                return Update(float(norm), applied=False)
            self._engine.step()
            return Update(float(norm), applied=True)
        loss_scale = float(self._engine.optimizer.loss_scale) if self._fp16 else 1.0
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return Update(float(norm), applied=self._engine.was_step_applied(), loss_scale=loss_scale)

    def _unpartitioned_norm(self) -> torch.Tensor:
        # Stage 0 in fp32 reports no norm; the gradients are already averaged here and the same on every rank.
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def set_learning_rate(self, rate: float) -> None:
        """The rate of every parameter group for the next update."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def evaluate(self, loss: Loss, batch: Batch) -> Any:
        """The head's answer for one micro-batch without gradients. At stage 3 every rank must call it equally often."""
        with torch.no_grad():
            return loss(self._engine, batch)

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The model's own output. At stage 3 every rank must call it equally often."""
        return self._engine(**inputs)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    # -- whole weights ------------------------------------------------------------------------------------------------

    @contextmanager
    def whole_module(self) -> Iterator[nn.Module]:
        """The module with all weights in memory on every rank, callable without collectives.

        At stage 3 the weights are gathered once and DeepSpeed's hooks are taken off, so that one rank can generate text
        of any length while the others wait. Needs room for the whole model on every rank.
        """
        if self.stage < 3:
            yield self.module
            return
        offload = self._engine.optimizer.parameter_offload
        with gathered(list(self.module.parameters())):
            for parameter in self.module.parameters():
                parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield self.module
            finally:
                # The recorded order of fetches belongs to the hooks that were removed.
                coordinator = offload.get_param_coordinator()
                if not coordinator.is_invalid_trace():
                    coordinator._invalidate_trace()
                offload._register_deepspeed_module(offload.module)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint_bytes(self) -> int:
        """About how much `save` writes over all ranks: fp32 weights, the optimizer's tensors, the module's weights."""
        elements = sum(full_count(parameter) for parameter in self._trained)
        in_module = 0 if self.stage == 3 else next(iter(self._trained)).element_size()
        return elements * (in_module + (0 if self.stage == 0 else 4) + 4 * self._moments)

    def save(self, directory: Path, tag: str) -> None:
        """Write this rank's shards below `directory/tag`. Every rank must call it."""
        self._engine.save_checkpoint(
            str(directory),
            tag=tag,
            client_state={PARAMETER_GROUPS: self._group_names},
            save_latest=False,
            exclude_frozen_parameters=self._has_frozen,
        )

    def load(self, directory: Path, tag: str) -> None:
        """Read this rank's shards from `directory/tag`, written by as many ranks at the same stage."""
        loaded, _ = self._engine.load_checkpoint(
            str(directory), tag=tag, load_module_strict=not self._has_frozen, load_lr_scheduler_states=False
        )
        assert loaded is not None, f"DeepSpeed found no checkpoint in {directory / tag}"

    def restore(self, source: Source) -> None:
        """Take over a checkpoint of another number of ranks, or of another stage. Every rank must call it."""
        restore(self._engine, self.stage, source, self._world.rank)

    def close(self) -> None:
        self._engine.destroy()
