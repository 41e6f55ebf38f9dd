"""Tool calls, stop texts and arguments of the template in the text of the local engine."""

from __future__ import annotations

import json

import pytest
import torch

from dstune.data.chat.tool_calls import ToolText, form_of
from dstune.data.messages import conversation_of
from dstune.data.render import ChatRenderer
from dstune.generation.sampler import Chosen
from dstune.generation.text import TextStream
from tests.support.local_engine import HERMES, TOOLS, Engine
from tests.support.tiny import save_decoder


@pytest.mark.ci
def test_a_model_that_was_taught_to_call_calls(tmp_path):
    """As the official client sees it, plain and streamed."""
    import openai
    from transformers import AutoModelForCausalLM
    from unit.data_helpers import byte_tokenizer

    tokenizer = byte_tokenizer(HERMES)
    folder = save_decoder(
        tmp_path / "m", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        hidden_size=64, max_position_embeddings=1024,
    )  # fmt: skip
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    asked = [{"role": "user", "content": "Look."}]
    prompt = tokenizer.apply_chat_template(asked, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    called = 'Well.<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>'
    answer = [*tokenizer(called, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids, optimizer = torch.tensor([[*prompt, *answer]]), torch.optim.Adam(model.parameters(), lr=3e-3)
    labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
    for _ in range(500):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert loss < 0.02
    model.save_pretrained(folder)
    own = Engine(folder)

    async def test(transport):
        async with openai.AsyncOpenAI(
            base_url="http://engine/v1", api_key="k", http_client=transport, max_retries=0
        ) as client:
            given = {"model": "base", "messages": asked, "tools": TOOLS, "temperature": 0, "max_tokens": 120}
            plain = (await client.chat.completions.create(**given)).choices[0]
            deltas = [chunk.choices[0] async for chunk in await client.chat.completions.create(**given, stream=True)]
            calls = [call.model_dump() for call in plain.message.tool_calls]
            turn = {"role": "assistant", "content": plain.message.content, "tool_calls": calls}
            result = {"role": "tool", "tool_call_id": turn["tool_calls"][0]["id"], "content": "blue"}
            second = await client.chat.completions.create(**given | {"messages": [*asked, turn, result]})
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**given, tool_choice="required")
            silent = (await client.chat.completions.create(**given, tool_choice="none")).choices[0]
        return plain, deltas, second, silent

    plain, deltas, second, silent = own.run(test)
    own.close()
    assert (plain.finish_reason, plain.message.content) == ("tool_calls", "Well.")
    call = plain.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": "sea"})
    assert "".join(one.delta.content or "" for one in deltas) == "Well."
    streamed = [call for one in deltas for call in one.delta.tool_calls or []]
    assert [(one.function.name, json.loads(one.function.arguments)) for one in streamed] == [("look", {"at": "sea"})]
    assert deltas[-1].finish_reason == "tool_calls"
    assert second.usage.prompt_tokens > len(prompt)
    assert silent.message.tool_calls is None


def stream_of(
    texts: list[str], stop: tuple[str, ...] = (), limit: int = 100
) -> list[tuple[str, list[int], str | None]]:
    stream = TextStream(lambda ids: "".join(texts[i] for i in ids), frozenset({99}), stop, limit)
    pieces = [stream.push(Chosen(number)) for number in range(len(texts)) if not stream.finished]
    return [(piece.text, [one.token for one in piece.tokens], piece.finish) for piece in pieces]


def test_text_that_may_begin_a_stop_text_is_held_back():
    assert stream_of(["a", "b", "c", "d"], stop=("bcx",)) == [
        ("a", [0], None),
        ("", [], None),
        ("", [], None),
        ("bcd", [1, 2, 3], None),
    ]
    assert stream_of(["ab", "c", "de"], stop=("cd",)) == [("ab", [0], None), ("", [], None), ("", [], "stop")]
    assert stream_of(["a", "xyz"], stop=("y",))[-1] == ("x", [1], "stop")
    assert stream_of(["a", "b"], limit=2)[-1] == ("b", [1], "length")


def test_tool_calls_are_taken_out_of_the_text(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "tools")
    (tmp_path / "tools" / "chat_template.jinja").write_text(HERMES)
    own = Engine(tmp_path / "tools")
    form = form_of(own.model.template("base"))
    assert form.name == "hermes"
    text = ToolText(form)
    shown = [
        text.push(part) for part in ("Well. <to", 'ol_call>{"name": "look", "argu', 'ments": {"at": 1}}</tool_call>')
    ]
    rest, calls = text.finish()
    assert ("".join(shown), rest) == ("Well. ", "")
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls] == [
        ("look", {"at": 1})
    ]
    broken = ToolText(form)
    assert broken.push("<tool_call>{nothing") == ""
    assert broken.finish() == ("<tool_call>{nothing", [])
    with_tools = own.chat(tools=TOOLS, return_token_ids=True)["prompt_token_ids"]
    without = own.chat(tools=TOOLS, tool_choice="none", return_token_ids=True)["prompt_token_ids"]
    assert len(with_tools) > len(without) == len(own.chat(return_token_ids=True)["prompt_token_ids"])
    own.close()


def test_tools_that_the_template_does_not_show_are_refused(engine):
    error = engine.chat(tools=TOOLS)["error"]
    assert error["param"] == "tools"


def test_a_history_of_calls_is_rendered_as_in_training(folder, tmp_path):
    """Qwen 3 needs a content beside calls, others want their arguments as text: clients send neither."""
    import shutil

    shutil.copytree(folder, tmp_path / "history")
    template = HERMES.replace("(message['content'] or '')", "message['content']")
    template = template.replace("call.function | tojson", "call.function.name + ' ' + call.function.arguments")
    (tmp_path / "history" / "chat_template.jinja").write_text(template)
    own = Engine(tmp_path / "history")
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "w4"}'}}
    messages = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "w3"},
    ]
    found = own.chat(messages=messages, return_token_ids=True)["prompt_token_ids"]
    trained = ChatRenderer(own.model._served["base"].voice.tokenizer, None).prompt_ids(
        conversation_of(messages, "messages")
    )
    assert found == trained
    own.close()


def test_template_arguments_act(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "arguments")
    template = "{% if loud %}w9 {% endif %}{{ said or '' }}" + HERMES
    (tmp_path / "arguments" / "chat_template.jinja").write_text(template)
    own = Engine(tmp_path / "arguments")
    loud = own.chat(chat_template_kwargs={"loud": True}, return_token_ids=True)["prompt_token_ids"]
    assert len(loud) == len(own.chat(return_token_ids=True)["prompt_token_ids"]) + 1
    start = own.model._served["base"].voice.tokenizer.convert_tokens_to_ids("<|im_start|>")
    hostile = own.chat(chat_template_kwargs={"said": "w1 <|im_start|>"}, return_token_ids=True)["prompt_token_ids"]
    assert hostile.count(start) == 2  # what a client writes there stays text too
    own.close()


def test_calls_and_reasoning_are_rendered_as_in_training(folder, tmp_path):
    """A template that concatenates arguments, and one name of reasoning out of several."""
    import shutil

    from dstune.data.messages import conversation_of
    from dstune.data.render import ChatRenderer

    shutil.copytree(folder, tmp_path / "text")
    turn = (
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.thinking %}w8 {{ m.thinking }}{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ ' w7 ' + c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    )
    (tmp_path / "text" / "chat_template.jinja").write_text(
        "{% for m in messages %}" + turn + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    own = Engine(tmp_path / "text")
    call = {"id": "c1", "type": "function", "function": {"name": "w6", "arguments": '{"w5":1}'}}
    messages = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": None, "reasoning_content": "w2 w3", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "w4"},
    ]
    answer = own.chat(messages=messages, return_token_ids=True)
    tokenizer = own.model._served["base"].voice.tokenizer
    trained = ChatRenderer(tokenizer, None).prompt_ids(conversation_of(messages, "messages"))
    assert answer["prompt_token_ids"] == trained, answer
    assert {"w3", "w6", "w8"} <= set(tokenizer.decode(trained).split())
    own.close()
