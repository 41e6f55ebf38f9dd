"""A template that ends a turn with calls by no token that a server stops at: the advice is the one setting that helps."""

from __future__ import annotations

import re

import pytest
from unit.data_helpers import byte_tokenizer

from dstune.config.architectures import mark_stops
from dstune.data.render import ChatRenderer, RenderError

TEMPLATE = """\
{% if enable_thinking or thinking %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}result: {{ message.content }}
{% else %}<|im_start|>{{ message.role }}
{% if message.tool_calls %}{% for call in message.tool_calls %}{{ call.function | tojson }}<|eom_id|>{% endfor %}
{%- else %}{{ message.content }}<|im_end|>
{% endif %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Paris"}}}
MESSAGES = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]


def test_the_end_of_a_call_is_advised_for_the_generation_settings_and_trains():
    tokenizer = byte_tokenizer(TEMPLATE)
    with pytest.raises(RenderError, match="prints no end of a turn that calls tools") as caught:
        ChatRenderer(tokenizer, None).passages(MESSAGES)
    assert "chat_template_kwargs" not in str(caught.value)
    (token,) = re.findall(r"the id (\d+) of <\|eom_id\|> .* eos_token_id .* generation_config\.json", str(caught.value))
    assert int(token) == tokenizer.convert_tokens_to_ids("<|eom_id|>")
    mark_stops(tokenizer, [tokenizer.eos_token_id, int(token)])
    (passage,) = ChatRenderer(tokenizer, None).passages(MESSAGES)
    trained = [passage.text[place.start : place.end] for place in passage.places]
    assert [text.endswith(end) for text, end in zip(trained, ("<|eom_id|>", "<|im_end|>"), strict=True)] == [True, True]
