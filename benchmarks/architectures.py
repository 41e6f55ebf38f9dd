"""Every architecture of transformers, trained by dstune and by a plain loop: trained alike, refused before training, or wrong.

python benchmarks/architectures.py run STATE.jsonl [--kinds llama,gemma3] [--part 3/8] [--every-case]
python benchmarks/architectures.py write STATE.jsonl      # benchmarks/architectures.json and docs/architectures.md

A pair of processes trains tiny checkpoints one after another. `STATE.jsonl` has a line for each case that is done; started again,
`run` goes on after the last one. A case that ends a process, or takes longer than five minutes, is noted and the next one gets a
new pair.

The plain loop has each sample alone in a forward pass: nothing is packed, padded, masked or partitioned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from architecture_cases import Case, all_cases, note, read_state
from architecture_page import write
from architecture_rank import rank_main

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a rank imports `support` and this checkout's `dstune`

PATIENCE = 300
"""Seconds for a case."""


def run(arguments: argparse.Namespace) -> None:
    from support.ranks import environment
    from support.tiny import write_dialogues, write_labelled, write_pairs

    from dstune.core.rendezvous import free_port

    state = arguments.state.resolve()
    cases = all_cases(arguments.kinds.split(",") if arguments.kinds else None, arguments.part, arguments.every_case)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        write_dialogues(work / "causal.jsonl", 24, turns=(1, 2))
        write_labelled(work / "classification.jsonl", 16)
        write_pairs(work / "seq2seq.jsonl", 16)
        while remaining := [case for case in cases if case.name not in read_state(state)]:
            (work / "cases.json").write_text(json.dumps([asdict(case) for case in remaining]))
            port, ranks = free_port(), []
            for rank in range(2):
                command = [
                    sys.executable,
                    str(Path(__file__).resolve()),
                    "rank",
                    str(work / "cases.json"),
                    str(state),
                    folder,
                ]
                variables = environment(rank, 2, port) | {"DSTUNE_CACHE": str(work / "cache")}
                with (work / f"rank-{rank}.log").open("w") as log:
                    ranks.append(subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT))
            watch(ranks, state, work)
    print(summary(read_state(state)))


def watch(ranks: list[subprocess.Popen[bytes]], state: Path, work: Path) -> None:
    """Wait for a pair; end it where a case ended one of them, or takes too long."""
    size, since = -1, time.monotonic()
    while any(rank.poll() is None for rank in ranks):
        now = state.stat().st_size if state.is_file() else 0
        if now != size:
            size, since = now, time.monotonic()
        stuck = time.monotonic() - since > PATIENCE
        if stuck or any(rank.returncode for rank in ranks):
            time.sleep(0 if stuck else 2)
            break
        time.sleep(0.2)
    for rank in ranks:
        rank.kill()
        rank.wait()
    for entry in list(read_state(state).values()):
        if entry["status"] == "begun":
            log = (work / "rank-0.log").read_text(errors="replace").splitlines() or [""]
            note(
                state, Case(**entry["case"]), {"status": "crashed", "reason": f"no answer; last line: {log[-1][:200]}"}
            )


def summary(entries: dict[str, dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for entry in entries.values():
        counts[entry["status"]] = counts.get(entry["status"], 0) + 1
    return json.dumps(counts)


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        rank_main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "write"])
    parser.add_argument("state", type=Path)
    parser.add_argument("--kinds")
    parser.add_argument("--part")
    parser.add_argument("--every-case", action="store_true")
    parser.add_argument("--work", default=None)
    arguments = parser.parse_args()
    if arguments.action == "write":
        write(arguments.state)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
