"""task=chat: conversations; the loss is on the assistant's tokens, the end of each turn included."""

from __future__ import annotations

from dstune.config.task_schema import ChatConfig
from dstune.protocols import task
from dstune.tasks._language import LanguageTask


@task
class Chat(LanguageTask):
    Config = ChatConfig
    config: ChatConfig

    conversational = True
    generates = True
    prefix_positions_ok = True
    unpackable = ""
    tensor_parallel = True
    few_shot = True
    formats = ("messages", "conversations", "prompt_completion", "alpaca")
    frozen_keys = ("template_date",)
    metrics = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
    ranked_by = (("bits_per_byte", True), ("loss", True))

    @property
    def every_position_is_a_target(self) -> bool:
        return self.config.train_on_prompt
