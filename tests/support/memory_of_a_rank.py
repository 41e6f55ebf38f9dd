"""Prints the planted secrets that stand anywhere in the memory of this process, which a fork server has forked."""

from __future__ import annotations

import contextlib
import json
import re

PLANTED = re.compile(rb"planted[-][0-9a-f]{32}")


def planted_in(process: int | str) -> set[str]:
    """Return the planted secrets in the memory of a process, which is this one or one that it may trace."""
    found: set[str] = set()
    with open(f"/proc/{process}/maps", encoding="ascii") as maps, open(f"/proc/{process}/mem", "rb", 0) as memory:
        for line in maps.read().splitlines():
            places, rights, *_ = line.split()
            start, end = (int(place, 16) for place in places.split("-"))
            for at in range(start, end, 2**24) if rights.startswith("r") else ():
                with contextlib.suppress(OSError, OverflowError):  # pages of the kernel
                    memory.seek(at)
                    found.update(one.decode() for one in PLANTED.findall(memory.read(min(2**24, end - at))))
    return found


if __name__ == "__main__":
    print(json.dumps(sorted(planted_in("self"))), flush=True)
