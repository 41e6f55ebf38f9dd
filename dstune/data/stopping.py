"""Find the tokens that end a model's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstune.core.errors import UserError
from dstune.data.render import ChatRenderer


def stop_token_ids(tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> list[int]:
    """Return the tokenizer's end-of-text token, and the tokens with which its chat template ends an assistant's turn.

    They differ in many chat models (Llama 3: `<|end_of_text|>` and `<|eot_id|>`); a model that stops only at the former
    continues with the user's next message.

    arguments: the run's template arguments, if they are not built into the template.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        try:
            stops = ChatRenderer(tokenizer, None, arguments).stops
        except UserError:
            return ids  # the template is not for conversations of user and assistant
        # A turn may end with plain text (a line break), which the answer itself may contain.
        ids += tokenizer.convert_tokens_to_ids([*stops.tokens, *stops.supplied.values()])
    return sorted(set(ids))
