"""How vLLM, llama.cpp and servers elsewhere are started and asked, against stubs of their HTTP side."""

from __future__ import annotations

import asyncio
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from dstune.core.errors import UserError
from dstune.serve.engines.base import Engine, Limits, Unprovable
from dstune.serve.engines.llama_cpp import LlamaCppEngine, number_format
from dstune.serve.engines.remote import RemoteEngine
from dstune.serve.engines.special import SpecialTexts
from dstune.serve.engines.vllm import VllmEngine
from dstune.serve.errors import ApiError
from dstune.serve.parity import Refused, prove
from tests.support.serving import stub_source, write_reference


def test_control_tokens_in_what_clients_write_are_refused(tmp_path):
    special = SpecialTexts(re.compile(re.escape("<|im_end|>")))
    for body in (
        {"messages": [{"role": "user", "content": "a<|im_end|>b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]},
        {"tools": [{"function": {"description": "<|im_end|>"}}]},
        {"prompt": ["a", "<|im_end|>"]},
        {"messages": [{"tool_calls": [{"function": {"arguments": '{"a": "\\u003c|im_end|>"}'}}]}]},
    ):
        with pytest.raises(ApiError):
            special.refuse(body)
    special.refuse({"messages": [{"role": "user", "content": "<think> im_end"}], "stop": "<|im_end|>"})


def test_the_command_line_of_vllm(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text("")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {"q": 32}}))
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }} {{ tools }} <tool_call>")
    source = stub_source("base", prompted_as=tmp_path, template_date="2024-05-06", trust_remote_code=True)
    engine = VllmEngine(
        source, "base", tmp_path, tmp_path, Limits(), python=str(tmp_path / "bin" / "python"), arguments=["--x", "y"]
    )
    engine.expect(stub_source("a", folder=tmp_path, adapter=True))
    folder = tmp_path / "run"
    folder.mkdir()
    made = engine.command(folder)
    words = made.argv[1:]
    assert words[:2] == ["serve", "base"] and words[-2:] == ["--x", "y"]
    value = lambda flag: words[words.index(flag) + 1]  # noqa: E731
    assert (value("--max-lora-rank"), value("--tool-call-parser"), value("--uds")) == ("32", "hermes", f"{folder}/http")
    assert "2024" in (folder / "chat_template.jinja").read_text().split("macro")[1]
    assert made.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1" and "PYTHONPATH" not in made.env
    assert "--api-key" not in words


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", [], "string"),
        ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}", [], "openai"),
        ("{{ messages[0].content }}", ["--chat-template-content-format=openai"], None),
    ],
)
def test_vllm_is_told_whether_the_template_reads_lists(tmp_path, template, arguments, expected):
    """Its versions judge loops in macros differently, and a list that no template reads is printed as Python writes it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text("")
    (tmp_path / "chat_template.jinja").write_text(template)
    source = stub_source("base", prompted_as=tmp_path)
    python = str(tmp_path / "bin" / "python")
    engine = VllmEngine(source, "base", tmp_path, tmp_path, Limits(), python=python, arguments=arguments)
    words = engine.command(tmp_path).argv
    flag = "--chat-template-content-format"
    assert (words[words.index(flag) + 1] if flag in words else None) == expected


def test_the_ranks_that_vllm_takes_are_those_of_its_command_line(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 32}))
    asked: list[str] = []

    async def ask(self, method, path, body):
        asked.append(path)
        if path == "/v1/unload_lora_adapter":
            raise Unprovable("there is none")
        return {}

    monkeypatch.setattr(Engine, "ask", ask)

    def load(*arguments, **given):
        asked.clear()
        engine = VllmEngine(stub_source("b"), "b", tmp_path, tmp_path, Limits(), arguments=list(arguments), **given)
        asyncio.run(engine.load_adapter("a", tmp_path))
        return asked

    for few in ((), ("--max-lora-rank", "16")):
        with pytest.raises(UserError, match="for ranks up to"):
            load(*few)
    assert load("--max-lora-rank=32") == ["/v1/load_lora_adapter"]
    # One that runs elsewhere may have it from an earlier gateway, in another version.
    assert load(address="http://127.0.0.1:9") == ["/v1/unload_lora_adapter", "/v1/load_lora_adapter"]


def test_a_server_behind_the_same_address_without_the_adapters_is_another(tmp_path, monkeypatch):
    """A rolling update: `/health` answers all the time, by a process that has loaded nothing."""
    engine = VllmEngine(stub_source("b"), "b", tmp_path, tmp_path, Limits(), address="http://127.0.0.1:9")
    engine.context = 64
    listed: dict[str, str] | None = {}

    async def ask(self, method, path, body):
        if path == "/v1/models" and listed is None:
            raise Unprovable("there is none")
        if path == "/v1/models":
            return {"data": [{"id": name, "root": root} for name, root in listed.items()]}
        return {}

    monkeypatch.setattr(Engine, "ask", ask)
    answers = lambda: asyncio.run(engine._still_answers())  # noqa: E731
    assert answers()
    listed = {"b": "base", "a": "/runs/a", "other": "/runs/o"}
    asyncio.run(engine.load_adapter("a", tmp_path))
    assert answers() and answers()
    listed = {"b": "base", "a": "/runs/a"}  # what somebody else has loaded is their business
    assert answers()
    for replaced in ({"b": "base"}, {"b": "base", "a": "/runs/older"}):
        listed = replaced
        assert not answers() and not answers()
    listed = None
    assert answers(), "it does not say"
    listed = {"b": "base", "a": "/runs/newer"}
    asyncio.run(engine.load_adapter("a", tmp_path))
    assert answers() and answers()
    asyncio.run(engine.unload_adapter("a"))
    listed = {"b": "base"}
    assert answers()


def test_what_vllm_serves_is_what_it_was_started_with(tmp_path):
    file = tmp_path / "chat_template.jinja"
    file.write_text("{{ tools }} <tool_call>")
    engine = VllmEngine(stub_source("b", folder=tmp_path), "b", tmp_path, tmp_path, Limits())
    assert "tools" in engine.routes["/v1/chat/completions"]
    file.unlink()
    assert "tools" in engine.routes["/v1/chat/completions"]


def answered(engine: Engine, routes: dict[str, Any]) -> list[tuple[str, dict]]:
    """Let `engine` speak to these routes; what it asked."""
    seen: list[tuple[str, dict]] = []

    class Answers:
        async def ask(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
            seen.append((path, json.loads(body or b"{}")))
            found = routes.get(path)
            found = found(seen[-1][1]) if callable(found) else found
            return (404, b"") if found is None else (200, json.dumps(found).encode())

    engine.client = Answers()
    return seen


LLAMA_ROW = {
    "messages": [{"role": "user", "content": "a"}],
    "arguments": {"thinking": False},
    "prompt_ids": [1, 2],
    "target_ids": [3, 4, 5],
    "logprobs": [-1.0, -2.0, -3.0],
}


def llama(folder: Path, dtype: str = "float16") -> LlamaCppEngine:
    write_reference(folder, [LLAMA_ROW])
    engine = LlamaCppEngine(stub_source("m", folder=folder), "m", folder, folder, Limits())
    engine.dtype = dtype
    return engine


def llama_server(found: dict[int, dict], tokens: tuple[int, ...] = (1, 2)) -> dict[str, object]:
    """As llama.cpp's server answers: a forced token with what the model gave it; nothing where it is a part of a character."""

    def written(body: dict) -> dict:
        ((token, bias),) = body["logit_bias"]
        assert bias > 1e5 and body["n_predict"] == 1 and body["n_probs"] == 1
        assert [*body["prompt"], token] == [1, 2, 3, 4, 5][: len(body["prompt"]) + 1]
        return {"completion_probabilities": [found[token]]} if token in found else {"content": ""}

    template = {"prompt": "<s>a"}
    return {"/apply-template": template, "/tokenize": {"tokens": list(tokens)}, "/completion": written}


def test_llama_cpp_is_held_against_the_training_by_forced_tokens(tmp_path):
    engine = llama(tmp_path)
    trained = {token: {"id": token, "logprob": -1.001 * (token - 2)} for token in (3, 4, 5)}
    seen = answered(engine, llama_server(trained))
    found = asyncio.run(prove(engine, "m", engine.source))
    assert found.status == "proven" and 0.0019 < found.difference < 0.0021
    assert seen[0][1] == {"messages": LLAMA_ROW["messages"], "chat_template_kwargs": {"thinking": False}}
    # It strips the template's own begin of the text, and sets that of its vocabulary in front.
    assert seen[1][1] == {"content": "<s>a", "add_special": True, "parse_special": True}

    answered(engine, llama_server(trained, tokens=(1, 5)))
    with pytest.raises(Refused, match="another prompt"):
        asyncio.run(prove(engine, "m", engine.source))
    answered(engine, llama_server(trained | {4: {"id": 4, "logprob": -2.2}}))
    with pytest.raises(Refused, match="not the model that was trained"):
        asyncio.run(prove(engine, "m", engine.source))


def test_what_llama_cpp_does_not_report_is_unproven(tmp_path):
    def proof_of(found: dict[int, dict], dtype: str = "float16", **given) -> str:
        engine = llama(tmp_path, dtype)
        answered(engine, llama_server(found, **given))
        return str(asyncio.run(prove(engine, "m", engine.source)))

    first = {"id": 3, "logprob": -1.0}
    assert proof_of({3: first, 5: {"id": 5, "logprob": -90.0}}).startswith("proven"), "4 is a part of a character"
    assert "log-probabilities of 0 of 1 rows" in proof_of({4: first})
    assert "tells no log-probability of a token" in proof_of({3: {"id": 3, "prob": 0.4}})
    assert "tells no log-probability of a token" in proof_of({3: {"id": 9, "logprob": -1.0}})
    assert "no bound is known for weights in Q4_K" in proof_of({3: first}, "Q4_K")
    with pytest.raises(Refused, match="another prompt"):
        proof_of({3: first}, "Q4_K", tokens=(1, 5))
    engine = llama(tmp_path)
    answered(engine, {})
    assert "has no POST /apply-template" in asyncio.run(prove(engine, "m", engine.source)).detail


def test_few_rows_with_log_probabilities_prove_nothing(tmp_path):
    """Of a row whose first target is a part of a character llama.cpp reports none."""
    engine = llama(tmp_path)
    other = LLAMA_ROW | {"target_ids": [4, 5], "logprobs": [-2.0, -3.0]}
    answered(engine, llama_server({3: {"id": 3, "logprob": -1.0}}))

    async def forced(model, prompt, targets):
        return [-1.0] if targets[0] == 3 else []

    engine.logprobs = forced
    for count, status in ((1, "unproven"), (2, "proven")):
        rows = [LLAMA_ROW] * count + [other] * (4 - count)
        write_reference(tmp_path, rows)
        found = asyncio.run(prove(engine, "m", engine.source))
        assert (found.status, found.rows) == (status, 0 if status == "unproven" else count)
        assert found.status == "proven" or "of 1 of 4 rows" in found.detail


def test_settings_that_are_not_the_files_of_the_export_are_named(tmp_path):
    engine = llama(tmp_path)
    trained = {token: {"id": token, "logprob": -1.0 * (token - 2)} for token in (3, 4, 5)}
    for words, named in (((), ""), (("--threads", "1"), ""), (("--temp=0.3",), "--temp")):
        engine.arguments = list(words)
        answered(engine, llama_server(trained))
        found = asyncio.run(prove(engine, "m", engine.source))
        assert found.status == "proven" and bool(found.detail) == bool(named) and named in found.detail
    elsewhere = VllmEngine(stub_source("m"), "m", tmp_path, tmp_path, Limits(), address="http://127.0.0.1:9")
    assert elsewhere.unseen_settings


def test_what_a_server_does_not_find_is_no_missing_route(tmp_path):
    """vLLM answers 404 to both: where its name of a model is another, an adapter would be unproven and be asked in vain."""
    engine = VllmEngine(stub_source("m"), "m", tmp_path, tmp_path, Limits(), address="http://127.0.0.1:9")

    def answer(error: dict[str, Any]) -> None:
        class Answers:
            async def ask(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
                return 404, json.dumps(error).encode()

        engine.client = Answers()

    unknown = {"message": "The model `m` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
    for error in ({"error": unknown}, unknown, {"error": {"message": "The model 'm'", "code": "model_not_found"}}):
        answer(error)
        with pytest.raises(UserError, match="does not find what /tokenize needs: The model"):
            asyncio.run(engine.prompt_ids("m", {"text": "a"}))
    answer({"error": {"message": "No adapter found for /runs/a", "type": "NotFoundError", "param": None, "code": 404}})
    with pytest.raises(UserError, match="No adapter found for /runs/a"):
        asyncio.run(Engine.load_adapter(engine, "a", tmp_path))
    for text in ("Not Found", "File Not Found"):
        for error in ({"detail": text}, {"error": {"message": text, "code": 404}}):
            answer(error)
            with pytest.raises(Unprovable, match="has no POST /tokenize"):
                asyncio.run(engine.prompt_ids("m", {"text": "a"}))
            with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
                asyncio.run(Engine.load_adapter(engine, "a", tmp_path))


def test_a_gguf_file_with_coarse_matrices_has_no_bound(tmp_path):
    import gguf
    import numpy as np

    def saved(*kinds: str) -> Path:
        file = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_tensor("norm", np.ones(32, np.float32))
        for number, kind in enumerate(kinds):
            quantized = gguf.quantize(np.ones((2, 256), np.float32), gguf.GGMLQuantizationType[kind])
            writer.add_tensor(f"m{number}", quantized, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    for kinds, expected in (
        (("F32",), "float16"),
        (("F32", "BF16"), "bfloat16"),
        (("F16", "Q8_0"), "Q8_0"),
        (("F32", "Q8_0", "Q4_0"), "Q4_0, Q8_0"),
    ):
        assert number_format(saved(*kinds)) == expected


def hostile(entries: int = 0, tensors: int = 0, rest: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, entries) + rest


NAME = struct.pack("<Q", 1) + b"a"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no GGUF", "shorter"),
        (hostile()[:4] + struct.pack("<IQQ", 1, 0, 0), "version"),
        (hostile(entries=1, rest=NAME + struct.pack("<IIQ", 9, 4, 2**40)), "shorter"),  # a list of so many numbers
        (hostile(entries=1, rest=NAME + struct.pack("<IIQ", 9, 8, 2**60)), "shorter"),
        (hostile(entries=1, rest=NAME + struct.pack("<IIQIQ", 9, 9, 1, 9, 1)), "a list of type 9"),
        (hostile(entries=1, rest=NAME + struct.pack("<I", 77)), "no type 77"),
        (hostile(entries=2**60), "shorter"),
        (hostile(tensors=2**60), "list of its tensors"),
        (hostile(tensors=1, rest=NAME + struct.pack("<I", 2**31) + b"\0" * 40), "shorter"),
        (hostile(tensors=1, rest=NAME + struct.pack("<IQQIQ", 2, 1, 1, 999, 0)), "999"),
    ],
)
def test_a_strangers_gguf_file_is_not_believed(tmp_path, content, reason):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=f"is no GGUF file: .*{reason}"):
        number_format(tmp_path / "m.gguf")


def test_a_server_elsewhere_is_asked_for_its_own_name_and_is_unproven(tmp_path):
    source = stub_source("ours", path="theirs")
    engine = RemoteEngine(source, "ours", tmp_path, tmp_path, Limits(), address="https://models.example/v1", key="k")
    assert engine.command(tmp_path).url == "https://models.example"
    assert engine.outgoing("/v1/chat/completions", {"model": "ours", "n": 1}) == {"model": "theirs", "n": 1}
    seen = answered(engine, {"/v1/models": {"data": []}})
    assert asyncio.run(engine._healthy())
    assert seen == [("/v1/models", {})] and engine.headers == {"authorization": "Bearer k"}
    assert asyncio.run(prove(engine, "ours", source)).status == "unproven"
