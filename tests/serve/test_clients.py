"""The official clients, unmodified, against the gateway."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import openai
import pytest

from tests.support.serving import served

PROGRAM = Path(__file__).parents[1] / "support" / "npm_client.mjs"
ASK = {"model": "first", "messages": [{"role": "user", "content": "a b c"}]}


def test_python(tmp_path):
    async def test():
        async with served(tmp_path) as found:
            client = openai.AsyncOpenAI(base_url=f"{found.url}/v1", api_key=found.key, max_retries=0)
            assert [model.id async for model in client.models.list()] == ["first", "second"]
            assert (await client.models.retrieve("first")).id == "first"
            answer = await client.chat.completions.create(**ASK, n=1, seed=3, stop=["x"], user="u", temperature=0.5)
            assert answer.choices[0].message.content == "a b c"
            assert answer.usage.completion_tokens == 3
            stream = await client.chat.completions.create(**ASK, stream=True)
            assert "".join([chunk.choices[0].delta.content async for chunk in stream]) == "abc"
            async with client.chat.completions.with_streaming_response.create(**ASK, stream=True) as response:
                async for _ in response.iter_bytes(1):
                    break  # and leave
            for kind, changes in (
                (openai.BadRequestError, {"temperature": 9}),
                (openai.BadRequestError, {"store": True}),
                (openai.BadRequestError, {"extra_body": {"chat_template": "x"}}),
                (openai.NotFoundError, {"model": "nothing"}),
            ):
                with pytest.raises(kind) as caught:
                    await client.chat.completions.create(**ASK | changes)
                assert caught.value.request_id.startswith("req_")
                assert caught.value.body["message"]
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="no").models.list()
            await client.close()

    asyncio.run(test())


@pytest.mark.slow
def test_npm(tmp_path):
    folder = os.environ.get("DSTUNE_NPM", "")
    if shutil.which("node") is None or not (Path(folder) / "node_modules" / "openai").is_dir():
        pytest.skip("needs node, and DSTUNE_NPM=FOLDER after `npm install --prefix FOLDER openai`")

    async def test():
        async with served(tmp_path) as found:
            command = ["node", str(PROGRAM), folder, f"{found.url}/v1", found.key]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
            assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr

    asyncio.run(test())
