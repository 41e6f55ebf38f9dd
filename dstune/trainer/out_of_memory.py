"""Replaces torch's out-of-memory error by a message that lists the settings that free the most memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dstune.config.schema import Automatic, Offload, OptimizerOffload, RunConfig, stage_of
from dstune.config.validate import permits
from dstune.core.errors import TrainingFailed, UserError, first_line
from dstune.planning.architecture import architecture
from dstune.planning.hardware import GIB
from dstune.planning.memory import memory
from dstune.planning.setup import head_of, labels_of, setup
from dstune.protocols import METHODS, method_of
from dstune.zero import accelerator


def alternatives(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield changes of a run that take less memory: each as an override, with the changed run."""
    trainer, zero, rows = config.trainer, config.zero, config.trainer.rows
    if rows > 1:
        half = replace(trainer, micro_batch_size=rows // 2)
        yield f"trainer.micro_batch_size={rows // 2}", replace(config, trainer=half)
    if not trainer.activation_checkpointing:
        again = replace(trainer, activation_checkpointing=True)
        yield "trainer.activation_checkpointing=true", replace(config, trainer=again)
    if (stage := stage_of(zero)) < 3:
        yield f"zero=stage{stage + 1}", replace(config, zero=replace(zero, stage=stage + 1))
    elif zero.offload_optimizer is OptimizerOffload.none:
        moved = replace(zero, offload_optimizer=OptimizerOffload.cpu, offload_param=Offload.cpu)
        yield "zero=stage3_offload", replace(config, zero=moved)
    shorter = config.data.max_length // 2
    yield f"data.max_length={shorter}", replace(config, data=replace(config.data, max_length=shorter))


def advice(config: RunConfig, values: dict[str, Any], precision: Any, ranks: int, ranks_per_node: int) -> list[str]:
    """Return the valid overrides that free memory, ordered by how much they free according to the planner; empty if the planner
    does not know the model. values: the model's `config.json`."""

    def total(run: RunConfig) -> float:
        model = architecture(values, head_of(run), labels_of(run))
        planned = setup(
            run,
            model,
            precision=precision,
            values=values,
            ranks=ranks,
            ranks_per_node=ranks_per_node,
            on_gpu=accelerator.present(),
        )
        return memory(planned).total / GIB

    try:
        now = total(config)
        freed = [(now - total(run), words) for words, run in alternatives(config) if permits(config, run)]
    except (UserError, AttributeError, LookupError, TypeError, ValueError):
        return []
    lora = replace(config, method=METHODS["lora"].Config())
    if not method_of(config.method).adapter and permits(config, lora):
        freed.append((0.0, "method=lora"))
    freed.sort(key=lambda entry: -entry[0])
    return [f"{words} ({gib:.1f} GiB less)" if gib > 0.05 else words for gib, words in freed if gib >= 0]


@contextmanager
def explained(place: Callable[[], str], advise: Callable[[], list[str]]) -> Iterator[None]:
    """Raise TrainingFailed in place of an out-of-memory error within the block. place: describes what the run was doing."""
    try:
        yield
    except Exception as error:  # torch, drivers and DeepSpeed raise different types
        if not accelerator.out_of_memory(error):
            raise
        fixes = advise()
        fix = ", ".join(fixes) or "a smaller trainer.micro_batch_size or data.max_length, or a higher zero.stage"
        message = f"out of memory in {place()} ({first_line(error)}). Settings that free memory, most first: {fix}"
        raise TrainingFailed(
            f"{message}. `trainer.micro_batch_size={Automatic.auto.value}` finds the micro-batch size that fits."
        ) from error
