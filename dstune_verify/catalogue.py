"""All cases, in the order in which they run."""

from __future__ import annotations

from dataclasses import replace

from dstune_verify import collectives, continuity, environment, golden, kernels, training, user
from dstune_verify.cases import Case, CheckCase
from dstune_verify.options import Options


def all_cases(options: Options) -> dict[str, Case]:
    """Return all cases by name. Agents and ranks build the same ones from the same options."""
    if options.any:
        return {case.name: case for case in user.cases(options)}
    cases: list[Case] = [
        CheckCase("packages-of-ranks", "torch", environment.check_same_packages, short=True),
        *collectives.CASES,
        *golden.CASES,
        *kernels.CASES,
        *training.TORCH,
        *(replace(case, short=True) for case in training.KNOWN_FAULTS),
        *training.DEEPSPEED,
        *continuity.CASES,
    ]
    return {case.name: case for case in cases}
