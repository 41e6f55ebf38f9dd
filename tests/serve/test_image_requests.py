"""Images in requests, as gateway, guard, log and engines take them, without a model."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import json
import re
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq
import pytest

from dstune.core.errors import UserError
from dstune.cycle.collect import _row
from dstune.guard.bodies import of_request
from dstune.monitor.conversations import Conversation
from dstune.monitor.server_logs import _conversation
from dstune.serve import options
from dstune.serve.engines.base import Engine, Limits
from dstune.serve.engines.llama_cpp import LlamaCppEngine
from dstune.serve.engines.special import SpecialTexts
from dstune.serve.engines.vllm import VllmEngine
from dstune.serve.errors import ApiError
from dstune.serve.fields import Chat, checked
from dstune.serve.gateway.output_bound import check_context
from dstune.serve.gateway.request_log import RequestLog
from dstune.serve.parity import prove
from tests.support.serving import stub_source, write_reference

CONTENT = b"\x89PNG the bytes of an image" * 100
URL = f"data:image/png;base64,{base64.b64encode(CONTENT).decode()}"
TEXT = {"type": "text", "text": "What is it?"}


def image(url: Any = URL, **beside: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **beside}}


def asked(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [*parts]}]}


def test_an_image_alone_stays_a_part_and_a_text_alone_becomes_one():
    found = checked(asked(image(detail="auto")), Chat, ["messages"])
    assert found["messages"] == [{"role": "user", "content": [image(detail="auto")]}]
    assert checked(asked(TEXT), Chat, ["messages"])["messages"] == [{"role": "user", "content": "What is it?"}]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            asked(image("https://example.org/a.png")),
            r"image_url.url is an address, and nothing is fetched for a request",
        ),
        (asked(image("file:///etc/passwd")), "is an address, and nothing is fetched"),
        (asked(image("/etc/passwd")), "must be a data URL of an image in base64"),
        (asked(image("data:text/html;base64,AAAA")), "must be a data URL of an image in base64"),
        (asked(image("data:image/png;base64,AA AA")), "must be a data URL of an image in base64"),
        (asked(image(detail="low")), "detail must be 'auto' or 'high': the model's processor chooses the size"),
        (asked({"type": "image_url", "image_url": URL}), "must be an object"),
        (asked(image(), role="assistant"), "has the unknown type or role 'image_url'"),
        (asked({"type": "input_audio", "input_audio": {}}), "unknown type or role 'input_audio'"),
    ],
)
def test_what_is_no_image_of_the_request_itself_is_refused(body: dict[str, Any], reason: str):
    with pytest.raises(ApiError, match=reason) as error:
        checked(body, Chat, ["messages"])
    assert error.value.status == 400 and URL[30:60] not in str(error.value)


def given(*parts: dict[str, Any]) -> dict[str, Any]:
    """A request to `/v1/responses`."""
    return {"input": [{"role": "user", "content": [*parts]}]}


INPUT_IMAGE = {"type": "input_image", "image_url": URL}
INPUT_TEXT = {"type": "input_text", "text": "What is it?"}


def test_an_image_has_no_characters_of_a_prompt(tmp_path):
    engine = VllmEngine(stub_source("b"), "b", tmp_path, tmp_path, Limits(), address="http://127.0.0.1:9")
    engine.context = 4
    check_context("/v1/chat/completions", asked(image(), TEXT), engine)
    check_context("/v1/responses", given(INPUT_IMAGE, INPUT_TEXT), engine)
    with pytest.raises(ApiError, match="messages has more"):
        check_context("/v1/chat/completions", asked(image(), {"type": "text", "text": "a" * 600}), engine)


def test_the_guard_reads_the_texts_beside_an_image():
    placed = of_request("/v1/chat/completions", asked(image(detail="auto"), TEXT, image("data:image/png;base64,AAAA")))
    assert [(one.place, one.text.text) for one in placed] == [(("messages", 0, "content", 1, "text"), "What is it?")]
    placed = of_request("/v1/responses", given(INPUT_IMAGE, INPUT_TEXT))
    assert [(one.place, one.text.text) for one in placed] == [(("input", 0, "content", 1, "text"), "What is it?")]


def test_control_tokens_are_looked_for_in_texts_alone():
    special = SpecialTexts(re.compile("AAAA"))
    special.refuse(asked(image("data:image/png;base64,AAAA"), TEXT))
    special.refuse(given(INPUT_IMAGE | {"image_url": "data:image/png;base64,AAAA"}))
    with pytest.raises(ApiError):
        special.refuse(asked(image(), {"type": "text", "text": "AAAA"}))


def test_the_log_has_the_digest_of_an_image(tmp_path):
    log = RequestLog(tmp_path, lambda text: text.replace("it", "***"))
    row = dict.fromkeys(("id", "response", "key", "model", "version", "status", "created"), "x") | {"user": None}
    log.add(row, "/v1/chat/completions", asked(image(), TEXT), b"{}", 5000)
    log.add(row, "/v1/responses", given(INPUT_IMAGE, INPUT_TEXT), b"{}", 5000)
    log.close()
    (file,) = tmp_path.glob("*.parquet")
    chat, response = map(json.loads, pq.read_table(file)["request"].to_pylist())
    digest = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    shown, text = chat["messages"][0]["content"]
    assert shown == {"type": "image_url", "image_url": {"url": digest, "bytes": len(CONTENT)}}
    assert text["text"] == "What is ***?"
    shown, text = response["input"][0]["content"]
    assert shown == {"type": "input_image", "image_url": digest, "bytes": len(CONTENT)}
    assert text["text"] == "What is ***?"


def test_a_logged_response_about_an_image_teaches_nothing():
    body = given(INPUT_IMAGE | {"image_url": "sha256:0"}, INPUT_TEXT) | {"instructions": "Be brief."}
    moment = datetime.datetime(2026, 1, 1)
    row = {"id": "a", "created": moment, "status": 200, "request": json.dumps(body), "answer": "{}"}
    said = replace(_conversation(row), correction="A cat")
    assert _row(said, 1.0, (), writes=True) == ("with an image, of which the log has the digest alone", None)
    body["input"][0]["content"].pop(0)
    said = replace(_conversation(row | {"request": json.dumps(body)}), correction="A cat")
    kind, taught = _row(said, 1.0, (), writes=True)
    roles = ["system", "user", "assistant"]
    assert kind == "correction" and [message["role"] for message in taught["messages"]] == roles


def test_vllm_gets_a_detail_of_each_image(tmp_path):
    engine = VllmEngine(stub_source("b"), "b", tmp_path, tmp_path, Limits(), address="http://127.0.0.1:9")
    engine._special = SpecialTexts(re.compile("nothing"))
    body = given(INPUT_IMAGE, INPUT_TEXT, INPUT_IMAGE | {"detail": "high"})
    sent = engine.outgoing("/v1/responses", body)["input"][0]["content"]
    assert sent == [INPUT_IMAGE | {"detail": "auto"}, INPUT_TEXT, INPUT_IMAGE | {"detail": "high"}]
    assert engine.outgoing("/v1/responses", {"input": "a"}) == {"input": "a", "store": False}


def test_a_logged_conversation_with_an_image_teaches_nothing():
    said = Conversation("a", ("What is it?",), fields=asked(image("sha256:0"), TEXT), answer="A cat", rating=1.0)
    assert _row(said, 1.0, (), writes=True) == ("with an image, of which the log has the digest alone", None)
    text = Conversation("a", ("What is it?",), fields=asked(TEXT), answer="A cat", rating=1.0)
    assert _row(text, 1.0, (), writes=True)[0] == "rating"


def test_llama_cpp_reads_no_images(tmp_path):
    engine = LlamaCppEngine(stub_source("b"), "b", tmp_path, tmp_path, Limits())
    engine._special = SpecialTexts(re.compile("nothing"))
    with pytest.raises(ApiError, match="this engine reads no images"):
        engine.outgoing("/v1/chat/completions", asked(image(), TEXT))


@pytest.mark.parametrize(("words", "is_right"), [("33554432", True), ("100", False), ("100000000", False)])
def test_how_large_a_body_may_be_is_an_option(words: str, is_right: bool):
    arguments = options.parsed(["model", "--max-body-bytes", words])
    if is_right:
        options.check(arguments)
        return
    with pytest.raises(UserError, match="--max-body-bytes"):
        options.check(arguments)


# -- parity

ROW = {
    "messages": [{"role": "user", "content": [image(), TEXT]}],
    "answer": "a cat",
    "prompt_ids": [1, 9, 9, 2],
    "target_ids": [5, 6, 7],
    "logprobs": [-1.0, -2.0, -3.0],
}
TEXT_ROW = {"messages": [{"role": "user", "content": "a"}], "prompt_ids": [1], "target_ids": [5], "logprobs": [-1.0]}


class Vllm:
    """The HTTP side of vLLM: a prompt with an image is rendered and scored as messages, without the end of the turn."""

    def __init__(self, ids: list[int], logprobs: list[float], scored: list[int] | None = None):
        self.ids, self.told, self.seen = ids, logprobs, []
        self.scored = [*ids, 5, 6] if scored is None else scored

    async def ask(self, method: str, path: str, body: Any) -> dict[str, Any]:
        self.seen.append((path, body))
        if path == "/tokenize":
            return {"tokens": [1]}
        if path == "/v1/completions":
            return {"choices": [{"prompt_logprobs": [None, {"5": {"logprob": -1.0}}]}]}
        assert path == "/v1/chat/completions" and body["return_token_ids"]
        if not body.get("continue_final_message"):
            return {"prompt_token_ids": self.ids}
        assert body["messages"][-1] == {"role": "assistant", "content": "a cat"}
        assert body["add_generation_prompt"] is False
        values = [0.0] * (len(self.ids) - 1) + self.told
        told = [{str(token): {"logprob": value}} for token, value in zip(self.scored[1:], values, strict=False)]
        return {"prompt_token_ids": self.scored, "prompt_logprobs": [None, *told]}


def proof_by_vllm(tmp_path, monkeypatch, server: Vllm, rows: list[dict[str, Any]]) -> Any:
    write_reference(tmp_path, rows)
    monkeypatch.setattr(Engine, "ask", lambda self, *given: server.ask(*given))
    source = stub_source("m", folder=tmp_path)
    engine = VllmEngine(source, "m", tmp_path, tmp_path, Limits(), address="http://127.0.0.1:9")
    engine.dtype = "float32"
    return asyncio.run(prove(engine, "m", source))


def test_vllm_is_proven_on_a_prompt_with_an_image(tmp_path, monkeypatch):
    found = proof_by_vllm(tmp_path, monkeypatch, Vllm([1, 9, 9, 2], [-1.0, -2.00001]), [ROW, TEXT_ROW])
    assert (found.status, found.rows) == ("proven", 2) and found.difference == pytest.approx(1e-5)
    assert found.detail.startswith("1 of these rows show images")


def test_vllm_with_other_pixels_or_another_number_of_places_is_refused(tmp_path, monkeypatch):
    from dstune.serve.parity import Refused

    with pytest.raises(Refused, match="is not the model that was trained"):
        proof_by_vllm(tmp_path, monkeypatch, Vllm([1, 9, 9, 2], [-1.0, -2.1]), [ROW, TEXT_ROW])
    with pytest.raises(Refused, match="another prompt than in training"):
        proof_by_vllm(tmp_path, monkeypatch, Vllm([1, 9, 9, 9, 2], [-1.0, -2.0]), [ROW, TEXT_ROW])


def test_a_template_that_writes_earlier_answers_otherwise_scores_nothing(tmp_path, monkeypatch):
    server = Vllm([1, 9, 9, 2], [-1.0, -2.0], scored=[1, 9, 9, 8, 5, 6])
    found = proof_by_vllm(tmp_path, monkeypatch, server, [ROW, TEXT_ROW])
    assert (found.status, found.rows) == ("proven", 1)
    assert found.detail.startswith("on text alone: the engine scored no prompt with images")
    assert proof_by_vllm(tmp_path, monkeypatch, server, [ROW]).status == "unproven"


def test_an_adapter_is_proven_by_the_rows_that_an_engine_scores(tmp_path, monkeypatch):
    """Though training changed those with images most."""
    write_reference(
        tmp_path,
        [*[ROW | {"base_logprobs": [-9.0, -9.0, -9.0]}] * 8, *[TEXT_ROW | {"base_logprobs": [-3.0]}] * 8],
    )

    async def score(self: Engine, model: str, prompt: Any, targets: Any) -> list[float]:
        return [-1.0 if model == "m" else -3.0]

    server = Vllm([1, 9, 9, 2], [-1.0, -2.0], scored=[1, 9, 9, 8, 5, 6])
    monkeypatch.setattr(Engine, "ask", lambda self, *given: server.ask(*given))
    monkeypatch.setattr(Engine, "logprobs", score)
    engine = VllmEngine(stub_source("m", folder=tmp_path), "base", tmp_path, tmp_path, Limits(), address="http://x")
    engine.dtype = "float32"
    proof = asyncio.run(prove(engine, "m", engine.source, "base"))
    assert (proof.status, proof.rows, proof.effect) == ("proven", 8, 2.0)


def test_an_engine_without_images_is_proven_on_text(tmp_path, monkeypatch):
    monkeypatch.setattr(VllmEngine, "reads_images", False)
    found = proof_by_vllm(tmp_path, monkeypatch, Vllm([], []), [ROW, TEXT_ROW])
    assert (found.status, found.rows) == (
        "proven",
        1,
    ) and "on text alone: the engine vllm reads no images" in found.detail
    assert "reads no images, and all rows" in proof_by_vllm(tmp_path, monkeypatch, Vllm([], []), [ROW]).detail
