"""Prompts with images of the local engine: the answers of transformers, beside other sequences, and hostile images."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from dstune.config.schema import ModelConfig
from dstune.data.images import request, store
from dstune.inference.reference import CONVERSATIONS, base_reference
from dstune.serve.engines.base import Limits
from dstune.serve.engines.local.answers import ChatAnswers
from dstune.serve.engines.local.engine import LocalEngine
from dstune.serve.parity import Refused, prove
from dstune.serve.source import resolve
from tests.support.local_engine import Engine, body
from tests.support.sight import draw, save
from tests.unit.test_image_rows import PNG, animation, bomb, file_of

QUESTION = {"type": "text", "text": "w1 w2"}


def url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def shown(*contents: bytes | str) -> list[dict[str, Any]]:
    """Parts of a content that show these images, and ask something."""
    addresses = [one if isinstance(one, str) else url(one) for one in contents]
    return [*({"type": "image_url", "image_url": {"url": address}} for address in addresses), QUESTION]


def by_transformers(folder: Path, images: list[Any], count: int) -> list[int]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, backend="torchvision")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    messages = [{"role": "user", "content": [*({"type": "image"} for _ in images), QUESTION]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=4)
    found: list[int] = written[0, inputs["input_ids"].shape[1] :].tolist()
    return found[: found.index(4)] if 4 in found else found


FAMILIES = [
    "qwen2_vl",
    *(pytest.param(name, marks=pytest.mark.ci) for name in ("gemma3", "mistral3", "qwen3_5", "smolvlm")),
]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Path, Engine]]]:
    """A model of a family and an engine that serves it, in chunks that are smaller than an image."""
    made: dict[str, tuple[Path, Engine]] = {}

    def of(family: str) -> tuple[Path, Engine]:
        if family not in made:
            folder = save(family, tmp_path_factory.mktemp("sight") / family)
            made[family] = folder, Engine(folder, chunk=3)
        return made[family]

    yield of
    for _, engine in made.values():
        engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(seeing: Callable[[str], tuple[Path, Engine]], family: str) -> None:
    folder, engine = seeing(family)
    pictures = {
        "one": [draw(0)],
        "two": [draw(1, (60, 40)), draw(2)],
        "none": [],
    }
    expected = {name: by_transformers(folder, images, 6) for name, images in pictures.items()}

    async def together(client: Any) -> dict[str, list[int]]:
        """At once, so that sequences with images and without share a batch."""

        async def one(name: str) -> list[int]:
            asked = [{"role": "user", "content": shown(*map(file_of, pictures[name]))}]
            given = body(messages=asked, max_tokens=6, return_token_ids=True)
            answer = (await client.post("/v1/chat/completions", json=given)).json()
            return list(answer["choices"][0]["token_ids"])

        names = [*pictures, *pictures]
        return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))

    assert engine.run(together) == expected


@dataclass
class Asking(LocalEngine):
    """The local engine as the gateway has it, in front of an application in this process."""

    app: Any = None

    async def ask(self, method: str, path: str, body: Any) -> dict[str, Any]:
        transport = httpx2.ASGITransport(app=self.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
            answer = await client.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_as_it_is_is_proven_on_an_image(
    seeing: Callable[[str], tuple[Path, Engine]], family: str, tmp_path: Path
) -> None:
    """`--prove`: also where another vision tower is loaded, whose texts are equal."""
    folder, engine = seeing(family)
    (tmp_path / "reference.json").write_text(json.dumps(base_reference(ModelConfig(path=str(folder)))))
    source = replace(resolve("base", str(folder)), reference=tmp_path)
    asking = Asking(source, "base", tmp_path, tmp_path, Limits(), dtype="float32", app=engine.app)
    proof = asyncio.run(prove(asking, "base", source))
    assert (proof.status, proof.rows) == ("proven", len(CONVERSATIONS) + 1)
    assert proof.detail.startswith("1 of these rows show images; ") and proof.difference < 1e-4
    towers = [tensor for name, tensor in engine.model.model.named_parameters() if re.search("vis(ion|ual)", name)]
    originals = [tensor.detach().clone() for tensor in towers]
    try:
        with torch.no_grad():
            for tensor in towers:
                tensor.add_(torch.randn_like(tensor))
        with pytest.raises(Refused, match=rf"of row {len(CONVERSATIONS) + 1} of its reference"):
            asyncio.run(prove(asking, "base", source))
    finally:
        with torch.no_grad():
            for tensor, original in zip(towers, originals, strict=True):
                tensor.copy_(original)


def refused(engine: Engine, content: Any) -> str:
    answer = engine.chat(messages=[{"role": "user", "content": content}])
    assert answer["error"]["code"] in ("invalid_value", "context_length_exceeded"), answer
    return str(answer["error"]["message"])


FAULTS = {
    "bomb": (bomb(30_000, 30_000), "image 1 .*decompression bomb"),
    "large": (bomb(12_000, 12_000), "image 1 has 12,000 x 12,000 pixels, and none may have more"),
    "pixels that are none": (bomb(32, 32), "image 1 is no whole image"),
    "cut off": (file_of(draw(0, (200, 200)), "JPEG")[:900], "image 1 is no whole image"),
    "text": (b"<svg/>", "image 1 is none of JPEG, PNG"),
    "frames": (animation(), "image 1 has several frames"),
    "path": ("/etc/passwd", r"image 1 \('/etc/passwd'\) is a path; a data URL is read"),
    "address": ("http://127.0.0.1/a.png", "nothing is fetched"),
    "not base64": ("data:image/png;base64,A", "is a data URL that is not base64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hostile_image_is_refused_with_its_reason(seeing: Callable[[str], tuple[Path, Engine]], fault: str) -> None:
    content, reason = FAULTS[fault]
    _, engine = seeing("qwen2_vl")
    assert re.search(reason, refused(engine, shown(content)))
    assert re.search(reason.replace("image 1", "image 2"), refused(engine, shown(PNG, content)))


def test_images_together_are_bounded(
    seeing: Callable[[str], tuple[Path, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = seeing("qwen2_vl")
    assert "257 images" in refused(engine, shown(*[PNG] * 257))
    assert "This model takes 512 tokens" in refused(engine, shown(*[PNG] * 200))
    monkeypatch.setattr(request, "MAX_INPUT_BYTES", 1000)
    assert "more than 1,000 bytes" in refused(engine, shown(PNG))
    monkeypatch.setattr(store, "MAX_PIXELS_OF_ROW", 2000)
    assert "image 2 the images have 2,048 pixels together" in refused(engine, shown(PNG, PNG))


def test_what_images_of_prompts_that_wait_take_is_bounded(seeing: Callable[[str], tuple[Path, Engine]]) -> None:
    _, engine = seeing("qwen2_vl")

    async def many(client: Any) -> list[int]:
        asked = body(messages=[{"role": "user", "content": shown(PNG)}], max_tokens=30)
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=asked) for _ in range(8)))
        return sorted(answer.status_code for answer in answers)

    assert engine.run(many) == [200] * 8
    bound, engine.scheduler._max_image_bytes = engine.scheduler._max_image_bytes, 1
    pause = threading.Event()
    engine.scheduler.call(pause.wait)
    threading.Timer(1, pause.set).start()
    found = engine.run(many)
    engine.scheduler._max_image_bytes = bound
    assert set(found) == {200, 503} and found.count(200) in (1, 2)


def test_images_of_prompts_that_are_read_together_are_bounded(
    seeing: Callable[[str], tuple[Path, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before any of them waits to be computed, and no longer than until then."""
    _, engine = seeing("qwen2_vl")
    size = input_bytes(engine)
    monkeypatch.setattr(engine.scheduler, "_max_image_bytes", 3 * size)
    looked_at: list[int] = []
    plain = engine.app._reserve_image_bytes

    def counting(images: request.PromptImages) -> None:
        try:
            plain(images)
        finally:
            looked_at.append(sum(engine.app._pending_image_bytes.values()))

    monkeypatch.setattr(engine.app, "_reserve_image_bytes", counting)

    async def many(client: Any) -> list[int]:
        asked = body(messages=[{"role": "user", "content": shown(*[PNG] * 3)}], max_tokens=2)
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=asked) for _ in range(6)))
        return [answer.status_code for answer in answers]

    statuses = engine.run(many)
    assert set(statuses) == {200, 503} and 0 < max(looked_at) <= 3 * size
    assert not engine.app._pending_image_bytes


def input_bytes(engine: Engine) -> int:
    """Of what the model gets of an image."""
    images = request.PromptImages(engine.model.image_processor("base"), [PNG])
    images.measure(0)
    images.look(0)
    return images.bytes


def test_images_are_not_held_while_an_answer_is_written(
    seeing: Callable[[str], tuple[Path, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = seeing("qwen2_vl")
    asked = []
    plain = ChatAnswers.submit

    def submit(answers: ChatAnswers) -> None:
        asked.append(answers.image_inputs)
        plain(answers)
        assert answers.image_inputs is None

    monkeypatch.setattr(ChatAnswers, "submit", submit)
    assert engine.says(messages=[{"role": "user", "content": shown(PNG)}]) and asked[0] is not None


def test_what_the_engine_never_holds_is_refused_before_its_images_are_decoded(
    seeing: Callable[[str], tuple[Path, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = seeing("qwen2_vl")
    monkeypatch.setattr(engine.scheduler, "_max_cached_tokens", 10)
    monkeypatch.setattr(request, "decode", None)
    answer = engine.chat(messages=[{"role": "user", "content": shown(PNG)}], max_tokens=200)
    assert answer["error"]["code"] == "context_length_exceeded" and "this engine holds 10" in answer["error"]["message"]


def test_images_are_decoded_beside_the_event_loop(
    seeing: Callable[[str], tuple[Path, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = seeing("qwen2_vl")
    threads: list[str] = []
    for name in ("decode", "size_of", "content_of"):
        plain = getattr(request, name)

        def noting(*given: Any, plain: Any = plain) -> Any:
            threads.append(threading.current_thread().name)
            return plain(*given)

        monkeypatch.setattr(request, name, noting)
    assert engine.says(messages=[{"role": "user", "content": shown(PNG, PNG)}])
    assert threads == ["images"] * 6


def test_a_model_that_sees_nothing_says_so(engine: Engine) -> None:
    assert "they show an image; the model base sees none" in refused(engine, shown(PNG))
