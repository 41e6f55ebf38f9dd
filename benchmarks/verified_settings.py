#!/usr/bin/env python3
"""Fresh shapes and settings, judged by `dstune-verify`: does it cry wolf?

    OMP_NUM_THREADS=1 python benchmarks/verified_settings.py [--count 50] [--seed 1] [--ranks 2]

Draws training cases that are not among the built-in ones: sizes of the model, rows, lengths, micro-batches, buckets, stages,
precisions, clipping, recomputation, offload, LoRA, experts. Prints each with its error beside the bound. An alarm that is no
known fault of the installed DeepSpeed, or a case that fails, ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dstune_verify import environment, known_faults, models, runner
from dstune_verify import rank as rank_module
from dstune_verify.cases import CRASHED, NOT_RUN, RIGHT, WRONG, Outcome
from dstune_verify.training import TrainingCase
from dstune_verify.world import World

SEED, COUNT = "VERIFIED_SETTINGS_SEED", "VERIFIED_SETTINGS_COUNT"


@dataclass(frozen=True)
class FreshCase(TrainingCase):
    """A training case on a tiny model of other sizes."""

    width: int = 24
    heads: int = 3
    layers: int = 2
    vocabulary: int = 61
    experts: int = 4

    def run(self, world: World) -> Outcome:
        with self.sizes():
            return super().run(world)

    @contextmanager
    def sizes(self) -> Iterator[None]:
        sizes = {"WIDTH": self.width, "HEADS": self.heads, "LAYERS": self.layers, "VOCABULARY": self.vocabulary}
        sizes["EXPERTS"] = self.experts
        before = {name: getattr(models, name) for name in sizes}
        vars(models).update(sizes)
        try:
            yield
        finally:
            vars(models).update(before)

    def __str__(self) -> str:
        words = [f"{self.model} {self.layers}x{self.width}/{self.heads}, {self.vocabulary} tokens"]
        words += [f"{self.accumulation} x {self.rows} x {self.length}", f"bucket {self.bucket:,}"]
        words += [f"clipping {self.clipping}"] if self.clipping != 0 else []
        words += [self.recomputation] if self.recomputation else []
        words += [word for word, is_on in (("offload", self.offload), ("LoRA", self.lora)) if is_on]
        words += ["uneven experts"] if self.ban_experts else []
        words += [json.dumps(self.config)] if self.config else []
        return ", ".join(words)


def draw(count: int, seed: int) -> list[FreshCase]:
    """Return cases, each of other settings than those before."""
    choose = random.Random(seed)
    return [draw_case(number, choose) for number in range(count)]


def draw_case(number: int, choose: random.Random) -> FreshCase:
    engine = choose.choice(("deepspeed",) * 8 + ("ddp", "fsdp2"))
    stage = choose.randrange(4) if engine == "deepspeed" else 0
    model = choose.choice(tuple(models.KINDS))
    lora = model in ("plain", "repeated") and choose.random() < 0.25
    recomputation = choose.choice(("", "", "non-reentrant", "reentrant"))
    if engine != "deepspeed" or (
        recomputation == "reentrant" and model in ("repeated", "two-inputs") and stage in (1, 2)
    ):
        recomputation = recomputation.replace("reentrant", "non-reentrant").replace(
            "non-non-", "non-"
        )  # they refuse it
    zero: dict[str, Any] = {}
    if stage in (1, 2) and choose.random() < 0.3:
        zero["overlap_comm"] = True
    if stage in (1, 2) and choose.random() < 0.2:
        zero["round_robin_gradients"] = True
    if stage == 3 and choose.random() < 0.3:
        zero["stage3_max_live_parameters"] = choose.choice((0, 1000, 10**6))
    heads, size = choose.choice((1, 2, 3, 4)), choose.choice((6, 8, 10, 14, 16))
    clips_unasked = engine == "deepspeed" and choose.random() < 0.1
    precision = choose.choice(("fp32", "bf16"))
    bans_experts = model == "experts" and choose.random() < 0.4  # otherwise enough tokens for all experts on every rank
    name = f"fresh-{number:02}-{engine if engine != 'deepspeed' else f'zero{stage}'}-{precision}"
    return FreshCase(
        name,
        engine=engine,
        stage=stage,
        precision=precision,
        model=model,
        accumulation=choose.choice((1, 2, 3, 5)),
        clipping=None if clips_unasked else choose.choice((0.0, 0.0, 0.3, 2.0)),
        recomputation=recomputation,
        offload=stage > 0 and choose.random() < 0.2,
        lora=lora,
        ban_experts=bans_experts,
        bucket=choose.choice((1500, 4000, 20_000, 10**7)),
        config={"zero_optimization": zero} if zero else {},
        rows=5 if model == "experts" and not bans_experts else choose.choice((1, 2, 3, 5)),
        length=33 if model == "experts" and not bans_experts else choose.choice((2, 5, 9, 16, 33)),
        width=heads * size,
        heads=heads,
        layers=choose.choice((1, 2, 3, 4)),
        vocabulary=choose.choice((37, 61, 101, 157)),
        experts=choose.choice((3, 4, 5)),
    )


def rank_main() -> None:
    """What a rank runs: it draws the same cases."""
    cases = {case.name: case for case in draw(int(os.environ[COUNT]), int(os.environ[SEED]))}
    rank_module.all_cases = lambda options: cases  # type: ignore[assignment]
    rank_module.main()


def rank_command() -> list[str]:
    path = [str(Path(__file__).parent), *sys.path]
    code = f"import sys; sys.path[:] = {path!r}; import verified_settings; verified_settings.rank_main()"
    return [sys.executable, "-c", code]


def describe(case: FreshCase, outcome: Outcome) -> str:
    """Return a line about a case: its error beside the bound, or what is wrong."""
    errors, bounds = outcome.errors, outcome.bounds
    figures = f"{errors['gradient']:.2g} of {bounds['gradient']:.2g}" if "gradient" in errors else ""
    fault = known_faults.find(case, outcome.status)
    reason = f"; known: {fault.name}" if fault else (f"; {outcome.detail}" if outcome.status != RIGHT else "")
    return f"{outcome.status:<8} {case.name:<24} {figures:<18} {case}{reason}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    os.environ |= {SEED: str(arguments.seed), COUNT: str(arguments.count)}
    runner.rank_command = rank_command
    cases = {case.name: case for case in draw(arguments.count, arguments.seed)}
    counts: Counter[str] = Counter()
    largest: dict[str, float] = {}
    for outcome in runner.Runner(None, arguments.ranks).run(list(cases.values())):
        case = cases[outcome.case]
        print(describe(case, outcome), flush=True)
        known = known_faults.find(case, outcome.status)
        counts[f"known: {known.name}" if known else outcome.status] += 1
        if outcome.status == RIGHT:
            share = max(
                outcome.errors[name] / bound for name, bound in outcome.bounds.items() if name in outcome.errors
            )
            largest[case.precision] = max(largest.get(case.precision, 0.0), share)
    print(json.dumps({**environment.versions(), "counts": counts, "largest error of its bound": largest}, indent=1))
    return int(any(counts[status] for status in (WRONG, CRASHED, NOT_RUN)))


if __name__ == "__main__":
    sys.exit(main())
