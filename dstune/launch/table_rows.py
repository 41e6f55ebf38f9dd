"""Resolves the addresses of tables before the ranks start: each address gets the table's version and id, and the rows are copied
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
    """Return `config` with resolved addresses, and the problems of addresses that cannot be resolved.

    stage: gets a line before each step that takes long.
    """
    problems: list[Problem] = []
    resolved: dict[str, str] = {}
    """Resolved address by address, so that a table has one version in the run even if somebody writes to it meanwhile."""

    def resolve_address(spec: Any, key: str) -> Any:
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
    parts: dict[str, Any] = {part: resolve_address(getattr(data, part), f"data.{part}") for part in PARTS}
    mixture = {
        name: replace(source, path=resolve_address(source.path, f"data.mixture.{name}.path"))
        for name, source in data.mixture.items()
    }
    general = resolve_address(config.forgetting.general, "forgetting.general")
    forgetting = replace(config.forgetting, general=general)
    return replace(config, data=replace(data, mixture=mixture, **parts), forgetting=forgetting), problems
