"""Decides whether a stored run may do what its `run.yaml` says, since a run directory may come from a stranger.

What runs code or reaches out is signed (`core/signing.py`) when a launching process writes `run.yaml`: keys whose field is
declared `setting(..., signed=...)`, plugins, and every text that resolves a variable of the environment. All other keys may be
edited. Where the signature does not fit, `--trust KEY` names what is believed all the same, or the command repeats the key.
The launching process decides: ranks read what it has written.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from dstune.config.convert import chosen_class, format_value, may_refer, refers, to_dict
from dstune.config.fields import SIGNED
from dstune.config.names import all_keys, classes_of, is_section, nearest, sections, type_hints
from dstune.config.overrides import key_of
from dstune.config.schema import CHOICES
from dstune.core import plugins, signing
from dstune.core.errors import Problem, UserError
from dstune.core.secrets import was_resolved

SIGNATURE = "signature"
"""Key of `run.yaml`, next to `config`."""
FLAG = "--trust"
MODEL, CODE = "model.path", "model.trust_remote_code"
LINKS = "links"
"""The word for links in a run's folders (`run_links.py`) that `--trust` accepts."""
CODE_OF = (
    *("model.path", "model.revision", "model.weights", "model.config_overrides"),
    *("task.reference_model", "task.reference_revision", "method.adapter", "method.frozen_adapters"),
    *("task.teacher", "task.teacher_revision"),
)
"""Keys that name the repositories whose code `model.trust_remote_code` allows; they are signed together with it."""
SIGNED_IF_SET = ("task.teacher", "task.teacher_revision")
"""Keys of `CODE_OF` that were added later. They are left out if unset, so signatures of earlier runs stay valid."""


class Use(Enum):
    """What a verb uses of a stored run. Unsigned values of the keys listed here, which it does not use, are left out."""

    everything = ()
    rows = ("launch", "tracking", "sweep", "trainer.callbacks")
    weights = (*rows, "data", "evaluate", "forgetting", "run")


# ---- keys that a command trusts by name ----

_named: dict[str, set[str]] = {}
"""Trusted keys by run; keys that the command trusts in every run are under the empty name."""


def believe(keys: Sequence[str], run: Path) -> None:
    """Treat these keys of `run` as signed from now on."""
    _named.setdefault(str(run.resolve()), set()).update(keys)


def check_keys(keys: Sequence[str], content: Mapping[str, Any]) -> None:
    """Raises UserError for keys that neither a `run.yaml` with this content nor any choice of dstune has."""
    valid_keys = {plugins.KEY, LINKS, OVERRIDES, *all_keys(), *(name for name, _, _ in _leaves(content["config"]))}
    problems = []
    for key in keys:
        if key not in valid_keys:
            similar = nearest(str(key), sorted(valid_keys))
            fix = f"did you mean {similar}?" if similar else "the keys that the refusal of the run names"
            problems.append(Problem("trust", "there is no such key", fix, str(key)))
    if problems:
        raise UserError(problems)


@contextmanager
def from_flags(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words of a command line without `--trust KEY[,KEY...]`, whose keys are believed meanwhile. Raises UserError."""
    other_words, iterator = [], iter(words)
    keys: list[str] = []
    for word in iterator:
        name, equals, value = word.partition("=")
        if name != FLAG:
            other_words.append(word)
            continue
        value = value if equals else next(iterator, "")
        if not re.fullmatch(r"[\w.\"-]+(,[\w.\"-]+)*", key_list := value.strip("[]")) or value.startswith("-"):
            fix = f"{FLAG} {CODE}, or what the refusal of the run names"
            raise UserError(Problem(FLAG, "the keys to trust are missing", fix, value))
        keys += key_list.split(",")
    believed_before = _named.get("", set())
    _named[""] = believed_before | set(keys)
    try:
        yield other_words
    finally:
        _named[""] = believed_before


def is_believed_by_command(key: str) -> bool:
    """Return whether this command's `--trust` names the key."""
    return key in _named.get("", set())


def flags_for(run: Path) -> list[str]:
    """Return the words with which a further process believes the same of `run`."""
    keys = believed(run)
    return [FLAG, ",".join(sorted(keys))] if keys else []


def believed(run: Path) -> set[str]:
    return _named.get("", set()) | _named.get(str(run.resolve()), set())


# ---- signed values ----


def statement(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests by key that the signature of a `run.yaml` with this content covers."""
    return {name: signing.digest(value) for name, value in consequential(content).items()}


def consequential(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values in a `run.yaml` that run code or contact other machines, by key."""
    value_by_key: dict[str, Any] = {}
    # Plugins of packages that the user has installed are there with or without the run.
    stored = [plugin for plugin in plugins.from_dicts(content.get(plugins.KEY), plugins.KEY) if not plugin.distribution]
    if stored:
        value_by_key[plugins.KEY] = [[plugin.name, plugin.sha256, plugin.is_file] for plugin in stored]
    everything: dict[str, list[Any]] = {}
    for name, value, field in _leaves(content["config"]):
        # Two keys that are written alike (1 and "1" in a mapping) count as one with both values.
        everything.setdefault(name, []).append(value)
        if _refers(value) or (field is not None and _speaks(field, value)):
            value_by_key[name] = everything[name]
    if CODE in value_by_key:
        value_by_key[CODE] = [value_by_key[CODE], _code_of(content["config"])]
    return value_by_key


def _code_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that name repositories whose code may run."""
    value_by_key = {key: _at(config, key) for key in CODE_OF}
    value_by_key = {key: value for key, value in value_by_key.items() if value is not None or key not in SIGNED_IF_SET}
    for section in ("task", "method"):
        choice = str(_at(config, f"{section}.name"))
        if choice in CHOICES.of_plugins(section) or CHOICES.find(section, choice) is None:
            # Which of them name further models is not known before the plugin is loaded, so all of its settings count.
            value_by_key[section] = config.get(section)
    return value_by_key


def _leaves(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any, Field[Any] | None]]:
    """Yield every value that is no section with its dotted key and, where it is known, its field."""
    for section, values in tree.items():
        cls = None
        if section in sections():
            with suppress(UserError):  # of a plugin that is not loaded yet
                cls = chosen_class(section, values, "")
        yield from _below(cls, values, _name(section), None)


def _below(
    cls: type | None, value: Any, name: str, field: Field[Any] | None
) -> Iterator[tuple[str, Any, Field[Any] | None]]:
    if not isinstance(value, Mapping):
        yield name, value, field
        return
    field_by_name = {class_field.name: class_field for class_field in fields(cls)} if cls is not None else {}
    hints = type_hints(cls) if cls is not None else {}
    for key, part in value.items():
        inner = hints.get(key)
        yield from _below(inner if is_section(inner) else None, part, f"{name}.{_name(key)}", field_by_name.get(key))


def _name(key: Any) -> str:
    text = str(key)
    return text if re.fullmatch(r"[\w-]+", text) else json.dumps(text)


def _refers(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_refers, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_refers, value))
    return isinstance(value, str) and refers(value)


def _speaks(field: Field[Any], value: Any) -> bool:
    """Return whether the field runs code or reaches out with this value."""
    signed = field.metadata.get(SIGNED)
    if signed is None or value in (None, False, [], ""):
        return False
    return bool(signed(value)) if callable(signed) else bool(value != to_dict(field.default))


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def check_reference(text: str, signature: Any, folder: Path) -> None:
    """Raises UserError where the export in `folder` names its base by variables of the environment that this process has not
    resolved before, and not with the signature of the run that it is of."""
    signed_digests, _, why = signing.signed_by(signature)
    if was_resolved(text) or MODEL in believed(folder) or signed_digests.get(MODEL) == signing.digest([text]):
        return
    raise UserError(_refusal(MODEL, [text], folder, why or "it was changed after it was signed", repeatable=False))


def signed_keys() -> set[str]:
    """Return keys of any choice that can run code or reach out."""

    def below(cls: type, prefix: str) -> Iterator[str]:
        for field in fields(cls):
            hint = type_hints(cls)[field.name]
            if is_section(hint):
                yield from below(hint, f"{prefix}.{field.name}")
            elif SIGNED in field.metadata:
                yield f"{prefix}.{field.name}"

    return {key for section in sections() for cls in classes_of(section).values() for key in below(cls, section)}


def check_overrides(stored: Sequence[str], folders: Sequence[str], signature: Any, path: Path) -> None:
    """Raises UserError where stored words of a command line, with its folders of groups, are neither signed nor harmless."""
    signed_digests, _, why = signing.signed_by(signature)
    if signed_digests.get(OVERRIDES) == signing.digest([list(stored), list(folders)]) or OVERRIDES in believed(
        path.parent
    ):
        return
    signed = signed_keys()
    doubtful = [text for text in stored if not _is_harmless(text, signed)]
    if doubtful or folders:
        reason = f"this may run code or reach out, and it is not known to be yours: {why or 'it was changed'}"
        fix = f"repeat the whole command; or read {path} and add {FLAG} {OVERRIDES}"
        raise UserError(Problem(OVERRIDES, reason, fix, text) for text in [*doubtful, *folders])


OVERRIDES = "sweep.overrides"
"""Name under which the words of a sweep's command are signed."""


def _is_harmless(text: str, signed: set[str]) -> bool:
    key, _, value = text.partition("=")
    if key in sections() or key == "experiment":
        return re.fullmatch(r"[\w,-]+", value) is not None
    is_known = any(
        key == known_key or (typing.get_origin(hint) is dict and key.startswith(f"{known_key}."))
        for known_key, hint in all_keys().items()
    )
    return is_known and key != plugins.KEY and key not in signed and not may_refer(value)


# ---- accepted values ----


def cleared(
    content: dict[str, Any], path: Path, use: Use = Use.everything, given: Sequence[str] = ()
) -> dict[str, Any]:
    """Return `content` of the `run.yaml` at `path`, without unsigned values that the command repeats (`given`, its overrides) or
    has no use for.

    Raises:
        UserError: each key that runs code or reaches out, and that nobody vouches for.
    """
    doubtful, why = _doubtful(content, path)
    repeated = {key_of(text) for text in given}
    left_out = [key for key in doubtful if key in repeated or _is_within(key, use.value)]
    if problems := [_refusal(key, value, path, why) for key, value in doubtful.items() if key not in left_out]:
        raise UserError(problems)
    return _with(content, dict.fromkeys(left_out, _NOTHING))


def cleared_beside(
    content: dict[str, Any], path: Path, config: Any, given: Sequence[str] = (), *, decided: bool = False
) -> dict[str, Any]:
    """Clear as `cleared`, for a command that continues the run: where it repeats an unsigned key, or chooses the section anew, it
    has its value from `config`, that of the command, and what both say alike needs no signature. decided: all that is unsigned is
    as in `config`, which was put together with `given` before.

    Raises: as `cleared`.
    """
    tree = to_dict(config)
    command_values = consequential({"config": tree})
    doubtful, why = _doubtful(content, path)
    doubtful = {
        key: value for key, value in doubtful.items() if key != plugins.KEY and command_values.get(key) != value
    }
    repeated = tuple(key_of(text) for text in given)
    replaced = [key for key in doubtful if decided or _is_within(key, repeated)]
    if problems := [_refusal(key, value, path, why) for key, value in doubtful.items() if key not in replaced]:
        raise UserError(problems)
    return _with(content, {key: _at(tree, key) for key in replaced})


def _doubtful(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Return what runs code or reaches out and nobody vouches for, by key, and why it does not count as signed."""
    consequences = consequential(content)
    if not consequences:
        return {}, ""
    signed_digests, _, why = signing.signed_by(content.get(SIGNATURE))
    believed_keys = believed(path.parent)
    unsigned = {
        key: value
        for key, value in consequences.items()
        if key not in believed_keys and signed_digests.get(key) != signing.digest(value)
    }
    return unsigned, why or "it was changed after it was signed"


def _is_within(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _refusal(key: str, value: Any, path: Path, why: str, *, repeatable: bool = True) -> Problem:
    text = ", ".join(entry[0] for entry in value) if key == plugins.KEY else format_value(value[0])
    if key == CODE:
        text = "true"
    does = "resolves a variable of your environment" if _refers(value) else "runs code or reaches out"
    repeat = f", or repeat it: {key}=VALUE" if repeatable and key != plugins.KEY else ""
    fix = f"read {path}; if you believe it, add {FLAG} {key}{repeat}"
    return Problem(key, f"it {does}, and this run is not known to be yours: {why}", fix, text)


_NOTHING = object()


def _with(content: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with other values of these keys of its configuration; those of `_NOTHING` go."""

    def changed(tree: Any, name: str) -> Any:
        if name in values:
            return values[name]
        if not isinstance(tree, Mapping):
            return tree
        parts = {key: changed(part, f"{name}.{_name(key)}" if name else _name(key)) for key, part in tree.items()}
        return {key: part for key, part in parts.items() if part is not _NOTHING}

    return {**content, "config": changed(content["config"], "")} if values else content
