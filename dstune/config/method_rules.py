"""Rules of `method`: what the other keys may not say beside it, and what fits together among its own."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import shown
from dstune.config.method_schema import HeadConfig, LoraConfig
from dstune.config.schema import RunConfig
from dstune.config.task_schema import ClassificationConfig
from dstune.errors import Problem


def check_method(config: RunConfig) -> Iterator[Problem]:
    method = config.method
    if isinstance(method, HeadConfig) and not isinstance(config.task, ClassificationConfig):
        yield Problem("method", f"task={config.task.name} has no head of its own", "method=full or method=lora", "head")
    if isinstance(method, LoraConfig):
        modules = method.target_modules
        if not modules:
            fix = "method.target_modules=[all-linear], or module names such as [q_proj,v_proj]"
            yield Problem("method.target_modules", "no module would get an adapter", fix, "[]")
        if "all-linear" in modules and len(modules) > 1:
            yield Problem(
                "method.target_modules", "all-linear stands alone", "leave out the other names", shown(modules)
            )
