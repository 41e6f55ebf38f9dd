"""Prompts of servers that render by code and not by Jinja. Run by the Python of an environment with vLLM, which brings
mistral-common, openai-harmony and DeepSeek's encoders.

    PYTHON code_renderers.py RENDERER < CONVERSATIONS > TEXTS

CONVERSATIONS: a JSON object of `{messages, tools, thinks}` by name, as a client sends them; thinks: whether the model is to think.
TEXTS: for each the prompt, or `{"error": ...}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def mistral(version: str) -> Callable[..., str]:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.v3(is_tekken=version == "v3-tekken")

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinks: bool) -> str:
        sent = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]
        request = ChatCompletionRequest(messages=sent, tools=tools)
        text: str = tokenizer.encode_chat_completion(request).text
        return text.replace("▁", " ").replace("<0x0A>", "\n")

    return render


def harmony() -> Callable[..., str]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
    from vllm.entrypoints.openai.parser.harmony_utils import (
        build_harmony_preamble,
        extract_instructions_from_messages,
        get_encoding,
        parse_chat_inputs_to_harmony_messages,
        render_for_completion,
    )

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinks: bool) -> str:
        harmony_tools = [ChatCompletionToolsParam(**tool) for tool in tools or []]
        sent = [{**message, "reasoning": message.get("reasoning_content")} for message in messages]
        instructions, messages_behind = extract_instructions_from_messages(sent)
        preamble = build_harmony_preamble(instructions=instructions, tools=harmony_tools or None)
        return str(
            get_encoding().decode(
                render_for_completion([*preamble, *parse_chat_inputs_to_harmony_messages(messages_behind)])
            )
        )

    return render


def deepseek(module: str) -> Callable[..., str]:
    import importlib

    encoder = importlib.import_module(f"vllm.tokenizers.{module}")

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinks: bool) -> str:
        sent = [dict(message) for message in messages]
        if tools:
            sent.insert(0, {"role": "system", "tools": tools})
        for message in sent:
            message["reasoning"] = message.get("reasoning_content")
        mode = "thinking" if thinks else "chat"
        text: str = encoder.encode_messages(sent, thinking_mode=mode, drop_thinking=sent[-1]["role"] == "user")
        return text

    return render


RENDERERS: dict[str, Callable[[], Callable[..., str]]] = {
    "mistral-v3": lambda: mistral("v3"),
    "mistral-v3-tekken": lambda: mistral("v3-tekken"),
    "harmony": harmony,
    "deepseek-v3.2": lambda: deepseek("deepseek_v32_encoding"),
    "deepseek-v4": lambda: deepseek("deepseek_v4_encoding"),
}


def main() -> None:
    render = RENDERERS[sys.argv[1]]()
    result_by_name: dict[str, Any] = {}
    for name, conversation in json.load(sys.stdin).items():
        try:
            result_by_name[name] = render(conversation["messages"], conversation.get("tools"), conversation["thinks"])
        except Exception as error:
            result_by_name[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    print("\n" + json.dumps(result_by_name))


if __name__ == "__main__":
    main()
