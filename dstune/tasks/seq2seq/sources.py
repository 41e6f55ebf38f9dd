"""Turns sources and targets into tokens, in the same way for training, evaluation and `dstune generate`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from dstune.data.control import ControlTokens
from dstune.data.render import ChatRenderer
from dstune.data.special_tokens import end_of_target, first_special_tokens
from dstune.tasks.seq2seq.config import Seq2SeqConfig

PLACE = "{source}"
"""Placeholder of the source in `task.prompt`."""


def prompt_of(task: Seq2SeqConfig, source: str) -> str:
    """Return `task.prompt` with `source` filled in."""
    return task.prompt.replace(PLACE, source)


class Sources:
    """Sources and targets as tokens, for one tokenizer (of transformers); picklable.

    encoder_decoder: the encoder reads the prompt, and the decoder begins with the target. Else a decoder reads the prompt as a
    user's message (`renderer`, where the task and the tokenizer have a chat template), or as plain text.
    """

    def __init__(self, tokenizer: Any, task: Seq2SeqConfig, *, encoder_decoder: bool):
        self._tokenizer, self._task, self.encoder_decoder = tokenizer, task, encoder_decoder
        self._control = ControlTokens(tokenizer)
        uses_template = task.chat and bool(tokenizer.chat_template) and not encoder_decoder
        self.renderer = (
            ChatRenderer(tokenizer, task.template_date, task.chat_template_kwargs) if uses_template else None
        )
        self._end = end_of_target(tokenizer)

    def conversation(self, source: str, target: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return a row of `task=chat` in which a decoder answers the source with the target.

        arguments: those that the row gives to the chat template.
        """
        prompt = self.prompt_text(source)
        if self.renderer is None:
            return {"prompt": prompt + self._task.separator, "completion": target}
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
        return {"messages": messages, **({"chat_template_kwargs": arguments} if arguments else {})}

    def prompt_text(self, source: str) -> str:
        """Return the prompt of the task with `source` filled in."""
        return prompt_of(self._task, source)

    def prompt_ids(
        self, source: str, arguments: Mapping[str, Any] | None = None, target: str | None = None
    ) -> list[int]:
        """Return the tokens that the model reads before it generates the target. Raises RenderError if the chat template refuses
        them."""
        prompt = self.prompt_text(source)
        if self.encoder_decoder:
            return self.encoder_ids(prompt, sys.maxsize)[0]
        if self.renderer is not None:
            answer = None if target is None else {"role": "assistant", "content": target}
            return self.renderer.prompt_ids([{"role": "user", "content": prompt}], arguments=arguments, answer=answer)
        text = prompt + self._task.separator
        ids = self._control.ids(text)
        first = first_special_tokens(self._tokenizer)
        return ids if ids[: len(first)] == first else [*first, *ids]

    def encoder_ids(self, text: str, max_length: int) -> tuple[list[int], int]:
        """Return the tokens of a text with its special tokens, cut to `max_length`, and their number before the cut."""
        if self._control.first(text):
            ids, _, length = self._control.sequence([text], max_length)
            return ids, length
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > max_length:
            return self._tokenizer(text, truncation=True, max_length=max_length)["input_ids"], len(ids)
        return ids, len(ids)

    def target_ids(self, text: str, max_length: int) -> tuple[list[int], int]:
        """Return a target's tokens with its end token, cut to `max_length`, and their number before the cut. A cut target has no
        end token, which would teach the model to stop there."""
        if self._control.first(text):
            ids, _, _ = self._control.sequence([text], sys.maxsize)
        else:
            ids = self._tokenizer(text_target=text, verbose=False)["input_ids"]
        if self._end is not None and ids[-1:] != [self._end]:
            ids = [*ids, self._end]
        return ids[:max_length], len(ids)

    def shortened(self, source: str, tokens: int) -> str:
        """Return `source` without its last `tokens` tokens; empty if it has no more than that."""
        ids_and_places = self._tokenizer(source, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = ids_and_places["offset_mapping"][: max(0, len(ids_and_places["input_ids"]) - tokens)]
        return source[: spans[-1][1]].rstrip() if spans else ""
