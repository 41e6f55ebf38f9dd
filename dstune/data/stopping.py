"""Which tokens end a model's answer."""

from __future__ import annotations

from typing import Any

from dstune.data.render import ChatRenderer, RenderError
from dstune.errors import UserError


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokenizer's end-of-text token, and the token with which its chat template ends an assistant's turn.

    The two differ in many chat models (Llama 3: `<|end_of_text|>` and `<|eot_id|>`); one that stops at the first only
    goes on to write the user's next message.
    """
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        found += _end_of_turn(tokenizer)
    return sorted(set(found))


def _end_of_turn(tokenizer: Any) -> list[int]:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    try:
        text, spans = ChatRenderer(tokenizer, None).spans(messages)
    except (UserError, RenderError):
        return []  # a template for something else than a conversation of user and assistant
    last = tokenizer(text[: spans[-1][1]], add_special_tokens=False)["input_ids"][-1]
    # A turn may end with plain text (a line break), which the answer itself may contain.
    return [last] if last in tokenizer.added_tokens_decoder else []
