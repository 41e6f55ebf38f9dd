"""How many file operations a start takes, which the shared file system of a cluster has to answer.

    python benchmarks/file_operations.py

Counts system calls with `strace -f` (Debian package `strace`): openings, and questions about a file (stat, access, readlink), of
imports in one process, and of runs of two steps of a tiny model. The ranks of a run start cold, each with its own imports, or are
forked from one process that has done the imports (`launch.warm`). By where the file lies: Python and its packages, the model, the
run's directory, dstune's cache, elsewhere.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from tests.support.command import overrides_of_run  # noqa: E402
from tests.support.tiny import save_decoder, write_dialogues  # noqa: E402

OPENINGS = {"open", "openat", "openat2", "creat"}
CALL = re.compile(r"^\d+\s+(\w+)\(.*?\"((?:[^\"\\]|\\.)*)\"")


def traced(
    words: Sequence[str], folder: Path, places: Mapping[str, Path], **variables: str
) -> dict[str, dict[str, int]]:
    """Run a command, and return its openings and questions by place. Raises CalledProcessError."""
    log = folder / "trace"
    command = ["strace", "-f", "-q", "-e", "trace=%file", "-e", "signal=none", "-o", str(log), *words]
    environment = (
        os.environ | {"DSTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
    )
    subprocess.run(
        command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    counts: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"openings": 0, "questions": 0})
    with log.open(errors="replace") as lines:
        for line in lines:
            if (call := CALL.match(line)) is None or call[1] in ("execve", "chdir"):
                continue
            path = folder / call[2]
            place = next((name for name, parent in places.items() if path.is_relative_to(parent)), "elsewhere")
            counts[place]["openings" if call[1] in OPENINGS else "questions"] += 1
    log.unlink()
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,4", help="numbers of ranks [%(default)s]")
    options = parser.parse_args()
    if shutil.which("strace") is None:
        sys.exit("strace is missing: apt-get install strace")
    names = ("torch", "deepspeed", "transformers", "datasets")
    print(f"Python {sys.version.split()[0]}, {', '.join(f'{name} {version(name)}' for name in names)}")
    folder = Path(tempfile.mkdtemp(prefix="file-operations-"))
    save_decoder(folder / "model")
    write_dialogues(folder / "dialogues.jsonl", 300)
    packages = {
        "packages": Path(find_spec("torch").origin).parents[1],
        "Python": Path(sys.base_prefix),
        "dstune": ROOT / "dstune",
    }
    places = {**packages, "model": folder / "model", "run": folder / "runs", "cache": folder / "cache"}
    columns = [*places, "elsewhere"]
    print(f"| what | {' | '.join(columns)} | all |\n|---|{'---|' * (len(columns) + 1)}")

    def show(what: str, words: Sequence[str], **variables: str) -> None:
        counts = traced(words, folder, places, **variables)
        cells = [
            f"{counts[name]['openings']:,} + {counts[name]['questions']:,}" if name in counts else "0"
            for name in columns
        ]
        total = sum(sum(values.values()) for values in counts.values())
        print(f"| {what} | {' | '.join(cells)} | {total:,} |", flush=True)

    try:
        for module in ("torch", "transformers", "deepspeed", "dstune.rank.worker"):
            show(f"`import {module}`", [sys.executable, "-c", f"import {module}"])
        run = [
            sys.executable,
            "-m",
            "dstune",
            "train",
            *overrides_of_run("run", 2),
            "evaluate.every=0",
            "launch.restarts=1",
        ]
        subprocess.run(
            [*run[:-1], "data.workers=1"], cwd=folder, check=False, capture_output=True
        )  # the rows are in the cache
        for ranks in map(int, options.ranks.split(",")):
            for warm in ("false", "true"):
                words = [*run, f"launch.processes={ranks}", f"launch.warm={warm}", f"run.dir=runs/{ranks}-{warm}"]
                how = "forked from one process with the imports" if warm == "true" else "cold"
                show(f"a run with {ranks} rank{'s' * (ranks > 1)}, {how}", words, PYTHONPATH=str(ROOT))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
