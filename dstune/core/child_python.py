"""The environment of Python processes that dstune starts: they import nothing from the working directory.

`python -m` and `python -c` put the working directory in front of the import path, where a stranger's `json.py` or `torch.py` would
run in place of the real module.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import dstune

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Keeps the working directory, or the folder of a script, out of the import path (Python 3.11 and newer)."""


def child_environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return `variables` (default: this process's environment) for a child that imports dstune."""
    environment = dict(os.environ if variables is None else variables) | SAFE_PATH
    if path := python_path(environment.get("PYTHONPATH", "")):
        environment["PYTHONPATH"] = path
    else:
        environment.pop("PYTHONPATH", None)
    return environment


def python_path(inherited: str) -> str:
    """Return `inherited` without empty entries; if dstune runs from a checkout, with the checkout's folder in front.

    Python cannot find a checkout by itself. An empty entry means the working directory, and `PYTHONPATH=$PYTHONPATH:/x` makes one
    by mistake.
    """
    home = Path(dstune.__file__).absolute().parent.parent
    places = [place for place in inherited.split(os.pathsep) if place]
    if home.name not in ("site-packages", "dist-packages"):
        places.insert(0, str(home))
    return os.pathsep.join(places)
