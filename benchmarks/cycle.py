#!/usr/bin/env python3
"""A served model that is trained again from feedback, by the commands of a user.

usage: python benchmarks/cycle.py story|gates|probes|rounds|kills [--folder FOLDER] [--kills N]

story   fine-tune, serve, ask with feedback, another topic, `dstune monitor` (exit code 3), forget a user, `dstune cycle`, the
        challenger beside the current version in the server, promote, rollback: each a process of its own
gates   candidates that are drawn, as good or worse, and how many of them pass, are held and are refused by 2, 10 and 50 gates
probes  the same for candidates that lose points in one of four probes, by the number of questions
rounds  five topics that arrive one after another, beside plain fine-tuning and a training on all rows at once; a candidate that
        loses an old topic; a round in which one key gives the wrong label to everything
kills   cycles with real trainings that are killed at random moments (--kills, 10), against one that nobody killed

The rows are short reviews made from seeds (`tests/support/topics.py`), the model a classifier of two layers with random weights.
Prints what it does, and at the end one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure(arguments: argparse.Namespace, folder: Path) -> Any:
    from tests.support import cycling, rounds

    if arguments.what == "story":
        return cycling.story(folder, say)
    if arguments.what == "gates":
        return rounds.gates(say)
    if arguments.what == "probes":
        return rounds.probes(say)
    if arguments.what == "kills":
        return cycling.killed(folder, arguments.kills, say)
    return rounds.rounds(folder, say)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["story", "gates", "probes", "rounds", "kills"])
    parser.add_argument("--folder", type=Path, help="an empty folder that stays (default: a temporary one)")
    parser.add_argument("--kills", type=int, default=10, help="(default 10)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dstune-cycle-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(arguments, folder.resolve())))


if __name__ == "__main__":
    main()
