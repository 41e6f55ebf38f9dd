"""Callbacks defined in a notebook cell or a script, written to a file that carries their source to the ranks."""

from __future__ import annotations

import ast
import atexit
import builtins
import hashlib
import inspect
import linecache
import re
import shutil
import sys
import tempfile
import textwrap
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dstune.core.errors import Problem, UserError

PLAIN = (str, bytes, int, float, bool, type(None))
LONGEST_CONSTANT = 10_000


def file_of(callback: type) -> Path:
    """Write the source of a class of `__main__`, with what it uses of it, into a plugin file of its own, and return its path.

    The name of the file follows from its content, so the same source is the same plugin when a run continues.

    Raises:
        UserError: the source cannot be read, or it uses what only this process has.
    """
    from dstune.protocols import CALLBACKS

    text = source_of(callback)
    # The plugin registers this name itself; nothing else can use the class that `__main__` registered.
    for name, cls in [*CALLBACKS.classes().items()]:
        if cls.__module__ == "__main__" and cls.__qualname__ == callback.__qualname__:
            CALLBACKS.remove(name)
    stem = f"{_snake(callback.__name__)}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    file = _folder() / f"{stem}.py"
    file.write_text(text, encoding="utf-8")
    return file


def source_of(callback: type) -> str:
    """Return the source of such a plugin file. Raises UserError."""
    name = callback.__name__
    fix = f"write it into a file (%%writefile my_callback.py), and pass callbacks=['./my_callback.py:{name}']"
    try:
        source = _source(callback)
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        raise UserError(Problem("callbacks", "the source of this class cannot be read", fix, name)) from None
    namespace = vars(sys.modules["__main__"])
    lines = []
    missing = []
    for used in sorted(_free_names(tree) - {name, "dstune"}):
        if used in namespace:
            if (line := _definition(used, namespace[used])) is not None:
                lines.append(line)
                continue
        elif hasattr(builtins, used):
            continue
        missing.append(used)
    if missing:
        reason = f"it uses {', '.join(missing)} of this process, which the ranks do not have: they are other processes"
        raise UserError(Problem("callbacks", reason, f"define that inside of the class, or {fix}", name))
    definition = tree.body[0]
    if isinstance(definition, ast.ClassDef) and not definition.decorator_list:
        source = f"@dstune.callback\n{source}"
    return "\n".join(['"""A callback of a notebook or a script."""', "", "import dstune", *lines, "", "", source])


def _source(callback: type) -> str:
    """Return the source of the class with its decorators. Raises OSError or TypeError."""
    codes = [method.__code__ for method in vars(callback).values() if inspect.isfunction(method)]
    for (
        code
    ) in codes:  # of a cell `inspect` knows the functions, by the name that the kernel gives it, and not the class
        text = "".join(linecache.getlines(code.co_filename))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name == callback.__name__ and node.end_lineno is not None:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if first <= code.co_firstlineno <= node.end_lineno:
                    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]) + "\n")
    return textwrap.dedent(inspect.getsource(callback))


def _free_names(tree: ast.Module) -> set[str]:
    """Return names that the code reads without defining them."""
    used: set[str] = set()
    defined: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    return used - defined


def _definition(name: str, value: Any) -> str | None:
    """Return a line that assigns the value to `name` in another process; None if there is none."""
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}" if value.__name__ != "__main__" else None
    if isinstance(value, PLAIN):
        text = repr(value)
        return f"{name} = {text}" if len(text) <= LONGEST_CONSTANT and text not in ("nan", "inf", "-inf") else None
    module, qualified_name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if (
        module in (None, "__main__")
        or not qualified_name.isidentifier()
        or getattr(sys.modules.get(module), qualified_name, None) is not value
    ):
        return None
    return f"from {module} import {qualified_name} as {name}"


@cache
def _folder() -> Path:
    """Return a folder private to this process; the run directory has its own copy of each plugin."""
    folder = tempfile.mkdtemp(prefix="dstune-callbacks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
