"""Faults from inside a process, for tests: Python runs this file at start when its folder is on PYTHONPATH.

DSTUNE_FAULT holds a JSON object: `at` names a function as "module:qualified.name", `rank` the rank it strikes (absent:
any process that is no rank too), `call` the number of the call from which on it strikes (once, unless `always`), `do`
what it does. Nothing happens without the variable.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from typing import Any


def act(kind: str, value: Any, call) -> Any:
    """Do the fault; returns what the function returns in its place."""
    match kind:
        case "raise":
            raise RuntimeError(value)
        case "oserror":
            raise OSError(getattr(errno, value), os.strerror(getattr(errno, value)))
        case "oom":
            import torch

            torch.empty(2**46)  # 256 TiB: refused by the allocator
        case "hang":
            while True:
                time.sleep(1.0)
        case "exit":
            os._exit(value)
        case "clock":
            really = time.time
            time.time = lambda: really() + value  # type: ignore[assignment]
        case "slow":
            time.sleep(value)
        case _:
            raise AssertionError(kind)
    return call()


def wrapped(function: Any, fault: dict[str, Any]) -> Any:
    calls = 0

    @functools.wraps(function)
    def instead(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.get("call", 1) or (fault.get("always") and calls > fault.get("call", 1)):
            return act(fault["do"], fault.get("value"), lambda: function(*arguments, **keywords))
        return function(*arguments, **keywords)

    return instead


class Finder(importlib.abc.MetaPathFinder):
    """Finds one module as ever, and patches it once it has run."""

    def __init__(self, module: str, fault: dict[str, Any]):
        self.module, self.fault = module, fault

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_patch(module: Any) -> None:
            run(module)
            *owners, last = self.fault["at"].split(":")[1].split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, last, wrapped(getattr(owner, last), self.fault))

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


if text := os.environ.get("DSTUNE_FAULT"):
    fault = json.loads(text)
    if "rank" not in fault or os.environ.get("RANK") == str(fault["rank"]):
        sys.meta_path.insert(0, Finder(fault["at"].split(":")[0], fault))
