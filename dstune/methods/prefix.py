"""method=prefix: trained keys and values in front of every layer's own (Li and Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.config.convert import format_value
from dstune.config.fields import setting
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.methods._peft import TrainedPrompt, linear
from dstune.methods._peft.config import AdapterConfig
from dstune.protocols import method, task_of

if TYPE_CHECKING:
    from dstune.planning.architecture import Architecture


@dataclass(frozen=True)
class PrefixConfig(AdapterConfig):
    """Trained keys and values in front of every layer's own (Li and Liang 2021, arXiv:2101.00190).

    Like `prompt`, but it acts in every layer. For decoders only.
    """

    name: str = "prefix"
    virtual_tokens: int = setting(20, at_least=1)
    """Length of the prefix."""
    projection_size: int | None = setting(None, at_least=1)
    """Train the prefix through a two-layer network of this width; if unset, train the prefix itself."""


@method
class Prefix(TrainedPrompt):
    Config = PrefixConfig
    config: PrefixConfig

    learning_rate = 1e-2

    peft_type = "PREFIX_TUNING"
    adapter_name = "prefix-tuning"
    renamed: ClassVar[dict[str, str]] = {"virtual_tokens": "num_virtual_tokens"}

    def check(self, run: RunConfig) -> Iterator[Problem]:
        yield from super().check(run)
        task = task_of(run.task)
        if task.has_head and task.prefix_positions_ok:  # other heads are already refused, with a fix that works
            reason = f"a prefix only works with models that predict tokens, but task={run.task.name} has a head instead"
            yield Problem("method", reason, "method=prompt, p_tuning or lora", self.name)
        if run.trainer.activation_checkpointing:
            reason = "the prefix is in the cache of keys and values, which checkpointed layers do not use"
            value = format_value(run.trainer.activation_checkpointing)
            yield Problem("trainer.activation_checkpointing", reason, "false, or method=lora", value)

    def _through_network(self) -> bool:
        return self.config.projection_size is not None

    def _parameters(self, model: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
        width = model.kv_heads * model.head_dim
        of_layers = model.layers * 2 * width
        size = self.config.projection_size
        if size is None:
            yield "embedding.weight", (self.config.virtual_tokens, of_layers)
        else:
            yield "embedding.weight", (self.config.virtual_tokens, width)
            yield from linear("transform.0", width, size)
            yield from linear("transform.2", size, of_layers)

    def settings(self, task_type: Any) -> Any:
        from dstune.models.peft_import import peft

        return peft.PrefixTuningConfig(
            num_virtual_tokens=self.config.virtual_tokens,
            prefix_projection=self.config.projection_size is not None,
            encoder_hidden_size=self.config.projection_size,
            task_type=task_type,
        )
