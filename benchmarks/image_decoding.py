#!/usr/bin/env python3
"""What it costs to decode images in a process of its own, and what damaged images cost.

usage: python benchmarks/image_decoding.py [--images 50]

First: pictures of several sizes and formats, decoded in this process and by `store.decode` in turns; the pixels have to be equal.
Then: damaged images, some for each decoder, and the largest that each decoder takes, with the processor time and the peak memory of
the process that decodes each; and the time in which an image of 8 x 8 pixels of one key is decoded, in the threads of the local
engine, while another key sends the worst of them again and again. Exit code 1: pixels differ, or a limit was exceeded.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import platform
import random
import resource
import struct
import sys
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
from dstune.serve.engines.local.app import IMAGE_THREADS
from dstune.serve.turns import TurnThreads

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


def largest() -> list[tuple[str, bytes]]:
    """Return images that take most memory: as many pixels as may be, transparency, 16 bits, a tile larger than the image."""
    size = (9_400, 9_500)
    transparent = Image.new("RGBA", size, (9, 99, 199, 0))
    grey = Image.new("I;16", size, 999)
    return [
        ("PNG, transparent", file_of(transparent, "PNG", compress_level=1)),
        ("PNG, 16 bits", file_of(grey, "PNG", compress_level=1)),
        (
            "WEBP, transparent",
            file_of(Image.new("RGBA", (16_383, 5_461), (9, 99, 199, 0)), "WEBP", lossless=True, method=0),
        ),
        ("TIFF, transparent", file_of(transparent, "TIFF", compression="tiff_deflate")),
        ("TIFF of 16 x 16 in a tile of 26,000 x 26,000", wide_tile()),
        ("JPEG", file_of(Image.new("RGB", size, (9, 99, 199)), "JPEG")),
    ]


def wide_tile() -> bytes:
    head = [(256, 3, 16), (257, 3, 16), (258, 3, 8), (259, 3, 1), (262, 3, 1), (277, 3, 1)]
    head += [(322, 4, 26_000), (323, 4, 26_000), (324, 4, 300), (325, 4, 26_000 * 26_000)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in head)
    return b"II*\0" + struct.pack("<IH", 8, len(head)) + entries + bytes(600)


def scans(count: int, side: int) -> bytes:
    """Return a progressive JPEG that repeats one of its scans."""
    content = file_of(Image.new("RGB", (side, side), (9, 99, 199)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


def processes() -> list[Path]:
    """Return the folders in /proc of the processes that decode."""
    return [Path(f"/proc/{spawned.process.pid}") for spawned in list(store._decoders._idle)]


def peak_bytes() -> int:
    """Return the largest resident size since `forget_peaks` of the processes that decode and, since ever, of those that ended."""
    peaks = [resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
    for process in processes():
        peaks += [
            int(line.split()[1]) for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM")
        ]
    return max(peaks) * 1024


def forget_peaks() -> None:
    for process in processes():
        (process / "clear_refs").write_text("5")


def worst_of_all(images: list[tuple[str, bytes]], what: str) -> bool:
    store.decode(file_of(picture((8, 8)), "PNG"))
    most, slowest, peak, largest_name, refused = 0.0, "", 0, "", 0
    for name, content in images:
        forget_peaks()
        before = seconds() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        try:
            store.size_of(content)
            store.decode(content)
        except RowError:
            refused += 1
        taken = max(0.0, seconds() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        if taken > most:
            most, slowest = taken, name
        if peak_bytes() > peak:
            peak, largest_name = peak_bytes(), name
    limit = 2 * IMAGE.seconds + decoder.MAX_PIXELS * IMAGE_SECONDS_PER_PIXEL
    print(
        f"\n{len(images)} {what} images: {refused} refused; at most {most:.2f} s ({slowest}) and "
        f"{peak / 2**30:.2f} GiB ({largest_name}) in the process that decodes",
        flush=True,
    )
    return most < limit and peak < IMAGE.added_bytes + 2**28


async def small_beside_worst() -> bool:
    """Decode a small image of one key again and again while four of another key wait. Return whether each took less than 2 s."""
    content, small = scans(5_000, 4_000), file_of(picture((8, 8)), "PNG")
    threads = TurnThreads("images", IMAGE_THREADS)

    async def decode_worst() -> None:
        began = time.monotonic()
        try:
            await threads.run("a", lambda: store.decode(content))
        except RowError as error:
            print(f"the worst, {len(content) / 2**20:.1f} MiB, after {time.monotonic() - began:.1f} s: {error}")

    worst, waits = [asyncio.create_task(decode_worst()) for _ in range(4)], []
    while not all(task.done() for task in worst):
        began = time.monotonic()
        await threads.run("b", lambda: store.decode(small))
        waits.append(time.monotonic() - began)
        await asyncio.sleep(0.02)
    waits.sort()
    print(
        f"8 x 8 of another key beside them, {len(waits)} times: median {1000 * waits[len(waits) // 2]:.1f} ms, most "
        f"{1000 * waits[-1]:.0f} ms"
    )
    return waits[-1] < 2


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=50, help="number of damaged images")
    count = arguments.parse_args().images
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, Pillow {PIL.__version__}\n"
    )
    equal = compare()
    print("the pixels are equal" if equal else "THE PIXELS DIFFER")
    within = worst_of_all(damaged(count), "damaged") and worst_of_all(largest(), "large")
    return int(not (asyncio.run(small_beside_worst()) and within and equal))


if __name__ == "__main__":
    sys.exit(main())
