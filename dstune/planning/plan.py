"""Compares the ways to train a run on given hardware: memory, largest micro-batch, seconds per step; and recommends one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from dstune.config.schema import Selective
from dstune.config.zero_rules import nodes_can_hold_copies
from dstune.planning.hardware import GIB, Cluster
from dstune.planning.memory import Memory, memory
from dstune.planning.setup import Setup
from dstune.planning.time import Speed, StepTime, step_time

CANDIDATES = (
    ("stage0", "none"),
    ("stage1", "none"),
    ("stage2", "none"),
    ("stage3", "none"),
    ("stage2", "optimizer"),
    ("stage3", "optimizer"),
    ("stage3", "optimizer+param"),
)
"""ZeRO stages, and what each offloads to host memory."""

CPU_CAUTION = 1.1
"""A rank on a CPU fits if its memory exceeds the prediction by 10%: the largest measured shortfall is 8% (docs/planning.md). On a
GPU the prediction itself contains a margin."""


ROOMY = 0.9
"""A choice that takes at most this share of a device's memory is preferred to an equally fast one that takes more, since a plan can
be wrong by up to a tenth."""


SAME_SPEED = 0.01
"""Choices whose times differ by at most this share are equally fast: then the one that takes less memory is better."""


@dataclass(frozen=True)
class Choice:
    """One row of the plan."""

    zero: str
    offload: str
    checkpointing: bool | Selective
    setup: Setup
    """The run as trained by this choice, with its micro-batch size."""
    memory: Memory
    time: StepTime
    fits: bool

    @property
    def partitioning(self) -> str:
        """The stage in words, and whether each node has a copy of the weights."""
        return f"{self.zero} hpz" if self.setup.copy_ranks > 1 else self.zero

    @property
    def memory_gib(self) -> float:
        return self.memory.total / GIB

    def overrides(self, configured: Setup) -> dict[str, object]:
        """Return the overrides that turn the configured run into this choice, by key."""
        overrides: dict[str, object] = {}
        if configured.stage != self.setup.stage:
            overrides["zero.stage"] = self.setup.stage
        chosen, other = self.setup, configured
        if (other.offload_optimizer, other.swaps) != (chosen.offload_optimizer, chosen.swaps):
            overrides["zero.offload_optimizer"] = (
                "nvme" if chosen.swaps else "cpu" if chosen.offload_optimizer else "none"
            )
        if configured.copy_ranks != self.setup.copy_ranks:
            overrides["zero.hpz"] = self.setup.copy_ranks > 1
        if configured.offload_param != self.setup.offload_param:
            overrides["zero.offload_param"] = "cpu" if self.setup.offload_param else "none"
        if configured.weight_bytes != self.setup.weight_bytes:
            overrides["trainer.precision"] = "fp32" if self.setup.weight_bytes == 4 else "bf16"
        if configured.checkpointing != self.checkpointing:
            overrides["trainer.activation_checkpointing"] = as_word(self.checkpointing)
        if configured.micro_batch_size != self.setup.micro_batch_size:
            overrides["trainer.micro_batch_size"] = self.setup.micro_batch_size
        return overrides


@dataclass(frozen=True)
class Plan:
    configured: Choice
    """The run exactly as configured."""
    choices: tuple[Choice, ...]
    recommended: Choice | None
    """The choice to take, as `_best` ranks them; None if nothing fits."""


def plan(configured: Setup, cluster: Cluster, speeds: dict[int, Speed], *, any_rows: bool = False) -> Plan:
    """Return the configured run and all choices for it. Offloaded bytes must fit into the node's memory if its size is known.

    speeds: by the bytes of a weight. any_rows: whether the run determines its micro-batch size itself.
    """

    def choice(setup: Setup, zero: str, offload: str) -> Choice:
        return _choice(setup, cluster, speeds, zero, offload)

    def fastest(setup: Setup, zero: str, offload: str) -> Choice:
        """Return the choice with the smallest micro-batch that is about as fast as the fastest one that fits; with the configured
        one if that is as fast and leaves memory free."""
        sizes = (choice(replace(setup, micro_batch_size=size), zero, offload) for size in _sizes(setup))
        fitting = list(takewhile(lambda tried: tried.fits, sizes))
        if not fitting:
            return choice(replace(setup, micro_batch_size=1), zero, offload)
        enough = (1 + SAME_SPEED) * min(tried.time.seconds for tried in fitting)
        equal = [tried for tried in fitting if tried.time.seconds <= enough]
        kept = (tried for tried in equal if tried.setup.micro_batch_size == setup.micro_batch_size)
        as_is = next((tried for tried in kept if tried.memory_gib <= ROOMY * cluster.device.memory_gib), None)
        return as_is or equal[0]

    def largest(setup: Setup, zero: str, offload: str) -> Choice:
        """Return the choice with the largest micro-batch that fits; with one row if none fits."""
        best = choice(replace(setup, micro_batch_size=1), zero, offload)
        for size in _sizes(setup):
            tried = choice(replace(setup, micro_batch_size=size), zero, offload)
            if not tried.fits:
                break
            best = tried
        return best

    def variants(checkpointing: bool | Selective) -> Iterator[Choice]:
        for zero, offload in CANDIDATES:
            setup = variant(replace(configured, checkpointing=checkpointing), zero, offload)
            for tried in with_copies(setup):
                yield (largest if any_rows else fastest)(tried, zero, offload)

    as_configured = (largest if any_rows else choice)(configured, f"stage{configured.stage}", _offload(configured))
    choices = list(variants(configured.checkpointing))
    for more_checkpointing in (Selective.selective, True):
        if configured.tiles > 1 and isinstance(more_checkpointing, Selective):
            continue  # cannot be combined with feed-forward layers computed in pieces
        if effort(more_checkpointing) > effort(configured.checkpointing) and not _plainly_fits(choices):
            choices += variants(more_checkpointing)
    return Plan(as_configured, tuple(choices), _best(choices, cluster))


def cheapest_stage(
    configured: Setup, cluster: Cluster, speeds: dict[int, Speed], stages: Iterable[int]
) -> tuple[Choice, list[Choice]]:
    """Return the run at the recommended stage, and at each of `stages` that can train it; everything else stays as configured. If
    no stage fits, the one that takes the least memory is recommended."""
    offload = _offload(configured)
    choices = []
    for stage in stages:
        setup = variant(configured, f"stage{stage}", offload)
        # A change of precision would make the results of the run depend on the hardware.
        if setup is not None and setup.weight_bytes == configured.weight_bytes:
            tried = [setup] if configured.copy_ranks > 1 else with_copies(setup)
            choices += [_choice(setup, cluster, speeds, f"stage{stage}", offload) for setup in tried]
    if not choices:
        choices = [_choice(configured, cluster, speeds, f"stage{configured.stage}", offload)]
    return _best(choices, cluster) or min(choices, key=lambda choice: choice.memory.total), choices


def _choice(setup: Setup, cluster: Cluster, speeds: dict[int, Speed], zero: str, offload: str) -> Choice:
    usage = memory(setup)
    caution = 1.0 if setup.on_gpu else CPU_CAUTION
    fits = usage.total * caution <= cluster.device.memory_gib * GIB
    if cluster.host_gib is not None:
        fits = fits and usage.host * setup.ranks_per_node <= cluster.host_gib * GIB
    time = step_time(setup, speeds[setup.weight_bytes])
    return Choice(zero, offload, setup.checkpointing, setup, usage, time, fits)


def _best(choices: Iterable[Choice], cluster: Cluster) -> Choice | None:
    """Return the fastest choice that fits; None if none does. Among choices of about the same speed, one without offloading wins,
    then one that leaves memory free (`ROOMY`). More memory is only taken for more speed (`SAME_SPEED`)."""
    fitting = [row for row in choices if row.fits]
    roomy_gib = ROOMY * cluster.device.memory_gib
    best = min(
        fitting,
        key=lambda row: (
            round(row.time.seconds / _fastest(fitting), 1),
            row.offload != "none",
            row.memory_gib > roomy_gib,
            row.time.seconds,
            row.setup.stage,
        ),
        default=None,
    )
    if best is None:
        return None
    equal = [
        row
        for row in fitting
        if row.time.seconds <= (1 + SAME_SPEED) * best.time.seconds
        and row.setup.stage <= best.setup.stage
        and row.offload in ("none", best.offload)
    ]
    return min(equal, key=lambda row: (row.memory_gib, row.time.seconds))


def _offload(setup: Setup) -> str:
    """Return what a run offloads to host memory, in the words of `CANDIDATES`."""
    offloaded = (("optimizer", setup.offload_optimizer), ("param", setup.offload_param))
    return "+".join(name for name, on in offloaded if on) or "none"


def _plainly_fits(rows: list[Choice]) -> bool:
    return any(row.fits and row.offload == "none" for row in rows)


def effort(checkpointing: bool | Selective) -> int:
    """Return a rank of the kind of activation checkpointing that increases with the amount of recomputation."""
    return 1 if isinstance(checkpointing, Selective) else 2 * checkpointing


def as_word(checkpointing: bool | Selective) -> bool | str:
    """Return the kind of activation checkpointing as the value that users write and JSON stores."""
    return checkpointing.value if isinstance(checkpointing, Selective) else checkpointing


def _fastest(rows: list[Choice]) -> float:
    return min(row.time.seconds for row in rows) or 1.0


def variant(setup: Setup, zero: str, offload: str) -> Setup | None:
    """Return `setup` with the stage `zero` and offloading `offload` of `CANDIDATES`; None if it cannot be trained that way."""
    stage = int(zero.removeprefix("stage"))
    if stage == 3 and setup.rounded:
        return None  # zero.Init does not support quantized weights
    if offload != "none" and not setup.on_gpu:
        return None  # offloading saves nothing on a CPU
    if setup.slices > 1 and (stage == 3 or offload != "none"):
        return None  # not supported if ranks share weights
    # In bf16, DeepSpeed's stage 0 makes an optimizer step without gradients at initialization, so stage 0 uses fp32.
    weight_bytes = 4 if stage == 0 else setup.weight_bytes
    frozen_bits = setup.frozen_bits if setup.rounded else 8 * weight_bytes
    return replace(
        setup,
        stage=stage,
        offload_optimizer=offload.startswith("optimizer"),
        swaps=setup.swaps and stage == 3 and offload.startswith("optimizer"),
        offload_param=offload.endswith("param"),
        weight_bytes=weight_bytes,
        frozen_bits=frozen_bits,
    )


def with_copies(setup: Setup | None) -> list[Setup]:
    """Return the setup without and, where stage 3 on several nodes permits it, with a copy of the weights in each node."""
    if setup is None:
        return []
    without = replace(setup, copy_ranks=1)
    ranks = setup.ranks * setup.slices
    if setup.stage < 3 or setup.offload_param or not nodes_can_hold_copies(ranks, setup.ranks_per_node):
        return [without]
    return [without, replace(setup, copy_ranks=setup.ranks_per_node)]


def _sizes(setup: Setup) -> list[int]:
    """Return the micro-batch sizes to try: powers of two up to the share of the global batch that a rank, or its group, trains."""
    share = max(1, -(-setup.global_batch_size // setup.groups))
    return [2**power for power in range(share.bit_length()) if 2**power <= share]
