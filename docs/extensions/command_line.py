"""The directive `command-line`: every verb of dstune with what its `--help` prints."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

WIDTH = "100"


def help_of(*verb: str) -> str:
    """What `dstune VERB --help` prints, in lines of a fixed width."""
    command = [sys.executable, "-m", "dstune", *verb, "--help"]
    environment = {**os.environ, "COLUMNS": WIDTH, "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


class CommandLine(Directive):
    """A section for each verb, in the order of `dstune --help`."""

    def run(self) -> list[nodes.Node]:
        from dstune.cli import VERBS

        sections: list[nodes.Node] = []
        for name in VERBS:
            section = nodes.section(ids=[f"dstune-{name}"], names=[name])
            section += nodes.title(text=f"dstune {name}")
            text = help_of(name)
            section += nodes.literal_block(text, text, language="text")
            sections.append(section)
        return sections


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
