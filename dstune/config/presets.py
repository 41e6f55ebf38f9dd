"""Reads the descriptions at the top of the files in `conf/`."""

from __future__ import annotations

from pathlib import Path

from dstune.config.hydra_session import config_folder


def description(path: Path) -> str:
    """Return the comment at the top of a file as one paragraph, without Hydra's directive and examples of commands."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @package", "#  ")):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def model_files() -> list[Path]:
    """Return the files of the group `model`, of a checkout or of the installed package."""
    return sorted((config_folder() / "model").glob("*.yaml"))


def description_of_choice(group: str, choice: str) -> str:
    """Return the description in the packaged file of a choice; empty if there is no such file."""
    file = config_folder() / group / f"{choice}.yaml"
    return description(file) if file.is_file() else ""
