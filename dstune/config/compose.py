"""From `key=value` overrides to the frozen `RunConfig`, and between it and `run.yaml`.

Only this folder uses Hydra; nothing outside of it sees a DictConfig.
"""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dstune import __version__
from dstune.config import by_method
from dstune.config import overrides as user_overrides
from dstune.config.convert import (
    ENVIRONMENT,
    EnvironmentText,
    chosen_class,
    dump,
    format_value,
    from_dict,
    from_yaml,
    interpolation_problem,
    load,
    partly_from_dict,
    to_dict,
    to_yaml,
)
from dstune.config.hydra_errors import problem_of
from dstune.config.hydra_session import ROOT_CONFIG, group_options, session
from dstune.config.names import all_keys, default_classes, sections
from dstune.config.plugins import activate_requested, load_built_ins
from dstune.config.resume import check_resume
from dstune.config.schema import CHOICES, RunConfig
from dstune.config.trust import SIGNATURE, Use, cleared, cleared_beside, statement
from dstune.config.validate import find_problems
from dstune.config.zero_file import given_by, keys_of_own_files, with_file
from dstune.core import files, plugins, signing
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import read_file
from dstune.core.plugins import Plugin
from dstune.protocols import TASKS, task_of

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

__all__ = [
    "Composed",
    "apply_overrides",
    "classes_for",
    "compose",
    "continue_run",
    "from_yaml",
    "kept_origins",
    "read_decided",
    "read_run",
    "to_dict",
    "to_yaml",
    "with_default_experiment",
    "write_run",
]

DEFAULT_EXPERIMENT = "experiment=quickstart"
REPLACES_QUICKSTART = ("experiment", "model", "model.path", "data", "data.train", "data.mixture")
"""What names an experiment, a model or training rows; a file of `model` or `data` has the path of one, and a mixture has rows."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Composed:
    config: RunConfig
    overrides: list[str]
    """What was given on the command line, `experiment=quickstart` included where nothing was asked for."""
    plugins: tuple[Plugin, ...] = ()
    config_dirs: tuple[str, ...] = ()
    """Folders of the user's own groups."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Where values come from that nobody gave and no default has, by key."""


def compose(overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> Composed:
    """The configuration for these overrides; not validated yet (`validate.validate`).

    Without an experiment, model or training rows among the overrides this is `experiment=quickstart`. A chat template's date is
    frozen to today, `run.dir` may stay None.

    Raises:
        UserError: everything that is wrong with the overrides, or with a YAML file that they chose.
    """
    given = with_default_experiment(overrides)
    activate_requested(given, config_dirs)
    with session(config_dirs) as hydra:
        composed, origins = run_hydra(hydra, given, lambda texts: _compose(hydra, texts))
        config = _typed(_plain(composed), "the composed configuration")
        if overruled := list(_overruled(hydra, given, config)):
            raise UserError(overruled)
        if config.zero.path is not None:
            before, config = config, with_file(config, given_by(hydra, given))
            origins = {key: origin for key, origin in origins.items() if before.optimizer == config.optimizer}
    config = replace(config, task=task_of(config.task).resolve(datetime.date.today().isoformat()))
    return Composed(config, given, plugins.used_by(config), tuple(map(str, config_dirs)), origins)


def frozen_at_start() -> tuple[str, ...]:
    """Keys that the first start of a run fills in (today's date, the hub's commit) and every later start takes over."""
    of_tasks = dict.fromkeys(f"task.{key}" for cls in TASKS.classes().values() for key in cls.frozen_keys)
    return ("model.revision", *of_tasks)


def _overruled(hydra: Hydra, overrides: Sequence[str], config: RunConfig) -> Iterator[Problem]:
    """A model or data that was asked for by name while the experiment's file itself says which: its word would win unseen."""
    given = {user_overrides.key_of(text): text.partition("=")[2] for text in overrides}
    if "experiment" not in given:
        return
    searched = [text for text in overrides if user_overrides.key_of(text) == "hydra.searchpath"]
    for group, key in (("model", "path"), ("data", "train")):
        if group not in given or f"{group}.{key}" in given:
            continue
        alone = compose_dict_config(hydra, [*searched, f"{group}={given[group]}"])[group].get(key)
        taken = getattr(getattr(config, group), key)
        if alone is not None and alone != taken:
            reason = f"experiment={given['experiment']} says {group}.{key}={taken}, which wins over the file of {given[group]}"
            yield Problem(group, reason, f"{group}.{key}={alone}", given[group])


def _typed(raw: Any, where: str) -> RunConfig:
    """The tree of plain values. Raises UserError with what `validate` can tell of the good sections, too."""
    config, problems = partly_from_dict(raw, where)
    if problems:
        raise UserError(problems + find_problems(config, {problem.where.split(".", 1)[0] for problem in problems}))
    return config


def with_default_experiment(overrides: Sequence[str]) -> list[str]:
    """The overrides, with `experiment=quickstart` in front if they name no experiment, model or training rows."""
    keys = [user_overrides.key_of(text) for text in overrides]
    named = any(key in REPLACES_QUICKSTART or key.startswith("data.mixture.") for key in keys)
    return list(overrides) if named else [DEFAULT_EXPERIMENT, *overrides]


def compose_dict_config(hydra: Hydra, overrides: list[str]) -> DictConfig:
    """Hydra's composition, its own `hydra` section included, with the defaults of the method."""
    return _compose(hydra, overrides)[0]


def _compose(hydra: Hydra, overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """The same, and where these defaults come from."""
    from hydra.types import RunMode

    composed = hydra.compose_config(ROOT_CONFIG, overrides, RunMode.RUN)
    return composed, by_method.fill(composed)


def run_hydra(hydra: Hydra, overrides: Sequence[str], action: Callable[[list[str]], Result]) -> Result:
    """`action(overrides)`, where whatever Hydra refuses becomes a `UserError` with all problems of the overrides."""
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
        found = unread + checked.problems
        doubtful = checked.doubtful | {user_overrides.meant_by(problem.where) for problem in unread}
        return found and found + _further_problems(hydra, checked.good, doubtful)

    if (unread or any(user_overrides.hydra_would_take(override) for override in parsed)) and (problems := mistakes()):
        raise UserError(problems)
    try:
        return action(texts)
    except UserError:
        raise
    except Exception as error:  # Hydra and OmegaConf raise kinds of their own, ValueError, YAMLError, ...
        problems = mistakes() or [problem_of(error, hydra)]
    raise UserError(problems)


def _further_problems(hydra: Hydra, good: Sequence[Override], doubtful: set[str]) -> list[Problem]:
    """What is wrong beside names and types, as far as the good overrides can tell."""
    try:
        raw = _plain(compose_dict_config(hydra, [str(override.input_line) for override in good]))
    except Exception:  # something is wrong with a file too, which is told once the overrides are right
        return []
    config, problems = partly_from_dict(raw, "the composed configuration")
    return problems + find_problems(config, doubtful | {problem.where.split(".", 1)[0] for problem in problems})


def classes_for(hydra: Hydra, overrides: list[str]) -> dict[str, type]:
    """The class of each section for these (good) choices of groups; the default one where a file is broken.

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
    """The sections as plain values, references resolved; those to the environment become `EnvironmentText`.

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
        if isinstance(value, str) and ENVIRONMENT in reference:
            return EnvironmentText(value, reference)
        return _plain_node(value, where, root, problems)

    if isinstance(node, ListConfig):
        return [item(index, f"{path}[{index}]") for index in range(len(node))]
    return {str(key): item(key, f"{path}.{key!s}") for key in node}


def _written(node: Any, key: Any) -> str:
    """The text of a reference as it was written."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_container(node, resolve=False)[key])  # type: ignore[index]


def _expand(text: str, where: str, root: DictConfig) -> str:
    """A reference with those to other keys replaced by their text, so that only `${oc.env:...}` stays.

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

    before = None
    while text != before:  # again for ${a.${b}}, whose inner reference comes first
        before, text = text, re.sub(r"\$\{([^}:$]+)\}", replaced, text)
    return text


def _steps(key: str) -> list[str]:
    return key.replace("[", ".").replace("]", "").split(".")


# ---- a run's PATH with values ----


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration of an existing run with some values replaced (`dstune evaluate RUN data.test=...`).

    Raises:
        UserError: every unknown key, wrong type, and choice of a group (a run's groups are settled).
    """
    parsed, problems = user_overrides.parse(overrides)
    tree = to_dict(config)
    groups: dict[str, list[str]] = {section: [] for section in (*sections(), "experiment")}
    values = []
    for override in parsed:
        key = override.key_or_group
        if user_overrides.is_group_choice(override, groups) and "." not in key:
            fix = _single_values(config, key, str(override.value()))
            problems.append(
                Problem(key, "the groups of an existing run are settled", fix, format_value(override.value()))
            )
        elif key == plugins.KEY:
            fix = f"dstune train run.dir=RUN with the settings of then, plugins=[...] and {plugins.ACCEPT}"
            problems.append(
                Problem(key, "the plugins of an existing run are settled", fix, format_value(override.value()))
            )
        elif key == "zero.path":
            fix = "set single values, such as zero.reduce_bucket_size=N or zero.settings.KEY=VALUE"
            problems.append(Problem(key, "the file was read when the run began", fix, format_value(override.value())))
        else:
            values.append(override)
    classes = {section: type(getattr(config, section)) for section in sections()}
    doubtful = {user_overrides.meant_by(problem.where) for problem in problems}
    checked = user_overrides.check(values, {}, lambda _: classes)
    problems += checked.problems
    for override in list(checked.good):
        value = override.value()
        if isinstance(value, str) and "${" in value and ENVIRONMENT not in value:
            fix = f"write the value or {ENVIRONMENT}NAME}}"
            problems.append(Problem(override.key_or_group, "keys of a run cannot refer to each other", fix, value))
            checked.good.remove(override)
            doubtful.add(override.key_or_group)
    for override in checked.good:
        _set(tree, override.key_or_group.split("."), override.value(), delete=override.is_delete())
    changed = _typed(tree, "the run's configuration")
    if problems:
        raise UserError(problems + find_problems(changed, doubtful | checked.doubtful))
    return changed


def _single_values(config: RunConfig, section: str, choice: str) -> str:
    """How to get what a choice of a group says without choosing it."""
    if section == "experiment":
        return "set single values"
    if section == "zero":
        with suppress(UserError):  # no such choice, or one that needs more beside it
            own, chosen = config.zero, compose(["data=chitchat", f"zero={choice}"]).config.zero
            changed = {key: getattr(chosen, key) for key in DECIDE_ZERO if getattr(own, key) != getattr(chosen, key)}
            if changed:
                return "write " + " ".join(f"zero.{key}={format_value(value)}" for key, value in changed.items())
    return f"set single values, such as {section}.KEY=VALUE"


DECIDE_ZERO = ("stage", "offload_optimizer", "offload_param")
"""The keys in which the choices of `zero` differ."""


def _set(tree: dict[str, Any], path: list[str], value: Any, delete: bool) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    if delete:
        tree.pop(path[-1], None)
    elif isinstance(value, Mapping) and isinstance(tree.get(path[-1]), dict):
        for key, part in value.items():
            _set(tree[path[-1]], [key], part, delete=False)
    else:
        tree[path[-1]] = value


# ---- run.yaml ----


RUN_FORMAT = 3
"""Of `run.yaml`. A file of format 1 does not say so; up to 2, `method.init=olora` meant what is `qr` now."""


def write_run(path: Path, composed: Composed, *, signature_of: Path | None = None) -> None:
    """Write `run.yaml`: the version, the overrides given, the plugins (their files are copied beside it), the resolved
    configuration, secrets by reference only, and the signature of this user.

    signature_of: in a rank, which signs nothing: the `run.yaml` that this one is derived from.
    """
    content: dict[str, Any] = {
        "dstune_version": __version__,
        "overrides": list(composed.overrides),
        **({"plugins": plugins.to_dicts(composed.plugins)} if composed.plugins else {}),
        **({"origins": dict(composed.origins)} if composed.origins else {}),
        "config": to_dict(composed.config),
    }
    plugins.install(composed.plugins, path.parent)
    if signature_of is None:
        write_signed(path, content)
    else:
        above = read_run_content(signature_of) if signature_of.is_file() else {}
        _write_content(path, content, above.get(SIGNATURE))


def write_signed(path: Path, content: Mapping[str, Any]) -> bool:
    """Write the content of a `run.yaml` with the signature of this user; whether there is a key to sign with."""
    signature = signing.sign(statement(content))
    _write_content(path, content, signature)
    return signature is not None


def _write_content(path: Path, content: Mapping[str, Any], signature: Any) -> None:
    signed = {} if signature is None else {SIGNATURE: signature}
    files.write(path, dump({"format": RUN_FORMAT} | {**content, "format": RUN_FORMAT, **signed}))


def read_run(path: Path, overrides: Sequence[str] | None = None, *, use: Use = Use.everything) -> Composed:
    """The inverse of `write_run`, also of earlier formats; `${oc.env:KEY}` is read from this process's environment. The run's
    plugins become the active ones.

    overrides: of the command, where it takes any, for `apply_overrides`: what they repeat needs no signature. use: what the verb
    does with the run.

    Raises:
        UserError: no such file, no YAML, a later format, unknown keys, wrong types, a variable that is not set, a plugin that is
            missing or has changed, and what `trust.cleared` refuses.
    """
    load_built_ins()
    content = cleared(read_run_content(path), path, use, overrides or ())
    if _activate(content, path, overrides):  # whose classes know more keys
        content = cleared(content, path, use, overrides or ())
    composed = _composed(content, path, ())
    return replace(composed, plugins=plugins.used_by(composed.config))


def read_decided(path: Path) -> Composed:
    """As `read_run`, in a rank: the launching process has decided what is believed, and has written the file."""
    load_built_ins()
    content = read_run_content(path)
    _activate(content, path, None)
    composed = _composed(content, path, ())
    return replace(composed, plugins=plugins.used_by(composed.config))


def _activate(content: Mapping[str, Any], path: Path, overrides: Sequence[str] | None) -> tuple[Plugin, ...]:
    stored = plugins.from_dicts(content.get(plugins.KEY), str(path))
    plugins.activate_stored(stored, path.parent, overrides)
    return stored


def read_run_beside(path: Path, config: RunConfig, given: Sequence[str] = (), *, decided: bool = False) -> Composed:
    """As `read_run`, of a run that `plugins.active()` is to continue: the active plugins stay, those of the run are listed.

    config, given, decided: see `trust.cleared_beside`.
    """
    content = cleared_beside(read_run_content(path), path, config, given, decided=decided)
    return _composed(content, path, plugins.from_dicts(content.get(plugins.KEY), str(path)))


def plugins_of(path: Path) -> tuple[Plugin, ...]:
    """The plugins that a `run.yaml` lists, none of them loaded. Raises UserError."""
    return plugins.from_dicts(read_run_content(path).get(plugins.KEY), str(path))


def _composed(content: dict[str, Any], path: Path, active: tuple[Plugin, ...]) -> Composed:
    overrides = [str(text) for text in content.get("overrides") or []]
    origins = {str(key): str(origin) for key, origin in (content.get("origins") or {}).items()}
    return Composed(from_dict(content["config"], str(path)), overrides, active, origins=origins)


def read_run_content(path: Path) -> dict[str, Any]:
    """The content of a `run.yaml` of any format up to the present one, as the present one has it. Raises UserError."""
    try:
        content = load(read_file(path).decode("utf-8"), str(path))
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be read: {error.strerror}", "give a run directory")) from None
    except UnicodeDecodeError:
        raise UserError(Problem(str(path), "this is no run.yaml", "give a run directory")) from None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(Problem(str(path), "this is no run.yaml: it has no `config`", "give a run directory"))
    written = content.get("format", 1)
    if type(written) is not int or not 1 <= written <= RUN_FORMAT:  # `true` is an int too
        reason = f"this version of dstune reads the formats 1 to {RUN_FORMAT} of run.yaml"
        fix = f"use dstune {content.get('dstune_version')}, which wrote it, or a later version"
        raise UserError(Problem(f"{path}: format", reason, fix, str(written)))
    method = content["config"].get("method")
    if written < 3 and isinstance(method, dict) and method.get("init") == "olora":
        method["init"] = "qr"
    return content


def continue_run(old: Composed, new: Composed) -> RunConfig:
    """The configuration with which `new` continues the run of `old`.

    What the command does not say now, or says as it did then, comes from the run: a default that has changed since, or what
    the first start filled in (a template's date, the commit of a branch), changes no existing run.

    Raises:
        UserError: keys that change the trajectory differ (`resume.check_resume`).
    """
    tree = _from_stored(to_dict(old.config), to_dict(new.config), "", _newly_given(old, new))
    config = from_dict(tree, "the composed configuration")
    check_resume(old.config, config)
    return config


def kept_origins(stored: Composed, config: RunConfig) -> dict[str, str]:
    """Of a run that goes on as `config`: where its values come from, those that have not changed."""

    def same(key: str) -> bool:
        value = attrgetter(key)
        try:
            return bool(value(config) == value(stored.config))
        except AttributeError:  # of another choice
            return False

    # Keys of a stranger's run.yaml may be any text.
    return {key: origin for key, origin in stored.origins.items() if key in all_keys() and same(key)}


OF_THIS_COMMAND = ("run.dir", "run.resume", "run.force")
"""Keys whose defaults mean something else than what the run began with."""


def _from_stored(
    stored: dict[str, Any], composed: dict[str, Any], prefix: str, given: Callable[[str], bool]
) -> dict[str, Any]:
    """`composed` with the stored value of every key that is not given."""
    result = dict(composed)
    for name, value in stored.items():
        key = f"{prefix}{name}"
        now: Any = composed.get(name)
        if key in CHOICES and value["name"] != now["name"]:
            if not given(key):  # chosen when the run began
                result[name] = value | {leaf: now[leaf] for leaf in now if leaf in value and given(f"{key}.{leaf}")}
        elif isinstance(value, dict) and isinstance(now, dict) and key not in all_keys():
            result[name] = _from_stored(value, now, f"{key}.", given)
        elif name in composed and key not in OF_THIS_COMMAND and not given(key):
            result[name] = value
    return result


def _newly_given(old: Composed, new: Composed) -> Callable[[str], bool]:
    """Whether a key, or the choice of a group, is given by the command of `new` otherwise than by that of `old`, or by one of
    the user's own files."""
    report = {key: text for text in new.overrides if (key := user_overrides.key_of(text)) and text not in old.overrides}
    sections_given = tuple(f"{key}." for key in report)
    everything = "experiment" in report
    with session(new.config_dirs) as hydra:
        own = keys_of_own_files(hydra, new.overrides)

    def given(key: str) -> bool:
        inside = any(name.startswith(f"{key}.") for name in report) and key in all_keys()  # data.columns.text=a
        return everything or key in report or key.startswith(sections_given) or inside or key in own

    return given
