"""Take a defence out of a copy of the tree and see the test fail that holds it.

A test of a refusal passes as well where nothing was ever attempted. Each change here undoes what one test holds; the tables are
`attack_mutations.py` (tests/security), `fault_mutations.py` (what is trained) and `device_mutations.py` (what a GPU shows).

usage: python benchmarks/mutations.py attacks|faults|devices [--only WORD] [--output mutations.jsonl]

Exit code 1: a test passed all the same. A run that is started again with the output of an earlier one goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900
"""After which a test is given up: nothing is known of it then, and a run that goes on tries it again."""


@dataclass(frozen=True)
class Change:
    """A text of a file below `dstune/`, which is there exactly `count` times, and what takes its place."""

    file: str
    old: str
    new: str
    count: int = 1

    def applied(self, root: Path) -> str:
        """Return the changed text of the file below `root`. Raises ValueError: the text is not there so many times."""
        text = (root / "dstune" / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != self.count:
            raise ValueError(f"{self.file} has {text.count(self.old)} times, not {self.count}: {self.old}")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Mutation:
    """What undoes a defence."""

    changes: tuple[Change, ...]
    case: str = ""
    """`-k` of pytest: the cases of the test that end, and take no memory, without the defence."""

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(change.file for change in self.changes))


def undo(
    file: str, old: str, new: str = "", *further: tuple[str, str, str], case: str = "", count: int = 1
) -> Mutation:
    first = Change(file, old, new, count)
    return Mutation((first, *(Change(*change) for change in further)), case)


@contextlib.contextmanager
def mutated(root: Path, mutation: Mutation) -> Iterator[None]:
    """Make the changes in the tree at `root`, and take them back at the end."""
    original_by_path: dict[Path, tuple[str, os.stat_result]] = {}
    try:
        for change in mutation.changes:
            path = root / "dstune" / change.file
            text = change.applied(root)
            original_by_path.setdefault(path, (path.read_text(encoding="utf-8"), path.stat()))
            path.write_text(text, encoding="utf-8")
            # Python tells by time and size whether what it has compiled is of this text.
            os.utime(path, (time.time() + 3600, time.time() + 3600))
        yield
    finally:
        for path, (text, status) in original_by_path.items():
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def copied(folder: Path) -> Path:
    """Return the files of the tree as git knows them, in a folder of their own."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


class Counted:
    """A plugin of pytest that counts what became of each case."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.reasons: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
        if report.failed:
            lines = str(report.longrepr).splitlines()
            self.reasons += [line for line in lines if line.startswith("E ")][:1] or lines[-1:]


def run(root: Path, test: str, case: str) -> dict[str, Any] | None:
    """Return the outcomes of a test in the tree at `root`, in a fork of this process, which has imported the large packages;
    None where it did not end."""
    answer = root / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        _in_child(root, test, case, answer)
    deadline = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.2)
    if not answer.exists():
        return {"failed": 1, "passed": 0, "skipped": 0, "reason": "the process ended"}
    outcome: dict[str, Any] = json.loads(answer.read_text())
    return outcome


def _in_child(root: Path, test: str, case: str, answer: Path) -> None:
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    sys.path[:] = [str(root), *(place for place in sys.path if place != str(ROOT))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dstune", "benchmarks", "tests")]:
        del sys.modules[name]
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    counted = Counted()
    try:
        import pytest

        selected = ["-k", case] if case else []
        pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *selected, test], [counted])
        outcomes = [*counted.outcomes.values()]
        counts = {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")}
        answer.write_text(json.dumps({**counts, "reason": " | ".join(dict.fromkeys(counted.reasons))[:600]}))
    finally:
        os._exit(0)


def main(argv: list[str]) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("table", choices=("attacks", "faults", "devices"))
    arguments.add_argument("--only", default="", help="tests with this in their name")
    arguments.add_argument("--output", type=Path, default=Path("mutations.jsonl"))
    options = arguments.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    table: Mapping[str, Mutation] = importlib.import_module(f"benchmarks.{options.table[:-1]}_mutations").MUTATIONS
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = {row["test"]: row for row in map(json.loads, lines)}
    chosen = {test: candidate for test, candidate in table.items() if options.only in test}
    for package in ("torch", "transformers", "datasets", "peft", "yaml", "hydra", "pytest"):
        importlib.import_module(package)
    with tempfile.TemporaryDirectory() as folder:
        root = copied(Path(folder))
        root.chmod(0o755)  # for tests with other users
        for test, mutation in chosen.items():
            if test in done:
                continue
            with mutated(root, mutation):
                outcome = run(root, test, mutation.case)
            if outcome is None:
                print(f"NOT DONE after {SECONDS} s: {test}", flush=True)
                continue
            done[test] = {"test": test, "files": mutation.files, **outcome}
            with options.output.open("a") as output:
                print(json.dumps(done[test]), file=output)
            survived = "" if outcome["failed"] else "PASSED ALL THE SAME  " if outcome["passed"] else "DID NOT RUN  "
            print(
                f"{survived}{outcome['failed']} failed, {outcome['passed']} passed: {test}  {outcome['reason'][:160]}",
                flush=True,
            )
    survivors = [test for test in chosen if test not in done or not done[test]["failed"]]
    print(f"{len(chosen)} tests, {len(chosen) - len(survivors)} fail without what they hold")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
