"""method=ia3: a trained scale for each key, value and feed-forward feature (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dstune.config.convert import format_value
from dstune.config.fields import setting
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.methods._peft import ModuleAdapter
from dstune.methods._peft.config import ModuleAdapterConfig
from dstune.protocols import method

if TYPE_CHECKING:
    import torch

    from dstune.planning.architecture import Architecture, Tensor

MODULES = {
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj", "down_proj"), ("down_proj",))),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (("q_proj", "v_proj", "down_proj"), ("down_proj",))
    ),
    **dict.fromkeys(("bert", "roberta"), (("key", "value", "output.dense"), ("output.dense",))),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "t5": (("k", "v", "wo"), ("wo",)),
    "bart": (("q_proj", "v_proj", "fc2"), ("fc2",)),
}
"""Modules that peft's IA3 scales by architecture, and those of them whose inputs it scales (constants of peft 0.21)."""


@dataclass(frozen=True)
class Ia3Config(ModuleAdapterConfig):
    """A trained scale for each key, value and feed-forward feature (Liu et al. 2022, arXiv:2205.05638).

    Use it for few rows, or for thousands of adapters on one model: it has a hundredth of LoRA's parameters and can be merged.
    """

    name: str = "ia3"
    target_modules: list[str] = setting([])
    """Module name endings that are scaled; peft's choice for the architecture when empty (llama: k_proj, v_proj, down_proj)."""
    feedforward_modules: list[str] = setting(
        [], example="[down_proj]", needs="method.target_modules=[k_proj,v_proj,down_proj]"
    )
    """Those of `target_modules` whose inputs are scaled instead of their outputs; peft's choice with them."""


@method
class Ia3(ModuleAdapter):
    Config = Ia3Config
    config: Ia3Config

    learning_rate = 1e-2

    peft_type = "IA3"
    adapter_name = "IA3"
    tensor_marks = (".ia3_l.",)

    def check(self, run: RunConfig) -> Iterator[Problem]:
        config = self.config
        if strange := set(config.feedforward_modules) - set(config.target_modules):
            reason = f"{', '.join(sorted(strange))} are not among method.target_modules"
            fix = "name them in both, or leave out both for peft's choice"
            yield Problem("method.feedforward_modules", reason, fix, format_value(config.feedforward_modules))
        yield from super().check(run)

    def _has_own_choice(self) -> bool:
        return True

    def added(self, model: Architecture) -> tuple[Tensor, ...]:
        """Return the tensors that the adapter adds: exact if the modules are known, otherwise a guess."""
        from dstune.planning.adapters import low_rank

        if self.config.target_modules or model.kind in MODULES:
            return tuple(self._scales(model))
        return tuple(low_rank(model, self.targets, 1, experts=False))

    def _scales(self, model: Architecture) -> Iterator[Tensor]:
        """Yield the scaling vectors: one number for each output of a module, for each input of a feed-forward module."""
        from dstune.planning.adapters import linear_modules
        from dstune.planning.architecture import Tensor

        if self.config.target_modules:
            chosen, feed_forward = self.config.target_modules, self.config.feedforward_modules
        else:
            chosen, feed_forward = map(list, MODULES[model.kind])
        for module, (outputs, inputs), layer in linear_modules(model, chosen):
            of_inputs = any(module.endswith(f".{ending}") for ending in feed_forward)
            shape = (1, inputs) if of_inputs else (outputs, 1)
            yield Tensor(f"{module}.ia3_l", shape, layer=layer)

    def merged_bias(self, module: Any, bias: torch.Tensor) -> torch.Tensor:
        return bias if module.is_feedforward else bias.float() * module.ia3_l["default"].flatten()

    def settings(self, common: dict[str, Any]) -> Any:
        from dstune.models.peft_import import peft

        chosen = {"feedforward_modules": self.config.feedforward_modules} if self.config.target_modules else {}
        return peft.IA3Config(**common, **chosen)
