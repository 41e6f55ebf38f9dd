"""The parsers of what clients, engines elsewhere and owners of uploaded files and tables send (`fuzz.py`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz_inputs import Draw, Make, damaged, like, lists, mapped, one_of, text

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
CHAT_BODY = {
    "model": "m",
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": "b", "name": "u"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
    "n": 2, "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "logit_bias": {"1": 2}, "stream_options": {"include_usage": True},
    "stream": True, "response_format": {"type": "json_object"}, "chat_template_kwargs": {"a": 1}, "metadata": {},
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT_BODY,
    "/v1/completions": {"model": "m", "prompt": [[1, 2], [3]], "n": 2, "best_of": 3, "logprobs": 1, "echo": True, "suffix": "a"},
    "/v1/responses": {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "metadata": {}},
    "/v1/embeddings": {"model": "m", "input": ["a"], "encoding_format": "float", "dimensions": 8},
    "/v1/moderations": {"model": "m", "input": "a"},
    "/classify": {"model": "m", "input": ["a", "b"]},
    "/rerank": {"model": "m", "query": "a", "documents": ["b"], "top_n": 1, "return_documents": True},
    "/score": {"model": "m", "text_1": "a", "text_2": ["b"]},
    "/tags": {"model": "m", "input": [["a", "b"]]},
    "/answers": {"model": "m", "question": "a", "context": ["b"]},
    "/rewards": {"model": "m", "messages": [CHAT_BODY["messages"]]},
}  # fmt: skip
CHUNK = {
    "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "usage": None,
    "choices": [{"index": 0, "finish_reason": None, "delta": {"content": "a", "tool_calls": [CALL | {"index": 0}]}}],
}  # fmt: skip
ANSWER = {
    "id": "c", "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "tool_calls": [CALL]}}],
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "a"}]}], "usage": {"total_tokens": 2},
}  # fmt: skip
LINE = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}}
VECTOR = {"storageType": "p", "pathOrInlineDv": "file:///a", "offset": 1, "sizeInBytes": 3, "cardinality": 1}
COMMIT = [
    {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}},
    {"metaData": {"id": "a", "format": {"provider": "parquet", "options": {}}, "schemaString": "{}", "partitionColumns": []}},
    {"add": {"path": "a=1/b.parquet", "size": 1, "partitionValues": {"a": "1"}, "deletionVector": VECTOR, "dataChange": True}},
]  # fmt: skip
POOLING = {
    "modules.json": [{"idx": 0, "path": "", "type": "a.Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "a.Pooling"}],
    "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode": "mean"},
    "sentence_bert_config.json": {"max_seq_length": 8},
}  # fmt: skip
CHOICE = {"unit": "tensors", "tensors": [{"name": "a", "shape": [2], "trained": 2}]}


@st.composite
def request(draw: Draw) -> tuple[str, bytes]:
    path = draw(st.sampled_from(list(BODIES)))
    body = json.dumps(BODIES[path]).encode()
    return path, draw(one_of(mapped(like(BODIES[path]), as_bytes), damaged(body)))


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


@cache
def engines() -> list[Any]:
    from dstune.serve.engines.base import Limits
    from dstune.serve.engines.remote import RemoteEngine
    from tests.support.serving import stub_source

    place = (stub_source("m"), "m", Path("/nowhere"), Path("/nowhere"))
    return [RemoteEngine(*place, Limits(), context=context) for context in (0, 4096)]


def taken(path_and_content: tuple[str, bytes], folder: Path) -> None:
    """Take a request as the gateway does, until an engine would get it."""
    from dstune.serve.fields import checked
    from dstune.serve.gateway.output_bound import bounded
    from dstune.serve.gateway.request import Request
    from dstune.serve.gateway.routes import INFERENCE
    from dstune.serve.gateway.settings import Settings

    path, content = path_and_content

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        return None

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    request = Request({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send, Settings())
    body = checked(asyncio.run(request.json()), INFERENCE[path], frozenset(INFERENCE[path].model_fields))
    request.refuse_halves(body)
    for engine in engines():
        bounded(path, body, engine, 131072)


def events() -> Make:
    piece = one_of(mapped(like(CHUNK), as_bytes), damaged(as_bytes(CHUNK)))
    event = st.tuples(piece, st.sampled_from((b"\n\n", b"\r\n\r\n", b"\n"))).map(
        lambda pair: b"data: " + pair[0] + pair[1]
    )
    return lists(event, 5).map(lambda parts: b"".join(parts) + b"data: [DONE]\n\n")


def streamed(content: bytes, folder: Path) -> None:
    """Read a stream of an engine elsewhere, through all that reads it."""
    from dstune.guard.check import Verdict
    from dstune.guard.policy import Policy
    from dstune.guard.streams import HeldBack
    from dstune.serve.gateway.inference import UsageRemover
    from dstune.serve.gateway.recording import Record
    from dstune.serve.gateway.request_log import answer_value

    half = len(content) // 2
    shown, record = UsageRemover(), Record(keeps_text=True)

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in (content[:half], content[half:]):
            record.take(chunk)
            yield shown.take(chunk)

    async def check(context: str, piece: str, windows: int) -> Verdict:
        return Verdict(Policy("p"))

    async def read() -> None:
        async for _ in HeldBack(check).stream(chunks()):
            pass

    answer_value(content)
    asyncio.run(read())


def answered(content: bytes, folder: Path) -> None:
    """Read an answer of an engine elsewhere as the guard and the log take it, and its list of models."""
    from dstune.guard.bodies import of_answer
    from dstune.serve.engines.base import context_of
    from dstune.serve.engines.http import object_of, of_its_shape
    from dstune.serve.gateway.request_log import answer_value

    answer_value(content)
    answer = object_of(content)
    context_of(answer, {"m"})
    with of_its_shape():
        of_answer(answer)


def uploaded(content: bytes, folder: Path) -> None:
    from dstune.finetuning.batches.lines import check_lines
    from dstune.finetuning.rows import check_file

    (folder / "rows.jsonl").write_bytes(content)
    for method in ("supervised", "dpo"):
        check_file(folder / "rows.jsonl", method)
    check_lines(folder / "rows.jsonl", "/v1/chat/completions")


def uploads(chat: Any, pair: Any) -> Make:
    rows = [mapped(like(example), as_bytes) for example in (chat, pair, LINE)]
    return one_of(
        *(mapped(lists(row, 4), b"\n".join) for row in rows), damaged(as_bytes(chat) + b"\n" + as_bytes(LINE))
    )


def table_log(content: bytes, folder: Path) -> None:
    """Check the log of a Delta table, before the library opens it."""
    from dstune.lakehouse.address import parse
    from dstune.lakehouse.inside import refuse_outside
    from dstune.lakehouse.tables import _user_errors_for, check_files

    address = parse("delta:///table", "data.train")
    (folder / "_delta_log").mkdir()
    (folder / "_delta_log" / "00000000000000000000.json").write_bytes(content)
    with _user_errors_for("data.train", "delta:///table", "the table cannot be opened"):
        refuse_outside(folder, address, "data.train")
    for place in (str(folder), "s3://bucket/table"):
        check_files([{"path": content[:60].decode("utf-8", "replace"), "size_bytes": 1}], place, address, "data.train")


def commits() -> Make:
    lines = mapped(like(COMMIT), lambda rows: b"\n".join(map(as_bytes, rows if isinstance(rows, list) else [rows])))
    names = mapped(
        text, lambda name: as_bytes({"add": {"path": "a", "deletionVector": VECTOR | {"pathOrInlineDv": name}}})
    )
    return one_of(lines, names, damaged(b"\n".join(map(as_bytes, COMMIT))))


def pooled(content_by_name: dict[str, bytes], folder: Path) -> None:
    from dstune.tasks.embedding.sentence_transformers import embedding_overrides

    (folder / "1_Pooling").mkdir()
    for name, content in content_by_name.items():
        (folder / name).write_bytes(content)
    embedding_overrides(folder)


def choice_of_tensors(content: bytes, folder: Path) -> None:
    from dstune.methods.importance.scores import REPORT, _read

    (folder / REPORT).write_bytes(content)
    _read(folder)


def continued(content: bytes, folder: Path) -> None:
    """Read the metrics of a run that goes on, as its trackers get them."""
    from dstune.tracking.history import History
    from dstune.tracking.jsonl import JsonLines

    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_bytes(content)
        JsonLines(folder / name, keep_until=2**40).close()
    list(History(folder / "metrics.jsonl", folder / "samples.jsonl").rows())
