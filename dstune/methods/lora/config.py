"""The keys of `method=lora`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dstune.config.fields import setting
from dstune.methods._peft.config import ModuleAdapterConfig


class LoraInit(Enum):
    default = "default"
    gaussian = "gaussian"
    pissa = "pissa"
    olora = "olora"
    qr = "qr"
    loftq = "loftq"


@dataclass(frozen=True)
class LoraConfig(ModuleAdapterConfig):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on frozen weights.

    The default: close to full fine-tuning with a fraction of its memory. The result is an adapter of a few MB that can be merged
    into the model. DoRA helps at low ranks, PiSSA and OLoRA speed up the start of training, and rank-stabilised scaling is for
    high ranks.
    """

    name: str = "lora"
    rank: int = setting(16, at_least=1)
    """Rank of the update matrices."""
    alpha: float = setting(32.0, above=0.0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of the adapters."""
    rank_pattern: dict[str, int] = setting({})
    """Other ranks by ending of the module's name, or regular expression: `{q_proj: 32, 'layers.0.mlp.*': 4}`."""
    alpha_pattern: dict[str, float] = setting({})
    """Other values of `alpha`, by module like `rank_pattern`."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed: direction by the adapter, a trained magnitude for each output (Liu et al. 2024, arXiv:2402.09353)."""
    init: LoraInit = LoraInit.default
    """First values: `default` and `gaussian` (B is zero), `pissa` (arXiv:2404.02948) and `olora` (arXiv:2406.01775), which
    split each weight into the adapter and a frozen rest, and with qlora `loftq` (arXiv:2310.08659), which makes up for what
    rounding took. `olora` has peft's first values, whose product is scaled; `qr` shares the scale out between both factors, so
    that the adapter begins as that part of the weight itself."""
    init_iterations: int | None = setting(None, at_least=1, example="16", needs="method.init=pissa")
    """With `init=pissa`: subspace iterations of a randomised SVD, for large models; the exact SVD when not given."""
    lr_ratio: float = setting(1.0, above=0.0)
    """LoRA+: the rate of B as a multiple of that of A, for example 16 (Hayou et al. 2024, arXiv:2402.12354)."""
    target_parameters: list[str] = setting([])
    """Stacked experts that get an adapter beside `target_modules`, by ending of the weight's name:
    `[experts.gate_up_proj, experts.down_proj]` for gpt-oss. Experts whose names peft knows (Qwen 3 MoE, Mixtral) get theirs by
    `all-linear`."""
    frozen_adapters: list[str] = setting([])
    """Finished LoRA adapters (exports or runs) on which the new one is trained: the export holds their sum."""
