"""Composes the frozen `RunConfig` from `key=value` overrides (`run_file.py` stores it).

Only this folder uses Hydra; nothing outside of it sees a DictConfig.
"""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dstune.config import by_method
from dstune.config import overrides as user_overrides
from dstune.config.convert import (
    EnvironmentText,
    chosen_class,
    interpolation_problem,
    partly_from_dict,
    refers,
    to_dict,
)
from dstune.config.habits import with_preset_names
from dstune.config.hydra_errors import problem_of
from dstune.config.hydra_session import ROOT_CONFIG, group_options, hidden_files, session
from dstune.config.names import default_classes
from dstune.config.plugins import activate_requested
from dstune.config.run_file import Composed
from dstune.config.schema import CHOICES, RunConfig
from dstune.core import plugins
from dstune.core.errors import Problem, UserError
from dstune.protocols import TASKS, task_of

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

DEFAULT_EXPERIMENT = "experiment=quickstart"
REPLACES_QUICKSTART = ("experiment", "model", "model.path", "data", "data.train", "data.mixture")
"""What names an experiment, a model or training rows; a file of `model` or `data` has the path of one, and a mixture has rows."""

Result = TypeVar("Result")


def compose(
    overrides: Sequence[str], config_dirs: Sequence[str | Path] = (), *, keep_plugins: bool = False
) -> Composed:
    """Compose the configuration for these overrides; it is not validated yet (`validate.validate`).

    Without an experiment, model or training rows among the overrides this is `experiment=quickstart`. A chat template's date is
    frozen to today, `run.dir` may stay None.

    keep_plugins: the active plugins stay the active ones, whatever the working directory and the overrides name.

    Raises:
        UserError: everything that is wrong with the overrides, or with a YAML file that they chose.
    """
    requested = with_default_experiment(with_preset_names(overrides))
    if not keep_plugins:
        activate_requested(requested, config_dirs)
    with session(config_dirs) as hydra:
        composed, origins = run_hydra(hydra, requested, lambda texts: _compose(hydra, texts))
        config = typed_config(_plain(composed), "the composed configuration")
        if overruled := list(_overruled(hydra, requested, config)):
            raise UserError(overruled)
        if config.zero.path is not None:
            from dstune.config.zero_file import given_by, with_file

            before_file, config = config, with_file(config, given_by(hydra, requested))
            origins = {key: origin for key, origin in origins.items() if before_file.optimizer == config.optimizer}
    config = replace(config, task=task_of(config.task).resolve(datetime.date.today().isoformat()))
    return Composed(config, requested, plugins.used_by(config), tuple(map(str, config_dirs)), origins)


def put_file(hydra: Hydra, composed: DictConfig, overrides: Sequence[str]) -> None:
    """Put the content of the file that zero.path names into a composition.

    A composition that refers to variables which only the run will have stays as it is.

    Raises:
        UserError: as `compose` does.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    try:
        if OmegaConf.select(composed, "zero.path") is None:
            return
        plain = _plain(composed)
    except (UserError, InterpolationResolutionError):
        return
    from dstune.config.zero_file import given_by, with_file

    config = typed_config(plain, "the composed configuration")
    before, after = to_dict(config), to_dict(with_file(config, given_by(hydra, overrides)))
    for section in (name for name in before if after[name] != before[name]):
        if after[section].get("name") != before[section].get("name"):
            composed[section] = after[section]  # another choice with other keys
            continue
        # Key by key, so that all others stay as written, with their references.
        for key, value in after[section].items():
            if value != before[section][key]:
                composed[section][key] = value


def frozen_at_start() -> tuple[str, ...]:
    """Return the keys that the first start of a run fills in (today's date, the hub's commit) and later starts adopt."""
    of_tasks = dict.fromkeys(f"task.{key}" for cls in TASKS.classes().values() for key in cls.frozen_keys)
    return ("model.revision", *of_tasks)


def _overruled(hydra: Hydra, overrides: Sequence[str], config: RunConfig) -> Iterator[Problem]:
    """Yield a model or data that was asked for by name while the experiment's file itself says which: its word would win unseen."""
    value_by_key = {user_overrides.key_of(text): text.partition("=")[2] for text in overrides}
    if "experiment" not in value_by_key:
        return
    searched = [text for text in overrides if user_overrides.key_of(text) == "hydra.searchpath"]
    for group, key in (("model", "path"), ("data", "train")):
        if group not in value_by_key or f"{group}.{key}" in value_by_key:
            continue
        file_value = compose_dict_config(hydra, [*searched, f"{group}={value_by_key[group]}"])[group].get(key)
        composed_value = getattr(getattr(config, group), key)
        if file_value is not None and file_value != composed_value:
            experiment, choice = value_by_key["experiment"], value_by_key[group]
            reason = (
                f"experiment={experiment} says {group}.{key}={composed_value}, which wins over the file of {choice}"
            )
            yield Problem(group, reason, f"{group}.{key}={file_value}", value_by_key[group])


def typed_config(raw: Any, where: str) -> RunConfig:
    """Build the configuration from a tree of plain values. Raises UserError with what `validate` can tell of the good sections,
    too."""
    config, problems = partly_from_dict(raw, where)
    if problems:
        from dstune.config.validate import find_problems  # which showing a configuration does not need

        raise UserError(problems + find_problems(config, {problem.where.split(".", 1)[0] for problem in problems}))
    return config


def with_default_experiment(overrides: Sequence[str]) -> list[str]:
    """Return the overrides, with `experiment=quickstart` in front if they name no experiment, model or training rows."""
    keys = [user_overrides.key_of(text) for text in overrides]
    names_a_run = any(key in REPLACES_QUICKSTART or key.startswith("data.mixture.") for key in keys)
    return list(overrides) if names_a_run else [DEFAULT_EXPERIMENT, *overrides]


def compose_dict_config(hydra: Hydra, overrides: list[str]) -> DictConfig:
    """Compose with Hydra, its own `hydra` section included, with the defaults of the method."""
    return _compose(hydra, overrides)[0]


def _compose(hydra: Hydra, overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """Return the same, and where these defaults come from."""
    from hydra.types import RunMode

    composed = hydra.compose_config(ROOT_CONFIG, overrides, RunMode.RUN)
    if hidden := list(hidden_files(composed)):
        raise UserError(hidden)
    return composed, by_method.fill(composed)


def run_hydra(hydra: Hydra, overrides: Sequence[str], action: Callable[[list[str]], Result]) -> Result:
    """Return `action(overrides)`, where whatever Hydra refuses becomes a `UserError` with all problems of the overrides."""
    with warnings.catch_warnings():
        # A folder of hydra.searchpath that does not exist is a mistake, not a warning.
        warnings.simplefilter("error", UserWarning)
        return _run_hydra(hydra, user_overrides.for_hydra(overrides), action)


def _run_hydra(hydra: Hydra, texts: list[str], action: Callable[[list[str]], Result]) -> Result:
    parsed, unread = user_overrides.parse(texts)

    def mistakes() -> list[Problem]:
        searched = [str(override.input_line) for override in parsed if override.key_or_group == "hydra.searchpath"]
        try:
            groups = group_options(hydra, searched)
            checked = user_overrides.check(parsed, groups, lambda good: classes_for(hydra, good))
        except UserWarning as warning:
            return [*unread, problem_of(warning, hydra)]
        problems = unread + checked.problems
        doubtful = checked.doubtful | {user_overrides.meant_by(problem.where) for problem in unread}
        return problems and problems + _further_problems(hydra, checked.good, doubtful)

    if (unread or any(user_overrides.hydra_would_take(override) for override in parsed)) and (problems := mistakes()):
        raise UserError(problems)
    try:
        return action(texts)
    except UserError:
        raise
    except Exception as error:  # Hydra and OmegaConf raise their own exceptions, ValueError, YAMLError, ...
        problems = mistakes() or [problem_of(error, hydra)]
    raise UserError(problems)


def _further_problems(hydra: Hydra, good: Sequence[Override], doubtful: set[str]) -> list[Problem]:
    """Return what is wrong beside names and types, as far as the good overrides can tell."""
    try:
        raw = _plain(compose_dict_config(hydra, [str(override.input_line) for override in good]))
    except Exception:  # something is wrong with a file too, which is told once the overrides are right
        return []
    from dstune.config.validate import find_problems

    config, problems = partly_from_dict(raw, "the composed configuration")
    return problems + find_problems(config, doubtful | {problem.where.split(".", 1)[0] for problem in problems})


def classes_for(hydra: Hydra, overrides: list[str]) -> dict[str, type]:
    """Return the class of each section for these (good) choices of groups; the default one where a file is broken.

    What is wrong with the file itself is reported when nothing is wrong with the overrides.
    """
    classes = default_classes()
    try:
        composed = compose_dict_config(hydra, overrides)
    except Exception:  # see run_hydra
        return classes
    for section in CHOICES:
        with suppress(UserError):
            classes[section] = chosen_class(section, dict(composed[section]), section)
    return classes


# ---- DictConfig to plain values ----


def _plain(composed: DictConfig) -> dict[str, Any]:
    """Return the sections as plain values, references resolved; those to the environment become `EnvironmentText`.

    Raises:
        UserError: all references that cannot be resolved.
    """
    problems: list[Problem] = []
    raw = {
        str(section): _plain_node(composed[section], str(section), composed, problems)
        for section in composed
        if section not in ("hydra", plugins.KEY)  # plugins are active already
    }
    if problems:
        raise UserError(problems)
    return raw


def _plain_node(node: Any, path: str, root: DictConfig, problems: list[Problem]) -> Any:
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(node, (DictConfig, ListConfig)) or node._is_none():
        return node

    def item(key: Any, where: str) -> Any:
        if OmegaConf.is_missing(node, key):
            problems.append(Problem(where, "a value has to be given", f"{where}=VALUE"))
            return None
        if not OmegaConf.is_interpolation(node, key):
            return _plain_node(node[key], where, root, problems)
        text = _written(node, key)
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(interpolation_problem(where, text, error))
            return None
        reference = _expand(text, where, root)
        if isinstance(value, str) and refers(reference):
            return EnvironmentText(value, reference)
        return _plain_node(value, where, root, problems)

    if isinstance(node, ListConfig):
        return [item(index, f"{path}[{index}]") for index in range(len(node))]
    return {str(key): item(key, f"{path}.{key!s}") for key in node}


def _written(node: Any, key: Any) -> str:
    """Return the text of a reference as it was written."""
    from omegaconf import OmegaConf

    written: Any = OmegaConf.to_container(node, resolve=False)
    return str(written[key])


def _expand(text: str, where: str, root: DictConfig) -> str:
    """Return a reference with those to other keys replaced by their text, so that only `${oc.env:...}` stays.

    A key that refers to a key that refers to the environment must not be saved with its value either.
    """
    from omegaconf import ListConfig, OmegaConf

    def replaced(match: re.Match[str]) -> str:
        name = match[1].strip()
        steps = name.lstrip(".")  # ${.name} is a sibling, ${..name} one level up
        above = _steps(where)[: -(len(name) - len(steps))] if steps != name else []
        *holder, last = [*above, *_steps(steps)]
        node = OmegaConf.select(root, ".".join(holder)) if holder else root
        key = int(last) if isinstance(node, ListConfig) else last
        if OmegaConf.is_interpolation(node, key):
            return _expand(_written(node, key), ".".join([*holder, last]), root)
        return str(node[key])

    text_before = None
    while text != text_before:  # again for ${a.${b}}, whose inner reference comes first
        text_before, text = text, re.sub(r"\$\{([^}:$]+)\}", replaced, text)
    return text


def _steps(key: str) -> list[str]:
    return key.replace("[", ".").replace("]", "").split(".")
