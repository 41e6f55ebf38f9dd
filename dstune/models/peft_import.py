"""Imports `peft` without loading PyTorch's compiler. Import peft from here, inside the functions that use it.

peft imports bitsandbytes if that is installed. bitsandbytes calls `torch.compile` on its CPU functions when it defines them,
which loads all of PyTorch's compiler: 1.4 s and 41 MiB per rank (bitsandbytes 0.50, torch 2.13), for functions that few runs
call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["peft"]


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """Within the block, make `torch.compile` of a function wait until the compiled function is first called."""
    torch_compile = torch.compile

    def compile_later(model: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if model is None:
            return lambda later: compile_later(later, **options)
        if not inspect.isfunction(model):
            return torch_compile(model, **options)
        compiled = functools.cache(lambda: torch_compile(model, **options))

        @functools.wraps(model)
        def call(*arguments: Any, **keywords: Any) -> Any:
            return compiled()(*arguments, **keywords)

        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = torch_compile


with compiled_when_called():
    import peft
