"""task=chat: conversations; the loss is on the assistant's tokens, the end of each turn included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dstune.protocols import task
from dstune.tasks._language import LanguageTask
from dstune.tasks.chat import rows as rows
from dstune.tasks.chat.config import ChatConfig, Reasoning

if TYPE_CHECKING:
    from dstune.data.render import Choice
    from dstune.data.tokenize.sample import Encoder


@task
class Chat(LanguageTask):
    Config = ChatConfig
    config: ChatConfig

    conversational = True
    sees_images = True
    splits_conversations = True
    prefix_positions_ok = True
    tensor_parallel = True
    one_pass = True
    formats: ClassVar[tuple[str, ...]] = (
        "messages",
        "conversations",
        "prompt_completion",
        "alpaca",
        "dolly",
        "gemini",
        "xlam",
    )
    frozen_keys: ClassVar[tuple[str, ...]] = ("template_date",)
    has_predictions = False
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
    ranked_by: ClassVar[tuple[tuple[str, bool], ...]] = (("bits_per_byte", True), ("loss", True))

    @property
    def needs_answer(self) -> bool:
        return not self.config.train_on_prompt

    @property
    def every_position_is_a_target(self) -> bool:
        return self.config.train_on_prompt

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.data.tokenize.conversations import ChatEncoder

        config = self.config
        return ChatEncoder(
            tokenizer,
            config.template_date,
            fmt,
            max_length,
            train_on_prompt=config.train_on_prompt,
            arguments=config.chat_template_kwargs,
            choice=self._choice(),
        )

    def rewrite_template(self, tokenizer: Any) -> None:
        """Make the chat template of an export print reasoning in the form that the model was trained on."""
        from dstune.data.render import ChatRenderer

        if self.config.reasoning is Reasoning.inline:
            config = self.config
            ChatRenderer(
                tokenizer, config.template_date, config.chat_template_kwargs, self._choice()
            ).rewrite_template()

    def _choice(self) -> Choice:
        from dstune.data.render import Choice

        return Choice(
            self.config.turns.value,
            drop_reasoning=self.config.reasoning is Reasoning.drop,
            inlines_reasoning=self.config.reasoning is Reasoning.inline,
            reasoning_marks=tuple(self.config.reasoning_marks),
        )
