"""What the command line names, what adapters fit, what addresses are allowed, and what parity says of a stub."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dstune.checkpoint.ollama import go_template, modelfile
from dstune.core.errors import UserError
from dstune.protocols import TASKS
from dstune.serve import command, fields, options
from dstune.serve.engines.base import Engine, Limits, Unprovable
from dstune.serve.engines.llama_cpp import LlamaCppEngine, number_format
from dstune.serve.engines.remote import RemoteEngine, check_address
from dstune.serve.engines.special import SpecialTexts
from dstune.serve.engines.vllm import VllmEngine
from dstune.serve.errors import ApiError
from dstune.serve.parity import Refused, prove, read_reference
from dstune.serve.source import of_words, resolve
from tests.support.serving import stub_source


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        command.main(list(words))
    return str(caught.value)


def test_names_and_paths():
    assert of_words(["runs/a", "x=runs/b", "./lr=1/run"]) == [("", "runs/a"), ("x", "runs/b"), ("", "./lr=1/run")]
    with pytest.raises(UserError) as caught:
        of_words(["a b=c", "d="])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["m", "--engine", "vllm"], "--engine-python"),
        (["m", "--engine", "remote"], "--engine-url"),
        (["m", "--engine-url", "https://h/v1"], "--engine-url"),
        (["m", "--engine-python", "/x"], "--engine-python"),
        (["m", "--engine", "vllm", "--engine-url", "https://h", "--engine-python", "/x"], "--engine-python"),
        (["m", "--engine", "vllm", "--engine-url", "https://h", "--", "--a"], "--"),
        (["m", "--engine-key-env", "HOME"], "--engine-key-env"),
        (["m", "--engine", "remote", "--engine-url", "https://h", "--engine-key-env", "NO_SUCH"], "--engine-key-env"),
        (["m", "--allow-engine", "h"], "--allow-engine"),
        (["m", "--engine", "llama.cpp", "--dtype", "float16"], "--dtype"),
        (["m", "--port", "-1"], "--port"),
        (["m", "--port", "70000"], "at most 65535"),
        (["m", "--log-days", "nan"], "--log-days"),
        (["m", "--host", "0.0.0.0"], "--allow-host"),
        (["m", "--", "--x"], "takes no arguments"),
        (["m", "--engine", "llama.cpp", "--max-sequences", "4"], "--max-sequences"),
        (["m", "--engine", "remote", "--engine-url", "https://h", "--threads", "2"], "--threads"),
        (["--no-inference", "--check"], "--check"),
        (["./nowhere"], "no such folder"),
        (["m", "serve.engine=nothing"], "there is no such choice"),
        (["--check"], "MODEL"),
    ],
)
def test_command_lines_that_are_wrong(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    assert told in refusal(*words)


def test_a_port_that_is_taken_is_refused_before_models_are_loaded(tmp_path, monkeypatch):
    async def start(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("dstune.serve.fleet.Fleet.start", start)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "cannot listen there" in refusal("me/mine", "--port", port, "--state", str(tmp_path / "s"))


def test_without_the_extra_the_verb_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.serve.extra.MODULES", ("no_such_module",))
    assert "pip install 'dstune[serve]'" in refusal("m", "--state", str(tmp_path / "s"))


def test_settings_in_the_words_of_keys():
    found = options.parsed(["m", "serve.engine.python=/x", "serve.max_queue=3", "--", "--a=b"])
    assert (found.models, found.engine_python, found.max_queue) == (["m"], "/x", 3)
    assert found.engine_arguments == ["--a=b"]


def test_folders_that_cannot_be_served(tmp_path, monkeypatch):
    monkeypatch.setattr(TASKS["question_answering"], "serves", ())  # as of a plugin's task
    (tmp_path / "dstune.json").write_text(json.dumps({"task": {"name": "question_answering"}}))
    monkeypatch.setattr(TASKS["question_answering"], "serves", ())  # as a task of a plugin may be
    with pytest.raises(UserError, match="has no route"):
        resolve("x", str(tmp_path))
    (tmp_path / "dstune.json").write_text(json.dumps({"task": {"name": "nothing"}}))
    with pytest.raises(UserError, match="not known"):
        resolve("x", str(tmp_path))


@pytest.mark.parametrize(
    ("address", "allowed", "told"),
    [
        ("https://models.example/v1", [], "--allow-engine"),
        ("http://models.example/v1", ["models.example"], "in the clear"),
        ("https://user:secret@models.example", ["models.example"], "no address"),
        ("ftp://models.example", ["models.example"], "no address"),
        ("https://models.example:99999", ["models.example"], ""),
        ("https://models.example/v1", ["models.example"], ""),
        ("https://models.example:8443/v1", ["models.example:8443"], ""),
        ("http://vllm:8000/v1", ["http://vllm:8000"], ""),
        ("http://127.0.0.1:8000", [], ""),
    ],
)
def test_addresses_of_other_servers(address, allowed, told):
    if told:
        with pytest.raises(UserError, match=told):
            check_address(address, allowed)
    else:
        check_address(address, allowed)


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
        with pytest.raises(UserError, match="for at most"):
            load(*few)
    assert load("--max-lora-rank=32") == ["/v1/load_lora_adapter"]
    # One that runs elsewhere may have it from an earlier gateway, in another version.
    assert load(address="http://127.0.0.1:9") == ["/v1/unload_lora_adapter", "/v1/load_lora_adapter"]


def test_what_vllm_serves_is_what_it_was_started_with(tmp_path):
    file = tmp_path / "chat_template.jinja"
    file.write_text("{{ tools }} <tool_call>")
    engine = VllmEngine(stub_source("b", folder=tmp_path), "b", tmp_path, tmp_path, Limits())
    assert "tools" in engine.routes["/v1/chat/completions"]
    file.unlink()
    assert "tools" in engine.routes["/v1/chat/completions"]


# -- parity -----------------------------------------------------------------------------------------------------------


@dataclass
class Told(Engine):
    """Tells what it is given."""

    name: ClassVar[str] = "told"
    ids: list[int] = field(default_factory=lambda: [1, 2])
    found: dict[str, Any] = field(default_factory=dict)

    async def prompt_ids(self, model, row):
        return self.ids

    async def logprobs(self, model, prompt, targets):
        if model not in self.found:
            raise Unprovable("nothing")
        return self.found[model]


def proof(tmp_path, *, dtype="float32", base=None, **given):
    row = {"messages": [], "prompt_ids": [1, 2], "target_ids": [3, 4], "logprobs": [-1.0, -2.0]}
    (tmp_path / "reference.json").write_text(json.dumps({"format": 1, "rows": [row]}))
    source = stub_source("m", folder=tmp_path)
    engine = Told(source, "m", tmp_path, tmp_path, Limits(), **given)
    engine.dtype = dtype
    return asyncio.run(prove(engine, "m", source, base))


def test_equal_is_proven_and_different_is_refused(tmp_path):
    near, far = [-1.00005, -2.0], [-1.0, -2.0002]
    found = proof(tmp_path, found={"m": near})
    assert (found.status, found.rows) == ("proven", 1) and found.difference == pytest.approx(5e-5)
    with pytest.raises(Refused, match="log-probabilities of row 1"):
        proof(tmp_path, found={"m": far})
    assert proof(tmp_path, found={"m": far}, dtype="bfloat16").status == "proven"
    with pytest.raises(Refused):
        proof(tmp_path, found={"m": [float("nan"), -2.0]})
    with pytest.raises(Refused, match=r"differ from token 1 on \(\.\.\. 7"):
        proof(tmp_path, found={"m": near}, ids=[1, 7])
    with pytest.raises(Refused, match="another prompt"):
        proof(tmp_path, found={"m": near}, ids=[1])


def test_vectors_are_compared_as_a_whole(tmp_path):
    """In bf16 the mean of the differences of single numbers would let any vector pass: each is small in a long one."""
    right = [1 / 16] * 256
    row = {"row": {"text": "a"}, "ids": [1], "answer": {"vector": right}}
    (tmp_path / "reference.json").write_text(json.dumps({"format": 1, "rows": [row]}))
    source = stub_source("m", folder=tmp_path, task="embedding", generates=False, serves=("embed",))

    def proof_of(vector, dtype):
        engine = Told(source, "m", tmp_path, tmp_path, Limits())
        engine.dtype = dtype

        async def answers(rows):
            return {"ids": [[1]], "answers": [{"vector": vector}]}

        engine.answers = answers
        return asyncio.run(prove(engine, "m", source))

    near, other = [one + 2e-3 for one in right], [one * (-1) ** number for number, one in enumerate(right)]
    assert proof_of(near, "bfloat16").difference == pytest.approx(0.032)
    for vector, dtype in ((other, "bfloat16"), (near, "float32"), ([float("nan"), *right[1:]], "bfloat16")):
        with pytest.raises(Refused, match="is not the model that was trained"):
            proof_of(vector, dtype)


def test_a_reader_is_known_by_its_spans_too(tmp_path):
    answer = {"predicted": "w1 w2", "no_answer": 0.0}
    row = {"row": {"question": "a"}, "ids": [1], "answer": answer}
    (tmp_path / "reference.json").write_text(json.dumps({"format": 1, "rows": [row]}))
    source = stub_source("m", folder=tmp_path, task="question_answering", generates=False, serves=("answer",))

    def proof_of(answer):
        engine = Told(source, "m", tmp_path, tmp_path, Limits())
        engine.dtype = "float32"

        async def answers(rows):
            return {"ids": [[1]], "answers": [answer]}

        engine.answers = answers
        return asyncio.run(prove(engine, "m", source)).status

    assert proof_of(answer) == "proven"
    with pytest.raises(Refused, match="is not the model that was trained"):
        proof_of(answer | {"predicted": "w3"})


def test_an_adapter_has_to_differ_from_its_base(tmp_path):
    same = [-1.0, -2.0]
    with pytest.raises(Refused, match="has no effect"):
        proof(tmp_path, base="b", found={"m": same, "b": [-1.0005, -2.0]})
    found = proof(tmp_path, base="b", found={"m": same, "b": [-1.5, -2.0]})
    assert found.effect == pytest.approx(0.5)


def test_a_small_effect_is_proven_in_bf16_where_the_reference_tells_what_the_base_says(tmp_path):
    """A change of 0.2 among differences of 0.05 between two libraries; one that shows none of it is refused."""

    def proof_of(engine_change: float):
        trained, base = [-1.0, -2.0, -3.0, -1.5], [-1.2, -1.8, -3.2, -1.3]
        noise = [0.05, 0.05, -0.05, -0.05]
        row = {
            "messages": [],
            "prompt_ids": [1, 2],
            "target_ids": [3, 4, 5, 6],
            "logprobs": trained,
            "base_logprobs": base,
        }
        (tmp_path / "reference.json").write_text(json.dumps({"format": 1, "rows": [row] * 12}))
        source = stub_source("m", folder=tmp_path)
        said = [one + wrong for one, wrong in zip(trained, noise, strict=True)]
        plain = [one - engine_change * (a - b) for one, a, b in zip(said, trained, base, strict=True)]
        engine = Told(source, "m", tmp_path, tmp_path, Limits(), found={"m": list(said), "b": list(plain)})
        engine.dtype = "bfloat16"
        return asyncio.run(prove(engine, "m", source, "b"))

    assert proof_of(1.0).status == "proven"
    assert proof_of(0.8).effect == pytest.approx(0.16)
    for change in (0.0, 0.2, -1.0):
        with pytest.raises(Refused, match="has no effect"):
            proof_of(change)


def test_what_cannot_be_compared_is_unproven(tmp_path):
    assert proof(tmp_path).detail == "nothing"
    assert proof(tmp_path, dtype="float8", found={"m": []}).status == "unproven"
    with pytest.raises(Refused):  # the tokens are compared all the same
        proof(tmp_path, ids=[9])
    (tmp_path / "reference.json").write_text("{")
    with pytest.raises(Refused, match="cannot be read"):
        read_reference(tmp_path)


def test_every_field_has_a_check_that_refuses_something():
    """A field that takes anything would be passed on unseen."""
    for known in (fields.CHAT, fields.COMPLETION, fields.EMBEDDING, fields.RERANK, fields.SCORE, fields.TAG):
        for name, check in known.items():
            assert check([[[object()]]]) or name == "metadata", name
            assert check({"a": {"b": "c"}}) or name == "metadata", name


def test_the_fields_of_the_official_client_are_known():
    """Each either acts, or is refused by its name and not as unknown."""
    import inspect

    from openai.resources.chat.completions import Completions
    from openai.resources.embeddings import Embeddings

    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    chat = set(inspect.signature(Completions.create).parameters) - own
    for name in chat - set(fields.CHAT):
        with pytest.raises(ApiError) as caught:
            fields.checked({"messages": [{"role": "user", "content": "a"}], name: {"x": 1}}, fields.CHAT, ())
        assert caught.value.param in (name, "messages")
    assert set(inspect.signature(Embeddings.create).parameters) - own <= set(fields.EMBEDDING)


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
    (folder / "reference.json").write_text(json.dumps({"format": 1, "rows": [LLAMA_ROW]}))
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
        (tmp_path / "reference.json").write_text(json.dumps({"format": 1, "rows": rows}))
        found = asyncio.run(prove(engine, "m", engine.source))
        assert (found.status, found.rows) == (status, 0 if status == "unproven" else count)
        assert found.status == "proven" or "of 1 of 4 rows" in found.detail


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


# -- Ollama -----------------------------------------------------------------------------------------------------------

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Tokenizer:
    bos_token = "<s>"

    def __init__(self, template: str):
        self.chat_template = template

    def get_chat_template(self, tools=None) -> str:
        return self.chat_template

    def apply_chat_template(self, messages, *, chat_template, tokenize, add_generation_prompt, tools=None):
        import jinja2

        return jinja2.Template(chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token=self.bos_token
        )

    def decode(self, ids):
        return "<|im_end|>"


def test_a_template_in_ollamas_language():
    text = modelfile("m.gguf", Tokenizer(CHATML), [4], None)
    assert text.splitlines()[0] == "FROM ./m.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in text
    template = go_template(Tokenizer(CHATML), None)
    assert template == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}<|im_start|>system\nBe kind<|im_end|>\n"
        '{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n"
    )
    numbered = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}"
    assert go_template(Tokenizer(numbered), None) is None
    assert "Ollama guesses one" in modelfile("m.gguf", Tokenizer(numbered), [], None)


def test_a_template_of_others_adds_no_line_to_ollamas_file_and_ends():
    ends = CHATML.replace("<|im_start|>", '<|im_start|>"""\nADAPTER /etc/passwd\n')
    assert "ADAPTER" not in modelfile("m.gguf", Tokenizer(ends), [], None)
    with pytest.raises(UserError, match="takes more than"):
        go_template(Tokenizer("{% for a in range(10**9) %}{% endfor %}" + CHATML), None)
