"""Which plugins a command asks for: `plugins: [...]` in `dstune.yaml`, an experiment and on the command line, read raw.

Plugins add groups and keys, so they are loaded before Hydra composes. The lists of the three places add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dstune.config.convert import yaml_problem
from dstune.config.names import nearest
from dstune.config.overrides import key_of
from dstune.core import plugins
from dstune.core.errors import Problem, UserError
from dstune.core.plugin_files import KEY

PROJECT_FILE = "dstune.yaml"
"""In the folder where a command is given."""


def activate_requested(overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> None:
    """Load the plugins of a new run, and make them the active ones.

    Raises:
        UserError: a list that is none, a plugin that is not there or cannot be imported.
    """
    names = requested(overrides, config_dirs)
    if names:
        plugins.load_built_ins()
    plugins.activate(names)


def requested(overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> list[str]:
    """`./file.py` and `package.module`, each once. Raises UserError."""
    found = [*_of_project(Path(PROJECT_FILE)), *_of_experiments(overrides, config_dirs), *_of_command(overrides)]
    return list(dict.fromkeys(found))


def _of_project(file: Path) -> list[str]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem(str(file), f"cannot be read: {error}")) from None
    except yaml.YAMLError as error:
        raise UserError(yaml_problem(error, str(file))) from None
    unknown = [str(key) for key in content or {} if key != KEY] if isinstance(content, dict | None) else [str(content)]
    if unknown:
        similar = nearest(unknown[0], [KEY])
        fix = f"did you mean {similar}?" if similar else "it has one key: plugins: [./file.py, package.module]"
        raise UserError(Problem(f"{file}: {unknown[0]}", "the file of a project has no such key", fix))
    return _texts((content or {}).get(KEY), f"{file}: {KEY}")


def _of_experiments(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> Iterator[str]:
    names = [text.partition("=")[2].strip("[]'\"") for text in overrides if key_of(text) == "experiment"]
    for name in [name for text in names[-1:] for name in text.split(",")]:
        for folder in _searched(overrides, config_dirs):
            file = folder / "experiment" / f"{name.strip()}.yaml"
            if not file.is_file():
                continue
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):  # reported by Hydra
                return
            if isinstance(content, dict):
                yield from _texts(content.get(KEY), f"{file}: {KEY}")
            break


def _searched(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> Iterator[Path]:
    """Folders with groups, the first one first."""
    from dstune.config.hydra_session import config_folder

    yield from map(Path, config_dirs)
    for text in overrides:
        if key_of(text) == "hydra.searchpath":
            for place in text.partition("=")[2].strip("[]").split(","):
                yield Path(place.strip("'\" ").removeprefix("file://"))
    yield config_folder()


def _of_command(overrides: Sequence[str]) -> list[str]:
    found: list[str] = []
    for text in overrides:
        if key_of(text) == KEY:
            found += _texts(_value(text), KEY)
    return found


def _value(text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "=" not in text or not text.startswith(KEY):
        raise UserError(Problem(KEY, "expected a list of files and modules", _EXAMPLE, text))
    try:
        return OverridesParser.create().parse_override(text).value()
    except HydraException:
        raise UserError(Problem(KEY, "the value has characters with a meaning in Hydra", _EXAMPLE, text[8:])) from None


_EXAMPLE = "plugins=[./file.py,package.module]"


def _texts(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise UserError(Problem(where, "expected a list of files and modules", _EXAMPLE, str(value)))
    return list(value)
