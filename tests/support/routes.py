"""The table of routes in docs/evidence.md: what a user types, the test that runs it, and the tier of that test."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
DEBIAN = {
    "ip": "iproute2",
    "mpirun": "openmpi-bin",
    "munged": "munge",
    "pdsh": "pdsh",
    "sbatch": "slurm-client",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
}
"""Programs that the routes of `tests/cluster` need, and the packages that have them."""


@dataclass(frozen=True)
class Route:
    """A row of the table."""

    command: str
    test: str
    """`cluster/test_slurm.py::test_name[case]`; without a case, all cases have the tier."""
    tier: str
    """`make test`, `make test-ci` or `make test-slow`."""


def routes(text: str | None = None) -> list[Route]:
    """Return the rows of the table under `## Routes`. text: a page; by default docs/evidence.md."""
    page = PAGE.read_text(encoding="utf-8") if text is None else text
    section = page.partition("\n## Routes\n")[2].partition("\n## ")[0]
    return [
        Route(*row) for row in re.findall(r"^\| (.*`.+`.*) \| `(\S.*?)` \| `(make .+?)` \|$", section, re.MULTILINE)
    ]


def missing_packages() -> list[str]:
    """Return the Debian packages that the routes need and this machine does not have."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return sorted(package for program, package in DEBIAN.items() if shutil.which(program, path=path) is None)


def refused_skip(test: str, reason: str, missing: list[str], table: list[Route]) -> str | None:
    """Return why a skipped test counts as failed; None if it may be skipped.

    The table promises that its tests run, so the one excuse is a package that is not installed. test: its path in `tests` with
    its name; reason: what pytest would print; missing: packages.
    """
    is_route = any(test == route.test or test.partition("[")[0] == route.test for route in table)
    if missing or not is_route:
        return None
    return f"{PAGE.name} names {test} as the test of a route, and all its packages are installed, but it was skipped: {reason}"
