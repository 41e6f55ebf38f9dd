"""Plugins: modules and files outside the package that register tasks, methods, callbacks, ... (`dstune.protocols`).

A process has one set of active plugins: those of the configuration that it composed, or of the run that it read, last.
`activate` makes it so. Members of an installed package that names itself in the entry-point group `dstune.plugins` are there
always. A file is read once, hashed, and executed as the module `dstune_plugins.NAME`; ranks execute the copy in `RUN/plugins/`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import linecache
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from dstune.core import files, registry
from dstune.core.errors import Problem, UserError

GROUP = "dstune.plugins"
"""Entry points of installed packages: `mine = "my_package.plugin"`."""
PACKAGE = "dstune_plugins"
FOLDER = "plugins"
"""Below the run directory, where files are copied to."""
VARIABLE = "DSTUNE_PLUGINS"
"""Tells the processes that a rank starts which files are active: JSON, `name` and `path` of each."""
KEY = "plugins"


@dataclass(frozen=True)
class Plugin:
    """An active plugin, as `run.yaml` lists it."""

    name: str
    """Of its module: that of a file without `.py`, or `package.module`."""
    file: str
    """Where it was read when the run was composed."""
    sha256: str
    """Of the file; of a package of all its Python files."""
    registers: tuple[str, ...] = ()
    """What it adds: `task ordinal`, `metric kappa`, ..."""
    is_file: bool = True
    """Whether it travels to the ranks as a copy in `RUN/plugins/`."""

    @property
    def copy(self) -> str:
        """Its file below the run directory."""
        return f"{FOLDER}/{self.name}.py"


@dataclass
class _Loaded:
    """A plugin that was executed in this process."""

    plugin: Plugin
    members: list[tuple[registry.Registry[Any], type]] = field(default_factory=list)


_loaded: dict[str, _Loaded] = {}
_active: dict[str, Plugin] = {}
_inherited = False


def active() -> tuple[Plugin, ...]:
    """The plugins that the last configuration asked for, in that order."""
    return tuple(_active.values())


def activate(requested: Sequence[str]) -> tuple[Plugin, ...]:
    """Make the plugins `requested` (`./file.py`, `package.module`, `package.module:Class`) the active ones.

    Raises:
        UserError: each that is not there, cannot be imported, or clashes with another one.
    """
    sources, problems = [], []
    for name, spec in _distinct(requested).items():
        try:
            sources.append((name, *_content(spec)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    _activate(sources, run_dir=None)
    for spec in requested:
        place, member = _split(spec)
        names = {cls.__name__ for _, cls in members_of(spec)}
        if member and member not in names:
            known = ", ".join(sorted(names)) or "nothing"
            fix = f"put @dstune.callback (or task, method, metric, ...) above the class; the plugin registers {known}"
            problems.append(Problem(KEY, f"{place} registers no class {member}", fix, spec))
    if problems:
        raise UserError(problems)
    return active()


def members_of(spec: str) -> list[tuple[registry.Registry[Any], Any]]:
    """What an active plugin has registered, each with its kind."""
    place, _ = _split(spec)
    return _loaded[Path(place).stem if is_path(place) else place].members


def activate_stored(plugins: Sequence[Plugin], run_dir: Path, *, accept_changes: bool = False) -> tuple[Plugin, ...]:
    """Make the plugins of the run in `run_dir` the active ones, from their copies there.

    Raises:
        UserError: one that is missing, cannot be imported, or is not the one that the run began with.
    """
    sources, problems = [], []
    for plugin in plugins:
        path = run_dir / plugin.copy if plugin.is_file else None
        try:
            content = _content(str(path) if path else plugin.name)
        except UserError as error:
            problems += error.problems
            continue
        if not accept_changes and _digest(content[1]) != plugin.sha256:
            problems.append(_changed(plugin, content[0]))
        sources.append((plugin.name, *content))
    if problems:
        raise UserError(problems)
    _activate(sources, run_dir)
    given = {plugin.name: plugin.file for plugin in plugins}
    _active.update({name: replace(one, file=given[name]) for name, one in _active.items()})
    return active()


def refuse_changes(before: Sequence[Plugin], now: Sequence[Plugin]) -> None:
    """Raises UserError where a run that began with the plugins `before` would go on with others."""
    then, today = ({plugin.name: plugin for plugin in plugins} for plugins in (before, now))
    problems = [
        _changed(then[name], today[name].file)
        for name in then
        if name in today and then[name].sha256 != today[name].sha256
    ]
    problems += [
        Problem(KEY, f"the run began with the plugin {name}", f"add {plugin.file} to plugins=[...]{_OR_ACCEPT}", name)
        for name, plugin in then.items()
        if name not in today
    ]
    problems += [
        Problem(KEY, f"the run began without the plugin {name}", f"leave it out{_OR_ACCEPT}", plugin.file)
        for name, plugin in today.items()
        if name not in then
    ]
    if problems:
        raise UserError(problems)


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
    """As `run.yaml` lists them."""
    return [
        {"name": one.name, "file": one.file, "sha256": one.sha256, "registers": list(one.registers)}
        | ({} if one.is_file else {"module": True})
        for one in plugins
    ]


def from_dicts(stored: Any, where: str) -> tuple[Plugin, ...]:
    """The inverse. Raises UserError: not a list of plugins."""
    try:
        return tuple(
            Plugin(
                str(one["name"]),
                str(one["file"]),
                str(one["sha256"]),
                tuple(map(str, one.get("registers") or ())),
                is_file=not one.get("module", False),
            )
            for one in stored or ()
        )
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            Problem(where, "`plugins` is not a list of plugins", "bring run.yaml back from a copy")
        ) from None


def digests(*kinds: str) -> list[str]:
    """Hashes of the active plugins that register a member of one of `kinds`: part of what is derived from them."""
    return sorted(one.sha256 for one in active() if any(text.rpartition(" ")[0] in kinds for text in one.registers))


# ---- installed packages ----


def load_installed() -> None:
    """Import what installed packages name in the group `dstune.plugins`, and what the process above has active, once.

    Raises:
        UserError: one cannot be imported.
    """
    global _inherited
    if _inherited:
        return
    _inherited = True
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP):
        try:
            importlib.import_module(point.module)
        except Exception as error:
            package = point.dist.name if point.dist is not None else point.module
            reason = f"the plugin of the installed package {package} cannot be imported: {_text(error)}"
            raise UserError(
                Problem(point.module, reason, f"pip install --upgrade {package}, or uninstall it")
            ) from error
    if inherited := os.environ.get(VARIABLE):
        for one in json.loads(inherited):
            _active[one["name"]] = _load(one["name"], *_content(one["path"] if one["is_file"] else one["name"]))


# ---- loading ----

_sources: dict[tuple[str, str], bytes] = {}
"""Content of files by name and sha256: what is copied is what was executed."""


def _distinct(requested: Sequence[str]) -> dict[str, str]:
    """The plugins by name. Raises UserError: two files of one name, or a name that is none."""
    found: dict[str, str] = {}
    problems = []
    for spec in (_split(one)[0] for one in requested):
        path = Path(spec)
        name = path.stem if is_path(spec) else spec
        if is_path(spec) and not name.isidentifier():
            fix = f"rename it, for example {path.with_name(''.join(c if c.isalnum() else '_' for c in name) + '.py')}"
            problems.append(Problem(KEY, "the name of a plugin file is a name in Python", fix, spec))
        elif name in found and Path(found[name]).absolute() != path.absolute() and found[name] != spec:
            reason = f"there are two plugins named {name}: {found[name]} and {spec}"
            problems.append(Problem(KEY, reason, "rename one of the files", spec))
        else:
            found[name] = spec
    if problems:
        raise UserError(problems)
    return found


def is_path(spec: str) -> bool:
    """Whether a plugin is given as a file, not as a module."""
    return spec.endswith(".py") or os.sep in spec


def _split(spec: str) -> tuple[str, str]:
    """File or module, and the class in it that is named behind a colon."""
    place, _, member = spec.rpartition(":")
    return (place, member) if place and member.isidentifier() else (spec, "")


def _content(spec: str) -> tuple[str, bytes, bool]:
    """File, content and whether it is a file of its own. Raises UserError: there is none."""
    if is_path(spec):
        path = Path(spec).expanduser()
        try:
            return spec, path.read_bytes(), True
        except OSError as error:
            import difflib

            near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=1)
            fix = f"did you mean {path.parent / near[0]}?" if near else "give the path of a Python file"
            reason = (
                "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            )
            raise UserError(Problem(KEY, reason, fix, spec)) from None
    module = spec
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        fix = "install the package that has it, or give a file: plugins=[./file.py]"
        raise UserError(Problem(KEY, "there is no such module", fix, spec))
    origin = Path(found.origin)
    if not _reaches_ranks(origin, module):
        if "." in module:
            fix = f"install the package (pip install -e .), or give the file: plugins=[{os.path.relpath(origin)}]"
            raise UserError(Problem(KEY, "ranks cannot import it: it is not installed", fix, spec))
        return str(origin), origin.read_bytes(), True
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    return str(origin), b"".join(file.read_bytes() for file in files), False


def _reaches_ranks(origin: Path, module: str) -> bool:
    """Whether ranks, which have neither this working directory nor changes of `sys.path`, import the module as well."""
    import site
    import sysconfig

    root = origin.parents[module.count(".") + (origin.name == "__init__.py")]
    places = [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("stdlib")]
    places += [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if root.resolve() in {Path(place).resolve() for place in places}:
        return True
    return any(hasattr(finder, "MAPPING") for finder in sys.meta_path) and root != Path.cwd()  # an editable install


def _activate(sources: Sequence[tuple[str, str, bytes, bool]], run_dir: Path | None) -> tuple[Plugin, ...]:
    load_installed()
    names = {name for name, *_ in sources}
    for name in [name for name in _active if name not in names]:
        _park(name)
    problems: list[Problem] = []
    for name, file, content, is_file in sources:
        try:
            _active[name] = _load(name, file, content, is_file)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    ordered = {name: _active[name] for name, *_ in sources}
    _active.clear()
    _active.update(ordered)
    os.environ.pop(VARIABLE, None)
    if run_dir is not None and ordered:
        paths = {name: run_dir.absolute() / one.copy if one.is_file else one.file for name, one in ordered.items()}
        listed = [{"name": one.name, "path": str(paths[one.name]), "is_file": one.is_file} for one in ordered.values()]
        os.environ[VARIABLE] = json.dumps(listed)
    return active()


def _park(name: str) -> None:
    """Take the members of a plugin out of the registries; it is executed once, so they are kept for later."""
    _active.pop(name, None)
    for kind, member in _loaded[name].members:
        kind.remove(member.name)  # type: ignore[attr-defined]


def _load(name: str, file: str, content: bytes, is_file: bool) -> Plugin:
    digest = _digest(content)
    known = _loaded.get(name)
    if known is not None and known.plugin.sha256 == digest and known.plugin.is_file == is_file:
        for kind, member in known.members:
            kind.add(member)
        return replace(known.plugin, file=file)
    if known is not None:
        if name in _active:
            _park(name)
        del _loaded[name]
    before = _members()
    try:
        if is_file:
            _execute(name, file, content)
        else:
            already = sys.modules.get(name)
            importlib.reload(already) if already is not None and known is not None else importlib.import_module(name)
    except Exception as error:
        for kind, member in _members() - before:
            kind.remove(member.name)  # type: ignore[attr-defined]
        sys.modules.pop(f"{PACKAGE}.{name}", None)
        raise UserError(_import_problem(name, file, error)) from error
    module = f"{PACKAGE}.{name}" if is_file else name
    added = [(kind, member) for kind, member in _members() if _is_of(member, module) or (kind, member) not in before]
    added.sort(key=lambda one: (one[0].kind, one[1].name))  # type: ignore[attr-defined]
    registers = tuple(f"{kind.kind} {member.name}" for kind, member in added)  # type: ignore[attr-defined]
    plugin = Plugin(name, file, digest, registers, is_file)
    _loaded[name] = _Loaded(plugin, added)
    _sources[name, digest] = content
    return plugin


def _is_of(member: type, module: str) -> bool:
    return member.__module__ == module or member.__module__.startswith(f"{module}.")


def _members() -> set[tuple[registry.Registry[Any], type]]:
    """All but built-ins."""
    members = {(kind, member) for kind in registry.kinds() for member in kind.present()}
    return {(kind, member) for kind, member in members if not member.__module__.startswith("dstune.")}


def _execute(name: str, file: str, content: bytes) -> ModuleType:
    """Run the file as `dstune_plugins.NAME`: the bytes that were hashed, whatever the file holds by now."""
    package = importlib.import_module(PACKAGE)
    path = str(Path(file).expanduser().absolute())
    folder = os.path.dirname(path)
    if folder not in package.__path__:
        package.__path__.append(folder)
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{PACKAGE}.{name}"] = module
    # Tracebacks and documentation show what was executed, also when the file has changed or gone since.
    text = content.decode(errors="replace")
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    exec(compile(content, path, "exec"), module.__dict__)
    setattr(package, name, module)
    return module


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _import_problem(name: str, file: str, error: Exception) -> Problem:
    path = str(Path(file).expanduser().absolute())
    if isinstance(error, SyntaxError) and error.filename == path:
        return Problem(f"{file}:{error.lineno}", f"this is no Python: {error.msg}", "correct the line")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{file}:{lines[-1]}" if lines else file
    if isinstance(error, UserError):
        return Problem(where, error.problems[0].reason, error.problems[0].fix)
    fix = "correct the line"
    if isinstance(error, ModuleNotFoundError):
        fix = f"install {error.name}; a plugin is one file or an installed package, and imports no files beside it"
    return Problem(where, f"the plugin cannot be imported: {_text(error)}", fix)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
