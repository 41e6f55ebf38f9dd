"""Refuses a run that cannot fit into the available memory before its ranks start, and says what would fit.

The bound is low on purpose, so that no run is refused that would fit: 90% of weights, optimizer states and gradient sums, which
every step needs regardless of its rows. Activations count only if the rows are known to have their maximum length.
"""

from __future__ import annotations

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data import inputs, sources
from dstune.launch.plan import Planned, planned
from dstune.launch.stages import free_cluster
from dstune.planning.hardware import GIB
from dstune.planning.memory import Memory
from dstune.planning.setup import Setup
from dstune.protocols import task_of

CERTAIN = 0.9
"""Share of the prediction that must be available: the planner's largest error is below 10% (docs/planning.md)."""

BYTES_PER_TOKEN = 16
"""A token of JSON rows is never longer on average: 3 to 6 bytes of text, names of columns and quotes beside it."""

ENOUGH_ROWS = 32
"""Full rows for each row of a micro-batch that the data has to hold at least: some may be repeated and left out."""


def memory_problems(config: RunConfig) -> list[Problem]:
    """Return why `config` cannot fit on this machine; nothing if it may fit, or the planner does not know the model."""
    if config.run.force:
        return []
    try:
        cluster = free_cluster(config)
        if cluster is None:
            return []  # the ranks' machines are others
        plan = planned(config, cluster)
    except UserError:  # an unknown architecture, or a number of processes that other checks refuse
        return []
    free_gib = cluster.device.memory_gib
    configured = plan.plan.configured
    needed = CERTAIN * least(configured.setup, configured.memory, full=rows_are_full(config), config=config) / GIB
    if needed <= free_gib:
        return []
    place = (
        "GPU memory"
        if cluster.device.gpu
        else f"memory ({cluster.per_node} ranks share {free_gib * cluster.per_node:.1f})"
    )
    reason = (
        f"a rank takes at least {needed:.1f} GiB, about {configured.memory_gib:.1f} at its peak, and {free_gib:.1f} GiB "
        f"of {place} are free"
    )
    return [Problem("trainer.micro_batch_size", reason, _fix(plan), str(config.trainer.micro_batch_size))]


def _fix(plan: Planned) -> str:
    best = plan.plan.recommended
    if best is None:
        advice = "no choice fits here: more ranks, a smaller model, method=lora or a shorter data.max_length"
    else:
        overrides = best.overrides(plan.setup)
        words = " ".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()
        )
        advice = f"{words} ({best.memory_gib:.1f} GiB)"
    return f"{advice}; `dstune plan` shows all choices, run.force=true starts all the same"


def least(setup: Setup, memory: Memory, *, full: bool, config: RunConfig) -> int:
    """Return the bytes that a rank needs regardless of its rows. full: whether rows have their maximum length, so activations
    count."""
    always = ("weights", "optimizer", "offloaded", *(model.name for model in setup.held))
    sums = memory.moments["step"]["gradient sums"] if setup.stage else 0
    moments = []
    for parts in memory.moments.values():
        size = sums + sum(parts.get(name, 0) for name in always)
        if full:
            every_target = task_of(config.task).every_position_is_a_target
            size += parts.get("activations", 0) + (parts.get("logits", 0) if every_target else 0)
        moments.append(size)
    return max(moments)


def rows_are_full(config: RunConfig) -> bool:
    """Return whether rows of `data.max_length` tokens are certain, because they are packed and there is enough data."""
    if not config.data.packing or config.data.max_rows is not None or config.data.mixture:
        return False
    needed = ENOUGH_ROWS * config.data.max_length * config.trainer.rows
    tokens = 0
    for key, part, source_config in inputs.row_inputs(config):
        if part != "train":
            continue
        try:
            for file in sources.of_part(source_config.data, part, key):
                if file.rows is not None:  # a slice: the length of its rows is unknown
                    return False
                tokens += file.path.stat().st_size // BYTES_PER_TOKEN
        except (UserError, OSError):
            return False
    return tokens >= needed
