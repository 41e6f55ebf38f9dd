"""A model with a template for conversations with tools is served as transformers renders it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from dstune.data.named_templates import joined
from dstune.serve.source import chat_templates
from tests.support.serving import stub_source
from tests.support.tiny import save_decoder

LOOP = "{%- for m in messages %}{{ m.role }}: {{ m.content }}\n{%- endfor %}"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
MESSAGES = [{"role": "user", "content": " Hello\n"}, {"role": "assistant", "content": "Yes"}]


def rendered(template: str, tools) -> str:
    return render_jinja_template([MESSAGES], tools=tools, chat_template=template)[0][0]


@pytest.mark.parametrize("before", ["", "\n", "  ", "\n\n ", "{# why #}\n", "{%- set a = 1 %}\n"])
@pytest.mark.parametrize(
    "after", ["", "\n", "\n\n", "\n   ", "end", "{%- set b = 2 %}\n", "{{ messages|length }}\n \n"]
)
def test_joined_templates_render_as_each_of_them(before, after):
    templates = {
        "default": f"{before}plain {LOOP}{after}",
        "tool_use": f"{before}{{{{ tools[0].function.name }}}} {LOOP}{after}",
    }
    whole = joined(templates)
    assert rendered(whole, None) == rendered(templates["default"], None)
    assert rendered(whole, TOOLS) == rendered(templates["tool_use"], TOOLS)


def test_without_a_default_only_conversations_with_tools_are_rendered():
    whole = joined({"tool_use": LOOP})
    assert rendered(whole, TOOLS) == rendered(LOOP, TOOLS)
    with pytest.raises(Exception, match="with tools alone"):
        rendered(whole, None)


NAMED = {"default": "plain " + LOOP, "tool_use": "with tools " + LOOP, "rag": "unused"}


def older(folder: Path) -> None:
    """As the folders of older releases have it."""
    file = folder / "tokenizer_config.json"
    named = [{"name": name, "template": text} for name, text in NAMED.items()]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    for jinja in folder.rglob("*.jinja"):
        jinja.unlink()


@pytest.mark.parametrize("change", [lambda folder: None, older])
def test_engines_get_what_chooses_among_them(change, tmp_path):
    save_decoder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = NAMED
    tokenizer.save_pretrained(tmp_path)
    change(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == NAMED
    assert chat_templates(tmp_path) == NAMED
    assert stub_source("m", folder=tmp_path).template == joined(NAMED)
