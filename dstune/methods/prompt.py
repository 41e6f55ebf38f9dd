"""method=prompt: trained token embeddings in front of every row (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.config.fields import setting
from dstune.config.schema import RunConfig
from dstune.methods._peft import TrainedPrompt
from dstune.methods._peft.config import AdapterConfig
from dstune.protocols import method

if TYPE_CHECKING:
    from dstune.planning.architecture import Architecture


@dataclass(frozen=True)
class PromptConfig(AdapterConfig):
    """Trained token embeddings in front of every row (Lester et al. 2021, arXiv:2104.08691).

    Use it to serve one copy of a large model with a prompt for each task. Small models learn little by it.
    """

    name: str = "prompt"
    virtual_tokens: int = setting(20, at_least=1)
    """Length of the trained prompt; it comes on top of `data.max_length`."""
    init_text: str | None = None
    """Begin with the embeddings of this text, repeated or cut to the length; with those of random tokens when not given."""


@method
class Prompt(TrainedPrompt):
    Config = PromptConfig
    config: PromptConfig

    learning_rate = 1e-2

    peft_type = "PROMPT_TUNING"
    adapter_name = "prompt-tuning"
    renamed: ClassVar[dict[str, str]] = {"virtual_tokens": "num_virtual_tokens"}
    ours_alone = ("init_text",)

    @property
    def added_length(self) -> int:
        return self.config.virtual_tokens

    def _parameters(self, model: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "embedding.weight", self._embedding(model)

    def settings(self, task_type: Any) -> Any:
        from dstune.models.peft_import import peft

        return peft.PromptTuningConfig(num_virtual_tokens=self.config.virtual_tokens, task_type=task_type)

    def start(self, adapted: Any, run: RunConfig) -> None:
        from dstune.methods._peft.prompts import start_at_tokens

        start_at_tokens(adapted, self.config.virtual_tokens, self.config.init_text, run)
