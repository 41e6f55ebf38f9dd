"""Attacks by images: in rows, in files of the fine-tuning API and in requests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
import resource
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from dstune.data.images import request as images_of_a_prompt
from dstune.data.images import store
from dstune.data.images.places import with_images
from dstune.data.images.request import PromptImages
from dstune.data.images.store import ImageFiles, ImageWriter
from dstune.data.problems import RowError
from dstune.finetuning.row_images import ImageRows
from dstune.finetuning.row_problems import FieldError
from tests.support.local_engine import Engine, body
from tests.support.serving import Served, chat, run
from tests.support.sight import save
from tests.unit.test_image_rows import PNG, bomb, file_of

BOMBS = {"30,000 x 30,000": bomb(30_000, 30_000), "12,000 x 12,000": bomb(12_000, 12_000)}
"""Pillow refuses the first by itself, and warns of the second, which is 432 MB in memory."""
TEXT = {"type": "text", "text": "Who?"}
ANSWER = {"role": "assistant", "content": "Yes"}


def url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def row_of(*addresses: str) -> dict[str, Any]:
    """A row, or a request to chat completions, that shows these images."""
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    return {"messages": [{"role": "user", "content": [*parts, TEXT]}, ANSWER]}


def prompt(*contents: bytes, expansion: Any = lambda width, height: "") -> PromptImages:
    """The images of a request to the local engine, with a processor that makes 2^28 bytes of each."""
    processor: Any = SimpleNamespace(
        expansion=expansion, inputs=lambda images: {}, joined_bytes=lambda seen: len(seen) * 2**28
    )
    return PromptImages(processor, [*contents])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of rows, beside which lie no images."""
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    return tmp_path / "data" / "rows.jsonl"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_no_decoder_begins_with_a_bomb(name: str, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    reason = "decompression bomb|and none may have more than 89,478,485"
    bomb_url = url(BOMBS[name])
    with pytest.raises(RowError, match=reason):
        ImageWriter(rows.parent).take({"images": [bomb_url]}, rows)
    with pytest.raises(RowError, match=reason):
        prompt(BOMBS[name]).measure(0)
    with pytest.raises(FieldError, match=reason):
        ImageRows().judge(row_of(bomb_url))


def test_many_images_are_no_bomb_together(rows: Path) -> None:
    """7 x 84 million pixels: each is allowed."""
    large = bomb(9_000, 9_330)
    with pytest.raises(RowError, match="the images have 587,790,000 pixels together"):
        ImageWriter(rows.parent).take({"images": [large] * 7}, rows)
    with pytest.raises(RowError, match="image 7 the images have 587,790,000 pixels together"):
        prompt(*[large] * 7).measured()
    with pytest.raises(FieldError, match="one image too many: a row may have 10"):
        ImageRows().judge(row_of(*[url(PNG)] * 11))


def test_what_a_model_gets_of_small_files_is_bounded() -> None:
    """Some processors give every image the size of the largest."""
    images = prompt(*[PNG] * 5).measured()
    for number in range(4):
        images.look(number)
    with pytest.raises(RowError, match=r"more than 1,073,741,824 bytes as the model takes them"):
        images.look(4)


def test_an_image_that_lies_about_its_size_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place in the prompt has as many tokens as its head says."""
    images = prompt(PNG).measured()
    monkeypatch.setattr("dstune.data.images.request.decode", lambda content: Image.new("RGB", (4000, 4000)))
    with pytest.raises(RowError, match="has 4000 x 4000 pixels, and says that it has another number"):
        images.look(0)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_truncated_image_ends_its_row_and_nothing_else(kind: str, rows: Path) -> None:
    cut = file_of(NOISE, kind)[:-400]

    def request() -> None:
        images = prompt(cut).measured()
        images.look(0)

    def row() -> None:
        """Some formats show it when the row is prepared, others in its batch."""
        writer = ImageWriter(rows.parent)
        writer.take({"images": [cut]}, rows)
        writer.finish()
        files = ImageFiles.of(rows.parent)
        assert files is not None
        files.image(0)

    for reads in (request, row):
        with pytest.raises(RowError, match=r"is no whole image|or not whole"):
            reads()


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PPM", "svg"])
def test_no_other_decoder_is_reached(kind: str, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has forty of them; that of EPS runs Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: pytest.fail("a program of PostScript runs"))
    content = b'<svg xmlns="http://www.w3.org/2000/svg"/>' if kind == "svg" else file_of(NOISE, kind)
    for read in (
        lambda: ImageWriter(rows.parent).take({"images": [url(content)]}, rows),
        lambda: prompt(content).measure(0),
        lambda: store.decode(content),
    ):
        with pytest.raises(RowError, match=r"is none of JPEG, PNG|is no whole image: cannot identify"):
            read()
    with pytest.raises(FieldError, match="is none of JPEG, PNG, WEBP"):
        ImageRows().judge(row_of(url(content)))


PLACES = {
    "relative": "../secret.png",
    "absolute": "{root}/secret.png",
    "address": "file://{root}/secret.png",
    "escaped": "file:///..%2F..%2F..{root}/secret.png",
    "link": "link.png",
    "link to a folder": "folder/secret.png",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_row_reads_no_file_outside_of_its_folder(name: str, rows: Path) -> None:
    root = rows.parent.parent
    (rows.parent / "link.png").symlink_to(root / "secret.png")
    (rows.parent / "folder").symlink_to(root)
    with pytest.raises(RowError, match="lies outside of"):
        ImageWriter(rows.parent).take({"images": [PLACES[name].format(root=root)]}, rows)


def test_a_request_reads_no_file_at_all(rows: Path) -> None:
    for place in (str(rows.parent.parent / "secret.png"), "secret.png", f"file://{rows.parent.parent}/secret.png"):
        with pytest.raises(RowError, match="is a path; a data URL is read"):
            PromptImages(SimpleNamespace(), [place]).measure(0)  # type: ignore[arg-type]


def test_a_row_holds_no_more_images_than_it_may() -> None:
    most = with_images(_places(256), None, sees="")
    assert len(most["images"]) == 256
    with pytest.raises(RowError, match="257 images, and no row may have more than 256"):
        with_images(_places(257), None, sees="")


def _places(count: int) -> dict[str, Any]:
    places = [{"type": "image", "image": PNG} for _ in range(count)]
    return {"messages": [{"role": "user", "content": [*places, TEXT]}, ANSWER]}


def test_no_address_is_fetched_for_an_image(tmp_path: Path) -> None:
    """A client could have the server ask machines that only the server reaches."""
    with socket.create_server(("127.0.0.1", 0)) as inside:
        inside.setblocking(False)
        address = f"http://127.0.0.1:{inside.getsockname()[1]}/latest/meta-data"
        forms = (
            address,
            address.replace("http", "HTTP", 1),
            f" {address}",
            "//169.254.169.254/a",
            "gopher://127.0.0.1/a",
        )

        async def test(found: Served) -> None:
            client = found.client()
            for form in forms:
                shown: dict[str, Any] = {"type": "image_url", "image_url": {"url": form}}
                asked = {"model": "first", "messages": [{"role": "user", "content": [shown, TEXT]}]}
                parts = [{"type": "input_image", "image_url": form}]
                response = {"model": "first", "input": [{"role": "user", "content": parts}]}
                for path, body in (("/v1/chat/completions", asked), ("/v1/responses", response)):
                    answer = await client.post(path, json=body)
                    assert answer.status_code == 400, (path, form)
                    assert re.search("nothing is fetched|must be a data URL", answer.text)
            assert not found.app.seen

        run(test, tmp_path)
        for form in forms[:3]:
            with pytest.raises(RowError, match="nothing is fetched while a run trains"):
                with_images(_places(1), [form], sees="")
            with pytest.raises(FieldError, match="nothing is fetched for a job"):
                ImageRows().judge(row_of(form))
        with pytest.raises(BlockingIOError):  # nobody has called
            inside.accept()


@pytest.mark.parametrize("length", ["told", "in chunks"])
def test_an_image_of_a_hundred_megabytes_is_not_read(length: str, tmp_path: Path) -> None:
    head = b'{"model": "first", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "'
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield head + b"data:image/png;base64,"
        for _ in range(1600):
            sent += 1 << 16
            yield b"A" * (1 << 16)
        yield b'"}}]}]}'

    async def test(found: Served) -> None:
        told = {"content-length": str(100 << 20)} if length == "told" else {}
        headers = {"content-type": "application/json", **told}
        with contextlib.suppress(httpx2.ReadError, httpx2.WriteError):  # it may close before the client reads why
            answer = await found.client().post("/v1/chat/completions", content=body(), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert not found.app.seen and sent < 40 << 20
        assert (await found.client().post("/v1/chat/completions", json=chat())).status_code == 200

    run(test, tmp_path)
    with pytest.raises(FieldError, match="has 11,534,336 bytes, and none may have more than 10,485,760"):
        ImageRows().judge(row_of(url(b"\x89PNG\r\n\x1a\n" + bytes((11 << 20) - 8))))


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG that repeats one of its scans."""
    whole = io.BytesIO()
    Image.new("RGB", (side, side), (9, 99, 199)).save(whole, "JPEG", progressive=True)
    content = whole.getvalue()
    begins = [at for at in range(len(content) - 1) if content[at : at + 2] == b"\xff\xda"]
    return content[: begins[-1]] + content[begins[-1] : -2] * count + content[-2:]


def tile() -> bytes:
    """A TIFF of 16 x 16 pixels in a tile of 26,000 x 26,000."""
    head = [(256, 3, 16), (257, 3, 16), (258, 3, 8), (259, 3, 1), (262, 3, 1), (277, 3, 1)]
    head += [(322, 4, 26_000), (323, 4, 26_000), (324, 4, 300), (325, 4, 26_000 * 26_000)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in head)
    return b"II*\0" + struct.pack("<IH", 8, len(head)) + entries + bytes(600)


@pytest.mark.parametrize("name", ["scans", "tile"])
def test_an_image_takes_no_more_time_or_memory_than_it_may(name: str) -> None:
    content = scans(5_000, 4_000) if name == "scans" else tile()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, own = time.monotonic(), time.process_time()
    with pytest.raises(RowError, match=r"or more than 2.5 GiB, to decode|no whole image"):
        store.decode(content)
    assert time.process_time() - own < 2, "this process does other things meanwhile"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime - children.ru_utime < 15 and time.monotonic() - began < 60
    assert store.decode(PNG).mode == "RGB", "the next image is decoded"


def test_a_small_image_of_others_is_decoded_beside_the_worst() -> None:
    worst = threading.Thread(target=_tried, args=(scans(5_000, 4_000),))
    store.decode(PNG)
    worst.start()
    time.sleep(0.5)
    began = time.monotonic()
    store.decode(PNG)
    seconds = time.monotonic() - began
    assert worst.is_alive() and seconds < 2
    worst.join()


def test_a_request_with_a_small_image_is_answered_beside_the_worst_of_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow image is decoded until the small one has been answered; three more of its key wait."""
    engine, is_answered = Engine(save("qwen2_vl", tmp_path / "sight")), threading.Event()
    slow, small = file_of(NOISE, "PNG"), file_of(NOISE.resize((8, 8)), "PNG")
    decode = images_of_a_prompt.decode

    def decode_slowly(content: bytes) -> Any:
        assert content != slow or is_answered.wait(60), "the small image waits for the slow one"
        return decode(content)

    monkeypatch.setattr(images_of_a_prompt, "decode", decode_slowly)

    async def ask(client: Any, key: str, content: bytes) -> int:
        messages = row_of(url(content))["messages"][:1]
        answer = await client.post("/v1/chat/completions", json=body(messages=messages, max_tokens=1, client=key))
        return int(answer.status_code)

    async def test(client: Any) -> list[int]:
        slow_answers = [asyncio.create_task(ask(client, "a", slow)) for _ in range(4)]
        await asyncio.sleep(1)
        small_answer = await asyncio.wait_for(ask(client, "b", small), 30)
        is_answered.set()
        return [small_answer, *await asyncio.gather(*slow_answers)]

    try:
        assert engine.run(test) == [200] * 5
    finally:
        is_answered.set()
        engine.close()


def _tried(content: bytes) -> None:
    with contextlib.suppress(RowError):
        store.decode(content)


def test_the_largest_image_with_transparency_is_decoded() -> None:
    whole = io.BytesIO()
    Image.new("RGBA", (9_400, 9_500), (9, 99, 199, 0)).save(whole, "PNG", compress_level=1)
    assert store.decode(whole.getvalue()).getpixel((9_399, 9_499)) == (255, 255, 255)
