"""Loads the plugins that a command asks for: by `plugins: [...]` in `dstune.yaml`, in an experiment or on the command line.

Plugins add groups and keys, so their names are read and they are loaded before Hydra composes. The three lists are concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dstune.config.overrides import key_of
from dstune.config.project import EXAMPLE, texts, trusted_plugins
from dstune.core import parsing, plugins
from dstune.core.errors import Problem, UserError
from dstune.core.plugin_files import KEY


def activate_requested(overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> None:
    """Load the plugins of a new run, and make them the active ones.

    Raises:
        UserError: something else than a list is given; a plugin is missing or cannot be imported; or the user has not trusted one
            that `dstune.yaml` in the working directory names.
    """
    named_plugins = [*_experiment_plugins(overrides, config_dirs), *_command_plugins(overrides)]
    project_plugins, sources = trusted_plugins(named_plugins)
    requested = list(dict.fromkeys([*project_plugins, *named_plugins]))
    if requested:
        plugins.load_built_ins()
    plugins.activate(requested, sources)


def _experiment_plugins(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> Iterator[str]:
    names = [text.partition("=")[2].strip("[]'\"") for text in overrides if key_of(text) == "experiment"]
    for name in [Path(name.strip()) for text in names[-1:] for name in text.split(",")]:
        if name.is_absolute() or ".." in name.parts:  # refused when the overrides are checked
            continue
        for folder in _group_folders(overrides, config_dirs):
            file = folder / "experiment" / f"{name}.yaml"
            if not file.is_file():
                continue
            try:
                content = parsing.parse_yaml(parsing.read_file(file).decode("utf-8"))
            except (OSError, ValueError, yaml.YAMLError):  # reported by Hydra
                return
            if isinstance(content, dict):
                yield from texts(content.get(KEY), f"{file}: {KEY}")
            break


def _group_folders(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> Iterator[Path]:
    """Yield the folders that are searched for groups, in that order."""
    from dstune.config.hydra_session import config_folders

    yield from map(Path, config_dirs)
    for text in overrides:
        if key_of(text) == "hydra.searchpath":
            for place in text.partition("=")[2].strip("[]").split(","):
                yield Path(place.strip("'\" ").removeprefix("file://"))
    yield from config_folders()


def _command_plugins(overrides: Sequence[str]) -> list[str]:
    specs: list[str] = []
    for text in overrides:
        if key_of(text) == KEY:
            specs += texts(_value(text), KEY)
    return specs


def _value(text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "=" not in text or not text.startswith(KEY):
        raise UserError(Problem(KEY, "expected a list of files and modules", EXAMPLE, text))
    try:
        return OverridesParser.create().parse_override(text).value()
    except HydraException:
        raise UserError(Problem(KEY, "the value has characters with a meaning in Hydra", EXAMPLE, text[8:])) from None
