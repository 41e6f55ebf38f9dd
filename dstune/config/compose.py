"""Composes the frozen `RunConfig` from `key=value` overrides (`run_file.py` stores it).

Only this folder uses Hydra: no other code sees a DictConfig.
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
    UnsetVariable,
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
"""Keys that choose an experiment, a model or training rows; if any of them is given, quickstart is not used."""

Result = TypeVar("Result")


def compose(
    overrides: Sequence[str], config_dirs: Sequence[str | Path] = (), *, keep_plugins: bool = False
) -> Composed:
    """Compose the configuration for these overrides. It is not validated yet (`validate.validate`).

    If the overrides choose no experiment, model or training rows, `experiment=quickstart` is used. The date of a chat template is
    frozen to today; `run.dir` may stay None.

    keep_plugins: leave the active plugins as they are, whatever the working directory and the overrides request.

    Raises:
        UserError: everything that is wrong with the overrides, or with a YAML file that they choose.
    """
    requested = with_default_experiment(with_preset_names(overrides, config_dirs))
    if not keep_plugins:
        activate_requested(requested, config_dirs)
    with session(config_dirs) as hydra:
        composed, origins = run_hydra(hydra, requested, lambda texts: _compose(hydra, texts))
        config = typed_config(_plain(composed), "the composed configuration")
        if overruled := list(_overruled(hydra, requested, config)):
            raise UserError(overruled)
        if config.zero.path is not None:
            from dstune.config.zero_file import given_by, with_file

            before_file = config
            config, of_file = with_file(config, given_by(hydra, requested))
            origins = {key: origin for key, origin in origins.items() if before_file.optimizer == config.optimizer}
            origins |= of_file
    config = replace(config, task=task_of(config.task).resolve(datetime.date.today().isoformat()))
    return Composed(config, requested, plugins.used_by(config), tuple(map(str, config_dirs)), origins)


def put_file(hydra: Hydra, composed: DictConfig, overrides: Sequence[str]) -> None:
    """Replace values of a composition by those of the file that `zero.path` names.

    A composition stays as it is if it refers to environment variables that only the run will have.

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
    without_file, with_values = to_dict(config), to_dict(with_file(config, given_by(hydra, overrides))[0])
    for section in (name for name in without_file if with_values[name] != without_file[name]):
        if with_values[section].get("name") != without_file[section].get("name"):
            composed[section] = with_values[section]  # another choice, with other keys
            continue
        # Key by key, so that all other keys stay as written, with their references.
        for key, value in with_values[section].items():
            if value != without_file[section][key]:
                composed[section][key] = value


def refuse_wrong_values(hydra: Hydra, composed: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a composition that `dstune train` would refuse.

    Keys that refer to environment variables which are not set here are not judged: only the machine of the run may have them.

    Raises:
        UserError: every problem.
    """
    raw, references = _plain_sections(composed)
    config, values = partly_from_dict(raw, "the composed configuration")
    unresolved = {problem.where for problem in references}
    wrong = [problem for problem in values if problem.where not in unresolved]
    wrong += [problem for problem in references if not isinstance(problem, UnsetVariable)]
    problems = [by_method.with_composed_default(problem, raw) for problem in wrong]
    if not unresolved and not problems:
        problems += _overruled(hydra, overrides, config)
    from dstune.config.validate import find_problems  # not at the top: `--info` does not need it

    doubtful = {where.split(".", 1)[0] for where in (*unresolved, *(problem.where for problem in problems))}
    if problems := problems + find_problems(config, doubtful):
        raise UserError(problems)


def frozen_at_start() -> tuple[str, ...]:
    """Return the keys that the first start of a run fills in (today's date, the hub's commit) and later starts adopt."""
    of_tasks = dict.fromkeys(f"task.{key}" for cls in TASKS.classes().values() for key in cls.frozen_keys)
    return ("model.revision", *of_tasks)


def _overruled(hydra: Hydra, overrides: Sequence[str], config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each choice of model or data that the experiment's file overrides: the user would not notice it."""
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
            reason = f"experiment={experiment} sets {group}.{key}={composed_value}, which overrides {group}={choice}"
            yield Problem(group, reason, f"{group}.{key}={file_value}", value_by_key[group])


def typed_config(raw: Any, where: str) -> RunConfig:
    """Build the configuration from a tree of plain values.

    Raises UserError with all problems of the values, and those that `validate` finds in the sections without problems.
    """
    config, problems = partly_from_dict(raw, where)
    if problems:
        problems = [by_method.with_composed_default(problem, raw) for problem in problems]
        from dstune.config.validate import find_problems  # not at the top: overrides without problems do not need it

        raise UserError(problems + find_problems(config, {problem.where.split(".", 1)[0] for problem in problems}))
    return config


def with_default_experiment(overrides: Sequence[str]) -> list[str]:
    """Return the overrides, with `experiment=quickstart` in front if they choose no experiment, model or training rows."""
    keys = [user_overrides.key_of(text) for text in overrides]
    has_choice = any(key in REPLACES_QUICKSTART or key.startswith("data.mixture.") for key in keys)
    return list(overrides) if has_choice else [DEFAULT_EXPERIMENT, *overrides]


def compose_dict_config(hydra: Hydra, overrides: list[str]) -> DictConfig:
    """Compose with Hydra, and fill in the method's defaults. The result includes Hydra's own section `hydra`."""
    return _compose(hydra, overrides)[0]


def _compose(hydra: Hydra, overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """Return the composition as `compose_dict_config` does, and the origin of each default of the method."""
    from hydra.types import RunMode

    composed = hydra.compose_config(ROOT_CONFIG, overrides, RunMode.RUN)
    if hidden := list(hidden_files(composed)):
        raise UserError(hidden)
    return composed, by_method.fill(composed)


def run_hydra(hydra: Hydra, overrides: Sequence[str], action: Callable[[list[str]], Result]) -> Result:
    """Return `action(overrides)`. If Hydra refuses them, raise UserError with all problems of the overrides."""
    with warnings.catch_warnings():
        # A folder of hydra.searchpath that does not exist is a mistake, not a warning.
        warnings.simplefilter("error", UserWarning)
        return _run_hydra(hydra, user_overrides.for_hydra(overrides), action)


def _run_hydra(hydra: Hydra, texts: list[str], action: Callable[[list[str]], Result]) -> Result:
    parsed, syntax_problems = user_overrides.parse(texts)

    def find_mistakes() -> list[Problem]:
        searched = [str(override.input_line) for override in parsed if override.key_or_group == "hydra.searchpath"]
        try:
            groups = group_options(hydra, searched)
            checked = user_overrides.check(parsed, groups, lambda good: classes_for(hydra, good))
        except UserWarning as warning:
            return [*syntax_problems, problem_of(warning, hydra)]
        problems = syntax_problems + checked.problems
        doubtful = checked.doubtful | {user_overrides.meant_by(problem.where) for problem in syntax_problems}
        return problems and _with_further_problems(hydra, problems, checked.good, doubtful)

    # Hydra would accept some mistakes, so these are looked for first.
    must_check = bool(syntax_problems) or any(user_overrides.hydra_would_take(override) for override in parsed)
    if must_check and (problems := find_mistakes()):
        raise UserError(problems)
    try:
        return action(texts)
    except UserError:
        raise
    except Exception as error:  # Hydra and OmegaConf raise their own exceptions, ValueError, YAMLError, ...
        problems = find_mistakes() or [problem_of(error, hydra)]
    raise UserError(problems)


def _with_further_problems(
    hydra: Hydra, problems: list[Problem], good: Sequence[Override], doubtful: set[str]
) -> list[Problem]:
    """Return `problems`, and those other than wrong names and types, as far as the good overrides show them."""
    try:
        raw = _plain(compose_dict_config(hydra, [str(override.input_line) for override in good]))
    except Exception:  # a file is wrong too, which is reported once the overrides are right
        return problems
    from dstune.config.validate import find_problems

    config, further = partly_from_dict(raw, "the composed configuration")
    further += find_problems(config, doubtful | {problem.where.split(".", 1)[0] for problem in further})
    # The default of a choice that does not exist is not known.
    known = {section: value for section, value in raw.items() if section not in {problem.where for problem in problems}}
    return [by_method.with_composed_default(problem, known) for problem in (*problems, *further)]


def classes_for(hydra: Hydra, overrides: list[str]) -> dict[str, type]:
    """Return the class of each section for these (good) choices of groups; the default class if a file is broken.

    Problems of a file are reported only once the overrides have none.
    """
    classes = default_classes()
    try:
        composed = compose_dict_config(hydra, overrides)
    except Exception:  # of Hydra or OmegaConf, as in `_run_hydra`
        return classes
    for section in CHOICES:
        with suppress(UserError):
            classes[section] = chosen_class(section, dict(composed[section]), section)
    return classes


# ---- DictConfig to plain values ----


def _plain(composed: DictConfig) -> dict[str, Any]:
    """Return the sections as plain values. References are resolved; those to the environment become `EnvironmentText`.

    Raises:
        UserError: all references that cannot be resolved.
    """
    raw, problems = _plain_sections(composed)
    if problems:
        raise UserError(problems)
    return raw


def _plain_sections(composed: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """Return the sections as plain values, None for what cannot be resolved, and a problem for each of these."""
    problems: list[Problem] = []
    raw = {
        str(section): _plain_node(composed[section], str(section), composed, problems)
        for section in composed
        if section not in ("hydra", plugins.KEY)  # plugins are active already
    }
    return raw, problems


def _plain_node(node: Any, path: str, root: DictConfig, problems: list[Problem]) -> Any:
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(node, (DictConfig, ListConfig)) or node._is_none():
        return node

    def item(key: Any, where: str) -> Any:
        if OmegaConf.is_missing(node, key):
            problems.append(Problem(where, "needs a value", f"{where}=VALUE"))
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
    """Replace references to other keys inside `text` by the text of those keys, so that only `${oc.env:...}` stays.

    A key that refers to the environment through another key must not be saved with its value either.
    """
    from omegaconf import ListConfig, OmegaConf

    def replaced(match: re.Match[str]) -> str:
        name = match[1].strip()
        path = name.lstrip(".")  # ${.name} is a sibling, ${..name} one level up
        base = _steps(where)[: -(len(name) - len(path))] if path != name else []
        *parents, last = [*base, *_steps(path)]
        node = OmegaConf.select(root, ".".join(parents)) if parents else root
        key = int(last) if isinstance(node, ListConfig) else last
        if OmegaConf.is_interpolation(node, key):
            return _expand(_written(node, key), ".".join([*parents, last]), root)
        return str(node[key])

    text_before = None
    while text != text_before:  # again for ${a.${b}}, whose inner reference comes first
        text_before, text = text, re.sub(r"\$\{([^}:$]+)\}", replaced, text)
    return text


def _steps(key: str) -> list[str]:
    """Split `a.b[0]` into `a`, `b` and `0`."""
    return key.replace("[", ".").replace("]", "").split(".")
