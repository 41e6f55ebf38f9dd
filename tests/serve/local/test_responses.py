"""`/v1/responses` of the local engine by OpenAI's client, through the gateway: the answers of chat completions, with images too."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from dstune.serve.engines.http import Upstream
from dstune.serve.engines.local.engine import CHAT, RESPONSE
from dstune.serve.store.tables import AnswerRow
from tests.serve.local.test_images import FAULTS, QUESTION, url
from tests.support.local_engine import Engine
from tests.support.serving import Served, listening, served
from tests.support.sight import draw, save
from tests.unit.test_image_rows import file_of

PICTURE = url(file_of(draw(0)))
ASK: dict[str, Any] = {"model": "base", "max_output_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(save("qwen2_vl", tmp_path_factory.mktemp("responses") / "model"))
    yield engine
    engine.close()


Test = Callable[[openai.AsyncOpenAI, Served], Awaitable[None]]


def run(test: Test, engine: Engine, folder: Path) -> None:
    """Run a test with a client of a gateway in front of an engine."""

    async def main() -> None:
        routes = {"/v1/chat/completions": CHAT, "/v1/responses": RESPONSE}
        async with listening(engine.app) as place, served(folder, names=["base"], routes=routes) as found:
            stub = found.fleet.models["base"].engine
            assert stub.client is not None
            await stub.client.close()
            stub.client = Upstream(place)
            async with openai.AsyncOpenAI(base_url=f"{found.url}/v1", api_key=found.key, max_retries=0) as client:
                await test(client, found)

    asyncio.run(main())


def asked(*parts: dict[str, Any], role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": [*parts]}]


def image(address: str = PICTURE, **changes: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": address, **changes}


WORDS = {"type": "input_text", "text": QUESTION["text"]}


async def chatted(client: openai.AsyncOpenAI, *messages: dict[str, Any]) -> Any:
    """Return the answer of chat completions."""
    return await client.chat.completions.create(model="base", max_tokens=6, temperature=0, messages=[*messages])


def test_a_response_says_what_a_chat_completion_says(seeing: Engine, tmp_path: Path) -> None:
    system = {"role": "system", "content": "w3"}
    chat_image = {"type": "image_url", "image_url": {"url": PICTURE}}

    async def test(client: openai.AsyncOpenAI, found: Served) -> None:
        plain = await client.responses.create(**ASK, input="w1 w2", instructions="w3")
        chat = await chatted(client, system, {"role": "user", "content": "w1 w2"})
        assert plain.output_text == chat.choices[0].message.content and plain.instructions == "w3"
        assert (plain.usage.input_tokens, plain.usage.output_tokens) == (
            chat.usage.prompt_tokens,
            chat.usage.completion_tokens,
        )
        assert (plain.status, plain.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        shown = await client.responses.create(**ASK, input=asked(image(detail="auto"), WORDS))
        content = [chat_image, QUESTION]
        chat = await chatted(client, {"role": "user", "content": content})
        assert shown.output_text == chat.choices[0].message.content != plain.output_text
        assert shown.usage.input_tokens == chat.usage.prompt_tokens
        # The conversation goes on with what was answered, as the client holds it.
        said = [entry.model_dump() for entry in shown.output]
        again = [*asked(image(), WORDS), *said, {"role": "user", "content": "w5"}]
        longer = await client.responses.create(**ASK, input=again)
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": shown.output_text}]
        chat = await chatted(client, *turns, {"role": "user", "content": "w5"})
        assert longer.output_text == chat.choices[0].message.content
        assert longer.usage.input_tokens == chat.usage.prompt_tokens > shown.usage.input_tokens

    run(test, seeing, tmp_path)


def test_a_stream_of_a_response(seeing: Engine, tmp_path: Path) -> None:
    async def test(client: openai.AsyncOpenAI, found: Served) -> None:
        plain = await client.responses.create(**ASK, input=asked(image(), WORDS))
        events = [
            event async for event in await client.responses.create(**ASK, input=asked(image(), WORDS), stream=True)
        ]
        assert [event.sequence_number for event in events] == [*range(len(events))]
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
        assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
        assert set(kinds[4:-4]) == {"output_text.delta"}
        assert "".join(event.delta for event in events[4:-4]) == plain.output_text == events[-4].text
        final = events[-1].response
        assert (final.output_text, final.usage, final.status) == (plain.output_text, plain.usage, plain.status)
        assert (plain.status, plain.output[0].status, plain.incomplete_details) == ("completed", "completed", None)
        assert {final.id} == {event.response.id for event in events[:2]} != {plain.id}
        # The client's own reader, which puts the events together.
        async with client.responses.stream(**ASK, input=asked(image(), WORDS)) as stream:
            async for _ in stream:
                pass
            assert (await stream.get_final_response()).output_text == plain.output_text
        await found.gateway.recorder.flush()
        with found.gateway.database.session() as session:
            counted = {(row.tokens, row.input_tokens) for row in session.query(AnswerRow)}
        assert counted == {(plain.usage.total_tokens, plain.usage.input_tokens)}

    run(test, seeing, tmp_path)


REFUSED = {
    "address": (asked(image("https://example.org/a.png")), "is an address, and nothing is fetched for a request"),
    "path": (asked(image("/etc/passwd")), "must be a data URL of an image in base64"),
    "small": (asked(image(detail="low")), "detail must be 'auto' or 'high'"),
    "file": (asked({"type": "input_image", "file_id": "file-1"}), "file_id names a file, and none is kept"),
    "answer": (asked(image(), role="assistant"), "of the assistant shows an image"),
    "sound": (asked({"type": "input_audio", "data": "AAAA"}), "unknown type or role 'input_audio'"),
    "bomb": (asked(image(url(FAULTS["bomb"][0]))), "Invalid input: image 1 .*decompression bomb"),
    "cut off": (asked(image(), image(url(FAULTS["cut off"][0]))), "Invalid input: image 2 is no whole image"),
    "many": (asked(*[image()] * 257), "Invalid input: the row holds 257 images"),
    "long": ("w1 " * 600, "This model takes 512 tokens"),
}


def test_what_a_chat_completion_refuses_is_refused(seeing: Engine, tmp_path: Path) -> None:
    async def test(client: openai.AsyncOpenAI, found: Served) -> None:
        for name, (given, reason) in REFUSED.items():
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError, match=reason) as error:
                    await client.responses.create(**ASK, input=given, stream=stream)
                assert error.value.body["param"] == "input", name

    run(test, seeing, tmp_path)
