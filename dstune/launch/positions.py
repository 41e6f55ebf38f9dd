"""Cuts rows to the number of positions that a model has learned, since it fails at longer ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from dstune.config.architectures import row_limit
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.planning.source import config_json
from dstune.protocols import method_of, task_of
from dstune.protocols.method_options import PutsPositionsInFront
from dstune.protocols.task_options import TrainsOnRollouts


def within_positions(config: RunConfig, stage: Callable[[str], None]) -> RunConfig:
    """Return `config` with `data.max_length` reduced to the model's limit. stage: called with a message if it is reduced.

    Raises UserError if the model's `config.json` is not on this machine, or where what is written behind a row has no room.
    """
    limit = _limit(config)
    if limit is None or config.data.max_length <= limit:
        return config
    if limit < 1:
        written = _written(config)
        reason = f"the model has {limit + written:,} positions, which leaves none for a prompt"
        fix = f"task.max_new_tokens={max(1, (limit + written) // 2)}"
        raise UserError(Problem("task.max_new_tokens", reason, fix, str(written)))
    stage(
        f"rows are cut to {limit} tokens, not data.max_length={config.data.max_length}: the model has no more positions"
    )
    return replace(config, data=replace(config.data, max_length=limit))


def truncate_as_before(before: RunConfig, config: RunConfig) -> RunConfig:
    """Return `config`, which asks for longer rows than the model of the run `before` takes, with those that this run got."""
    limit = None
    with suppress(UserError):
        limit = _limit(before)
    if limit is None or not limit == before.data.max_length < config.data.max_length:
        return config
    return replace(config, data=replace(config.data, max_length=limit))


def _limit(config: RunConfig) -> int | None:
    limit = row_limit(config_json(config.model))
    method = method_of(config.method)
    trained = method.positions if isinstance(method, PutsPositionsInFront) else 0
    return None if limit is None else limit - trained - _written(config)


def _written(config: RunConfig) -> int:
    """Return the maximum tokens that the model writes after a row."""
    task = task_of(config.task)
    return task.tokens_written_behind_rows if isinstance(task, TrainsOnRollouts) else 0
