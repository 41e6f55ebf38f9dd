"""Finds the file or installed module of a plugin that a configuration names, and reads what is hashed. Executes nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dstune.core import parsing
from dstune.core.errors import Problem, UserError

KEY = "plugins"


@dataclass(frozen=True)
class Source:
    """The code of a plugin."""

    name: str
    """Name of its module: the file's name without `.py`, or `package.module`."""
    file: str
    content: bytes
    """The file's content; for an installed module, that of all Python files of its outermost package."""
    is_file: bool
    """Whether it travels to the ranks as a copy in `RUN/plugins/`."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def distinct(requested: Sequence[str]) -> dict[str, str]:
    """Return the plugins by name. Raises UserError: two plugins have the same name, or a name is no identifier."""
    spec_by_name: dict[str, str] = {}
    problems = []
    for spec in (split(requested_spec)[0] for requested_spec in requested):
        path = Path(spec)
        name = name_of(spec)
        if is_path(spec) and not name.isidentifier():
            fix = "give the path of a Python file"
            if path.name not in ("", ".."):  # folders without a name of their own
                valid = "".join(c if c.isalnum() else "_" for c in name)
                fix = f"rename it, for example {path.with_name(f'{valid}.py')}"
            problems.append(Problem(KEY, "the name of a plugin file is a name in Python", fix, spec))
        elif (
            name in spec_by_name
            and Path(spec_by_name[name]).absolute() != path.absolute()
            and spec_by_name[name] != spec
        ):
            reason = f"there are two plugins named {name}: {spec_by_name[name]} and {spec}"
            problems.append(Problem(KEY, reason, "rename one of the files", spec))
        else:
            spec_by_name[name] = spec
    if problems:
        raise UserError(problems)
    return spec_by_name


def is_path(spec: str) -> bool:
    """Return whether a plugin is given as a file, not as a module."""
    return spec.endswith(".py") or os.sep in spec


def split(spec: str) -> tuple[str, str]:
    """Split `FILE:CLASS` or `MODULE:CLASS` into file or module, and class."""
    place, _, member = spec.rpartition(":")
    return (place, member) if place and member.isidentifier() else (spec, "")


def name_of(place: str) -> str:
    """Return the plugin's name."""
    return Path(place).stem if is_path(place) else place


def find(spec: str) -> Source:
    """Find the plugin at `spec` (without a class). Raises UserError: there is none, or ranks cannot import it."""
    return _file(spec) if is_path(spec) else _module(spec)


def _file(spec: str) -> Source:
    path = Path(spec).expanduser()
    try:
        return Source(name_of(spec), spec, parsing.read_file(path), is_file=True)
    except OSError as error:
        import difflib

        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "give the path of a Python file"
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if missing else f"cannot be read: {error.strerror}"
        raise UserError(Problem(KEY, reason, fix, spec)) from None


def _module(name: str) -> Source:
    # The outermost package first: looking for a module below it would execute the package.
    package, *below = name.split(".")
    top, installed = _origin(package), is_installed(name)
    if below and top is not None and not installed:
        folder = top if top.is_dir() else top.parent
        file = os.path.relpath(folder.joinpath(*below).with_suffix(".py"))
        fix = f"install the package (pip install -e .), or give the file: plugins=[{file}]"
        raise UserError(Problem(KEY, "ranks cannot import it: it is not installed", fix, name))
    origin = _origin(name) if top is not None else None
    if origin is None or origin.is_dir():
        fix = "install the package that has it, or give a file: plugins=[./file.py]"
        raise UserError(Problem(KEY, "there is no such module", fix, name))
    content = installed_content(origin) if installed else origin.read_bytes()
    return Source(name, str(origin), content, is_file=not installed)


def _origin(module: str) -> Path | None:
    """Return the file of a module; the folder of a package without `__init__.py`."""
    try:
        module_spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if module_spec is None:
        return None
    if module_spec.origin is None or module_spec.origin in ("built-in", "frozen"):
        return next((Path(folder) for folder in module_spec.submodule_search_locations or ()), None)
    return Path(module_spec.origin)


def installed_content(origin: Path) -> bytes:
    """Read all Python files of the outermost package that contains the module at `origin`."""
    package = None
    folder = origin.parent
    while (folder / "__init__.py").is_file():
        package, folder = folder, folder.parent
    files = [origin] if package is None else sorted(package.rglob("*.py"))
    return b"".join(file.read_bytes() for file in files)


def is_installed(module: str) -> bool:
    """Return whether ranks, which have neither this working directory nor this process's `sys.path`, can import the module's
    outermost package. Executes nothing."""
    import site
    import sysconfig

    package = module.partition(".")[0]
    if (top := _origin(package)) is None:
        return False
    root = (top.parent.parent if top.name == "__init__.py" else top.parent).resolve()
    libraries = [*site.getsitepackages(), site.getusersitepackages()]
    places = [*libraries, sysconfig.get_path("stdlib"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if root in {Path(place).resolve() for place in places if place}:
        return True
    # Editable installations: a folder in a `.pth` file, or a finder with a table of packages.
    listed = (file.read_text(errors="replace") for place in libraries for file in Path(place).glob("*.pth"))
    if str(root) in {line.strip() for text in listed for line in text.splitlines()}:
        return True
    finders = (sys.modules.get(getattr(finder, "__module__", "")) for finder in sys.meta_path)
    return any(package in getattr(finder, "MAPPING", ()) for finder in finders)
