"""Converts PyTorch's FSDP, as accelerate and transformers configure it, into the ZeRO stage and offload that keep the same memory.

The keys are those of transformers' `fsdp` and `fsdp_config`, and of accelerate's command line and file (`fsdp_` in front).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune.core.parsing import read_object
from dstune.importing.result import DIFFERENT, MEANINGLESS, NOT_SUPPORTED, Import
from dstune.importing.rules import Rule

STAGES = {
    **dict.fromkeys(("full_shard", "hybrid_shard", "1", "4"), 3),
    **dict.fromkeys(("shard_grad_op", "hybrid_shard_zero2", "2", "5"), 2),
    **dict.fromkeys(("no_shard", "3"), 1),
}
"""Lowest ZeRO stage that keeps no more on a rank than a sharding strategy of FSDP, by its name or number; without sharding every
rank keeps everything, of which stage 1 partitions the optimizer states."""
OPTIONS = ("offload", "auto_wrap")
"""Words of `fsdp` beside the strategy."""
OWN_WAY = (
    *("auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params", "backward_prefetch", "forward_prefetch"),
    *("use_orig_params", "sync_module_states", "cpu_ram_efficient_loading", "state_dict_type", "limit_all_gathers"),
    *("version", "xla", "xla_fsdp_settings", "xla_fsdp_grad_ckpt", "final_state_dict_type", "wrap_policy"),
)
"""Keys about how FSDP works, which decide nothing about memory that ZeRO does not decide itself."""
MEMORY = ("offload_params", "sharding_strategy", "reshard_after_forward", "activation_checkpointing")
"""Keys about what is kept where."""


def partition(imported: Import, value: Any) -> None:
    """Choose the ZeRO stage and offload of all keys of FSDP together: the rule of `fsdp`, `fsdp_config` and each memory key."""
    settings = _settings(imported)
    words = _words(imported.get("fsdp"))
    unknown = [word for word in words if word not in (*STAGES, *OPTIONS)]
    strategy = str(settings.get("sharding_strategy", "")).lower()
    if strategy and strategy not in STAGES:
        unknown.append(strategy)
    if unknown:
        imported.refuse(
            f"unknown sharding of FSDP: {', '.join(unknown)}", "zero=stage2, zero=stage3 or zero=stage3_offload"
        )
        return
    if not words and not settings:
        return  # fsdp: false
    stages = [STAGES[word] for word in (*words, strategy) if word in STAGES]
    stage = stages[-1] if stages else 3
    if (reshard := settings.get("reshard_after_forward")) is not None and not strategy:
        # FSDP 1 has a strategy here, FSDP 2 whether parameters are freed between the forward and the backward pass.
        stage = STAGES.get(str(reshard).lower(), 3 if _is_true(reshard) else 2)
    offload = "offload" in words or _is_true(settings.get("offload_params"))
    imported.choose("zero", "stage3_offload" if offload else f"stage{stage}")
    where = "parameters and optimizer states stay in host memory" if offload else "each rank keeps as much or less"
    imported.drop(f"DeepSpeed's ZeRO partitions instead of FSDP; {where}", DIFFERENT)
    if _is_true(settings.get("activation_checkpointing")):
        imported.put("trainer.activation_checkpointing", True)


def _settings(imported: Import) -> dict[str, Any]:
    """Return the settings in `fsdp_config` and in separate keys, by their names without `fsdp_`."""
    config = imported.get("fsdp_config") or {}
    if isinstance(config, str):
        file = Path(str(imported.raw["_file"])).parent / config
        config = read_object(file if file.is_file() else Path(config))
    if not isinstance(config, Mapping):
        if imported.current == "fsdp_config":
            imported.refuse("this is no readable file of settings", "give its content in place of its name")
        config = {}
    separate = {key: value for key, value in imported.raw.items() if key.startswith("fsdp_") and key != "fsdp_config"}
    settings = {str(key).removeprefix("fsdp_"): value for key, value in (*config.items(), *separate.items())}
    if imported.current == "fsdp_config" and (unknown := sorted(settings.keys() - {*OWN_WAY, *MEMORY})):
        imported.drop(f"this import does not know {', '.join(unknown)} in it", NOT_SUPPORTED)
    settings = {key: value for key, value in settings.items() if value not in (None, "")}
    return settings if _is_true(imported.get("use_fsdp", True)) else {}


def _words(value: Any) -> list[str]:
    if value is True:
        return ["full_shard"]
    words = value if isinstance(value, list) else str(value or "").replace(",", " ").split()
    return [str(word).lower() for word in words if str(word).lower() != "false"]


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")


def _own_way(imported: Import, value: Any) -> None:
    imported.drop("ZeRO partitions instead", MEANINGLESS)


TABLE: dict[str, Rule] = {
    **dict.fromkeys(("fsdp", "fsdp_config", "use_fsdp", *(f"fsdp_{key}" for key in MEMORY)), partition),
    **dict.fromkeys((f"fsdp_{key}" for key in OWN_WAY), _own_way),
}
