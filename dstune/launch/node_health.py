"""Judges what a node reports of itself (`probe.health`): network, GPUs, kernel messages, limits, clock, folders.

Formats: NCCL's variables by NVIDIA's *NCCL environment variables*; `nvidia-smi -q -x` by its manual (drivers since 535 say
`clocks_event_reasons`, earlier ones `clocks_throttle_reasons`); Xid numbers by NVIDIA's *Xid errors*; `/sys/class/infiniband` by
the kernel's *sysfs-class-infiniband*; options of mounts by nfs(5) and Lustre's manual.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.launch import probe
from dstune.protocols.launcher import FAIL, PASS, WARN, Check

GIB = 2**30
SHARED_BYTES, OPEN_FILES, LEAST_PROCESSES = GIB, 4096, 2048
VIRTUAL = ("lo", "docker", "virbr", "veth", "cni", "flannel", "br-")
"""Prefixes of interfaces that lead to no other node."""
SLOWER = {
    "NCCL_P2P_DISABLE": ("1", "GPUs of a node then exchange data through host memory"),
    "NCCL_SHM_DISABLE": ("1", "ranks of a node then use the network"),
    "NCCL_IB_DISABLE": ("1", "nodes then use TCP instead of the fabric"),
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel then waits for the one before"),
    "NCCL_DEBUG": ("TRACE", "every call of NCCL is then logged"),
}
"""Variables that were set to find a fault and make runs slower: the value, and what it does."""
APPLICATION_XIDS = {13, 31, 43, 45}
"""Errors of programs, which say nothing of the machine."""
XIDS: dict[int, tuple[str, str, str]] = {
    48: (FAIL, "uncorrectable memory error", "reset the GPU or reboot; replace it if this comes again"),
    62: (FAIL, "the GPU's controller halted", "reboot"),
    63: (WARN, "a bad row of memory was recorded for replacement", "reset the GPU when it is free"),
    64: (FAIL, "a bad row of memory could not be replaced", "replace the GPU"),
    74: (FAIL, "NVLink error", "nvidia-smi nvlink --errorcounters; reseat or replace the GPU or bridge"),
    79: (FAIL, "the GPU has fallen off the bus", "reboot; look at power and the PCIe slot"),
    92: (WARN, "many corrected memory errors", "watch the GPU's ECC counts"),
    94: (WARN, "uncorrectable memory error that ended one program", "reset the GPU when it is free"),
    95: (
        FAIL,
        "uncorrectable memory error that all programs of the GPU see",
        "reset the GPU before anything runs on it",
    ),
    119: (FAIL, "the GPU's system processor does not answer", "reboot; update the driver if this comes again"),
    120: (FAIL, "the GPU's system processor failed", "reboot; update the driver if this comes again"),
}
"""By Xid: whether it fails the check, what it means, what to do."""
XID_LINE = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
SLOWED = {
    "hw_thermal_slowdown": "too hot",
    "sw_thermal_slowdown": "near its temperature limit",
    "hw_power_brake_slowdown": "braked by the power supply",
    "hw_slowdown": "slowed down by the hardware",
}
"""Reasons for lower clocks that mean a fault; a GPU at its power limit is busy."""


def judge(facts: Mapping[str, Any], *, several_nodes: bool) -> Iterator[Check]:
    """Yield the findings on one node. facts: from `probe.health`. several_nodes: whether runs use this node beside others."""
    yield from _limits(facts)
    yield from _clock(facts)
    yield from _folders(facts, several_nodes=several_nodes)
    yield from _interfaces(facts, several_nodes=several_nodes)
    yield from _fabric(facts)
    yield from _variables(facts)
    yield from _gpus(facts)
    yield from _kernel_messages(facts)


def warnings_at_start(folder: Path, *, several_nodes: bool) -> Iterator[str]:
    """Yield what will fail on this node, as far as that shows without starting programs. folder: the run's parent."""
    for check in judge(probe.health([str(folder)], quick=True), several_nodes=several_nodes):
        if check.status == FAIL:
            yield f"{check.name}: {check.detail} ({check.fix})"


# ---- limits ----


def _limits(facts: Mapping[str, Any]) -> Iterator[Check]:
    shared = facts["shared_bytes"]
    if shared is None:
        yield Check("/dev/shm", WARN, "is not there; ranks of one machine talk through it", "mount a tmpfs there")
    else:
        fix = "docker run --shm-size 8g; mount -o remount,size=8G /dev/shm" if shared < SHARED_BYTES else ""
        yield Check("/dev/shm", WARN if fix else PASS, f"{shared / GIB:.1f} GiB free", fix)
    soft, hard = facts["limits"]["open files"]
    few = soft is not None and soft < OPEN_FILES
    most = "unlimited" if hard is None else hard
    detail = f"{'unlimited' if soft is None else soft} (at most {most})"
    yield Check("open files", WARN if few else PASS, detail, "ulimit -n 65536" if few else "")
    processes = min(
        (n for n in (facts["limits"]["processes"][0], facts["most_processes"]) if n is not None), default=None
    )
    if processes is not None and processes < LEAST_PROCESSES:
        fix = "docker run --pids-limit -1; ulimit -u unlimited"
        yield Check("processes", WARN, f"at most {processes} processes and threads may run; a rank starts dozens", fix)
    locked = facts["limits"]["locked memory"][0]
    if locked is not None and any(port["state"] == "ACTIVE" for port in facts["ports"]):
        fix = "docker run --ulimit memlock=-1; memlock unlimited in /etc/security/limits.conf; LimitMEMLOCK=infinity for slurmd"
        detail = f"{locked / 1024:.0f} KiB may be locked, and the fabric's adapters register all memory that they send"
        yield Check("locked memory", FAIL, detail, fix)
    limit, total = facts["memory_limit"], facts["memory_bytes"]
    if limit is not None and total is not None and limit < 0.9 * total:
        detail = f"this container may use {limit / GIB:.0f} of the machine's {total / GIB:.0f} GiB"
        yield Check("container memory", WARN, detail, "docker run --memory; #SBATCH --mem=0; the pod's memory limit")


def _clock(facts: Mapping[str, Any]) -> Iterator[Check]:
    if facts["clock_synchronized"] is False:
        fix = "systemctl enable --now chronyd (or systemd-timesyncd)"
        yield Check("clock", WARN, "it is not synchronized; times of files and leases of nodes then disagree", fix)


# ---- folders ----


def _folders(facts: Mapping[str, Any], *, several_nodes: bool) -> Iterator[Check]:
    for folder, (kind, options) in facts["mounts"].items():
        words = set(options.split(","))
        if not several_nodes:
            continue
        if kind in ("nfs", "nfs4") and words & {"nolock", "local_lock=all", "local_lock=flock"}:
            option = min(words & {"nolock", "local_lock=all", "local_lock=flock"})
            detail = f"{folder} is mounted by NFS with {option}: a lock keeps out programs of this node alone"
            yield Check("shared folder", FAIL, detail, f"mount it without {option}")
        elif kind == "lustre" and "localflock" in words:
            detail = f"{folder} is mounted by Lustre with localflock: a lock keeps out programs of this node alone"
            yield Check("shared folder", FAIL, detail, "mount it with flock instead of localflock")
        elif kind == "lustre" and "flock" not in words:
            detail = f"{folder} is mounted by Lustre without flock: locks fail"
            yield Check("shared folder", FAIL, detail, "mount it with flock, or choose another run.dir")
        elif kind == "tmpfs" or kind == "overlay":
            detail = f"{folder} is on {kind}, which no other node sees"
            yield Check("shared folder", WARN, detail, "choose a run.dir in a folder that all nodes share")


# ---- the network ----


def selected(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a list of NCCL selects: prefixes, `=NAME` for the exact name, `^` in front to exclude."""
    excluded = pattern.startswith("^")
    words = [word.strip() for word in pattern.removeprefix("^").split(",") if word.strip()]
    exact = pattern.removeprefix("^").startswith("=")

    def matches(name: str) -> bool:
        return any(
            name == word.removeprefix("=") if exact or word.startswith("=") else name.startswith(word) for word in words
        )

    return [name for name in names if matches(name) != excluded]


def _interfaces(facts: Mapping[str, Any], *, several_nodes: bool) -> Iterator[Check]:
    names = list(facts["interfaces"])
    for variable, chosen in (
        ("NCCL_SOCKET_IFNAME", lambda pattern: selected(pattern, names)),
        ("GLOO_SOCKET_IFNAME", lambda pattern: [name for name in names if name in pattern.split(",")]),
    ):
        pattern = facts["variables"].get(variable, "")
        if not pattern:
            continue
        matching = chosen(pattern)
        fix = f"unset {variable}, or set it to one of {', '.join(name for name in names if name != 'lo')}"
        if not matching:
            detail = f"{variable}={pattern} selects none of this node's interfaces ({', '.join(names)})"
            yield Check("interfaces", FAIL, detail, fix)
        elif several_nodes and all(name.startswith(VIRTUAL) for name in matching):
            yield Check(
                "interfaces", FAIL, f"{variable}={pattern} selects {', '.join(matching)}: no way to other nodes", fix
            )


def _fabric(facts: Mapping[str, Any]) -> Iterator[Check]:
    ports, variables = facts["ports"], facts["variables"]
    if not ports:
        return
    active = [port for port in ports if port["state"] == "ACTIVE"]
    names = [f"{port['device']}:{port['port']}" for port in ports]
    pattern = variables.get("NCCL_IB_HCA", "")
    if pattern and not selected(pattern, [*names, *(port["device"] for port in ports)]):
        detail = f"NCCL_IB_HCA={pattern} selects none of this node's adapters ({', '.join(names)}); NCCL then uses TCP"
        yield Check("fabric", WARN, detail, "unset NCCL_IB_HCA, or name adapters that ibv_devinfo lists")
    for port, name in zip(ports, names, strict=True):
        if port["state"] == "INIT":
            fix = "start the fabric's subnet manager (opensm), or look at it: sminfo"
            yield Check("fabric", WARN, f"{name} is connected, but no subnet manager has set it up", fix)
        elif port["state"] != "ACTIVE":
            detail = f"{name} is {port['state']} ({port['physical']})"
            yield Check("fabric", WARN, detail, "look at its cable and switch; ibstat")
    rates = [port["gigabits"] for port in active if port["gigabits"]]
    for port in active:
        if port["gigabits"] and port["gigabits"] < max(rates):
            detail = f"{port['device']}:{port['port']} runs at {port['gigabits']:g} Gb/s, others at {max(rates):g}"
            yield Check("fabric", WARN, f"{detail}; the slowest one decides", "look at its cable; ibstat")
    index = variables.get("NCCL_IB_GID_INDEX", "")
    lacking = [port for port in active if index.isdigit() and int(index) not in port["gids"]]
    if lacking:
        filled = ", ".join(map(str, lacking[0]["gids"])) or "none"
        empty = ", ".join(f"{port['device']}:{port['port']}" for port in lacking)
        detail = f"NCCL_IB_GID_INDEX={index} is an empty entry of {empty} (filled: {filled})"
        yield Check("fabric", FAIL, detail, "unset NCCL_IB_GID_INDEX; show_gids lists the entries")
    if active and facts["nvidia_smi"] and not facts["peer_memory"]:
        detail = (
            "nvidia_peermem is not loaded: unless the kernel offers DMA-BUF, data takes the way through host memory"
        )
        yield Check("fabric", WARN, detail, "modprobe nvidia_peermem")
    if active:
        speeds = ", ".join(f"{port['device']} {port['gigabits']:g} Gb/s {port['layer']}" for port in active)
        yield Check("fabric", PASS, speeds)


def _variables(facts: Mapping[str, Any]) -> Iterator[Check]:
    for name, (value, effect) in SLOWER.items():
        if facts["variables"].get(name, "").upper() != value:
            continue
        if name == "NCCL_IB_DISABLE" and not any(port["state"] == "ACTIVE" for port in facts["ports"]):
            continue
        where = "" if name in facts["environment"] else " (in /etc/nccl.conf)"
        yield Check("variables", WARN, f"{name}={value}{where}: {effect}", f"unset {name}")


# ---- GPUs ----


def _gpus(facts: Mapping[str, Any]) -> Iterator[Check]:
    error = facts["nvidia_smi_error"]
    if "version mismatch" in error.lower():
        fix = "reboot, or unload and load the driver's modules: it was updated while it was loaded"
        yield Check("GPU driver", FAIL, error.strip().splitlines()[0], fix)
    elif error:
        yield Check("GPU driver", FAIL, f"nvidia-smi fails: {error.strip().splitlines()[0]}", "nvidia-smi; reboot")
    if not facts["nvidia_smi"]:
        return
    try:
        log = ElementTree.fromstring(facts["nvidia_smi"])
    except ElementTree.ParseError as broken:
        yield Check("GPU driver", WARN, f"the output of nvidia-smi -q -x cannot be read: {broken}", "nvidia-smi -q")
        return
    gpus = log.findall("gpu")
    if facts["driver_gpus"] > len(gpus):
        detail = f"the driver has {facts['driver_gpus']} GPUs, and nvidia-smi shows {len(gpus)}: some do not answer"
        yield Check("GPU health", FAIL, detail, "dmesg | grep Xid; reboot")
    findings = [finding for number, gpu in enumerate(gpus) for finding in _health(number, gpu)]
    yield from findings
    if gpus and not findings:
        yield Check("GPU health", PASS, f"{len(gpus)} without memory errors, at full width and clocks")


def _text(gpu: ElementTree.Element, *paths: str) -> str:
    return next((text.strip() for path in paths if (text := gpu.findtext(path))), "")


def _health(number: int, gpu: ElementTree.Element) -> Iterator[Check]:
    name = f"GPU {number} ({gpu.get('id', '?')})"
    volatile = gpu.find("ecc_errors/volatile")
    counts = [] if volatile is None else [leaf for leaf in volatile.iter() if "uncorrectable" in leaf.tag]
    counts += [] if volatile is None else volatile.findall("double_bit/total")
    texts = [(leaf.text or "").strip() for leaf in counts]
    uncorrected = sum(int(text) for text in texts if text.isdigit())
    if uncorrected:
        detail = f"{name} has had {uncorrected} uncorrectable memory error{'s' * (uncorrected > 1)} since it started"
        yield Check("GPU health", FAIL, detail, f"nvidia-smi --gpu-reset -i {number} when it is free")
    if _text(gpu, "remapped_rows/remapped_row_failure") == "Yes":
        yield Check("GPU health", FAIL, f"{name} cannot replace bad rows of its memory any more", "replace the GPU")
    elif "Yes" in (
        _text(gpu, "remapped_rows/remapped_row_pending"),
        _text(gpu, "retired_pages/pending_retirement", "retired_pages/pending_blacklist"),
    ):
        detail = f"{name} has bad memory that is replaced when the GPU is reset"
        yield Check("GPU health", WARN, detail, f"nvidia-smi --gpu-reset -i {number} when it is free")
    for reason, meaning in SLOWED.items():
        paths = (f"clocks_{word}_reasons/clocks_{word}_reason_{reason}" for word in ("event", "throttle"))
        if _text(gpu, *paths) == "Active":
            temperature = _text(gpu, "temperature/gpu_temp")
            detail = f"{name} runs at lower clocks: {meaning}{f' ({temperature})' if 'thermal' in reason else ''}"
            fix = "nvidia-smi -q -d PERFORMANCE,TEMPERATURE; look at its cooling and power"
            yield Check("GPU health", WARN, detail, fix)
            break
    width, most = (_text(gpu, f"pci/pci_gpu_link_info/link_widths/{of}_link_width") for of in ("current", "max"))
    if re.fullmatch(r"\d+x", width) and re.fullmatch(r"\d+x", most) and int(width[:-1]) < int(most[:-1]):
        detail = f"{name} is connected by {width[:-1]} of {most[:-1]} PCIe lanes"
        yield Check("GPU health", WARN, detail, "reseat it, or look at the slot's settings")
    state, status = _text(gpu, "fabric/state"), _text(gpu, "fabric/status")
    if state not in ("", "N/A", "Completed") or (state == "Completed" and status not in ("", "N/A", "Success")):
        detail = (
            f"{name} has not joined the NVLink fabric ({state}, {status or 'no status'}); CUDA fails with error 802"
        )
        yield Check("GPU health", FAIL, detail, "systemctl restart nvidia-fabricmanager")
    if _text(gpu, "compute_mode") == "Prohibited":
        yield Check(
            "GPU health", FAIL, f"{name} admits no programs (compute mode Prohibited)", f"nvidia-smi -i {number} -c 0"
        )


def _kernel_messages(facts: Mapping[str, Any]) -> Iterator[Check]:
    lines = facts["kernel_messages"]
    seen: dict[tuple[int, str], int] = {}
    for line in lines:
        if match := XID_LINE.search(line):
            key = (int(match[2]), match[1])
            seen[key] = seen.get(key, 0) + 1
    for (xid, place), count in seen.items():
        if xid in APPLICATION_XIDS:
            continue
        unknown = (WARN, "an error of the GPU or its driver", "look it up in NVIDIA's list of Xid errors")
        status, meaning, fix = XIDS.get(xid, unknown)
        times = f", {count} times" if count > 1 else ""
        yield Check("kernel messages", status, f"Xid {xid} of {place}{times} since the start: {meaning}", fix)
    killed = [line for line in lines if "Out of memory: Killed process" in line or "oom-kill:" in line]
    if killed:
        detail = (
            f"the kernel has ended {len(killed)} program{'s' * (len(killed) > 1)} for lack of memory since the start"
        )
        yield Check(
            "kernel messages",
            WARN,
            detail,
            "dmesg | grep -i 'killed process' names them; dstune plan counts host memory",
        )
