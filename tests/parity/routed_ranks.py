"""Program on every rank: trains tiny models whose rows choose their weights, and compares each with a plain loop."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from support.ranks import end_with, start_rank

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


def main() -> None:
    """Train the cases of the argument, JSON of `cases` (kind, method, stage each) and `work` (a folder with `seq2seq.jsonl`)."""
    warnings.filterwarnings("ignore")
    import transformers
    from architecture_cases import Case
    from architecture_rank import run_case

    from dstune.core.errors import UserError

    transformers.logging.set_verbosity_error()
    world = start_rank()
    request = json.loads(sys.argv[1])
    for kind, method, stage in request["cases"]:
        try:
            result = run_case(Case("seq2seq", kind, method, False, stage), world, Path(request["work"]))
        except UserError as error:
            (problem,) = error.problems
            result = {"status": "refused", "where": problem.where, "fix": problem.fix}
        if world.is_main:
            print("RESULT", json.dumps({"kind": kind, "method": method, "stage": stage, **result}), flush=True)


if __name__ == "__main__":
    end_with(main)
