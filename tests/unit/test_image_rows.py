"""Images of rows: the conventions of several tools, the files that they name, and everything that may be wrong with one."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dstune.config.data_schema import DataConfig, OnBadRow
from dstune.core.errors import UserError
from dstune.data.bad_rows import BadRows
from dstune.data.chat.evidence import Kept, _pixels
from dstune.data.images import store
from dstune.data.images.expand import count_to, expand
from dstune.data.images.places import for_hash
from dstune.data.images.positions import three_positions
from dstune.data.images.processor import refusal
from dstune.data.images.store import ImageFiles, ImageWriter, decode, size_of
from dstune.data.preferences import as_chat
from dstune.data.problems import RowError
from dstune.data.rows import hash_of, normalise
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss
from dstune.tasks.reward.config import RewardConfig
from dstune.tasks.reward.predict import RewardQuestion
from tests.support.sight import draw

PLACE = {"type": "image"}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ANSWER = {"role": "assistant", "content": "Yes"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def file_of(image: Any, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


PNG = file_of(draw(0))
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()

# name: (columns of a row, its format, contents of its first message, what is shown)
CONVENTIONS: dict[str, tuple[dict[str, Any], str, list[Any], list[Any]]] = {
    "TRL": (
        {"messages": [user([PLACE, text("Who?")]), ANSWER], "images": ["a.png"]},
        "messages",
        [PLACE, text("Who?")],
        ["a.png"],
    ),
    "TRL, one image and no place": (
        {"messages": [user("Who?"), ANSWER], "image": {"bytes": PNG, "path": None}},
        "messages",
        [PLACE, text("Who?")],
        [PNG],
    ),
    "TRL, prompt and completion": (
        {"prompt": [user("Who?")], "completion": [ANSWER], "images": ["a.png", "b.png"]},
        "prompt_completion",
        [PLACE, PLACE, text("Who?")],
        ["a.png", "b.png"],
    ),
    "plain prompt and completion": (
        {"prompt": "Who?", "completion": "Yes", "image": "a.png"},
        "prompt_completion",
        [PLACE, text("Who?")],
        ["a.png"],
    ),
    "OpenAI": (
        {"messages": [user([text("Who?"), {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}]), ANSWER]},
        "messages",
        [text("Who?"), PLACE],
        [URL],
    ),
    "OpenAI, file beside the rows": (
        {"messages": [user([{"type": "image_url", "image_url": "a.png"}, text("Who?")]), ANSWER]},
        "messages",
        [PLACE, text("Who?")],
        ["a.png"],
    ),
    "transformers": (
        {"messages": [user([{"type": "image", "path": "a.png"}, text("Who?")]), ANSWER]},
        "messages",
        [PLACE, text("Who?")],
        ["a.png"],
    ),
    "LLaVA": (
        {
            "image": "coco/a.jpg",
            "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Yes"}],
        },
        "conversations",
        [PLACE, text("Who?")],
        ["coco/a.jpg"],
    ),
    "LLaMA-Factory": (
        {"messages": [user("<image>Who is left of <image>?"), ANSWER], "images": ["a.png", "b.png"]},
        "messages",
        [PLACE, text("Who is left of "), PLACE, text("?")],
        ["a.png", "b.png"],
    ),
    "LLaMA-Factory, v1": (
        {
            "messages": [
                user([{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "Who?"}]),
                {"role": "assistant", "content": [{"type": "text", "value": "Yes"}]},
            ]
        },
        "messages",
        [PLACE, text("Who?")],
        ["a.png"],
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "<image>Who?", "input": "", "output": "Yes", "images": ["a.png"]},
        "alpaca",
        [PLACE, text("Who?")],
        ["a.png"],
    ),
    "ms-swift": (
        {"query": "<image>Who?", "response": "Yes", "images": ["a.png"]},
        "prompt_completion",
        [PLACE, text("Who?")],
        ["a.png"],
    ),
    "a marker that somebody wrote": (
        {"messages": [user([PLACE, text("What is <image>?")]), ANSWER], "images": ["a.png"]},
        "messages",
        [PLACE, text("What is <image>?")],
        ["a.png"],
    ),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_each_convention_becomes_places_and_images(name: str) -> None:
    fields, fmt, content, shown = CONVENTIONS[name]
    row = normalise(fields, fmt, {}, ChatConfig())
    assert row["messages"][0]["content"] == content
    assert row["images"] == shown
    assert hash_of(row, 1) != hash_of({**row, "images": ["other.png"] * len(shown)}, 1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": [user("<image><image>Who?"), ANSWER], "images": ["a.png"]}, "1 image and 2 places for it"),
        ({"messages": [user([PLACE]), ANSWER], "images": ["a.png", "b.png"]}, "2 images and 1 place for them"),
        ({"messages": [user([PLACE]), ANSWER]}, "0 images and 1 place"),
        ({"messages": [user("Who?"), ANSWER], "images": ["HTTP://x.y/a.png"]}, "nothing is fetched"),
        (
            {"messages": [user([{"type": "image_url", "image_url": {"url": "https://x.y"}}]), ANSWER]},
            "nothing is fetched",
        ),
        ({"messages": [user("Who?"), ANSWER], "images": ["a.png"] * 257}, "257 images"),
    ],
)
def test_places_and_images_have_to_match(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        normalise(fields, "messages", {}, ChatConfig())


def test_a_task_that_sees_nothing_says_so() -> None:
    row = {"prompt": [user("Who?")], "chosen": [ANSWER], "rejected": [WORSE], "images": ["a.png"]}
    with pytest.raises(RowError, match="the row holds an image; task=reward reads none"):
        normalise(row, "preference", {}, RewardConfig())
    with pytest.raises(RowError, match="the row holds an image; task=causal_lm reads none"):
        normalise({"messages": [user([PLACE]), ANSWER], "images": ["a"]}, "messages", {}, CausalLmConfig())


WORSE = {"role": "assistant", "content": "No"}
OPENAI = {"type": "image_url", "image_url": {"url": URL}}

# name: (columns of a row of two answers, its format, what is shown)
PAIRS: dict[str, tuple[dict[str, Any], str, list[Any]]] = {
    "TRL": (
        {"images": ["a.png"], "prompt": [user([PLACE, text("Who?")])], "chosen": [ANSWER], "rejected": [WORSE]},
        "preference",
        ["a.png"],
    ),
    "TRL, whole conversations": (
        {
            "images": ["a.png"],
            "chosen": [user([PLACE, text("Who?")]), ANSWER],
            "rejected": [user([PLACE, text("Who?")]), WORSE],
        },
        "preference",
        ["a.png"],
    ),
    "TRL, texts": (
        {"image": "a.png", "prompt": "Who?", "chosen": "Yes", "rejected": "No"},
        "preference",
        ["a.png"],
    ),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "<image>Who?"}],
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": {"from": "gpt", "value": "No"},
            "images": ["a.png"],
        },
        "preference",
        ["a.png"],
    ),
    "ms-swift": (
        {"messages": [user("<image>Who?"), ANSWER], "rejected_response": "No", "images": ["a.png"]},
        "preference",
        ["a.png"],
    ),
    "OpenAI": (
        {
            "input": {"messages": [user([OPENAI, text("Who?")])]},
            "preferred_output": [ANSWER],
            "non_preferred_output": [WORSE],
        },
        "openai_preference",
        [URL],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_both_answers_are_to_the_images_of_the_prompt(name: str) -> None:
    fields, fmt, shown = PAIRS[name]
    row = normalise(fields, fmt, {}, PreferenceConfig())
    assert row == {
        "prompt": [user([PLACE, text("Who?")])],
        "chosen": [ANSWER],
        "rejected": [WORSE],
        "images": shown,
    }
    assert as_chat(row, "rejected") == {"messages": [user([PLACE, text("Who?")]), WORSE], "images": shown}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": ["a.png", "b.png"]}, "2 images and 1 place"),
        ({"images": []}, "0 images and 1 place"),
        ({"chosen": [ANSWER, user([PLACE]), ANSWER]}, "of a pair only the prompt may"),
        ({"chosen": [{"role": "assistant", "content": [PLACE]}]}, "models see images and write none"),
    ],
)
def test_images_of_pairs_that_do_not_match(changes: dict[str, Any], reason: str) -> None:
    row = {"images": ["a.png"], "prompt": [user([PLACE, text("Who?")])], "chosen": [ANSWER], "rejected": [WORSE]}
    with pytest.raises(RowError, match=reason):
        normalise(row | changes, "preference", {}, PreferenceConfig())


def test_judged_answers_have_images_too() -> None:
    kto = PreferenceConfig(loss=PreferenceLoss.kto)
    expected = {"messages": [user([PLACE, text("Who?")]), ANSWER], "desirable": True, "images": ["a.png"]}
    row = {"prompt": "<image>Who?", "completion": "Yes", "label": True, "images": ["a.png"]}
    assert normalise(row, "feedback", {}, kto) == expected
    row = {"messages": [user("<image>Who?"), ANSWER], "kto_tag": True, "images": ["a.png"]}
    assert normalise(row, "feedback_messages", {}, kto) == expected


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animation(kind: str = "GIF") -> bytes:
    stream = io.BytesIO()
    draw(0).save(stream, kind, save_all=True, append_images=[draw(1)])
    return stream.getvalue()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "notes.png").write_text("no image")
    return folder / "rows.jsonl"


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": ("b.png", r"image 1 \('b.png'\) is not there; data.image_folder names the folder"),
    "folder": (".", r"image 1 \('.'\) is no file"),
    "outside": ("../secret.png", "lies outside of .*; data.image_folder names"),
    "absolute": ("/etc/passwd", "lies outside of"),
    "link": ("link.png", "lies outside of"),
    "null": ("a\0.png", "is no path"),
    "text": ("notes.png", "is none of JPEG, PNG, .* or not whole"),
    "bomb": (bomb(30_000, 30_000), "decompression bomb"),
    "large": (bomb(12_000, 12_000), "12,000 x 12,000 pixels, and none may have more than 89,478,485"),
    "svg": ("data:image/svg+xml;base64,PHN2Zy8+", "is none of JPEG, PNG, .* or not whole"),
    "data": ("data:text/html;base64,PHN2Zy8+", "is a data URL of another kind"),
    "base64": ("data:image/png;base64,***", "is a data URL that is not base64"),
    "animation": (animation(), "has several frames; only still images"),
    "32 bits": (file_of(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "has 32 bits a pixel"),
    "up and down": (f"../data/../{'../' * 40}etc/passwd", "lies outside of"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_image_that_cannot_be_used_is_a_problem_of_its_row(name: str, rows: Path, tmp_path: Path) -> None:
    reference, reason = FAULTS[name]
    with pytest.raises(RowError, match=reason):
        ImageWriter(tmp_path).take({"images": [reference]}, rows)


def test_an_image_is_stored_once_and_read_again(rows: Path, tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    entry.mkdir()
    writer = ImageWriter(entry)
    photo = draw(1, (20, 10))
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by a quarter
    stream = io.BytesIO()
    photo.save(stream, "JPEG", exif=exif)
    row = writer.take({"images": ["a.png", PNG, URL, stream.getvalue(), "./a.png"]}, rows)
    assert [image["number"] for image in row["images"]] == [0, 0, 0, 1, 0]
    assert row["images"][3]["size"] == [10, 20]
    writer.finish()
    files = ImageFiles.of(entry)
    assert files is not None and len(files) == 2
    assert files.image(1).size == (10, 20)
    assert np.array_equal(np.asarray(files.image(0)), np.asarray(draw(0)))
    assert files.are_as_prepared()
    (rows.parent / "a.png").write_bytes(file_of(draw(2)))
    assert not files.are_as_prepared()
    with pytest.raises(RowError, match="is another one than when the rows were prepared"):
        files.image(0)


def test_an_image_that_is_cut_off_is_found_when_it_is_decoded(rows: Path, tmp_path: Path) -> None:
    whole = file_of(draw(0, (200, 200)), "JPEG")
    entry = tmp_path / "entry"
    entry.mkdir()
    writer = ImageWriter(entry)
    writer.take({"images": [whole[: len(whole) // 2]]}, rows)
    writer.finish()
    with pytest.raises(RowError, match="is no whole image"):
        ImageFiles(entry).image(0)


def test_a_grey_image_of_16_bits_keeps_its_shades() -> None:
    shades = np.array([[0, 300, 0x8000, 0xFFFF]], np.uint16)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(decode(file_of(Image.fromarray(shades), kind)))
        assert found[0, :, 0].tolist() == [0, 1, 0x80, 0xFF]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_is_that_of_the_turned_image(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    draw(0, (20, 10)).save(stream, kind, exif=exif)
    expected = (10, 20) if orientation > 4 else (20, 10)
    assert size_of(stream.getvalue()) == decode(stream.getvalue()).size == expected


def test_the_first_picture_of_a_photo_with_a_preview_is_read() -> None:
    stream = io.BytesIO()
    draw(0, (20, 10)).save(stream, "MPO", save_all=True, append_images=[draw(1, (4, 4))])
    assert Image.open(stream).n_frames == 2
    assert size_of(stream.getvalue()) == decode(stream.getvalue()).size == (20, 10)


def test_frames_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(self: Any) -> int:
        raise AssertionError("reads the whole file")

    for kind in ("GIF", "TIFF"):
        monkeypatch.setattr(type(Image.open(io.BytesIO(animation(kind)))), "n_frames", property(count))
        with pytest.raises(RowError, match="has several frames"):
            size_of(animation(kind))


def test_all_images_of_a_row_together_are_bounded(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_PIXELS_OF_ROW", 2 * 32 * 32)
    assert len(ImageWriter(tmp_path).take({"images": [PNG, "a.png"]}, rows)["images"]) == 2
    with pytest.raises(RowError, match="the images have 3,072 pixels together, and at most 2,048"):
        ImageWriter(tmp_path).take({"images": [PNG, "a.png", PNG]}, rows)


def test_of_two_rows_of_a_kind_the_one_with_small_images_is_proven() -> None:
    assert _pixels('{"images":[{"size":[3,4]},{"size":[10,10]}],"messages":[]}') == 112
    assert _pixels('{"messages":["\\"images\\""]}') == 0
    small, large, cut = Kept("", 0, False, False), Kept("", 1, False, True), Kept("", 2, True, False)
    assert small.is_better_than(large) and large.is_better_than(cut) and not small.is_better_than(small)


def test_a_snapshot_of_hugging_face_has_its_images_in_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    for folder in (snapshot / "images", blobs, tmp_path / "entry"):
        folder.mkdir(parents=True)
    (blobs / "5f").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (snapshot / "images" / "a.png").symlink_to(Path("../../../blobs/5f"))
    (snapshot / "out.png").symlink_to(tmp_path / "secret.png")
    writer = ImageWriter(tmp_path / "entry")
    assert writer.take({"images": ["images/a.png"]}, snapshot / "rows.jsonl")["images"][0]["size"] == [32, 32]
    for name in ("out.png", "../../blobs/5f"):
        with pytest.raises(RowError, match="lies outside of"):
            writer.take({"images": [name]}, snapshot / "rows.jsonl")


def test_relative_paths_begin_in_the_folder_that_is_named(rows: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "images"
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes(PNG)
    assert ImageWriter(tmp_path, str(elsewhere)).take({"images": ["x.png"]}, rows)["images"][0]["size"] == [32, 32]
    with pytest.raises(RowError, match="the row holds an image; it is blind"):
        ImageWriter(tmp_path, None, "it is blind").take({"images": ["a.png"]}, rows)


def test_the_fix_for_a_model_without_a_tower_is_another_model() -> None:
    def fix(*reasons: str) -> str:
        bad = BadRows(OnBadRow.error)
        for number, reason in enumerate(reasons, 1):
            bad.add(f"rows.jsonl:{number}", f"the row holds an image; {reason}")
        with pytest.raises(UserError) as caught:
            bad.raise_if_any()
        return caught.value.problems[-1].fix

    assert fix(*[refusal(None, "m")] * 2).startswith("set model.path to a model that sees")
    assert fix(refusal(None, "m"), "task=reward reads none").startswith("fix the file")


def test_bytes_are_hashed_by_their_digest() -> None:
    assert for_hash({"images": [b"a", "b"]})["images"] == ["a96faf705af16834e6c632b61e964e1f", "b"]


def test_a_placeholder_is_expanded_and_places_move() -> None:
    found = expand("ab<i>cd<i>ef", "<i>", ["1234", "5", "unused"], [0, 2, 3])
    assert found.text == "ab1234cd5ef"
    assert [found.text[start:end] for start, end in found.spans] == ["1234", "5"]
    assert [found.moved(at) for at in (0, 2, 5, 7, 10, 12)] == [0, 2, 6, 8, 9, 11]
    with pytest.raises(RowError, match=r"prints 1 place .*for 3 images"):
        expand("a<i>", "<i>", ["1", "2", "3"], [0, 2, 3])
    messages = [user([PLACE, PLACE]), ANSWER, user([PLACE]), ANSWER]
    assert count_to(messages, 1) == [2, 3] and count_to(messages, 3) == [3]


def test_three_positions_by_hand() -> None:
    is_image = np.array([False, True, True, True, True, False, False])
    found = three_positions(is_image, np.array([[1, 4, 4]]), 2)
    assert found.tolist() == [[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]]
    side_by_side = three_positions(np.array([True] * 3 + [False]), np.array([[1, 2, 2], [1, 2, 4]]), 2)
    assert side_by_side.tolist() == [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]


def test_a_reward_model_refuses_to_score_images():
    question = RewardQuestion(RewardConfig(), (), DataConfig())
    image = "data:image/png;base64," + base64.b64encode(b"x").decode()
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Who?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Ada"}]
    with pytest.raises(RowError, match="the row holds an image; task=reward reads none"):
        question.row({"messages": messages}, "row 1")
    assert question.row({"messages": [{"role": "user", "content": "Who?"}, messages[1]]}, "row 1")["messages"]
