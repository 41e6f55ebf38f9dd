"""Run a cycle from rows to a challenger. Each step writes its result, then its line of the ledger; a step with a result is done."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from dstune.config.run_file import plugins_of, read_run
from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in
from dstune.cycle import collect as rows_of
from dstune.cycle import training
from dstune.cycle.collect import RUN_WORDS, Contamination, Row, digest_of_row, load, read_rows, save, write_rows
from dstune.cycle.decisions import HELD, PROMOTED, REFUSED, decide_candidate, summarize
from dstune.cycle.gates import NEW_ROWS, agreements, compare, compare_memory, judge_all, undecidable_probes
from dstune.cycle.judges import judge_of
from dstune.cycle.ledger import Ledger
from dstune.cycle.refusals import check_gates, check_task, rows_of_spec
from dstune.cycle.registry import Registry
from dstune.cycle.settings import CycleSettings
from dstune.data.run_rows import read_run_parts
from dstune.protocols import PROBES, task_of

ROWS, CYCLES, VERSIONS = "rows", "cycles", "versions"
FIRST = "v1"
DONE = "done.json"
MOST_RECITED = 200
"""Number of new training rows that are tested for recitation."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises UserError if another process holds it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = files.try_lock(files.open_plain(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600))
    if descriptor is None:
        raise UserError(Problem("folder", "another `dstune cycle` works here", "wait for it", str(folder)))
    try:
        yield
    finally:
        os.close(descriptor)


class Cycle:
    """The current cycle of a folder: the newest one if it is unfinished, otherwise a new one."""

    def __init__(self, settings: CycleSettings, message: Callable[[str], None] = lambda text: None):
        self.settings, self._message = settings, message
        self.ledger = Ledger(settings.folder)
        self.registry = Registry.read(settings.folder)
        numbers = sorted(int(place.name) for place in (settings.folder / CYCLES).glob("[0-9]*"))
        is_over = bool(numbers) and (self._place(numbers[-1]) / DONE).is_file()
        self.number = 1 if not numbers else numbers[-1] + is_over
        self.place = self._place(self.number)

    def _place(self, number: int) -> Path:
        return self.settings.folder / CYCLES / f"{number:04d}"

    @property
    def version(self) -> str:
        return f"v{self.number + 1}"

    @cached_property
    def _base(self) -> tuple[RunConfig, dict[str, list[dict[str, Any]]]]:
        """The configuration of the first run, and its rows by part."""
        config, parts = read_run_parts(
            self.settings.run, fix="begin a cycle with a run of files (data.train) that stay as they are"
        )
        return config, {part: [row for _, row in rows] for part, rows in parts.items()}

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        """The model's labels; empty if it writes text."""
        return training.labels_of_run(self.settings.run)

    def run(self) -> str:
        """Run the cycle, continuing after its last finished step. Returns the decision. Raises UserError, Preempted,
        TrainingFailed."""
        check_task(read_run(self.settings.run / "run.yaml").config)
        config, parts = self._base
        check_gates(self.settings, config, self._labels, parts)
        for sentence in undecidable_probes(
            self.settings.gates, {name: PROBES[name] for name in self.settings.gates.probes}
        ):
            self._message(sentence)
        self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._first_version()
        for step in (self.collect, self.train, self.judge, self.register):
            decision, reason, facts = step()
            self.ledger.note(self.number, step.__name__, decision, reason, **facts)
            self._message(f"{step.__name__}: {decision}: {reason}")
            if decision in ("nothing", "waiting"):
                break
        files.write(self.place / DONE, json.dumps({"decision": decision}) + "\n", sync=True)
        return decision

    def _first_version(self) -> None:
        if self.registry.current is not None:
            return
        digest = training.export_model(self.settings.run, self._folder_of(FIRST))
        self.registry.versions[FIRST] = {
            "run": str(self.settings.run), "digest": digest, "parent": None, "status": "current", "cycle": 0,
        }  # fmt: skip
        self.registry.aliases[self.settings.alias] = {FIRST: 1.0}
        self.registry.write()

    def _folder_of(self, version: str) -> Path:
        return self.settings.folder / VERSIONS / version

    def _result(self, step: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a step. It is computed once and kept in a file, even if the cycle is killed later."""
        file = self.place / f"{step}.json"
        if not file.is_file():
            self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.write(file, json.dumps(make(), indent=1) + "\n", sync=True)
        return object_in(file)

    # -- rows

    def collect(self) -> tuple[str, str, dict[str, Any]]:
        """Take the new rows, and drop earlier rows that their source no longer has."""
        result = self._result("collect", self._collect)
        facts = {key: result[key] for key in ("rows", "held_out", "dropped", "forgotten", "digest")}
        if self.registry.challenger not in (None, self.version):
            return "waiting", f"{self.registry.challenger} waits for a person: promote it, or roll it back", facts
        replaces = result.get("replaces")
        if result["rows"] < self.settings.least_rows and not replaces:
            return "nothing", f"{result['rows']} new rows, fewer than least_rows={self.settings.least_rows}", facts
        if result["tried"]:
            return "nothing", "the same rows as those of a candidate that was refused or rolled back", facts
        reason = f"{result['rows']} new rows from version {result['start']}"
        return "trains", f"{reason}, since {replaces} holds deleted rows" if replaces else reason, facts

    def _collect(self) -> dict[str, Any]:
        config, parts = self._base
        requests, present = rows_of.read_feedback(self.settings)
        forgotten = self._forget(present)
        self._withdraw_challenger()
        earlier = {number: load(self._rows_file(number)) for number in self._passed_cycles()}
        writes = task_of(config.task).generates
        used = {row.id for rows in earlier.values() for row in rows}
        collected = rows_of.collect(self.settings, requests, self._labels, used, writes=writes)
        held_out = [row for row in collected.rows if row.is_held_out]
        measured = Contamination([*self._measured(parts), *(row.row for row in held_out), *self._held_out_rows()])
        train = [row for row in collected.rows if not row.is_held_out]
        touched = measured.touched([row.row for row in train])
        clean = [row for row, is_touched in zip(train, touched, strict=True) if not is_touched]
        dropped = dict(collected.dropped)
        if len(clean) < len(train):
            dropped["shares words with rows that are measured"] = len(train) - len(clean)
        save(self._rows_file(self.number), [*clean, *held_out])
        start = self._start()
        since = [row for number in self._cycles_since(start) for row in earlier[number] if not row.is_held_out]
        digest = digest_of_row({"rows": sorted(row.digest for row in [*since, *clean])})
        # A version that a person rolled back has this status too.
        refused = [version["cycle"] for version in self.registry.versions.values() if version["status"] == "refused"]
        tried = any(self._collected(cycle).get("digest") == digest for cycle in refused)
        return {
            "rows": len(clean), "held_out": len(held_out), "dropped": dropped, "forgotten": forgotten,
            "digest": digest, "tried": tried, "start": start, "largest_key": collected.largest_key,
            "replaces": self.registry.current if since and start != self.registry.current else None,
        }  # fmt: skip

    def _withdraw_challenger(self) -> None:
        """Drop a challenger that was trained on rows that were deleted since: it would keep a candidate without them waiting."""
        challenger = self.registry.challenger
        if challenger is None or not self.registry.holds_deleted_rows(challenger):
            return
        reason = "it was trained on rows that were deleted since"
        self.ledger.note(self.number, "withdraw", challenger, reason)
        self._message(f"withdraw: {challenger}: {reason}")
        self.registry.roll_back(self.settings.alias)
        self.registry.write()

    def _collected(self, number: int) -> dict[str, Any]:
        return object_in(self._place(number) / "collect.json")

    def _rows_file(self, number: int) -> Path:
        return self.settings.folder / ROWS / f"{number:04d}.jsonl"

    def _passed_cycles(self) -> list[int]:
        """Return the earlier cycles whose version was not refused, in order; the rows of refused ones are collected again."""
        return sorted(
            version["cycle"]
            for version in self.registry.versions.values()
            if version["cycle"] and version["status"] != "refused" and version["cycle"] != self.number
        )

    def _forget(self, present: set[str]) -> int:
        """Remove the rows that their source no longer has, and mark the versions trained on them. Returns their number.

        present: ids of everything that the source still has.
        """
        gone = 0
        for file in sorted((self.settings.folder / ROWS).glob("*.jsonl")):
            number = int(file.stem)
            rows = load(file)
            remaining = [row for row in rows if row.id in present]
            if len(remaining) == len(rows):
                continue
            gone += len(rows) - len(remaining)
            trained = any(not row.is_held_out and row.id not in present for row in rows)
            for name, version in self.registry.versions.items():
                if trained and number in self._ancestry(name):
                    version["holds_forgotten"] = True
            self.registry.write()
            self._forget_copies(number, remaining)
            save(file, remaining)  # last: if the cycle is killed before, the next one finds these rows again
        return gone

    def _forget_copies(self, number: int, remaining: list[Row]) -> None:
        """Remove the rows of cycle `number` that are not in `remaining` from all files that a training read.

        Rows and origins are matched by digest. Origins are written last, so a kill in between leaves too many of them, never too
        few.
        """
        rows = {digest_of_row(row.row) for row in remaining}
        for name in ("train.jsonl", "old.jsonl"):
            for place in (self.settings.folder / CYCLES).glob(f"*/{name}"):
                lineage = place.with_name(f"lineage-{name}")
                origins = read_rows(lineage)
                is_removed = [origin["cycle"] == number and origin["digest"] not in rows for origin in origins]
                if any(is_removed):
                    remaining_origins = [
                        origin for origin, is_gone in zip(origins, is_removed, strict=True) if not is_gone
                    ]
                    removed = {origin["digest"] for origin, is_gone in zip(origins, is_removed, strict=True) if is_gone}
                    write_rows(place, _without_copies(read_rows(place), removed, remaining_origins))
                    write_rows(lineage, remaining_origins)

    def _ancestry(self, name: str | None) -> list[int]:
        """Return the cycles whose rows a version was trained on, starting with its own; 0 is the first run."""
        cycles: list[int] = []
        while name is not None:
            version = self.registry.versions[name]
            cycles += [version["cycle"], *version.get("rows_of", [])]
            name = version["parent"]
        return list(dict.fromkeys(cycles))

    def _cycles_since(self, start: str) -> list[int]:
        """Return the earlier cycles whose rows `start` was not trained on: those of versions after it that hold deleted rows."""
        ancestry = self._ancestry(start)
        return [number for number in self._passed_cycles() if number not in ancestry]

    def _start(self) -> str:
        """Return the version to train from: the current one, or its newest ancestor that was not trained on a forgotten row."""
        name = self.registry.current
        while name is not None and self.registry.holds_deleted_rows(name):
            name = self.registry.versions[name]["parent"]
        return name or FIRST

    def _measured(self, parts: Mapping[str, list[dict[str, Any]]]) -> Iterator[Mapping[str, Any]]:
        """Yield the rows that models are measured on: those of the first run's held-out parts and those of the gates."""
        for part in ("validation", "test"):
            yield from parts.get(part, [])
        for rows in self._test_sets().values():
            yield from rows
        for rows in self._prompts().values():
            yield from rows

    def _held_out_rows(self) -> list[dict[str, Any]]:
        """Return the held-out rows of all cycles, each once."""
        files_of_rows = sorted((self.settings.folder / ROWS).glob("*.jsonl"))
        rows = {row.digest: row.row for file in files_of_rows for row in load(file) if row.is_held_out}
        return [*rows.values()]

    # -- training

    def train(self) -> tuple[str, str, dict[str, Any]]:
        """Train from the start version on new rows and old ones."""
        start = self._collected(self.number)["start"]
        result = self._result("train", lambda: self._train(start))
        return "trained", f"{result['steps']} steps on {result['new']} new and {result['old']} old rows", result

    def _train(self, start: str) -> dict[str, Any]:
        config, parts = self._base
        since = self._cycles_since(start)
        new = [(row, number) for number in [*since, self.number] for row in load(self._rows_file(number))]
        rows_before = [
            (row, number) for number in self._ancestry(start) if number for row in load(self._rows_file(number))
        ]
        old = [
            *((row, 0) for row in parts["train"]),
            *((row.row, number) for row, number in rows_before if not row.is_held_out),
        ]
        taught = [(row.row, number) for row, number in new if not row.is_held_out]
        # Earlier training rows may overlap with what is measured now: a new test set, or a question of a held-out user.
        measured = Contamination([*self._measured(parts), *self._held_out_rows()])
        count = len(taught) + len(old)
        taught, old = (_untouched(measured, rows) for rows in (taught, old))
        for name, rows in (("train", taught), ("old", old)):
            write_rows(self.place / f"{name}.jsonl", [row for row, _ in rows])
            origins = [{"digest": digest_of_row(row), "cycle": number} for row, number in rows]
            write_rows(self.place / f"lineage-{name}.jsonl", origins)
        held_out = parts.get("validation", [])
        write_rows(self.place / "validation.jsonl", held_out)
        run = self.place / "run"
        overrides = training.training_overrides(
            self.settings, self.place / "train.jsonl", self.place / "old.jsonl",
            self.place / "validation.jsonl" if held_out else None, self.version,
        )  # fmt: skip
        base = training.config_from_version(config, self._folder_of(start))
        training.prepare_run(run, base, overrides, self._labels, plugins_of(self.settings.run / "run.yaml"))
        training.train(run)
        from dstune.launch import records

        digest = training.export_model(run, self._folder_of(self.version), with_reference=bool(held_out))
        steps = (records.read_result(run) or {}).get("steps", 0)
        lineage = digest_of_row({"rows": sorted(digest_of_row(row) for row, _ in [*taught, *old])})
        return {
            "version": self.version, "start": start, "steps": steps, "new": len(taught), "old": len(old),
            "left_out": count - len(taught) - len(old),
            "weights": digest, "lineage": lineage, "rows_of": since,
        }  # fmt: skip

    # -- gates

    def judge(self) -> tuple[str, str, dict[str, Any]]:
        """Compare the candidate with the current version."""
        result = self._result("judge", self._judge)
        return *summarize(result["gates"]), result

    def _judge(self) -> dict[str, Any]:
        config, parts = self._base
        current = self.registry.current
        assert current is not None
        sets = {"validation": parts.get("validation", []), "test": parts.get("test", []), **self._test_sets()}
        sets[NEW_ROWS] = self._held_out_rows()
        gates = self.settings.gates
        judges = judge_of(self._folder_of(current), config), judge_of(self._folder_of(self.version), config)
        comparisons = compare(gates, {name: rows for name, rows in sets.items() if rows}, self._prompts(), *judges)
        taught = [dict(row) for row in read_rows(self.place / "train.jsonl")][:MOST_RECITED]
        comparisons += compare_memory(gates, taught, *judges)
        said, keys = load(self._rows_file(self.number)), []
        if said and task_of(config.task).has_labels:
            keys = agreements(judges[1].scores([row.row for row in said]), [row.key for row in said])
        results = judge_all(gates, comparisons, keys)
        return {"current": current, "gates": [asdict(result) for result in results]}

    def _test_sets(self) -> dict[str, list[dict[str, Any]]]:
        specs = self.settings.gates.tests
        names = Counter(Path(spec).name for spec in specs)
        short = {spec: spec if "://" in spec or names[Path(spec).name] > 1 else Path(spec).name for spec in specs}
        return {short[spec]: [row for _, row in rows_of_spec(spec)] for spec in specs}

    def _prompts(self) -> dict[str, list[dict[str, Any]]]:
        spec_by_name = {"safety": self.settings.gates.safety, "canaries": self.settings.gates.canaries}
        return {name: [row for _, row in rows_of_spec(spec)] for name, spec in spec_by_name.items() if spec is not None}

    # -- registry

    def register(self) -> tuple[str, str, dict[str, Any]]:
        """Make the candidate the challenger with its share of the traffic, promote it, or refuse it."""
        trained, judged = object_in(self.place / "train.json"), object_in(self.place / "judge.json")
        largest_key = self._collected(self.number).get("largest_key", 0.0)
        replaces = judged["current"] if self.registry.holds_deleted_rows(judged["current"]) else None
        decision, reason = decide_candidate(self.settings, judged["gates"], largest_key, replaces)
        if self.version not in self.registry.versions:
            self.registry.versions[self.version] = {
                "run": str(self.place / "run"), "digest": trained["weights"], "lineage": trained["lineage"],
                "parent": trained["start"], "status": "refused" if decision == REFUSED else "challenger",
                "cycle": self.number, "rows_of": trained["rows_of"],
            }  # fmt: skip
            self._follow(decision)
        return decision, reason, {"version": self.version, "weights": trained["weights"]}

    def _follow(self, decision: str) -> None:
        """Apply the decision about the candidate to the registry."""
        alias = self.settings.alias
        if decision == PROMOTED:
            self.registry.promote(alias)
        elif decision != REFUSED:
            self.registry.share(alias, 0.0 if decision == HELD else self.settings.share)
        elif self.registry.challenger is not None:
            self.registry.roll_back(alias)
        self.registry.write()

    def judge_again(self) -> str:
        """Judge the challenger again, on the current rows of the gates. Returns the decision. Raises UserError."""
        self.number = int(self.registry.versions[self.registry.waiting("judge")]["cycle"])
        self.place = self._place(self.number)
        self._refuse_taught_tests()
        (self.place / "judge.json").unlink(missing_ok=True)
        for step in (self.judge, self.register):
            decision, reason, facts = step()
            if step == self.register:
                self._follow(decision)
            self.ledger.append(self.number, step.__name__, decision, reason, **facts)
            self._message(f"{step.__name__}: {decision}: {reason}")
        return decision

    def _refuse_taught_tests(self) -> None:
        """Check that the challenger was not trained on rows that are measured now. Raises UserError otherwise."""
        measured = Contamination([*self._measured(self._base[1]), *self._held_out_rows()])
        taught = [row for name in ("train", "old") for row in read_rows(self.place / f"{name}.jsonl")]
        if count := sum(measured.touched(taught)):
            shared = f"ask what these rows ask, or share {RUN_WORDS} words with them"
            reason = f"{count} rows that the challenger was trained on {shared}"
            raise UserError(Problem("gates.tests", reason, "rows that it was not trained on"))


def _untouched(measured: Contamination, rows: Sequence[tuple[dict[str, Any], int]]) -> list[tuple[dict[str, Any], int]]:
    """Return the rows that overlap with no measured row. rows: each with its cycle."""
    touched = measured.touched([row for row, _ in rows])
    return [entry for entry, is_touched in zip(rows, touched, strict=True) if not is_touched]


def _without_copies(
    rows: Iterable[dict[str, Any]], removed: set[str], origins: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows; of each removed row only as many copies as `origins` still lists. removed: digests."""
    copies = Counter(origin["digest"] for origin in origins)
    for row in rows:
        digest = digest_of_row(row)
        if digest not in removed:
            yield row
        elif copies[digest] > 0:
            copies[digest] -= 1
            yield row
