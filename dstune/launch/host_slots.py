"""Reads a hostfile, with one `HOST slots=N` per line, and selects the slots that a run uses.

The forms of lines and of include and exclude are those of DeepSpeed's launcher (`HOST`, `HOST:0,2`, joined by `@`). All errors
are reported together, before anything starts.
"""

from __future__ import annotations

import re
from pathlib import Path

from dstune.core.errors import Problem, UserError

LINE = re.compile(r"(\S+)\s+slots=(\d{1,6})\s*(#.*)?")
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]*")
"""Host names that are safe on a command line of ssh and mpirun: `-oProxyCommand=...` would be an option, `a[1-9]` nine hosts."""


def read_hostfile(path: str) -> dict[str, int]:
    """Read the number of slots by host, in the order of the file.

    Raises:
        UserError: the file cannot be read, or lists every wrong line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        fix = "give a file with one `HOST slots=N` per line, as in launch/hostfile.example"
        raise UserError(Problem("launch.hostfile", reason, fix, path)) from None
    hosts: dict[str, int] = {}
    problems = []
    for number, text in enumerate(lines, 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        place, match = f"{path}:{number}", LINE.fullmatch(text.strip())
        if match is None:
            problems.append(Problem(place, "this is not `HOST slots=N`", "node1 slots=8", text.strip()))
        elif not HOST.fullmatch(match[1]):
            problems.append(Problem(place, "this is not a host name or address", "node1 slots=8", match[1]))
        elif match[1] in hosts:
            problems.append(Problem(place, "this host is listed twice", "give each host one line", match[1]))
        elif int(match[2]) < 1:
            problems.append(Problem(place, "a host without slots runs no rank", "leave the line out", text.strip()))
        else:
            hosts[match[1]] = int(match[2])
    if not hosts and not problems:
        problems.append(Problem("launch.hostfile", "it lists no host", "node1 slots=8", path))
    if problems:
        raise UserError(problems)
    return hosts


def select_slots(hosts: dict[str, int], include: str | None, exclude: str | None) -> dict[str, list[int]]:
    """Return the numbers of the slots that the run uses, by host in the order of the file.

    Raises:
        UserError: include or exclude names a host or slot that the file does not have, or leaves no slot.
    """
    slots = {host: list(range(count)) for host, count in hosts.items()}
    key, text = ("launch.include", include) if include else ("launch.exclude", exclude)
    if not text:
        return slots
    slots_listed: dict[str, list[int]] = {}
    problems = []
    for part in text.split("@"):
        match = re.fullmatch(r"([^:@\s]+)(?::(\d{1,6}(?:,\d{1,6})*))?", part)
        if match is None:
            problems.append(Problem(key, "this is not HOST or HOST:SLOT,SLOT", "node1@node2:0,1", part))
            continue
        host, listed = match[1], [int(number) for number in match[2].split(",")] if match[2] else None
        if host not in slots:
            problems.append(Problem(key, "the hostfile has no such host", f"one of {', '.join(slots)}", host))
            continue
        absent = [number for number in listed or [] if number not in slots[host]]
        if absent:
            reason = f"{host} has {hosts[host]} slots, numbered from 0"
            problems.append(
                Problem(key, reason, "give only slots in this range", f"{host}:{','.join(map(str, absent))}")
            )
        slots_listed[host] = sorted({*slots_listed.get(host, []), *(slots[host] if listed is None else listed)})
    if problems:
        raise UserError(problems)
    if include:
        chosen_slots = {host: slots_listed[host] for host in slots if host in slots_listed}
    else:
        chosen_slots = {
            host: [n for n in host_slots if n not in slots_listed.get(host, [])] for host, host_slots in slots.items()
        }
        chosen_slots = {host: host_slots for host, host_slots in chosen_slots.items() if host_slots}
    if not chosen_slots:
        raise UserError(Problem(key, "no slot is left for the run", "exclude fewer hosts or slots", text))
    return chosen_slots
