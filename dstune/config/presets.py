"""What the files in `conf/` say of themselves."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from dstune.config.hydra_session import CONFIG_MODULE, config_folder


def description(path: Path) -> str:
    """The comment at the top of a file as one paragraph, without Hydra's directive and examples of commands."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @package", "#  ")):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def model_files() -> list[Path]:
    """The files of the group `model`, of a checkout or of the installed package."""
    folder = config_folder()
    if folder is None:
        folder = Path(str(importlib.resources.files(CONFIG_MODULE)))
    return sorted((folder / "model").glob("*.yaml"))
