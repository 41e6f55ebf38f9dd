"""What a node says about itself: `python - < probe.py`, sent over ssh. Standard library only, also of older Pythons: the
node may have another dstune, or none.

Reads one JSON object from the variable DSTUNE_PROBE: packages, paths to compare, a folder to look for. Prints one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from typing import Any


def main() -> None:
    query = json.loads(os.environ.get("DSTUNE_PROBE", "{}"))
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "time": time.time(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": {name: version(name) for name in query.get("packages", [])},
        "files": {path: fingerprint(path) for path in query.get("paths", [])},
        "interfaces": interfaces(),
        "port": free_port(),
        "gpus": gpus(),
        "memory_gib": memory(),
    }
    print("DSTUNE_PROBE " + json.dumps(facts))


def version(package: str) -> str | None:
    try:
        from importlib.metadata import version as installed

        return installed(package)
    except Exception:  # this runs on any host, whatever is broken there
        return None


def fingerprint(path: str) -> str | None:
    """Return digest of a file, or of all Python and YAML files below a folder; None where it is absent."""
    digest = hashlib.sha256()
    if os.path.isfile(path):
        with open(path, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        return digest.hexdigest()[:16]
    if not os.path.isdir(path):
        return None
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            if name.endswith((".py", ".yaml", ".jinja")):
                digest.update(os.path.relpath(os.path.join(folder, name), path).encode())
                with open(os.path.join(folder, name), "rb") as stream:
                    digest.update(stream.read())
    return digest.hexdigest()[:16]


def interfaces() -> dict[str, str]:
    """Return IPv4 addresses by interface."""
    import fcntl
    import struct

    address_by_name: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name[:15].encode()))  # SIOCGIFADDR
                address_by_name[name] = socket.inet_ntoa(answer[20:24])
            except OSError:
                pass
    return address_by_name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def gpus() -> int:
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None


if __name__ == "__main__":
    main()
