"""Preparation of many short rows: rows a second, anonymous memory of all its processes, disk.

    python benchmarks/prepare.py --rows 100000 1000000
    nice -n 19 python benchmarks/prepare.py --rows 10000000 --folder /a/large/disk

Each size is prepared twice: as a whole (`dstune.data.build.prepare`), then as a stream of blocks of 100,000 rows, all of
which are made and dropped as a training run would. The model is sample://smollm2, of which the tokenizer is used. The
growth in bytes a row between the smallest and the largest size is what constant memory is judged by; memory of the same
process after its imports is shown beside it. Cached files, which the kernel drops when it needs room, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

SAMPLE_SECONDS = 0.25
STREAM_ROWS = 100_000
WORDS = [
    "the",
    "a",
    "one",
    "some",
    "few",
    "old",
    "new",
    "red",
    "blue",
    "large",
    "cat",
    "dog",
    "tree",
    "river",
    "sees",
    "finds",
]


def generate(path: Path, rows: int) -> None:
    """Write rows of a few words and a number, nearly all of them different; about 60 bytes each."""
    choose = random.Random(0)
    with path.open("w") as stream:
        for number in range(rows):
            stream.write(f'{{"text": "{" ".join(choose.choices(WORDS, k=8))} {number}"}}\n')


def prepare(kind: str, file: Path, folder: Path, rows: int) -> dict[str, Any]:
    """Time one preparation, run in a process of its own; imports are done before the time starts."""
    from dstune import samples
    from dstune.config.compose import compose
    from dstune.core.rank_env import RankEnv
    from dstune.data import build
    from dstune.data.blocks import Blocks
    from dstune.models.load import load_tokenizer

    samples.resolve("sample://smollm2")
    streaming = [f"data.stream_rows={STREAM_ROWS}", "data.streaming=true", "trainer.max_steps=1"]
    config = compose(
        [
            "model=smollm2",
            "task=causal_lm",
            f"data.train={file}",
            "data.max_length=64",
            *(streaming * (kind == "stream")),
        ]
    ).config
    tokenizer = load_tokenizer(config.model)
    print(json.dumps({"imported": anonymous(psutil.Process())}), flush=True)
    began = time.perf_counter()
    env = RankEnv(0, 1, 0, 1, "alone")
    data = build.prepare(config, tokenizer, env, folder)
    read = data.report["train"]["rows_read"]
    if kind == "stream":
        blocks = Blocks(config, tokenizer, data, folder, folder, leader=True)
        block = blocks.get(0, None)
        while read < rows:
            last = read + STREAM_ROWS >= rows
            blocks.keep_from(block, ahead=not last)
            block = blocks.get(block.number + 1, block.end)
            read += STREAM_ROWS
        blocks.close(remove=True)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    build.prepare(config, tokenizer, env, folder)
    return {"seconds": seconds, "again": time.perf_counter() - began, "read": read}


def anonymous(process: psutil.Process) -> int:
    """Return bytes of memory that no file stands behind, of this process; what it shares with others counts in parts, so that
    the sum over a process and its forks is what they take together."""
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:  # ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss_Anon")), 0)


def size_of(folder: Path) -> int:
    """Sum the bytes that the files below a folder take on the disk."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:  # removed meanwhile
                continue
    return total


def measure(kind: str, rows: int, folder: Path) -> dict[str, Any]:
    """Measure one size: what the process says, and what was seen of it and its children."""
    file, cache = folder / "rows.jsonl", folder / "prepared"
    generate(file, rows)
    command = [sys.executable, __file__, "--one", kind, str(file), str(cache), str(rows)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watched, peak, disk = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        time.sleep(SAMPLE_SECONDS)
        try:
            family = [watched, *watched.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        peak = max(peak, sum(anonymous(member) for member in family))
        disk = max(disk, size_of(cache))
    assert process.stdout is not None
    lines = [json.loads(line) for line in process.stdout.read().splitlines() if line.startswith("{")]
    assert process.wait() == 0, f"the preparation of {rows} rows failed"
    shutil.rmtree(cache)
    figures = {name: value for line in lines for name, value in line.items()}
    return {"kind": kind, "rows": rows, "peak": peak, "disk": disk, "file": file.stat().st_size, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["whole", "stream"], choices=["whole", "stream"])
    parser.add_argument("--folder", type=Path, help="where the rows and the prepared data go for a while")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, file, folder, rows = arguments.one
        print(json.dumps(prepare(kind, Path(file), Path(folder), int(rows))), flush=True)
        return
    titles = ("rows", 12), ("rows/s", 10), ("seconds", 9), ("again s", 9), ("MiB imports", 13), ("MiB peak", 10)
    print("kind    " + "".join(title.rjust(width) for title, width in (*titles, ("file MB", 9), ("disk MB", 9))))
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for rows in arguments.rows:
        for kind in arguments.kinds:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                row = measure(kind, rows, Path(folder))
            by_kind.setdefault(kind, []).append(row)
            print(
                f"{kind:8}{rows:12,}{row['read'] / row['seconds']:10,.0f}{row['seconds']:9.1f}{row['again']:9.2f}"
                f"{row['imported'] / 2**20:13,.0f}{row['peak'] / 2**20:10,.0f}{row['file'] / 1e6:9,.0f}{row['disk'] / 1e6:9,.0f}",
                flush=True,
            )
    for kind, rows_of_kind in by_kind.items():
        if len(rows_of_kind) > 1:
            grown = (rows_of_kind[-1]["peak"] - rows_of_kind[0]["peak"]) / (
                rows_of_kind[-1]["rows"] - rows_of_kind[0]["rows"]
            )
            print(f"{kind}: {grown:.1f} bytes of memory more for each row more")


if __name__ == "__main__":
    main()
