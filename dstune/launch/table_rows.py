"""Tables that rows come from, before the ranks start: each address gets its version and the table's id, and its rows are copied
to the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data.inputs import PARTS
from dstune.data.sources import data_source_of


def resolve(config: RunConfig, stage: Callable[[str], None]) -> tuple[RunConfig, list[Problem]]:
    """Return `config` with resolved addresses, and what keeps others from being resolved. stage: told what takes long."""
    problems: list[Problem] = []
    resolved: dict[str, str] = {}
    """The same table is the same version everywhere, even if somebody writes to it meanwhile."""

    def of(spec: Any, key: str) -> Any:
        source = data_source_of(spec)
        if source is None:
            return spec
        try:
            if spec not in resolved:
                resolved[spec] = source.resolve(spec, key, stage)
            return resolved[spec]
        except UserError as error:
            problems.extend(error.problems)
            return spec

    data = config.data
    parts: dict[str, Any] = {part: of(getattr(data, part), f"data.{part}") for part in PARTS}
    mixture = {
        name: replace(source, path=of(source.path, f"data.mixture.{name}.path"))
        for name, source in data.mixture.items()
    }
    forgetting = replace(config.forgetting, general=of(config.forgetting.general, "forgetting.general"))
    return replace(config, data=replace(data, mixture=mixture, **parts), forgetting=forgetting), problems
