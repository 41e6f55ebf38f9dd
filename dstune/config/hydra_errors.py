"""Translates errors of Hydra, OmegaConf and the YAML parser into problems that say what a user has to change in a file.

`overrides.check` finds mistakes in overrides before, and names keys better than Hydra does, so errors here come from inside a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dstune.config.convert import describe, yaml_problem
from dstune.config.habits import unknown_choice
from dstune.config.names import all_keys, nearest, sections, suggest_key
from dstune.core.errors import Problem

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra


def problem_of(error: BaseException, hydra: Hydra) -> Problem:
    """Return the problem that Hydra stopped at."""
    from hydra.errors import MissingConfigException

    if isinstance(error, UserWarning):
        return Problem("hydra.searchpath", str(error), "give folders that exist")
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        return yaml_problem(error, mark.name if mark else "a configuration file")
    text = str(error)
    named_file = re.search(r"[Ii]n '([^']+)'", text)
    where = file_of(named_file[1], hydra) if named_file else "configuration"
    if isinstance(error, MissingConfigException):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        problem = unknown_choice(group, choice, list(error.options or []))
        if (
            named_file is None or named_file[1] == "train"
        ):  # Hydra names the root, although another file changed its defaults list
            return problem
        return Problem(where, f"{problem.reason}: {choice}", problem.fix)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines and error.__cause__ is not None:  # OmegaConf cannot read the class of a choice
        cause = str(error.__cause__)
        lines = cause.splitlines()
        owner = re.search(r"object_type=(?!NoneType)(\w+)", cause)
        where = owner[1] if owner else where
        text = cause
    keyed = re.search(r"full_key: (\S+)", text) or re.search(r"full_key: (\S+)", str(error.__cause__ or ""))
    if keyed:
        return _key_problem(where, keyed[1], lines)
    if "Could not override" in text and (missing := re.search(r"override '([^']+)'", text)):
        similar = nearest(missing[1], sections())
        fix = f"did you mean `override /{similar}`?" if similar else f"groups are {', '.join(sections())}"
        return Problem(where, f"there is no group {missing[1]} to override", fix)
    if "not a subclass of" in text:
        return Problem(where, "this has to be a mapping of keys to values")
    return Problem(where, " ".join(lines[:3]) if lines else type(error).__name__)


def file_of(config: str, hydra: Hydra) -> str:
    """Return the path at which Hydra finds a configuration (`experiment/mine`); only its file name if it is inside a package."""
    for source in hydra.config_loader.get_sources():
        path = Path(source.path) / f"{config}.yaml"
        if source.scheme() == "file" and path.is_file():
            return str(path)
    return f"{config}.yaml"


def _key_problem(where: str, key: str, lines: list[str]) -> Problem:
    """Return the problem with a key in a file that does not exist, or whose value has the wrong type."""
    text = " ".join(lines)
    if key in all_keys() and (value := re.search(r"Value '(.*?)' of type|Invalid value '(.*?)'", text)):
        rejected_value = value[1] or value[2] or ""
        return Problem(where, f"{key}={rejected_value}: expected {describe(all_keys()[key])}")
    if "not in" in text or "is not in struct" in text:
        section = key.split(".", 1)[0]
        similar = suggest_key(key, all_keys()) if "." in key else nearest(key, sections())
        is_known = key in all_keys()
        reason = f"the chosen {section} has no key {key}" if is_known else f"there is no key {key}"
        return Problem(where, reason, f"did you mean {similar}?" if similar and not is_known else "")
    reason = next((line for line in lines if "raised while composing" not in line), text)
    return Problem(where, f"{key}: {reason}")
