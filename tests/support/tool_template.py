"""A chat template with tools for a word-level tokenizer, in which a whole call is one word."""

from __future__ import annotations

TEMPLATE = (
    "{% if tools %}<|im_start|> tools {% for tool in tools %} {{ tool.function.name }} {% endfor %} <|im_end|> {% endif %}"
    "{% for message in messages %} <|im_start|> {{ message.role }} {{ message.content or '' }}"
    '{% for call in message.tool_calls or [] %} <tool_call>{"name":"{{ call.function.name }}","arguments":'
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}}</tool_call>"
    "{% endfor %} <|im_end|> {% endfor %}{% if add_generation_prompt %} <|im_start|> assistant {% endif %}"
)


def call_of(name: str) -> str:
    """Return the word that calls a tool without arguments."""
    return f'<tool_call>{{"name":"{name}","arguments":{{}}}}</tool_call>'
