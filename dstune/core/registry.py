"""Registries in which tasks, methods, launchers, optimizers, ... register, and from which generic code gets them.

Built-ins and plugins register in the same way: a decorator on a class (`@task`, `@method`, ...; see `dstune.protocols`).
A kind whose members are chosen by a configuration section (`task`, `method`, `optimizer`, ...) is a `Registry` of classes
with a `Config` dataclass; `REGISTRY.of(config)` is the object of that section. A kind that is looked up by name only
(callbacks, metrics, row formats, trackers) leaves `Config` out.

The rooms of a kind are imported by name when a registry is first read. Nothing below the rooms imports them.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from dstune.core.entry_points import is_mentioned

Member = TypeVar("Member", bound=Any)
"""Any class with a `name`; with a `Config` too if a section of the configuration chooses it."""

VERSION = 2
"""Version of the protocols (`dstune.protocols`)."""
EARLIER_VERSIONS = (1,)
"""Plugins written for these work too. If they use something that has changed, registering fails and names the replacement."""
PLUGIN_GROUP = "dstune.plugins"
"""Entry points of installed packages: `mine = "my_package.plugin"`."""
PLUGINS_VARIABLE = "DSTUNE_PLUGINS"
"""Variable with the active plugin files, for processes that a rank starts: JSON with `name`, `path` and `sha256` of each."""

_changed: list[Callable[[], None]] = []
_kinds: list[Registry[Any]] = []
_loading = 0


def kinds() -> tuple[Registry[Any], ...]:
    """Return the registries to which plugins may add."""
    return tuple(_kinds)


def on_change(forget: Callable[[], None]) -> None:
    """Call `forget` whenever a member is added or removed: what is derived from the members (schema, keys) is stale then."""
    _changed.append(forget)


@functools.cache
def _are_installed() -> bool:
    return is_mentioned(PLUGIN_GROUP)


def _load_installed() -> None:
    # `dstune --help` saves the time of importing the module if there is nothing to load; and plugins import this one.
    if "dstune.core.plugins" in sys.modules or PLUGINS_VARIABLE in os.environ or _are_installed():
        importlib.import_module("dstune.core.plugins").load_installed()


def wing_modules(name: str | None) -> list[str]:
    """Return the modules and packages `dstune.WING.name` that exist; without a wing, its members are missing."""
    if name is None:
        return []
    package = os.path.dirname(os.path.dirname(__file__))
    return [
        f"{os.path.basename(package)}.{folder}.{name}"
        for folder in sorted(os.listdir(package))
        for file in (f"{package}/{folder}/{name}.py", f"{package}/{folder}/{name}/__init__.py")
        if os.path.isfile(file)
    ]


def _position(member: type[Any], rooms: Sequence[str]) -> int:
    """Return the place of the most specific room that holds the module of `member`; plugins come last."""
    module = f"{member.__module__}."
    return max((index for index, room in enumerate(rooms) if module.startswith(f"{room}.")), default=len(rooms))


def _calls_super(member: Any, name: str) -> bool:
    """Return whether a method or property of a class calls what a base class has under `name`."""
    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    return "super" in names and name in names


class Registry(Generic[Member]):
    """The members of one kind, in the order in which they registered.

    kind: what a member is called in messages, and the configuration section that chooses one.
    base: the class that all members derive from.
    package: the package whose modules and subpackages are the built-in rooms; each registers on import. The names in its
    `ORDER` come first; the first one is the default of the section. folders_only: modules of the package are no rooms.
    in_wings: the module, or package of rooms, in which wings register members of this kind (`dstune/WING/launchers.py`).
    plugins: whether plugins may add members. in_runs: whether a member can act in a run, whose `run.yaml` then lists its plugin.
    options: protocols of which a member has all members or none.
    """

    def __init__(
        self,
        kind: str,
        base: type[Any],
        package: str | None = None,
        *,
        folders_only: bool = False,
        in_wings: str | None = None,
        plugins: bool = True,
        in_runs: bool = True,
        options: Sequence[type] = (),
        adapt: Callable[[Any], Any] | None = None,
    ) -> None:
        self.kind, self.in_runs, self._options, self._adapt = kind, in_runs, options, adapt
        self._base = base
        self._plugins = plugins
        if plugins:
            _kinds.append(self)
        self._package = package
        self._in_wings = in_wings
        self._loaded = package is None and in_wings is None
        self._folders_only = folders_only
        self._members: dict[str, type[Member]] = {}
        self._by_config: dict[type, type[Member]] = {}

    def add(self, member: Any) -> Any:
        """Register a class under its `name` (default: that of its `Config`), and return it. Used as a decorator.

        Raises:
            ValueError: another class has this name already, or `member` is not of this kind.
        """
        cls = member if self._adapt is None else self._adapt(member)
        if not (isinstance(cls, type) and issubclass(cls, self._base)):
            name = getattr(cls, "__qualname__", cls)
            raise ValueError(f"{name}: a {self.kind} is a class that derives from dstune.{self._base.__name__}")
        self._check_options(cls)
        config = getattr(cls, "Config", None)
        # Not an inherited name: a room may derive from another room's class.
        name = cls.__dict__.get("name") or (config.name if config is not None else getattr(cls, "name", None))
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{cls.__qualname__}: a {self.kind} needs a `name`, or a `Config` whose field `name` has it as default"
            )
        other = self._members.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"there are two {self.kind}s named {name!r}: {other.__module__} and {cls.__module__}")
        of_config = self._by_config.get(config) if config is not None else None
        if of_config is not None and of_config.name != name:
            reason = f"{cls.__qualname__}: the {self.kind} {of_config.name!r} has this `Config`"
            raise ValueError(f"{reason}; derive one from it whose field `name` is {name!r}")
        cls.name = name  # type: ignore[attr-defined]
        self._members[name] = cls
        if config is not None:
            self._by_config[config] = cls
        for forget in _changed:
            forget()
        return member

    def _check_options(self, cls: type[Member]) -> None:
        """Raises ValueError if `cls` has only some members of a protocol, which nothing would call without the others, or if it
        calls super() for a default that only the protocol has."""
        for option in self._options:
            members = [name for name in vars(option) if not name.startswith("_")]
            missing = [name for name in members if not hasattr(cls, name)]
            protocol = f"{option.__module__}.{option.__name__}"
            for name in members:
                if _calls_super(vars(cls).get(name), name) and not any(hasattr(base, name) for base in cls.__bases__):
                    reason = f"{cls.__qualname__}.{name} calls super().{name}, whose default is in {protocol}"
                    raise ValueError(f"{reason}; derive the class from it too")
            if missing and len(missing) < len(members):
                defined = ", ".join(name for name in members if name not in missing)
                reason = f"{cls.__qualname__} has {defined}, which {protocol} calls together with {', '.join(missing)}"
                raise ValueError(f"{reason}; derive the class from it too, for their defaults")

    def remove(self, name: str) -> None:
        """Remove a member whose plugin is no longer active."""
        cls = self._members.pop(name)
        self._by_config = {config: member for config, member in self._by_config.items() if member is not cls}
        for forget in _changed:
            forget()

    def load(self) -> None:
        """Import the built-in rooms and what installed packages add, once."""
        self._load_rooms()
        if self._plugins and not _loading:  # after the built-ins of all kinds, whose names take precedence
            _load_installed()

    def _load_rooms(self) -> None:
        global _loading
        if self._loaded:
            return
        self._loaded = True  # first: a room may ask for another one
        _loading += 1
        try:
            rooms = [room for package in self._packages() for room in self._rooms(package)]
            for room in rooms:
                importlib.import_module(room)
        except BaseException:
            self._loaded = False  # the next call raises the same error, instead of reporting a missing member
            raise
        finally:
            _loading -= 1
        first = {name: self._members[name] for name in self._order() if name in self._members}
        # Not in the order of import: `find` may have imported one before the others.
        others = sorted(self._members.items(), key=lambda item: _position(item[1], rooms))
        self._members = first | dict(others)

    def _packages(self) -> list[str]:
        return ([] if self._package is None else [self._package]) + wing_modules(self._in_wings)

    def _rooms(self, package: str) -> list[str]:
        """Return the modules to import for a package; for a plain module, the module itself."""
        folders = getattr(importlib.import_module(package), "__path__", ())
        folders_only = self._folders_only and package == self._package
        return [package] + [
            f"{package}.{module.name}"
            for module in pkgutil.iter_modules(folders)
            if not module.name.startswith("_") and (module.ispkg or not folders_only)
        ]

    def _order(self) -> Sequence[str]:
        return () if self._package is None else getattr(importlib.import_module(self._package), "ORDER", ())

    def find(self, name: str) -> type[Member] | None:
        """Return the member `name`, or None. If a room has that name, only it is imported: importing all rooms takes 0.1 s."""
        if self._plugins and not _loading:
            _load_installed()
        if not self._loaded and name not in self._members and name.isidentifier() and not name.startswith("_"):
            for package in self._packages():
                if (room := f"{package}.{name}") in self._rooms(package):
                    importlib.import_module(room)
                    break
        if name not in self._members:
            self.load()
        return self._members.get(name)

    def __iter__(self) -> Iterator[str]:
        self.load()
        return iter(tuple(self._members))

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._members

    def __getitem__(self, name: str) -> type[Member]:
        self.load()
        return self._members[name]

    def without_installed(self) -> Mapping[str, type[Member]]:
        """Return the built-in members and those of active plugins, without looking for installed packages."""
        self._load_rooms()
        return dict(self._members)

    def present(self) -> tuple[type[Member], ...]:
        """Return the members that have registered so far, without importing anything."""
        return tuple(self._members.values())

    def classes(self) -> Mapping[str, type[Member]]:
        """Return all members by name."""
        self.load()
        return dict(self._members)

    @property
    def refused(self) -> Mapping[str, str]:
        """Well-known names that dstune does not offer, with the reason (`REFUSED` of the package)."""
        package = None if self._package is None else importlib.import_module(self._package)
        return getattr(package, "REFUSED", {})

    def configs(self) -> dict[str, type]:
        """Return the configuration classes by name."""
        self.load()
        return {name: cls.Config for name, cls in self._members.items()}

    def of(self, config: Any) -> Member:
        """Return the member that a configuration section chooses, bound to it (`member.config`).

        Raises:
            KeyError: no member has the class of `config`.
        """
        self.load()
        # `__class__`, not `type`: rules read the configuration through a view whose `__class__` is that of the viewed object.
        return self._by_config[config.__class__](config)

    def default(self) -> Any:
        """Return the configuration of the first member, with its defaults."""
        return next(iter(self.classes().values())).Config()
