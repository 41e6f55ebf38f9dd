#!/usr/bin/env python3
"""Run two trees of dstune beside each other on this machine and compare what they compute, to the bit.

usage: tools/side_by_side.py OLD_TREE NEW_TREE --work FOLDER [--only TASK,METHOD,...] [--stages 0,3] [--ranks N]
                             [--rotate] [--no-runs] [--no-errors] [--resume] [--report FILE.json]

Every task x method x ZeRO stage: a few steps on a tiny model on CPUs, through `dstune train` as rank 0 of 1 (2 at stages 2
and 3 with `--ranks 2`). Losses, gradient norms, evaluation metrics, generated samples and every tensor of the export have
to be equal; a key that a JSON file of the export has gained is counted, not compared. A pair that the rules refuse has to be
refused by both trees, with the same problems; one that failed in the old tree may do anything but fail. Then the configurations
of `tools/wrong_configurations.txt`: where, value, exit code and number of problems have to be equal; changed wordings are
written to FOLDER/wording.diff for review.

Each tree is driven by one process (`case_server.py`); the cases are those of `case_matrix.py`. `OLD_TREE` is a checkout of the
earlier commit (`git worktree add --detach FOLDER COMMIT`); its results stay in FOLDER and are used again (delete FOLDER/old to
measure anew; `--resume` keeps those of NEW_TREE as well). `--rotate` runs each pair at one of its stages only: a quarter of the
time. Exits 1 where anything differs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.case_matrix import make_inputs, pairs, wrong_configurations
from tools.case_server import ENVIRONMENT, Case, Outcome

SERVER = Path(__file__).with_name("case_server.py")


class Tree:
    """One tree's process and its results, a JSON file each, in `folder`."""

    def __init__(self, tree: Path, folder: Path, models: Path):
        self.tree, self.folder, self.models = tree, folder, models
        folder.mkdir(parents=True, exist_ok=True)
        self._server: subprocess.Popen[str] | None = None

    def run(self, case: Case, *, again: bool) -> Outcome:
        result_file = self.folder / "results" / f"{case.name}.json"
        if result_file.exists() and not again:
            stored = json.loads(result_file.read_text())
            if stored["case"] == asdict(case):
                return Outcome(**stored["outcome"])
        outcome = self._ask(case)
        if case.ranks and outcome.exit_code == 2:  # refused: what the launcher says, as JSON
            refused = self._ask(Case(case.name, [*case.argv, "--json"], 0))
            outcome.problems = refused.problems
        result_file.parent.mkdir(parents=True, exist_ok=True)
        result_file.write_text(json.dumps({"case": asdict(case), "outcome": asdict(outcome)}))
        return outcome

    def _ask(self, case: Case) -> Outcome:
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                [sys.executable, str(SERVER), str(self.folder.absolute()), str(self.models.absolute())],
                cwd=self.folder,
                env={
                    **os.environ,
                    **ENVIRONMENT,
                    "PYTHONPATH": str(self.tree),
                    "DSTUNE_CACHE": str(self.folder / "cache"),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(case)) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self.tree} ended: {self._server.wait()}")
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            self._server.wait()


def deviations(old: Outcome, new: Outcome) -> list[str]:
    """Return a line for each thing that differs and may not."""
    lines: list[str] = []
    if old.exit_code not in (0, 2):  # it had no result
        return [f"fails still: {last_lines(new.log)}"] * (new.exit_code not in (0, 2))
    if old.exit_code != new.exit_code:
        lines.append(f"exit code {old.exit_code} -> {new.exit_code}: {last_lines(new.log)}")
    problems_before, problems_after = (
        sorted(map(where_and_value, old.problems)),
        sorted(map(where_and_value, new.problems)),
    )
    if problems_before != problems_after:
        lines.append(f"problems {problems_before} -> {problems_after}")
    for name in ("metrics", "samples"):
        rows, now = getattr(old, name), getattr(new, name)
        if len(rows) != len(now):
            lines.append(f"{len(rows)} -> {len(now)} rows of {name}")
        for old_row, new_row in zip(rows, now, strict=False):
            lines += [f"{name} of step {old_row.get('step')}: {line}" for line in differences(old_row, new_row)]
    shared = {name: without_gained(old.export.get(name), value) for name, value in new.export.items()}
    lines += [f"export: {line}" for line in differences(old.export, shared)]
    return lines


def without_gained(old: Any, new: Any) -> Any:
    """Return `new` with the keys of `old` only, wherever both are mappings."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {key: without_gained(old[key], value) for key, value in new.items() if key in old}


def gained(old: Any, new: Any, above: str = "") -> set[str]:
    """Return names of the keys that `new` has and `old` has not, wherever both are mappings."""
    names: set[str] = set()
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in new.items():
            names |= gained(old[key], value, f"{above}{key}.") if key in old else {f"{above}{key}"}
    return names


def where_and_value(problem: Mapping[str, str]) -> tuple[str, str]:
    return problem.get("where", ""), problem.get("value", "")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**old, **new} if old.get(name, "absent") != new.get(name, "absent")]
    return [f"{name}: {str(old.get(name, 'absent'))[:80]} -> {str(new.get(name, 'absent'))[:80]}" for name in names]


def last_lines(log: str) -> str:
    return " | ".join(log.strip().splitlines()[-3:])


def wording(case: Case, old: Outcome, new: Outcome) -> str:
    """Return the changed texts of errors and of model cards, as a diff."""

    def lines(outcome: Outcome) -> list[str]:
        problem_lines = [
            f"{problem.get('where')}: {problem.get('reason', problem.get('message'))} | {problem.get('fix')}"
            for problem in outcome.problems
        ]
        return problem_lines + [line for text in outcome.texts.values() for line in text.splitlines()]

    title = f"{case.name}: {shlex.join(case.argv)}" if not case.ranks else case.name
    return "\n".join(difflib.unified_diff(lines(old), lines(new), title, title, lineterm="", n=0))


def compare(trees: tuple[Tree, Tree], cases: Sequence[Case], chosen: argparse.Namespace) -> int:
    old, new = trees
    wrong: dict[str, list[str]] = {}
    trained = refused = 0
    failed: dict[str, int] = {}
    keys: set[str] = set()
    texts: list[str] = []
    for number, case in enumerate(cases, 1):
        old_outcome, new_outcome = old.run(case, again=False), new.run(case, again=not chosen.resume)
        lines = deviations(old_outcome, new_outcome)
        trained += case.ranks > 0 and old_outcome.exit_code == 0
        refused += old_outcome.exit_code == 2
        if old_outcome.exit_code not in (0, 2):
            failed[case.name] = new_outcome.exit_code
        for file in old_outcome.export.keys() & new_outcome.export.keys():
            keys |= gained(old_outcome.export[file], new_outcome.export[file], f"{file}: ")
        if diff := wording(case, old_outcome, new_outcome):
            texts.append(diff)
        if lines:
            wrong[case.name] = lines
        alike = {0: "equal", 2: "refused alike"}.get(
            old_outcome.exit_code, f"failed before, exits {new_outcome.exit_code} now"
        )
        print(
            f"{number}/{len(cases)} {case.name}: {'DIFFERS' if lines else alike} "
            f"({old_outcome.seconds} s, {new_outcome.seconds} s)",
            flush=True,
        )
        for line in lines[:4]:
            print(f"    {line}", flush=True)
    (chosen.work / "wording.diff").write_text("\n".join(texts) + "\n")
    summary = {
        "cases": len(cases),
        "trained": trained,
        "refused": refused,
        "failed before": failed,
        "keys gained": sorted(keys),
        "deviations": wrong,
    }
    if chosen.report:
        chosen.report.write_text(json.dumps(summary, indent=1) + "\n")
    print("keys that exports have gained:", ", ".join(sorted(keys)) or "none")
    print(
        f"{trained} runs trained, {refused} refused, {len(failed)} failed before, {len(wrong)} differ; "
        f"{len(texts)} wordings changed (wording.diff)"
    )
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs and results")
    parser.add_argument("--only", default="", help="words that the name of a case has: a task, a method, a variant")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--ranks", type=int, default=1, help="of stages 2 and 3")
    parser.add_argument("--rotate", action="store_true", help="each pair at one stage")
    parser.add_argument("--no-runs", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--resume", action="store_true", help="use results of the new tree that are there")
    parser.add_argument("--report", type=Path, help="write the deviations as JSON")
    chosen = parser.parse_args()
    chosen.work = chosen.work.absolute()
    chosen.work.mkdir(parents=True, exist_ok=True)
    make_inputs(chosen.work)
    trees = []
    for name, tree in (("old", chosen.old), ("new", chosen.new)):
        trees.append(Tree(tree.resolve(), chosen.work / name, models=chosen.work / "models"))
    stages = [int(stage) for stage in chosen.stages.split(",")]
    only = [word for word in chosen.only.split(",") if word]
    cases: list[Case] = []
    if not chosen.no_runs:
        cases += pairs(only, stages, chosen.ranks, chosen.work, rotate=chosen.rotate)
    if not chosen.no_errors and not only:
        cases += wrong_configurations()
    try:
        return compare((trees[0], trees[1]), cases, chosen)
    finally:
        for tree in trees:
            tree.close()


if __name__ == "__main__":
    sys.exit(main())
