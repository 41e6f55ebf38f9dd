"""Rules of `forgetting`: combinations with other keys that are refused."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.forgetting import mixes_in
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.protocols import method_of


def check_forgetting(config: RunConfig) -> Iterator[Problem]:
    forgetting = config.forgetting
    for key in ("l2sp", "ewc"):
        if getattr(forgetting, key) and not method_of(config.method).moves_weights:
            reason = f"method={config.method.name} does not change pretrained weights, so their distance from the start is always 0"
            yield Problem(f"forgetting.{key}", reason, f"forgetting.{key}=0", format_value(getattr(forgetting, key)))
    for key in ("ewc", "replay"):
        if getattr(forgetting, key) and not forgetting.general:
            reason = "this needs the rows that the model is not to forget"
            yield Problem(
                f"forgetting.{key}", reason, "forgetting.general=FILE", format_value(getattr(forgetting, key))
            )
    if forgetting.general and not (forgetting.ewc or forgetting.replay):
        fix = "forgetting.replay=0.1 or forgetting.ewc=1000"
        yield Problem("forgetting.general", "nothing uses these rows", fix, format_value(forgetting.general))
    if forgetting.replay and config.data.mixture and not mixes_in(config):
        fix = "forgetting.replay=0, and add the rows to data.mixture with their own weight"
        yield Problem("forgetting.replay", "data.mixture has sources already", fix, format_value(forgetting.replay))
    if forgetting.replay and config.data.streaming:
        reason = "this is a share of an epoch, and the length of a stream is not known"
        yield Problem("forgetting.replay", reason, "data.streaming=false", format_value(forgetting.replay))
