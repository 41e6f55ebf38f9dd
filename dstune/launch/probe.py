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
        "health": health(query["folders"]) if query.get("folders") else None,
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


# ---- for node_health.py ----

VARIABLES = ("NCCL_", "GLOO_", "CUDA_LAUNCH_BLOCKING")
ANSWER_SECONDS = 20
"""A driver whose GPU has fallen off the bus may never answer."""


def health(folders: list[str], *, quick: bool = False) -> dict[str, Any]:
    """Return what `node_health.judge` judges. folders: those whose mount is of interest. quick: start no programs."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    smi, smi_error = ("", "") if quick else output("nvidia-smi", "-q", "-x")
    return {
        "environment": environment,
        "variables": {**nccl_conf(), **environment},
        "interfaces": interfaces(),
        "ports": ports(),
        "peer_memory": any(os.path.isdir(f"/sys/module/{name}") for name in ("nvidia_peermem", "nv_peer_mem")),
        "nvidia_smi": smi,
        "nvidia_smi_error": smi_error,
        "driver_gpus": gpus(),
        "kernel_messages": [] if quick else kernel_messages(),
        "limits": limits(),
        "most_processes": least("pids.max"),
        "memory_limit": least("memory.max", "memory/memory.limit_in_bytes"),
        "memory_bytes": None if memory() is None else int((memory() or 0) * 2**30),
        "shared_bytes": shared_bytes(),
        "clock_synchronized": None if quick else clock_synchronized(),
        "mounts": {folder: mount(folder) for folder in folders},
    }


def text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(1 << 20)
    except OSError:
        return ""


def least(*names: str) -> int | None:
    """Return the smallest limit that the control groups of this process set in files of these names; None for no limit."""
    lines = text("/proc/self/cgroup").splitlines()
    inside = next((line.split(":", 2)[2].strip("/") for line in lines if line.startswith("0::")), "")
    parts = inside.split("/") if inside else []
    folders = ["/".join(["/sys/fs/cgroup", *parts[:depth]]) for depth in range(len(parts) + 1)]
    values = [text(f"{folder}/{name}").strip() for folder in folders for name in names]
    return min((int(value) for value in values if value.isdigit() and int(value) < 2**62), default=None)


def output(*words: str) -> tuple[str, str]:
    """Return the output of a program, and its error if it fails; both empty if it is not installed."""
    import subprocess

    try:
        done = subprocess.run(words, capture_output=True, timeout=ANSWER_SECONDS)
    except OSError:
        return "", ""
    except subprocess.TimeoutExpired:
        return "", f"no answer in {ANSWER_SECONDS} s"
    said = done.stdout.decode(errors="replace")
    if done.returncode:
        return "", (said + done.stderr.decode(errors="replace")).strip() or f"exit code {done.returncode}"
    return said, ""


def nccl_conf() -> dict[str, str]:
    """Return the variables that /etc/nccl.conf, or the file that NCCL_CONF_FILE names, sets."""
    lines = text(os.environ.get("NCCL_CONF_FILE", "/etc/nccl.conf")).splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, value in pairs}


def ports(root: str = "/sys/class/infiniband") -> list[dict[str, Any]]:
    """Return the ports of InfiniBand and RoCE adapters. `state` is `4: ACTIVE`, `rate` is `400 Gb/sec (4X NDR)`."""
    rows: list[dict[str, Any]] = []
    for device in sorted(os.listdir(root)) if os.path.isdir(root) else []:
        for port in sorted(os.listdir(f"{root}/{device}/ports")):
            folder = f"{root}/{device}/ports/{port}"
            state, physical = (text(f"{folder}/{name}").strip().split(": ")[-1] for name in ("state", "phys_state"))
            rate = text(f"{folder}/rate").split()
            entries = os.listdir(f"{folder}/gids") if os.path.isdir(f"{folder}/gids") else []
            filled = [int(entry) for entry in entries if text(f"{folder}/gids/{entry}").strip(" \n0:")]
            rows.append(
                {
                    "device": device,
                    "port": port,
                    "state": state,
                    "physical": physical,
                    "gigabits": float(rate[0]) if rate else 0.0,
                    "layer": text(f"{folder}/link_layer").strip(),
                    "gids": sorted(filled),
                }
            )
    return rows


def kernel_messages() -> list[str]:
    """Return the kernel's messages since the start about GPUs and memory, at most the last 200; none without the permission."""
    log = output("journalctl", "-k", "-b", "--no-pager", "-q")[0] or output("dmesg")[0]
    words = ("NVRM: Xid", "Out of memory: Killed process", "oom-kill:")
    return [line for line in log.splitlines() if any(word in line for word in words)][-200:]


def limits() -> dict[str, list[int | None]]:
    """Return soft and hard limits; None for unlimited."""
    import resource

    names = {"open files": "RLIMIT_NOFILE", "processes": "RLIMIT_NPROC", "locked memory": "RLIMIT_MEMLOCK"}
    pairs = {name: resource.getrlimit(getattr(resource, of)) for name, of in names.items()}
    return {
        name: [None if value == resource.RLIM_INFINITY else value for value in pair] for name, pair in pairs.items()
    }


def shared_bytes() -> int | None:
    try:
        shared = os.statvfs("/dev/shm")
        return shared.f_bavail * shared.f_frsize
    except OSError:
        return None


def clock_synchronized() -> bool | None:
    """Return whether the clock follows a time server; None where nobody says."""
    said = output("timedatectl", "show", "-p", "NTPSynchronized", "--value")[0].strip()
    return {"yes": True, "no": False}.get(said)


def mount(folder: str, table: str = "/proc/self/mounts") -> tuple[str, str]:
    """Return the type and the options of the file system that a folder is on."""
    place, nearest = os.path.realpath(folder), ("", "", "")
    for line in text(table).splitlines():
        words = line.split()
        if len(words) < 4:
            continue
        root = words[1].replace("\\040", " ")
        inside = root == "/" or place == root or place.startswith(root + "/")
        if inside and len(root) >= len(nearest[0]):
            nearest = (root, words[2], words[3])
    return nearest[1], nearest[2]


if __name__ == "__main__":
    main()
