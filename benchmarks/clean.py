"""Rows a second of each step of `data.clean`, and what it finds: `python benchmarks/clean.py [--data sample://chitchat]`.

One process; the steps of single rows run in as many as `data.workers` says. Times are of the processor (other work on
the machine does not count), the best of `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dstune import samples
from dstune.data.clean import language, near, sensitive
from dstune.data.clean.rows import map_texts, near_text, row_hashes, texts
from dstune.data.clean.unicode import clean_unicode


def best(rounds: int, work: Callable[[], object]) -> float:
    """Return seconds of the fastest round."""
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample://chitchat", help="a sample, or a JSONL file of normalised rows")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    path = samples.resolve(options.data) if samples.is_sample(options.data) else Path(options.data)
    rows = [json.loads(line) for line in path.open()]
    row_texts = ["\n".join(texts(row)) for row in rows]
    compared = [near_text(row) for row in rows]
    near.signature(""), language.language("a"), sensitive.find_secrets(""), sensitive.find_personal_data("")

    print(f"{len(rows):,} rows of {np.mean([len(text) for text in row_texts]):,.0f} characters on average\n")
    print("| step | rows/s |\n|---|---|")
    steps: dict[str, Callable[[], object]] = {
        "unicode": lambda: [map_texts(row, clean_unicode) for row in rows],
        "exact duplicates and leaks (two hashes)": lambda: [row_hashes(row) for row in rows],
        "near duplicates: signature": lambda: [near.signature(text) for text in compared],
        "languages": lambda: [language.language(text) for text in row_texts],
        "secrets": lambda: [sensitive.find_secrets(text) for text in row_texts],
        "personal data": lambda: [sensitive.find_personal_data(text) for text in row_texts],
    }
    for name, work in steps.items():
        print(f"| {name} | {len(rows) / best(options.rounds, work):,.0f} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "signatures"
        with file.open("wb") as stream:
            for text in compared:
                stream.write(near.signature(text))
        signatures = near.open_signatures(file, len(rows))
        anything = lambda first, second: np.ones(len(first), dtype=bool)  # noqa: E731
        mib_before = peak_mib()
        search = near.NearCopies(signatures, compared.__getitem__, anything, 0.9)
        seconds = best(1, lambda: search.find())
        print(f"| near duplicates: groups and comparisons | {len(rows) / seconds:,.0f} |")
        print(f"\nmemory of the groups: {(peak_mib() - mib_before) * 2**20 / len(rows):,.0f} bytes a row at most")
    unequal = len(rows) - len({row_hashes(row)[0] for row in rows})
    print(f"equal to an earlier row: {unequal}; languages: {counted(row_texts)}")
    print(f"texts with personal data: {sum(bool(sensitive.find_personal_data(text)) for text in row_texts)}")


def counted(row_texts: list[str]) -> dict[str, int]:
    names, counts = np.unique([language.language(text)[0] for text in row_texts], return_counts=True)
    order = np.argsort(-counts)[:5]
    return {str(names[place]): int(counts[place]) for place in order}


if __name__ == "__main__":
    main()
