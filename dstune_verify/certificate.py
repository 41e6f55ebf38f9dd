"""Certificates: what a run of the program showed, as a file that can be sent and compared.

A certificate holds the verdict as JSON (`Verdict.as_json`), the date, and which cases were chosen.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import stat
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dstune_verify import environment
from dstune_verify.cases import STATUSES

FULL, SHORT, CHOSEN = "full", "short", "chosen"
"""Which cases ran: all, those of `--short`, or what the user chose by other options."""
LARGEST_BYTES = 1 << 20
DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def make(verdict: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Return the certificate of a verdict. form: FULL, SHORT or CHOSEN."""
    made = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {**verdict, "form": form, "made": made}


def write(file: Path, certificate: Mapping[str, Any]) -> None:
    """Write a certificate, all of it or nothing. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def store(folder: Path, certificate: Mapping[str, Any]) -> Path:
    """Write a certificate into a folder and return its file. It replaces an earlier one of the same stack and form. Raises
    OSError."""
    stack = certificate["stack"]
    file = folder / f"{stack['digest']}-{stack['device']['type']}-{certificate['form']}.json"
    write(file, certificate)
    return file


def newest(folder: Path) -> dict[str, Any] | None:
    """Return the newest certificate in a folder, or None. Files that are no certificates are passed over."""
    certificates = [content for file in folder.glob("*.json") if (content := read(file)) is not None]
    return max(certificates, key=lambda content: str(content["made"]), default=None)


def read(file: Path) -> dict[str, Any] | None:
    """Return the content of a certificate; None if the file is none."""
    try:
        content = load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return content if not problem_of(content) else None


def load(file: Path) -> Any:
    """Return what a file holds, which may be a stranger's. Raises OSError, ValueError, RecursionError: it is too large, no JSON, or
    a pipe or a device, which might never end."""
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = stream.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise ValueError(f"it has more than {LARGEST_BYTES:,} bytes")
    return json.loads(content.decode("utf-8"))


def problem_of(content: Any) -> str:
    """Return what makes `content` no certificate; empty if it is one. Certificates come from strangers."""
    if not isinstance(content, dict):
        return "it is no object"
    stack = content.get("stack")
    if not isinstance(stack, dict) or not isinstance(stack.get("device"), dict):
        return "stack.device is no object"
    for name, value in (
        ("digest", stack.get("digest")),
        ("python", stack.get("python")),
        ("stack.device.type", stack["device"].get("type")),
    ):
        if not _is_word(value):
            return f"{name} is no word"
    if not isinstance(content.get("made"), str) or not DATE.fullmatch(content["made"]):
        return "made is no date such as 2026-12-01T10:00:00Z"
    if not isinstance(stack.get("packages"), dict) or not all(
        map(_is_word, [*stack["packages"], *stack["packages"].values()])
    ):
        return "stack.packages is no object of words"
    if not all(_is_printable(value, 100) for value in [*stack["device"], *stack["device"].values()]):
        return "stack.device is no object of printable texts"
    if not stack["device"].get("name"):
        return "stack.device.name is missing"
    if content.get("form") not in (FULL, SHORT, CHOSEN):
        return f"form is none of {FULL}, {SHORT}, {CHOSEN}"
    if type(content.get("ranks")) is not int or not isinstance(content.get("cases"), list):
        return "ranks or cases are missing"
    for case in content["cases"]:
        if not isinstance(case, dict) or not _is_word(case.get("case")) or case.get("status") not in STATUSES:
            return "a case has no name, or another status"
        if not _is_text(case.get("detail", ""), 2000) or not _is_figures(case.get("errors", {})):
            return f"detail or errors of {case['case']} are of another type"
        known = case.get("known") or {}
        if not isinstance(known, dict) or not all(_is_printable(value, 300) for value in known.values()):
            return f"known of {case['case']} is no object of printable texts"
    return ""


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.:+\-]{1,80}", value) is not None


def _is_text(value: Any, most: int) -> bool:
    return isinstance(value, str) and len(value) <= most


def _is_printable(value: Any, most: int) -> bool:
    """Return whether a page can show the text: without escapes, changes of direction, halves of characters."""
    return _is_text(value, most) and value.isprintable()


def _is_figures(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_text(name, 40) and isinstance(number, (int, float)) for name, number in value.items()
    )


def changes(certificate: Mapping[str, Any]) -> list[str]:
    """Return how this process's stack differs from the certificate's: `torch 2.13.0 instead of 2.12.1`."""
    before, now = _versions(certificate["stack"]), _versions(environment.versions())
    return [
        f"{name} {now.get(name) or 'none'} instead of {before.get(name) or 'none'}"
        for name in dict.fromkeys([*now, *before])
        if now.get(name) != before.get(name)
    ]


def _versions(stack: Mapping[str, Any]) -> dict[str, str]:
    device = {
        {"name": "device", "type": "device type"}.get(name, name): value for name, value in stack["device"].items()
    }
    return {"python": stack["python"], **stack["packages"], **device}


ADDRESS = re.compile(
    r"\[[\w.:%\-]+\]:\d+|\([A-Za-z][\w.\-]*, \d{2,5}\)|\b(?:\d{1,3}\.){3}\d{1,3}\b(?::\d+)?"
    r"|(?<![\w:])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{1,4}(?!\w)",
    re.IGNORECASE,
)
"""Addresses as torch and gloo print them: `[HOST]:PORT`, `(HOST, PORT)`, and those of IPv4 and IPv6."""
PATH = re.compile(r"(?<![\w/])~?(?:/[^\s/'\",:;()\[\]]+){2,}/?|\b[A-Za-z]:\\[^\s'\",;]+")


def without_private(text: str) -> str:
    """Replace paths, addresses and the names of this host and user in the text of an error."""
    text = ADDRESS.sub("ADDRESS", PATH.sub("PATH", text))
    for name, word in (
        (socket.gethostname(), "HOST"),
        (socket.gethostname().partition(".")[0], "HOST"),
        (_user(), "USER"),
    ):
        if len(name) > 2:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""
