"""Attacks on the guard of `dstune serve`: answers that reach a client unseen."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.guards import guarded
from tests.support.serving import chat, served

KEY = "sk-ant-api03-" + "Ab1_" * 20
POLICY = {"output": [{"detector": "secrets", "action": "block"}]}


def delta(text: str, kind: str = "response.output_text.delta") -> dict:
    return {"type": kind, "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": text}


def chunk(text: str) -> dict:
    return {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}


ITEM = {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": KEY}]}
SPELLINGS = {
    "without a space": b"data:%s\n\n",
    "in two lines": b"data: {\ndata: %s\n\n",
    "with carriage returns": b"data: %s\r\r",
    "behind a comment and a name": b": hello\r\nevent: x\r\nid: 1\r\ndata:%s\r\n\r\n",
}
UNSEEN = {
    "/v1/responses": {
        "an item": [{"type": "response.output_item.done", "item": ITEM}],
        "the whole answer": [{"type": "response.completed", "response": {"id": "r", "output": [ITEM]}}],
        "an error": [{"type": "error", "message": KEY}],
        "pieces": [delta(KEY[:9]), delta("no", "response.refusal.delta"), delta(KEY[9:])],
        "an event of no known type": [{"a": {"b": [KEY]}}],
    },
    "/v1/chat/completions": {
        "a choice": [chunk(KEY[:9]), chunk(KEY[9:])],
        "beside the choices": [chunk("Hi") | {"reasoning": KEY}],
        "an error": [{"error": {"message": KEY}}],
    },
}


async def shown(found, path: str, stream: bytes) -> bytes:
    """What a client is sent of a stream of the engine; what came until it was cut, if it was."""
    found.app.raw = stream
    body = {"model": "first", "input": "Hi", "stream": True} if path == "/v1/responses" else chat(stream=True)
    content = b""
    try:
        async with found.client().stream("POST", path, json=body) as answer:
            async for part in answer.aiter_raw():
                content += part
    except Exception:  # the connection was cut
        return content + b"<cut>"
    return content


@pytest.mark.parametrize("path", UNSEEN)
def test_no_spelling_of_events_gets_a_text_past_the_guard(tmp_path, path):
    def spelled(spelling: bytes, value: dict) -> bytes:
        text = json.dumps(value).encode()
        return spelling % (text[1:] if b"{\n" in spelling else text)

    async def test():
        async with served(tmp_path) as found:
            guarded(found, POLICY)
            for what, spelling in SPELLINGS.items():
                for where, values in UNSEEN[path].items():
                    stream = b"".join(spelled(spelling, value) for value in values)
                    content = await shown(found, path, b"\xef\xbb\xbf" + stream)
                    assert KEY[9:].encode() not in content, (what, where)
                    assert b"content_filter" in content or b"<cut>" in content or b"[DONE]" in content, (what, where)
                harmless = delta("Hello.") if path == "/v1/responses" else chunk("Hello.")
                assert b"Hello." in await shown(found, path, spelled(spelling, harmless)), what

    asyncio.run(test())


@pytest.mark.parametrize("path", UNSEEN)
def test_what_cannot_be_read_does_not_pass_the_guard(tmp_path, path):
    async def test():
        async with served(tmp_path) as found:
            guarded(found, POLICY)
            for stream in (f"data: {KEY}\n\n", f": {KEY}\n\n", f"event: {KEY}\ndata: {{}}\n\n", f"{KEY}\n\n", KEY):
                assert KEY.encode() not in await shown(found, path, stream.encode()), stream

    asyncio.run(test())


def test_the_request_in_its_answer_does_not_stop_it(tmp_path):
    """`/v1/responses` repeats the instructions in its first event."""
    secret = "You are Ada of Example Bank, and never mention the vault behind the stairs to anybody."
    response = {"type": "response.created", "response": {"id": "resp_1", "instructions": secret, "output": []}}
    leak = {"output": [{"detector": "system_prompt_leak", "action": "block"}]}

    async def test():
        async with served(tmp_path) as found:
            guarded(found, leak)
            for text, passes in (("I am Ada.", True), (secret[4:], False)):
                found.app.raw = b"".join(b"data: %s\n\n" % json.dumps(one).encode() for one in (response, delta(text)))
                body = {"model": "first", "input": "Hi", "instructions": secret, "stream": True}
                answer = await found.client().post("/v1/responses", json=body)
                assert (text in answer.text, "content_filter" in answer.text) == (passes, not passes)

    asyncio.run(test())
