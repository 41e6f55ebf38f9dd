"""Merge certificates of `dstune-verify` into docs/verified-stacks.md: devices by versions by cases.

    python tools/certificates.py add FILE ...      # checks certificates and copies them into benchmarks/certificates/
    python tools/certificates.py write             # writes the page from that folder

A certificate replaces an earlier one of the same device, packages and form. Certificates come from strangers: a file that has
anything but words and numbers where these belong is refused.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dstune_verify import certificate  # noqa: E402

FOLDER, PAGE = ROOT / "benchmarks" / "certificates", ROOT / "docs" / "verified-stacks.md"
COLUMNS = ("torch", "deepspeed", "transformers", "accelerate", "peft", "trl")
HEAD = """# Which devices and versions were verified

Each row is a certificate: somebody ran [`dstune-verify`](verify.md) on that stack. Numbers count its cases. To add yours:

1. Run `python dstune-verify.pyz --certificate certificate.json`, or the same by your launcher
   ([On your cluster](verify-cluster.md)).
2. Read the file: it has versions, the device, and the result of each case. Paths, addresses, and names of hosts and users are left
   out.
3. Attach it to an issue of the form *Certificate of dstune-verify*.
"""


def read(file: Path) -> dict[str, Any]:
    """Return a certificate. Raises SystemExit if the file is none, or not of all or the short cases."""
    content = certificate.read(file)
    if content is None:
        raise SystemExit(f"{file}: no certificate: {reason_of(file)}")
    if content["form"] == certificate.CHOSEN:
        raise SystemExit(f"{file}: only some cases were chosen; the page takes all cases, or those of --short")
    if content["made"] > (datetime.now(UTC) + timedelta(days=1)).isoformat():
        # No later one of the same stack would take its place.
        raise SystemExit(f"{file}: made on {content['made']}, which is ahead of now")
    return content


def reason_of(file: Path) -> str:
    """Return why a file is no certificate."""
    try:
        return certificate.problem_of(certificate.load(file))
    except (OSError, ValueError, RecursionError) as error:
        return str(error)


def add(files: Iterable[Path], folder: Path) -> list[Path]:
    """Copy certificates into the folder, each in place of an earlier one of the same stack. Raises SystemExit."""
    added = []
    for content in [read(file) for file in files]:
        device, stack = content["stack"]["device"], content["stack"]
        name = re.sub(r"\W+", "-", device["name"], flags=re.ASCII).strip("-").lower()[:60] or device["type"]
        target = folder / f"{name}-{stack['digest']}-{content['form']}.json"
        earlier = certificate.read(target)
        if earlier is None or earlier["made"] <= content["made"]:
            certificate.write(target, content)
        added.append(target)
    return added


def page(certificates: Sequence[dict[str, Any]]) -> str:
    """Return the page. Devices and the newest versions first within a device."""
    ordered = sorted(certificates, key=lambda content: str(content["made"]), reverse=True)
    devices: dict[str, list[dict[str, Any]]] = {}
    for content in sorted(ordered, key=lambda content: str(content["stack"]["device"]["name"])):
        devices.setdefault(str(content["stack"]["device"]["name"]), []).append(content)
    parts = [HEAD]
    for device, stacks in devices.items():
        parts += [f"## {text(device)}", stacks_table(stacks), cases_table(stacks)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def stacks_table(stacks: Sequence[dict[str, Any]]) -> str:
    """Return the versions and counts of certificates of one device, with a number for each."""
    names = [name for name in COLUMNS if any(name in content["stack"]["packages"] for content in stacks)]
    rows = [["", "date", "ranks", "Python", *names, "driver", "cases", "right", "wrong", "failed", "not run"]]
    for number, content in enumerate(stacks, 1):
        stack, statuses = content["stack"], [case["status"] for case in content["cases"]]
        versions = [stack["packages"].get(name, "") for name in names]
        counts = [str(statuses.count(status)) for status in ("right", "wrong", "crashed", "not run")]
        driver = text(stack["device"].get("driver", "") or stack["device"]["type"])
        date, ranks = content["made"].partition("T")[0], str(content["ranks"])
        rows.append([str(number), date, ranks, stack["python"], *versions, driver, content["form"], *counts])
    return table(rows)


def cases_table(stacks: Sequence[dict[str, Any]]) -> str:
    """Return what is not right in at least one of these certificates: cases by certificates."""
    by_stack = [{case["case"]: case for case in content["cases"]} for content in stacks]
    names = dict.fromkeys(name for cases in by_stack for name in cases)
    shown = [name for name in names if any(cases.get(name, {}).get("status", "right") != "right" for cases in by_stack)]
    rows = [["case", *(str(number) for number in range(1, len(stacks) + 1))]]
    rows += [[f"`{name}`", *(cell(cases.get(name)) for cases in by_stack)] for name in shown]
    return table(rows) if shown else "All cases that ran are right."


def cell(case: dict[str, Any] | None) -> str:
    """Return what a case showed, in a few words."""
    if case is None:
        return ""
    status = {"crashed": "fails", "wrong": "**wrong**"}.get(case["status"], case["status"])
    known = case.get("known") or {}
    error = case.get("errors", {}).get("gradient")
    if case["status"] == "wrong" and isinstance(error, (int, float)):
        status = f"**{error:.2g}**"
    return " ".join(part for part in (status, text(known.get("source", ""))) if part)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown. rows: of Markdown; the first is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def text(value: str) -> str:
    """Return a stranger's text so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", html.escape(" ".join(value.split()), quote=False))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("add", "write"))
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "add":
        for file in add(arguments.files, FOLDER):
            print(file)
    PAGE.write_text(page([read(file) for file in sorted(FOLDER.glob("*.json"))]), encoding="utf-8")


if __name__ == "__main__":
    main()
