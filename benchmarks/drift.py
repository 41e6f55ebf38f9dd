#!/usr/bin/env python3
"""False alarms and power of `dstune monitor`, on data whose drift is known.

usage: python benchmarks/drift.py null|verdict|streams|power|psi|speed [--trials N] [--json]

null     alarms of the embedding test, the classifier and both together at 5%, without drift: two fresh sets of conversations a
         trial, each with turns about one topic. `turns`: the same with a vector a turn, as if turns were independent.
verdict  alarms of a whole check (every signal, streams, one budget of 5%), without drift
streams  alarms of the streams of such a check alone
power    how often a check alarms at the corrected level of 12 checks, by kind of drift and rows of each side: vectors of MiniLM
         of film reviews (sample://sentiment) with verses (sample://verses) or other reviews among the live ones
psi      how often the population stability index of equal distributions exceeds 0.1 and 0.2
speed    seconds of one check of 10,000 rows of 384 dimensions a side

Intervals are of Clopper and Pearson, 95%.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy.stats import beta

from dstune.monitor import effects
from dstune.monitor.budget import Budget
from dstune.monitor.check import DRIFT, Settings, Sides, run_check
from dstune.monitor.conversations import Conversation
from dstune.monitor.signals import CLASSIFIER, EMBEDDINGS, SignalTable
from dstune.monitor.two_sample import DomainClassifier, MeanDiscrepancy, test_jointly

TOPICS, DIMENSIONS, TURNS = 30, 48, 6
CACHE = Path(os.environ.get("TMPDIR", "/tmp")) / "dstune-drift-vectors.npz"


def interval(count: int, trials: int) -> list[float]:
    low = 0.0 if count == 0 else float(beta.ppf(0.025, count, trials - count + 1))
    high = 1.0 if count == trials else float(beta.ppf(0.975, count + 1, trials - count))
    return [round(low, 4), round(high, 4)]


def counted(name: str, count: int, trials: int) -> dict[str, Any]:
    return {
        "case": name,
        "alarms": count,
        "trials": trials,
        "rate": round(count / trials, 4),
        "interval": interval(count, trials),
    }


def normalised(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def talk(generator: np.random.Generator, conversations: int) -> np.ndarray:
    """Draw turns of conversations, each about a topic of its own mixture [conversations, TURNS, DIMENSIONS]."""
    topics = np.random.default_rng(7).normal(size=(TOPICS, DIMENSIONS))
    chosen = topics[generator.integers(TOPICS, size=conversations)]
    speaker = generator.normal(scale=0.7, size=(conversations, DIMENSIONS))
    return normalised((chosen + speaker)[:, None] + generator.normal(size=(conversations, TURNS, DIMENSIONS)))


def null(trials: int) -> Iterator[dict[str, Any]]:
    size = 60
    alarms = {EMBEDDINGS: 0, CLASSIFIER: 0, "both, joint": 0, "turns": 0}
    turn_trials = min(trials, 300)
    is_live = np.arange(2 * size) >= size
    for trial in range(trials):
        turns = talk(np.random.default_rng([1, trial]), 2 * size)
        vectors = normalised(turns.mean(axis=1))
        tested = test_jointly(
            {EMBEDDINGS: MeanDiscrepancy(vectors), CLASSIFIER: DomainClassifier(vectors)}, is_live, 199, trial
        )
        for name in (EMBEDDINGS, CLASSIFIER):
            alarms[name] += tested.p[name] <= 0.05
        alarms["both, joint"] += min(tested.adjusted.values()) <= 0.05
        if trial < turn_trials:
            flat = turns.reshape(-1, DIMENSIONS)
            wrong = test_jointly({"turns": MeanDiscrepancy(flat)}, np.repeat(is_live, TURNS), 199, trial)
            alarms["turns"] += wrong.p["turns"] <= 0.05
    for name, count in alarms.items():
        yield counted(name, count, turn_trials if name == "turns" else trials)


def conversations(generator: np.random.Generator, count: int, begin: float) -> list[Conversation]:
    return [Conversation(str(number), (str(number),), time=begin + number * 60.0) for number in range(count)]


def null_check(trial: int, size: int, *, streams: bool) -> Any:
    """Return a check of two sides from the same distribution, with every kind of signal that a check has."""
    generator = np.random.default_rng([2, trial])
    vectors = normalised(talk(generator, 2 * size).mean(axis=1))
    sides = Sides(conversations(generator, size, 0.0), conversations(generator, size, 1e6), vectors)
    table = SignalTable()
    halves = lambda values: np.split(values, 2)  # noqa: E731
    table.add("characters", sides.against, *halves(np.log1p(generator.poisson(80, 2 * size)).astype(np.float64)))
    table.add("language", sides.against, *halves(generator.choice(["en", "de", "fr"], 2 * size, p=[0.9, 0.07, 0.03])))
    table.add("label", sides.against, *halves(generator.choice(["a", "b", ""], 2 * size)))
    confidence = generator.beta(8, 2, 2 * size)
    table.add("confidence", "validation rows", confidence[: size // 2], confidence[size:])
    table.add("loss", "validation rows", *np.split(generator.exponential(size=3 * size // 2), [size // 2]))
    flags = generator.random(2 * size) < 0.05
    table.add("guard flags", "the window before", *halves(flags.astype(np.float64)))
    return run_check(sides, table, Budget(0.05, 1), Settings(checks=1, streams=streams, seed=trial))


def verdict(trials: int) -> Iterator[dict[str, Any]]:
    count = sum(null_check(trial, 120, streams=True).verdict == DRIFT for trial in range(trials))
    yield counted("whole verdict", count, trials)


def streams(trials: int) -> Iterator[dict[str, Any]]:
    from dstune.monitor.streams import find_change

    for size in (200, 1000):
        count = 0
        for trial in range(trials):
            generator = np.random.default_rng([3, trial])
            count += any(
                find_change("x", generator.exponential(size=size), None, generator.exponential(size=size), 0.05 / 4)
                for _ in range(4)
            )
        yield counted(f"four streams of {size}, 5% in all", count, trials)
    errors = []
    for trial in range(min(trials, 200)):
        generator = np.random.default_rng([4, trial])
        values = generator.normal(size=1000) + 0.5 * (np.arange(1000) >= 500)
        change = find_change("x", values, None, generator.normal(size=1000), 0.01 / 12 / 4)
        errors.append(None if change is None else change.index - 500)
    places = [place for place in errors if place is not None]
    row: dict[str, Any] = {
        "case": "0.5 sd from the middle of 1000, corrected level",
        "found": len(places) / len(errors),
    }
    if places:
        row["placed_off_by"] = {str(share): float(np.quantile(places, share)) for share in (0.05, 0.5, 0.95)}
    yield row


def pools() -> dict[str, np.ndarray]:
    """Return vectors of MiniLM by kind of text; made once."""
    if not CACHE.is_file():
        from dstune import samples
        from dstune.monitor.vectors import embed

        def rows(name: str) -> list[dict[str, Any]]:
            with Path(samples.resolve(name)).open(encoding="utf-8") as stream:
                return [json.loads(line) for line in stream]

        reviews, verses = rows("sample://sentiment")[:5000], rows("sample://verses")
        texts = {
            "reviews": [row["text"] for row in reviews],
            "verses": [row["en"] for row in verses[::20]],
            "law": [row["en"] for row in verses[:5800:2]],
            "gospels": [row["en"] for row in verses[23100:26800:2]],
        }
        made = {
            name: embed([Conversation("", (text,)) for text in part], "sample://minilm") for name, part in texts.items()
        }
        made["labels"] = np.array([row["label"] for row in reviews])
        np.savez(CACHE, **made)
    with np.load(CACHE) as cached:
        return dict(cached)


Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, Callable[[SignalTable, str], None]]]


def drifts(pool: dict[str, np.ndarray]) -> dict[str, Draw]:
    """Return drifts by name: vectors of both sides, and what else differs."""

    def mixed(base: str, other: str, share: float) -> Draw:
        def draw(generator: np.random.Generator, size: int) -> tuple[np.ndarray, Callable[[SignalTable, str], None]]:
            count = round(share * size)
            rows = pool[base][generator.permutation(len(pool[base]))[: 2 * size - count]]
            other_rows = pool[other][generator.permutation(len(pool[other]))[:count]]
            return np.concatenate([rows, other_rows]), lambda table, against: None

        return draw

    def changed(add: Callable[[np.random.Generator, int, SignalTable, str], None]) -> Draw:
        def draw(generator: np.random.Generator, size: int) -> tuple[np.ndarray, Callable[[SignalTable, str], None]]:
            rows = pool["reviews"][generator.permutation(len(pool["reviews"]))[: 2 * size]]
            return rows, lambda table, against: add(generator, size, table, against)

        return draw

    def longer(generator: np.random.Generator, size: int, table: SignalTable, against: str) -> None:
        lengths = generator.lognormal(4.6, 0.5, size=2 * size) * np.where(np.arange(2 * size) < size, 1.0, 1.25)
        table.add("characters", against, *np.split(np.log(lengths), 2))

    def other_labels(generator: np.random.Generator, size: int, table: SignalTable, against: str) -> None:
        table.add("label", against, *(np.where(generator.random(size) < share, "a", "b") for share in (0.5, 0.65)))

    def less_sure(generator: np.random.Generator, size: int, table: SignalTable, against: str) -> None:
        table.add("confidence", "validation rows", *(generator.normal(mean, 1.0, size) for mean in (0.0, -0.3)))

    return {
        "5% verses in reviews": mixed("reviews", "verses", 0.05),
        "10% verses in reviews": mixed("reviews", "verses", 0.1),
        "20% verses in reviews": mixed("reviews", "verses", 0.2),
        "20% gospels in books of Moses": mixed("law", "gospels", 0.2),
        "50% gospels in books of Moses": mixed("law", "gospels", 0.5),
        "25% longer": changed(longer),
        "label 50% -> 65%": changed(other_labels),
        "confidence -0.3 sd": changed(less_sure),
    }


def power(trials: int) -> Iterator[dict[str, Any]]:
    pool = pools()
    settings = Settings(streams=False)
    for name, draw in drifts(pool).items():
        for size in (100, 250, 500):
            count, stated = 0, []
            for trial in range(trials):
                generator = np.random.default_rng([5, trial])
                vectors, add = draw(generator, size)
                lines = [Conversation(str(number), (str(number),)) for number in range(2 * size)]
                sides, table = Sides(lines[:size], lines[size:], vectors), SignalTable()
                add(table, sides.against)
                # Beside what drifts, signals that do not: they share the budget.
                for quiet in ("characters", "language", "confidence"):
                    if quiet not in [signal.name for signal in table.signals]:
                        against = "validation rows" if quiet == "confidence" else sides.against
                        table.add(quiet, against, *np.split(generator.normal(size=2 * size), 2))
                check = run_check(sides, table, Budget(0.05, 12), settings)
                count += check.verdict == DRIFT
                if check.power is not None:
                    stated.append(check.power.power)
            yield {**counted(name, count, trials), "rows": size, "stated_power": round(float(np.median(stated)), 3)}


def psi(trials: int) -> Iterator[dict[str, Any]]:
    fewest, effects.PSI_ROWS = effects.PSI_ROWS, 1
    for size in (50, 100, 200, 500):
        generator = np.random.default_rng(6)
        values = [effects.psi(generator.normal(size=size), generator.normal(size=size)) or 0.0 for _ in range(trials)]
        for limit in (0.1, 0.2):
            yield counted(f"{size} rows, above {limit}", int(np.sum(np.array(values) > limit)), trials)
    effects.PSI_ROWS = fewest


def speed(trials: int) -> Iterator[dict[str, Any]]:
    generator = np.random.default_rng(8)
    for size in (1000, 10_000):
        vectors = normalised(generator.normal(size=(2 * size, 384)))
        lines = [Conversation(str(number), (str(number),), time=float(number)) for number in range(2 * size)]
        sides, table = Sides(lines[:size], lines[size:], vectors), SignalTable()
        table.add("characters", sides.against, *np.split(generator.normal(size=2 * size), 2))
        table.add("language", sides.against, *np.split(generator.choice(["en", "de"], 2 * size), 2))
        table.add("confidence", "validation rows", *np.split(generator.normal(size=2 * size), 2))
        wall, processor = time.perf_counter(), time.process_time()
        check = run_check(sides, table, Budget(0.05, 12), Settings())
        yield {
            "case": f"{size:,} rows a side, 384 dimensions, {check.permutations} permutations",
            "seconds": round(time.perf_counter() - wall, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
        }


CASES = {
    "null": (null, 5000),
    "verdict": (verdict, 5000),
    "streams": (streams, 5000),
    "power": (power, 40),
    "psi": (psi, 2000),
    "speed": (speed, 1),
}
"""With the usual number of trials."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    arguments = parser.parse_args()
    work, trials = CASES[arguments.case]
    for row in work(arguments.trials or trials):
        if arguments.json:
            print(json.dumps(row), flush=True)
        else:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
