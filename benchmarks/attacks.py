#!/usr/bin/env python3
"""The attacks that tests/security replays: what each is, where it strikes, and how it is held.

usage: python benchmarks/attacks.py [--run]

Prints the table of docs/security.md (`python tools/guides.py` puts it there). `--run` replays all of them with pytest first
and prints how many were held. `python benchmarks/mutations.py attacks` takes each defence out of a copy of the tree, in the
file of the last column, and sees its test fail.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

from benchmarks.attack_mutations import MUTATIONS
from benchmarks.attack_table.code import CODE
from benchmarks.attack_table.files import FILES
from benchmarks.attack_table.hangs import HANGS
from benchmarks.attack_table.pictures import PICTURES
from benchmarks.attack_table.processes import PROCESSES
from benchmarks.attack_table.programs import PROGRAMS
from benchmarks.attack_table.recordings import RECORDINGS
from benchmarks.attack_table.runs_of_others import RUNS_OF_OTHERS
from benchmarks.attack_table.server import SERVER

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "security"

ATTACKS = (*PROCESSES, *CODE, *RUNS_OF_OTHERS, *SERVER, *PICTURES, *PROGRAMS, *RECORDINGS, *FILES, *HANGS)


def table() -> str:
    """Return the attacks as a Markdown table."""
    lines = ["| attack | where | how it is held | test | undone in |", "| --- | --- | --- | --- | --- |"]
    for attack in ATTACKS:
        file, _, name = attack.test.partition(".")
        undone = ", ".join(f"`{place}`" for place in MUTATIONS[attack.place].files)
        cells = (attack.what, attack.where, attack.held, f"`{name}` in `tests/security/test_{file}.py`", undone)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run", action="store_true", help="replay them first")
    code = 0
    if arguments.parse_args(argv).run:
        tests = sorted({attack.place for attack in ATTACKS})
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, check=False).returncode
        print(f"{len(ATTACKS)} attacks, {'all of them held' if code == 0 else 'not all of them held'}\n")
    print(table(), end="")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
