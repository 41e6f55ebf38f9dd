"""What one rank runs: it joins the group, runs the cases one after another, and writes each outcome as a line of a file."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from typing import Any

import torch

from dstune_verify.cases import CRASHED, NOT_RUN, CannotRun, Case, Outcome
from dstune_verify.catalogue import all_cases
from dstune_verify.options import Options
from dstune_verify.world import World, join

ORDER = "DSTUNE_VERIFY_ORDER"
"""The variable with a file that says, as JSON, what a rank is to do: its place, the names of the cases, the file for outcomes."""


def main() -> None:
    """Run the cases of the order in the environment."""
    with open(os.environ[ORDER], encoding="utf-8") as order_file:
        order = json.load(order_file)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    with open(order["outcomes"], "a", encoding="utf-8") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        world = join(**order["place"], seconds=order["seconds"])
        cases = all_cases(Options(**order["options"]))
        for name in order["cases"]:
            write(running=name)
            outcome = run(cases[name], world)
            write(outcome=asdict(outcome))
            if not _together(world, outcome, order["seconds"]):
                os._exit(1)
        world.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries that wait for each other at the end of the interpreter do not matter here


def run(case: Case, world: World) -> Outcome:
    """Run a case; an exception is an outcome too."""
    began = time.perf_counter()
    try:
        outcome = case.run(world)
    except CannotRun as error:
        outcome = Outcome(case.name, NOT_RUN, str(error))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        outcome = Outcome(case.name, CRASHED, f"{type(error).__name__}: {lines[0][:300]}")
    return replace(outcome, seconds=time.perf_counter() - began)


def _together(world: World, outcome: Outcome, seconds: float) -> bool:
    """Return whether the group can go on: all ranks completed the case, or all ended it by an exception. If only some did, others
    wait for them in a collective."""
    try:
        statuses = world.gather(outcome.status, seconds=10 if outcome.status == CRASHED else seconds)
        crashed = {status == CRASHED for status in statuses}
        if crashed == {True}:  # an exception may only say that another rank, which raised earlier, has left already
            world.gather(True, seconds=10)
    except Exception:  # a rank does not come: it hangs, or has died
        return False
    return len(crashed) == 1


if __name__ == "__main__":
    main()
