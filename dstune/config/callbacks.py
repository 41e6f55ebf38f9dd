"""Checks and creates the callbacks of `trainer.callbacks`, which a run has in addition to the built-in ones."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dstune.config.convert import convert
from dstune.config.names import nearest
from dstune.config.schema import RunConfig
from dstune.core import plugin_files
from dstune.core.errors import Problem, UserError, collected
from dstune.protocols import CALLBACKS, Callback

KEY = "trainer.callbacks"
EXAMPLE = f"{KEY}=[NAME,{{OTHER:{{ARGUMENT:VALUE}}}}]"


def chosen_callbacks(config: RunConfig) -> list[Callback]:
    """Create the callbacks of `trainer.callbacks`. Raises UserError."""
    made: list[Callback] = []
    for number, entry in enumerate(config.trainer.callbacks):
        where = f"{KEY}[{number}]"
        name, arguments = _name_and_arguments(entry, where)
        cls = _find_class(name, where)
        arguments = _converted(cls, arguments, name, where)
        if clash := _clash(cls, [type(other) for other in made], name, where):
            raise UserError(clash)
        try:
            made.append(cls(**arguments))
        except UserError:
            raise
        except Exception as error:  # of the user's own code
            reason = f"it cannot be made: {type(error).__name__}: {error}"
            raise UserError(Problem(where, reason, "change its arguments", name)) from error
    return made


def check_callbacks(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong with the names and arguments in `trainer.callbacks`; creates none of the callbacks."""
    seen: list[type[Callback]] = []
    for number, entry in enumerate(config.trainer.callbacks):
        where = f"{KEY}[{number}]"
        try:
            name, arguments = _name_and_arguments(entry, where)
            cls = _find_class(name, where)
            _converted(cls, arguments, name, where)
        except UserError as error:
            yield from error.problems
            continue
        if clash := _clash(cls, seen, name, where):
            yield clash
        seen.append(cls)


def _clash(cls: type[Callback], others: Sequence[type[Callback]], name: str, where: str) -> Problem | None:
    """Return the problem if another callback has the name of `cls`: checkpoints store the state of a callback by its name."""
    if cls in others:
        return Problem(where, "this callback is in the list already", "name it once", name)
    same_name = [
        other for other in (*others, *CALLBACKS.classes().values()) if other.name == cls.name and other is not cls
    ]
    if same_name:
        reason = f"{same_name[0].__module__}.{same_name[0].__qualname__} has the name {cls.name!r} too"
        return Problem(where, reason, "give the class a `name` of its own", name)
    return None


def _name_and_arguments(entry: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, arguments),) = entry.items()
        if arguments is None or isinstance(arguments, Mapping):
            return str(name), arguments or {}
    raise UserError(Problem(where, "is neither a name nor NAME: {ARGUMENT: VALUE}", EXAMPLE, str(entry)))


def _find_class(name: str, where: str) -> type[Callback]:
    """Return a registered callback, or the class that `module:Class` names (`module.Class` where Hydra reads a colon)."""
    if ":" in name or "." in name:
        return _import_class(name, where)
    if name not in CALLBACKS:
        similar = nearest(name, [other for other in CALLBACKS if not CALLBACKS[other].is_automatic()])
        fix = (
            f"did you mean {similar}?"
            if similar
            else "register it (@dstune.callback in a plugin), or give module:Class of an installed package"
        )
        raise UserError(Problem(where, "there is no callback of this name", fix, name))
    if CALLBACKS[name].is_automatic():
        reason = "this callback is part of every run that needs it"
        raise UserError(Problem(where, reason, "leave it out; its settings are keys of their own", name))
    return CALLBACKS[name]


def _import_class(name: str, where: str) -> type[Callback]:
    module, _, attribute = name.rpartition(":" if ":" in name else ".")
    # As for plugins, modules in the working directory are not imported.
    if plugin_files.is_path(module) or not plugin_files.is_installed(module):
        reason = f"{module} is not a module of an installed package, and ranks import no other modules"
        file = module if plugin_files.is_path(module) else f"./{module.replace('.', '/')}.py"
        fix = f"plugins=[{file}], @dstune.callback above the class, and its name here"
        raise UserError(Problem(where, reason, fix, name))
    try:
        member = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # of the user's own code
        reason = f"{module} cannot be imported: {type(error).__name__}: {error}"
        raise UserError(Problem(where, reason, "correct the module", name)) from error
    if not (isinstance(member, type) and issubclass(member, Callback)):
        reason = f"{module} has no subclass of dstune.Callback named {attribute!r}"
        raise UserError(Problem(where, reason, "give module:Class", name))
    if not member.name:
        member.name = member.__qualname__
    return member


def _converted(cls: type[Callback], arguments: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return the arguments converted to the types that `cls.__init__` annotates. Raises UserError if it does not accept them."""
    parameters = inspect.signature(cls).parameters
    takes_any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [
        parameter.name
        for parameter in parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    problems = []
    for argument in arguments:
        if argument not in names and not takes_any_name:
            similar = nearest(argument, names)
            fix = f"did you mean {similar}?" if similar else f"one of {', '.join(names)}" if names else "leave it out"
            problems.append(Problem(f"{where}.{argument}", f"the callback {name} has no such argument", fix))
    for parameter in parameters.values():
        is_required = parameter.default is parameter.empty and parameter.name in names
        if is_required and parameter.name not in arguments:
            problems.append(
                Problem(
                    where, f"the callback {name} needs {parameter.name}", f"give {name}: {{{parameter.name}: VALUE}}"
                )
            )
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError as error:
        reason = f"the type of an argument of {name} is imported for type checkers only: {error}"
        fix = "import it without `if TYPE_CHECKING`, or annotate the argument with str, int, float, bool or a list of these"
        raise UserError([*problems, Problem(where, reason, fix)]) from error
    converted = dict(arguments)
    for argument, value in arguments.items():
        with collected(problems):
            if argument in names and argument in hints:
                converted[argument] = convert(value, hints[argument], f"{where}.{argument}")
    if problems:
        raise UserError(problems)
    return converted
