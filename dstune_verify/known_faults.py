"""Faults of published versions, by the cases that show them.

A wrong case is a known fault if its settings fit and the installed version is among the bad ones. Versions come from
docs/verified-versions.md, where each release ran the cases, and from upstream's threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dstune_verify.cases import CRASHED, WRONG, Case
from dstune_verify.environment import version_of
from dstune_verify.training import TrainingCase


@dataclass(frozen=True)
class KnownFault:
    """A fault with the versions that have it."""

    name: str
    package: str
    what: str
    """What goes wrong, as a clause."""
    source: str
    """The issue or pull request upstream, or where it was measured."""
    first_bad: str
    first_good: str
    """Empty if no published version is right."""
    remedy: str
    status: str = WRONG

    @property
    def versions(self) -> str:
        """The bad versions, in words."""
        if not self.first_good:
            return f"{self.package} {self.first_bad} and later, no release cures it yet"
        return f"{self.package} {self.first_bad} to before {self.first_good}"


def number(version: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def find(case: Case, status: str, version: Callable[[str], str] = version_of) -> KnownFault | None:
    """Return the known fault that a wrong or crashed case shows. version: gives the installed version of a package."""
    if not isinstance(case, TrainingCase) or case.engine != "deepspeed":
        return None
    for fault, fits in KNOWN:
        installed = number(version(fault.package))
        bad = number(fault.first_bad) <= installed and not (fault.first_good and installed >= number(fault.first_good))
        if bad and status == fault.status and fits(case):
            return fault
    return None


KNOWN: tuple[tuple[KnownFault, Callable[[TrainingCase], bool]], ...] = (
    (
        KnownFault(
            "clipping-default", "deepspeed", "without `gradient_clipping` in its configuration, DeepSpeed clips at 1.0",
            "DeepSpeed #8068", "0.19.3", "", 'write "gradient_clipping" into the configuration, 0 for none',
        ),
        lambda case: case.clips_unasked,
    ),
    (
        KnownFault(
            "reentrant-repeated", "deepspeed",
            "ZeRO-3 loses a part of the gradient of a module that is called twice under reentrant recomputation",
            "measured from 0.17.0 to 0.19.8, not reported", "0.17.0", "",
            "recompute with use_reentrant=False (gradient_checkpointing_kwargs of trainers), or use ZeRO-2",
        ),
        lambda case: case.zero_stage == 3 and case.recomputation == "reentrant" and case.model in ("repeated", "two-inputs"),
    ),
    (
        KnownFault(
            "reentrant-repeated-error", "deepspeed",
            "ZeRO-3 ends with an error where both calls of a module under reentrant recomputation fall into one bucket",
            "measured with 0.19.8, not reported", "0.19.8", "",
            "recompute with use_reentrant=False (gradient_checkpointing_kwargs of trainers), or use ZeRO-2", CRASHED,
        ),
        lambda case: case.zero_stage == 3 and case.recomputation == "reentrant" and case.model in ("repeated", "two-inputs"),
    ),
    (
        KnownFault(
            "uneven-experts", "deepspeed",
            "ZeRO-1 and ZeRO-2 add up gradients of different experts where ranks reached different ones",
            "measured from 0.17.0 to 0.19.8, not reported", "0.17.0", "",
            "use ZeRO-3 with set_z3_leaf_modules, or give every expert a gradient on every rank",
        ),
        lambda case: case.zero_stage in (1, 2) and case.model == "experts",
    ),
    (
        KnownFault(
            "uneven-experts-abort", "deepspeed",
            "ZeRO-1 and ZeRO-2 reduce buckets of different sizes where ranks reached different experts",
            "measured from 0.17.0 to 0.19.8, not reported", "0.17.0", "",
            "use ZeRO-3 with set_z3_leaf_modules, or give every expert a gradient on every rank", CRASHED,
        ),
        lambda case: case.zero_stage in (1, 2) and case.model == "experts",
    ),
    (
        KnownFault(
            "zero2-accumulation", "deepspeed", "ZeRO-2 keeps only a part of the accumulated gradient",
            "DeepSpeed #7718", "0.17.6", "0.18.3", "upgrade DeepSpeed",
        ),
        lambda case: case.zero_stage == 2 and case.accumulation > 1 and not case.offloads,
    ),
    (
        KnownFault(
            "zero2-accumulation-offload", "deepspeed",
            "ZeRO-2 with the optimizer on the host keeps only a part of the accumulated gradient",
            "DeepSpeed #7967", "0.15.2", "0.19.0", "upgrade DeepSpeed",
        ),
        lambda case: case.zero_stage == 2 and case.accumulation > 1 and case.offloads,
    ),
    (
        KnownFault(
            "zero0-bf16", "deepspeed", "bf16 without ZeRO does not update the weights, or by an old gradient",
            "DeepSpeed #7839", "0.17.6", "0.18.6", "upgrade DeepSpeed, or use ZeRO-1",
        ),
        lambda case: case.zero_stage == 0 and case.precision == "bf16",
    ),
    (
        KnownFault(
            "zero1-bf16-fp32-sums", "deepspeed", "ZeRO-1 in bf16 with `grad_accum_dtype: fp32` loses micro-batches",
            "DeepSpeed #7985", "0.18.3", "0.19.0", "upgrade DeepSpeed",
        ),
        lambda case: case.zero_stage == 1 and case.precision == "bf16" and case.accumulation > 1,
    ),
    (
        KnownFault(
            "scattered-gradients", "deepspeed",
            "`contiguous_gradients: false` loses the gradients of all micro-batches but the last (seen on CPUs only)",
            "measured from 0.17.0 to 0.19.7, not reported", "0.17.0", "0.19.8",
            'upgrade DeepSpeed, or set "contiguous_gradients": true',
        ),
        lambda case: case.zero_stage == 2 and case.accumulation > 1 and case.scatters_gradients,
    ),
    (
        KnownFault(
            "lora-recomputed", "deepspeed", "ZeRO-3 changes frozen weights between forward and recomputation",
            "DeepSpeed #8148", "0.17.0", "0.19.3", "upgrade DeepSpeed", CRASHED,
        ),
        lambda case: case.zero_stage == 3 and case.lora and case.recomputation == "non-reentrant",
    ),
)  # fmt: skip
"""Each fault with the settings that show it; the first that fits counts."""
