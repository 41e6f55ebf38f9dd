"""Checks the index of weights in several files, which must not name files outside of its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in

INDEX = "model.safetensors.index.json"


def check_indexes(folder: Path, where: str, value: str) -> None:
    """Raise UserError if an index in `folder` names a file outside of it.

    transformers joins the names to the folder unchecked, and `config.json` can point it to any index there. Links are not resolved,
    since the files of the hub's cache are links.
    """
    problems = []
    for file in sorted(folder.glob("*.index.json")):
        places = object_in(file).get("weight_map")
        outside = [name for name in places.values() if not is_inside(name)] if isinstance(places, dict) else []
        if outside:
            reason = f"{file.name} names a file outside of its folder: {min(outside, key=str)}"
            problems.append(Problem(where, reason, "take the model from somebody you trust", value))
    if problems:
        raise UserError(problems)


def is_inside(name: object) -> bool:
    """Return whether a path of an index stays below the folder that it is joined to."""
    return isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
