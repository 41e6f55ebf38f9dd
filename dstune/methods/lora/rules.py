"""Rules of `method=lora`: which of its keys go together, and what adapters of stacked experts cannot have."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.parallel_rules import OFF
from dstune.core.errors import Problem
from dstune.methods.lora.config import LoraConfig, LoraInit


def check_lora(config: LoraConfig) -> Iterator[Problem]:
    if config.adapter and config.init is not LoraInit.default:
        reason = "the adapter that method.adapter names has its values already"
        yield Problem("method.init", reason, "method.init=default, or leave out method.adapter", config.init.value)
    if config.init_iterations is not None and config.init is not LoraInit.pissa:
        reason = "is for the singular value decomposition of init=pissa"
        yield Problem(
            "method.init_iterations", reason, "leave it out, or method.init=pissa", str(config.init_iterations)
        )
    if config.dora and config.frozen_adapters:
        reason = "DoRA scales the whole weight, so an adapter of its own cannot hold its sum with others"
        yield Problem("method.dora", reason, "method.dora=false, or a merged model in model.path", "true")
    if splits(config) and config.lr_ratio != 1:
        reason = "LoRA+ is for a B that begins at zero, and init=" + config.init.value + " gives both their size"
        yield Problem("method.lr_ratio", reason, "method.lr_ratio=1, or method.init=default", f"{config.lr_ratio:g}")
    if config.target_parameters:
        yield from _check_stacked(config)
    for key in ("rank_pattern", "alpha_pattern"):
        for name, value in getattr(config, key).items():
            if not value > 0:
                yield Problem(f"method.{key}", f"{name} must be more than 0", "", format_value(value))
            try:
                re.compile(name)
            except re.error as error:
                yield Problem(
                    f"method.{key}", f"is no regular expression: {error}", "q_proj, or 'layers.0.mlp.*'", name
                )


def _check_stacked(config: LoraConfig) -> Iterator[Problem]:
    if problem := adapted_experts_problem(config):
        yield problem
    for key, value, is_plain, fix in (
        ("init", config.init.value, not splits(config), "method.init=default"),
        ("frozen_adapters", config.frozen_adapters, not config.frozen_adapters, "method.frozen_adapters=[]"),
    ):
        if not is_plain:
            reason = "splits or shifts linear layers, and method.target_parameters names stacked weights"
            yield Problem(f"method.{key}", reason, f"{fix}, or method.target_parameters=[]", format_value(value))


def splits(config: LoraConfig) -> bool:
    """Return whether each weight is split into the adapter and a frozen remainder."""
    return config.init in (LoraInit.pissa, LoraInit.olora, LoraInit.qr)


def check_sharded_weights(config: LoraConfig) -> Iterator[Problem]:
    for key, value, is_plain, fix in (
        ("dora", config.dora, not config.dora, "method.dora=false"),
        ("init", config.init.value, config.init in (LoraInit.default, LoraInit.gaussian), "method.init=default"),
        ("frozen_adapters", config.frozen_adapters, not config.frozen_adapters, "method.frozen_adapters=[]"),
        ("target_parameters", config.target_parameters, not config.target_parameters, "method.target_parameters=[]"),
    ):
        if not is_plain:
            reason = "it is not held against a reference with slices of the weights"
            yield Problem(f"method.{key}", reason, f"{fix}, or {OFF}", format_value(value))


def adapted_experts_problem(config: LoraConfig) -> Problem | None:
    """Return the problem with a key that peft's adapters of stacked experts do not support; None if there is none."""
    for key, value, off in (("dropout", config.dropout, "0"), ("dora", config.dora, "false")):
        if value:
            reason = "the experts of this model are stacked weights, whose adapters cannot have it"
            fix = f"method.{key}={off}, or method.target_modules=[q_proj,k_proj,v_proj,o_proj]"
            return Problem(f"method.{key}", reason, fix, str(value).lower())
    return None
