#!/usr/bin/env python3
"""What it costs to decode images in a process of its own, and what damaged images cost.

usage: python benchmarks/image_decoding.py [--images 50]

First: pictures of several sizes and formats, decoded in this process and by `store.decode` in turns; the pixels have to be equal.
Then: damaged images, some for each decoder, with the processor time and the memory of the processes that decode them; and the time
in which an image of 8 x 8 pixels is decoded beside the worst of them. Exit code 1: pixels differ, or a limit was exceeded.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import random
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

import numpy as np
import PIL
from PIL import Image

from dstune.core.confinement.table import IMAGE, IMAGE_SECONDS_PER_PIXEL
from dstune.data.images import decoder, store
from dstune.data.problems import RowError

SIZES = {"8 x 8": (8, 8), "640 x 480": (640, 480), "1920 x 1080": (1920, 1080), "4000 x 3000": (4000, 3000)}
ROUNDS = 9
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def seconds() -> float:
    """Return the processor time of this process and of those that decode for it."""
    total = time.process_time()
    for spawned in list(store._decoders._idle):
        total += int(Path(f"/proc/{spawned.process.pid}/schedstat").read_text().split()[0]) / 1e9
    return total


def file_of(image: Any, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def picture(size: tuple[int, int], mode: str = "RGB") -> Any:
    """A picture that neither compresses to nothing nor is noise."""
    width, height = size
    values = np.add.outer(np.arange(height) * 3, np.arange(width) * 5)[..., None] + np.arange(len(mode)) * 40
    values = values + np.random.default_rng(0).integers(0, 9, values.shape)
    return Image.fromarray((values % 256).astype(np.uint8), mode)


def compare() -> bool:
    equal = True
    print("| image | in this process, ms of processor time | in its own | |\n| --- | --- | --- | --- |")
    for name, size in SIZES.items():
        for kind in ("JPEG", "PNG", "WEBP"):
            content = file_of(picture(size), kind)
            repeats = 60 if size[0] < 100 else 2
            taken: dict[str, list[float]] = {"here": [], "own": []}
            for _ in range(ROUNDS):
                for place, decode in (("here", decoder.decode), ("own", store.decode)):
                    began = seconds()
                    for _ in range(repeats):
                        image = decode(content)
                    taken[place].append((seconds() - began) / repeats * 1000)
            equal &= decoder.decode(content).tobytes() == image.tobytes()
            here, own = (sorted(values)[ROUNDS // 2] for values in taken.values())
            print(f"| {name} {kind} | {here:.2f} | {own:.2f} | {own - here:+.2f} |", flush=True)
    return equal


def damaged(count: int) -> list[tuple[str, bytes]]:
    """Return images that are cut, changed in a few bytes, repeated in parts, or claim to be large."""
    rng, images = random.Random(7), list[tuple[str, bytes]]()
    while len(images) < count:
        kind = KINDS[len(images) % len(KINDS)]
        mode = rng.choice(["RGB", "RGBA"]) if kind in ("PNG", "WEBP", "TIFF") else "RGB"
        options = {"progressive": True} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
        content = bytearray(file_of(picture((rng.randint(1, 1200), rng.randint(1, 1200)), mode), kind, **options))
        way = rng.choice(["cut", "bytes", "head", "repeat"])
        if way == "cut":
            del content[rng.randrange(len(content)) :]
        elif way == "repeat":
            begin = rng.randrange(len(content) // 2)
            content[begin:begin] = content[begin : begin + 5000] * 200
        else:
            for _ in range(rng.randint(1, 12)):
                content[rng.randrange(min(len(content), 64 if way == "head" else len(content)))] = rng.randrange(256)
        images.append((f"{kind}, {way}", bytes(content)))
    return images


def scans(count: int, side: int) -> bytes:
    """Return a progressive JPEG that repeats one of its scans."""
    content = file_of(Image.new("RGB", (side, side), (9, 99, 199)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


def worst_of_all(images: list[tuple[str, bytes]]) -> bool:
    store.decode(file_of(picture((8, 8)), "PNG"))
    most, worst, refused, within = 0.0, "", 0, True
    for name, content in images:
        before = seconds() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        try:
            store.size_of(content)
            store.decode(content)
        except RowError:
            refused += 1
        taken = max(0.0, seconds() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        if taken > most:
            most, worst = taken, name
    limit = 2 * IMAGE.seconds + decoder.MAX_PIXELS * IMAGE_SECONDS_PER_PIXEL
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"\n{len(images)} damaged images: {refused} refused; at most {most:.2f} s ({worst}); {peak:.2f} GiB in a process that ended"
    )
    within &= most < limit and peak < 2

    content, small = scans(5_000, 4_000), file_of(picture((8, 8)), "PNG")

    def decode_worst() -> None:
        try:
            store.decode(content)
        except RowError as error:
            print(f"the worst, {len(content) / 2**20:.1f} MiB, {time.monotonic() - began:.1f} s: {error}")

    thread = threading.Thread(target=decode_worst)
    began = time.monotonic()
    thread.start()
    waits = []
    while thread.is_alive():
        begin = time.monotonic()
        store.decode(small)
        waits.append(time.monotonic() - begin)
        time.sleep(0.02)
    thread.join()
    waits.sort()
    print(
        f"8 x 8 beside it, {len(waits)} times: median {1000 * waits[len(waits) // 2]:.1f} ms, most {1000 * waits[-1]:.0f} ms"
    )
    return within and waits[-1] < 5


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=50, help="number of damaged images")
    count = arguments.parse_args().images
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, Pillow {PIL.__version__}\n"
    )
    equal = compare()
    print("the pixels are equal" if equal else "THE PIXELS DIFFER")
    return int(not (worst_of_all(damaged(count)) and equal))


if __name__ == "__main__":
    sys.exit(main())
