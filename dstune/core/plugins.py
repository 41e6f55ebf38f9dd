"""Plugins: modules and files outside the package that register tasks, methods, callbacks, ... (`dstune.protocols`).

A process has one set of active plugins: those of the configuration that it composed, or of the run that it read, last.
`activate` makes it so. Members of an installed package that names itself in the entry-point group `dstune.plugins` are there
always. A file is read once, hashed, and executed as the module `dstune_plugins.NAME`; ranks execute the copy in `RUN/plugins/`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import linecache
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core import entry_points, files, plugin_files, registry
from dstune.core.errors import Problem, UserError, collected, with_class
from dstune.core.plugin_files import KEY as KEY
from dstune.core.plugin_files import Source

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from types import ModuleType

VARIABLE = registry.PLUGINS_VARIABLE
PACKAGE = "dstune_plugins"
FOLDER = "plugins"
"""Folder of the run directory with the copies of plugin files."""
SAYS_VERSION = "DSTUNE_PROTOCOLS"
"""Name in a plugin's module: the version of the protocols that it was written for."""


@dataclass(frozen=True)
class Plugin:
    """A plugin as `run.yaml` lists it."""

    name: str
    """Of its module: that of a file without `.py`, or `package.module`."""
    file: str
    """Where it was read when the run was composed."""
    sha256: str
    """Of the file; of an installed module of all Python files of its package."""
    registers: tuple[str, ...] = ()
    """What it adds: `task ordinal`, `metric kappa`, ..."""
    is_file: bool = True
    """Whether it travels to the ranks as a copy in `RUN/plugins/`."""
    distribution: str = ""
    """The installed package that names it in the entry-point group: it is there always."""
    version: str = ""
    """Of the distribution."""

    @property
    def copy(self) -> str:
        """Its file below the run directory."""
        return f"{FOLDER}/{self.name}.py"

    @property
    def package_note(self) -> str:
        return f" of the package {self.distribution} {self.version}" if self.distribution else ""


@dataclass
class _Loaded:
    """A plugin that was executed in this process."""

    plugin: Plugin
    members: list[tuple[registry.Registry[Any], type[Any]]] = field(default_factory=list)


_loaded: dict[str, _Loaded] = {}
_active: dict[str, Plugin] = {}
_installed: dict[str, Plugin] = {}
_looked_for_installed = False


def active() -> tuple[Plugin, ...]:
    """Return the plugins of the last configuration, in its order."""
    return tuple(_active.values())


def used_by(config: Any) -> tuple[Plugin, ...]:
    """Return the plugins of a run: those of installed packages that can act in it, and the active ones.

    config: the tree of its configuration. A member that a section chooses (a task, a method, ...) acts where its `Config` is
    in the tree; a metric, row format or callback can act in any run.
    """
    chosen = set(_classes(config))
    return (*(plugin for plugin in _installed.values() if _can_act(_loaded[plugin.name], chosen)), *active())


def _can_act(plugin: _Loaded, chosen: set[type]) -> bool:
    if not plugin.members:  # it has been imported for what that does
        return True
    return any(kind.in_runs and getattr(member, "Config", None) in {None, *chosen} for kind, member in plugin.members)


def _classes(node: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        yield type(node)
        for node_field in dataclasses.fields(node):
            yield from _classes(getattr(node, node_field.name))
    elif isinstance(node, Mapping | list | tuple):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from _classes(value)


def activate(requested: Sequence[str], read: Mapping[str, Source] | None = None) -> None:
    """Make the plugins `requested` (`./file.py`, `package.module`, `package.module:Class`) the active ones.

    read: by file or module, those that have been read: these bytes are executed, whatever the file holds by now.

    Raises:
        UserError: each that is not there, cannot be imported, or clashes with another one.
    """
    load_installed()
    sources: list[Source] = []
    problems: list[Problem] = []
    for name, place in plugin_files.distinct(requested).items():
        if name in _installed and not plugin_files.is_path(place):
            continue
        with collected(problems):
            sources.append((read or {}).get(place) or plugin_files.find(place))
    if problems:
        raise UserError(problems)
    _activate(sources, run_dir=None)
    for spec in requested:
        place, member = plugin_files.split(spec)
        names = {cls.__name__ for _, cls in members_of(spec)}
        if member and member not in names:
            registered_names = ", ".join(sorted(names)) or "nothing"
            fix = f"put @dstune.callback (or task, method, metric, ...) above the class; the plugin registers {registered_names}"
            problems.append(Problem(KEY, f"{place} registers no class {member}", fix, spec))
    if problems:
        raise UserError(problems)


def members_of(spec: str) -> list[tuple[registry.Registry[Any], Any]]:
    """Return what a plugin that was loaded has registered, each with its kind."""
    place, _ = plugin_files.split(spec)
    return _loaded[plugin_files.name_of(place)].members


def activate_stored(plugins: Sequence[Plugin], run_dir: Path, overrides: Sequence[str] | None = None) -> None:
    """Activate the plugins of the run in `run_dir`, from their copies there.

    overrides: of the command, if it takes any; `run.accept_plugin_changes=true` is one.

    Raises:
        UserError: one that is missing, cannot be imported, or is not the one that the run began with.
    """
    load_installed()
    accepted = accepts_changes(overrides or ())
    sources: list[Source] = []
    problems: list[Problem] = []
    for plugin in plugins:
        if plugin.distribution:
            problems += () if accepted else _package_problems(plugin)
            continue
        try:
            source = plugin_files.find(str(run_dir / plugin.copy) if plugin.is_file else plugin.name)
        except UserError as error:
            problems += error.problems
            continue
        if source.is_file and not plugin.is_file:  # in this folder, which a stranger's run must not look into
            fix = "install the package that has it"
            problems.append(Problem(KEY, "there is no such module of an installed package", fix, plugin.name))
            continue
        if not accepted and source.sha256 != plugin.sha256:
            problems.append(_changed(plugin, source.file))
        if plugin.is_file or plugin.name not in _installed:  # which are active already
            sources.append(source)
    if problems and overrides is None:
        problems = [replace(problem, fix=problem.fix.removesuffix(_OR_ACCEPT)) for problem in problems]
    if problems:
        raise UserError(problems)
    _activate(sources, run_dir)
    file_by_name = {plugin.name: plugin.file for plugin in plugins}
    _active.update({name: replace(one, file=file_by_name[name]) for name, one in _active.items()})


def accepts_changes(overrides: Sequence[str]) -> bool:
    return ACCEPT in (text.lower() for text in overrides)


def refuse_changes(before: Sequence[Plugin], now: Sequence[Plugin]) -> None:
    """Raise UserError if a run that began with the plugins `before` would continue with different ones."""
    then, today = ({plugin.name: plugin for plugin in plugins} for plugins in (before, now))
    problems: list[Problem] = []
    for name, plugin in then.items():
        if plugin.distribution:
            problems += _package_problems(plugin)
        elif name not in today:
            fix = f"add {plugin.file} to plugins=[...]{_OR_ACCEPT}"
            problems.append(Problem(KEY, f"the run began with the plugin {name}", fix, name))
        elif plugin.sha256 != today[name].sha256:
            problems.append(_changed(plugin, today[name].file))
    for name, plugin in today.items():
        if name not in then:
            fix = f"pip uninstall {plugin.distribution}" if plugin.distribution else "leave it out"
            reason = f"the run began without the plugin {name}{plugin.package_note}"
            problems.append(Problem(KEY, reason, f"{fix}{_OR_ACCEPT}", plugin.file))
    if problems:
        raise UserError(problems)


def _package_problems(plugin: Plugin) -> Iterator[Problem]:
    """Yield the problem if an installed plugin of a run's beginning is missing or has changed."""
    installed = _installed.get(plugin.name)
    fix = f"pip install {plugin.distribution}=={plugin.version}{_OR_ACCEPT}"
    if installed is None:
        reason = f"the run began with the plugin {plugin.name}{plugin.package_note}, which is not installed"
        yield Problem(KEY, reason, fix, plugin.name)
    elif installed.sha256 != plugin.sha256:
        reason = f"the run began with the plugin {plugin.name}{plugin.package_note} (sha256 {plugin.sha256[:12]})"
        yield Problem(
            installed.file, f"{reason}, and {installed.version} (sha256 {installed.sha256[:12]}) is installed", fix
        )


ACCEPT = "run.accept_plugin_changes=true"
_OR_ACCEPT = f", or {ACCEPT} if the results may differ from here on"


def _changed(plugin: Plugin, file: str) -> Problem:
    reason = f"the plugin {plugin.name} has changed since the run began (sha256 {plugin.sha256[:12]})"
    return Problem(file, reason, f"bring the file back as it was{_OR_ACCEPT}")


def install(plugins: Iterable[Plugin], run_dir: Path) -> None:
    """Copy the files of `plugins` into `run_dir`."""
    for plugin in plugins:
        if not plugin.is_file:
            continue
        target = run_dir / plugin.copy
        source = _sources[plugin.name, plugin.sha256]
        if target.is_file() and target.read_bytes() == source:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write(target, source)


def to_dicts(plugins: Iterable[Plugin]) -> list[dict[str, Any]]:
    """Return `plugins` as `run.yaml` lists them."""
    return [
        {"name": plugin.name, "file": plugin.file, "sha256": plugin.sha256, "registers": list(plugin.registers)}
        | ({} if plugin.is_file else {"module": True})
        | ({"distribution": plugin.distribution, "version": plugin.version} if plugin.distribution else {})
        for plugin in plugins
    ]


def from_dicts(stored: Any, where: str) -> tuple[Plugin, ...]:
    """Return the plugins that `to_dicts` wrote. Raises UserError: `stored` is no list of plugins."""
    try:
        plugins = tuple(
            Plugin(
                str(entry["name"]),
                str(entry["file"]),
                str(entry["sha256"]),
                tuple(map(str, entry.get("registers") or ())),
                is_file=not entry.get("module", False),
                distribution=str(entry.get("distribution") or ""),
                version=str(entry.get("version") or ""),
            )
            for entry in stored or ()
        )
    except (KeyError, TypeError, AttributeError):
        plugins = None
    # A name is part of a path: one with `..` in it would execute a file elsewhere.
    if plugins is None or not all(part.isidentifier() for entry in plugins for part in _parts(entry)):
        raise UserError(Problem(where, "`plugins` is not a list of plugins", "bring run.yaml back from a copy"))
    return plugins


def _parts(plugin: Plugin) -> list[str]:
    return [plugin.name] if plugin.is_file else plugin.name.split(".")


def digests(*kinds: str) -> list[str]:
    """Return hashes of the plugins that register a member of one of `kinds`: part of what is derived from them."""
    loaded = (*_installed.values(), *active())
    return sorted(
        plugin.sha256 for plugin in loaded if any(text.rpartition(" ")[0] in kinds for text in plugin.registers)
    )


# ---- installed packages ----


def load_installed() -> None:
    """Import, once, the plugins of installed packages (entry-point group `dstune.plugins`) and those active in the parent process.

    Raises:
        UserError: one cannot be imported, or clashes with a built-in or another one.
    """
    global _looked_for_installed
    if _looked_for_installed:
        return
    _looked_for_installed = True
    points, inherited = entry_points.named_in(registry.PLUGIN_GROUP), os.environ.get(VARIABLE)
    try:
        if points or inherited:
            load_built_ins()
        for point in points:
            _installed[point.module] = _load_installed(point)
        for entry in json.loads(inherited or "[]"):
            source = plugin_files.find(entry["path"] if entry["is_file"] else entry["name"])
            if source.sha256 != entry["sha256"]:
                reason = f"the plugin {entry['name']} has changed since this process began"
                raise UserError(Problem(source.file, reason, "start the run again"))
            _active[entry["name"]] = _load(source)
    except BaseException:
        _looked_for_installed = False  # the next call raises the same error
        raise


def load_built_ins() -> None:
    """Load the built-in members before any plugin, so that of two members of one name the plugin's is refused."""
    importlib.import_module("dstune.protocols")  # not at the top, since it depends on this module
    for kind in registry.kinds():
        kind.load()


def _load_installed(point: EntryPoint) -> Plugin:
    distribution, version = (point.module, "") if point.dist is None else (point.dist.name, point.dist.version)
    try:
        spec = importlib.util.find_spec(point.module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {point.module!r}")
        content = plugin_files.installed_content(Path(spec.origin))
        plugin = _load(Source(point.module, spec.origin, content, is_file=False))
    except Exception as error:  # of the plugin's own code
        text = (
            error.problems[0].reason if isinstance(error, UserError) else f"it cannot be imported: {with_class(error)}"
        )
        reason = f"the plugin of the installed package {distribution}: {text}"
        fix = f"pip install --upgrade {distribution}, or uninstall it"
        raise UserError(Problem(point.module, reason, fix)) from error
    return replace(plugin, distribution=distribution, version=version)


# ---- loading ----

_sources: dict[tuple[str, str], bytes] = {}
"""Content of files by name and sha256: what is copied is what was executed."""


def _activate(sources: Sequence[Source], run_dir: Path | None) -> None:
    identities = [(source.name, source.sha256, source.is_file) for source in sources]
    if identities == [(plugin.name, plugin.sha256, plugin.is_file) for plugin in active()]:
        _active.update({source.name: replace(_active[source.name], file=source.file) for source in sources})
    else:
        for name in tuple(_active):  # all: which of two members of one name is refused depends on their order alone
            _park(name)
        problems: list[Problem] = []
        for source in sources:
            with collected(problems):
                _active[source.name] = _load(source)
        if problems:
            raise UserError(problems)
    os.environ.pop(VARIABLE, None)
    if run_dir is not None and sources:
        os.environ[VARIABLE] = json.dumps(
            [
                {"name": one.name, "path": str(Path(one.file).absolute()), "sha256": one.sha256, "is_file": one.is_file}
                for one in sources
            ]
        )


def _park(name: str) -> None:
    """Remove the members of a plugin from the registries. They stay in `_loaded`, since a plugin is executed only once."""
    _active.pop(name, None)
    _remove(_loaded[name].members)


def _remove(members: Iterable[tuple[registry.Registry[Any], type[Any]]]) -> None:
    for kind, member in members:
        kind.remove(member.name)


def _load(source: Source) -> Plugin:
    loaded = _loaded.get(source.name)
    if loaded is not None and (loaded.plugin.sha256, loaded.plugin.is_file) == (source.sha256, source.is_file):
        _add_again(loaded, source)
        return replace(loaded.plugin, file=source.file)
    _loaded.pop(source.name, None)
    members_before = _members()
    try:
        module = _execute(source) if source.is_file else _import(source.name, again=loaded is not None)
        _check_version(module)
    except (Exception, SystemExit) as error:  # a script that ends itself would end the command without a word
        _remove(_members() - members_before)
        sys.modules.pop(f"{PACKAGE}.{source.name}", None)
        raise UserError(_import_problem(source, error)) from error
    added = [
        registered
        for registered in _members()
        if _is_of(registered[1], module.__name__) or registered not in members_before
    ]
    added.sort(key=lambda registered: (registered[0].kind, registered[1].name))
    registers = tuple(f"{kind.kind} {member.name}" for kind, member in added)
    plugin = Plugin(source.name, source.file, source.sha256, registers, source.is_file)
    _loaded[source.name] = _Loaded(plugin, added)
    _sources[source.name, source.sha256] = source.content
    return plugin


def _add_again(loaded: _Loaded, source: Source) -> None:
    """Register the members of a loaded plugin again. Raises UserError if another plugin has taken one of the names."""
    added: list[tuple[registry.Registry[Any], type[Any]]] = []
    try:
        for kind, member in loaded.members:
            kind.add(member)
            added.append((kind, member))
    except ValueError as error:
        _remove(added)
        raise UserError(_import_problem(source, error)) from error


def _is_of(member: type, module: str) -> bool:
    return member.__module__ == module or member.__module__.startswith(f"{module}.")


def _members() -> set[tuple[registry.Registry[Any], type[Any]]]:
    """Return all registered members except the built-in ones."""
    members = {(kind, member) for kind in registry.kinds() for member in kind.present()}
    return {(kind, member) for kind, member in members if not member.__module__.startswith("dstune.")}


def _import(name: str, *, again: bool) -> ModuleType:
    already = sys.modules.get(name)
    return importlib.reload(already) if already is not None and again else importlib.import_module(name)


def _execute(source: Source) -> ModuleType:
    """Run the file as `dstune_plugins.NAME`: the bytes that were hashed, even if the file has changed since."""
    package = importlib.import_module(PACKAGE)
    path = str(Path(source.file).expanduser().absolute())
    folder = os.path.dirname(path)
    if folder not in package.__path__:
        package.__path__.append(folder)
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{source.name}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    # Tracebacks and documentation show what was executed, also when the file has changed or gone since.
    text = source.content.decode(errors="replace")
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    exec(compile(source.content, path, "exec"), module.__dict__)
    setattr(package, source.name, module)
    return module


def _check_version(module: ModuleType) -> None:
    version = getattr(module, SAYS_VERSION, registry.VERSION)
    if version not in (registry.VERSION, *registry.EARLIER_VERSIONS):
        reason = f"it was written for version {version} of the protocols, and this is version {registry.VERSION}"
        fix = f"docs/plugins.md lists what changed; then {SAYS_VERSION} = {registry.VERSION}"
        raise UserError(Problem(module.__name__, reason, fix))


def _import_problem(source: Source, error: BaseException) -> Problem:
    path = str(Path(source.file).expanduser().absolute())
    if isinstance(error, SyntaxError) and error.filename == path:
        return Problem(f"{source.file}:{error.lineno}", f"this is no Python: {error.msg}", "correct the line")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{source.file}:{lines[-1]}" if lines else source.file
    if isinstance(error, UserError):
        return Problem(where, error.problems[0].reason, error.problems[0].fix)
    fix = "correct the line"
    if isinstance(error, ModuleNotFoundError):
        fix = f"install {error.name}; a plugin is one file or an installed package, and imports no files beside it"
    return Problem(where, f"the plugin cannot be imported: {with_class(error)}", fix)
