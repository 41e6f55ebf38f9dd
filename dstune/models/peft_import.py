"""`peft`, without what bitsandbytes brings with it: import it from here, where it is used.

peft imports bitsandbytes wherever that is installed. bitsandbytes calls `torch.compile` on its functions for CPUs as they are
defined, which loads all of PyTorch's compiler: 1.4 s and 41 MiB per rank (bitsandbytes 0.50, torch 2.13), for functions that few
runs call.
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
    """While open, `torch.compile` of a function compiles it when it is first called."""
    own = torch.compile

    def compile_later(model: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if model is None:
            return lambda later: compile_later(later, **options)
        if not inspect.isfunction(model):
            return own(model, **options)
        compiled = functools.cache(lambda: own(model, **options))

        @functools.wraps(model)
        def call(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = own


with compiled_when_called():
    import peft
