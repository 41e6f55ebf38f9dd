"""`dstune serve` with real models in real processes: proven against the training, or refused."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import openai
import pytest

import dstune
from dstune.checkpoint.answer_files import digest_files
from dstune.core.errors import DstuneError
from dstune.serve.engines.base import EngineDown, Limits
from dstune.serve.engines.llama_cpp import LlamaCppEngine
from dstune.serve.engines.local.engine import LocalEngine
from dstune.serve.engines.vllm import VllmEngine
from dstune.serve.fleet import Fleet
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.recording import Recorder
from dstune.serve.gateway.routes import ROUTES
from dstune.serve.gateway.settings import Settings
from dstune.serve.prepare import main as prepared
from dstune.serve.source import resolve, with_neutral_labels
from dstune.serve.store.database import Database
from tests.support import vllm_double
from tests.support.served_runs import save_run
from tests.support.serving import listening
from tests.support.tiny import (
    save_decoder,
    save_encoder,
    write_contrastive,
    write_dialogues,
    write_labelled,
    write_preferences,
    write_questions,
    write_tagged,
)

LORA = ("task=chat", "method=lora", "method.rank=4")
WIDE = {"hidden_size": 128, "initializer_range": 0.02}
"""Of models for the real vLLM: on CPUs its attention takes heads of 32 and more, and log-probabilities of weights as large as
those of the other tests are up to 2.5e-4 apart; these are as large as transformers makes them."""


class Shelf:
    """Exports with their references, each made when it is first asked for."""

    def __init__(self, folder: Path, **changes: float):
        self.folder = folder
        self.base = save_decoder(folder / "base", **changes)
        self.encoder = save_encoder(folder / "encoder")
        self.chat = write_dialogues(folder / "chat.jsonl", 60)
        self.made: dict[str, Path] = {}

    def run(self, name: str) -> Path:
        if name not in self.made:
            self.made[name] = self._make(name)
        return self.made[name]

    def _make(self, name: str) -> Path:
        folder = self.folder / "runs" / name
        if name.startswith("lora"):
            made = save_run(folder, self.base, self.chat, *LORA, seed=len(name) + ord(name[-1]))
        elif name == "full":
            made = save_run(folder, self.base, self.chat, "task=chat", "method=full", scale=0.02)
        elif name == "classifier":
            data = write_labelled(self.folder / "labels.jsonl", 60)
            made = save_run(folder, self.encoder, data, "task=classification", "method=full", labels=("left", "right"))
        elif name == "reranker":
            data = self.folder / "text_pairs.jsonl"
            rows = [{"text": f"w{n}", "text_pair": f"w{n + n % 2}", "label": ["no", "yes"][n % 2]} for n in range(60)]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            made = save_run(folder, self.encoder, data, "task=classification", "method=full", labels=("no", "yes"))
        elif name == "reader":
            data = write_questions(self.folder / "questions.jsonl", 60)
            made = save_run(folder, self.encoder, data, "task=question_answering", "method=full", scale=0.02)
        elif name == "judge":
            data = write_preferences(self.folder / "preferences.jsonl", 60)
            made = save_run(folder, self.base, data, "task=reward", "method=full", scale=0.02)
        elif name == "tagger":
            data = write_tagged(self.folder / "tags.jsonl", 60)
            labels = ("O", "B-X", "I-X", "B-Y", "I-Y")
            made = save_run(folder, self.encoder, data, "task=token_classification", "method=full", labels=labels)
        else:
            data = write_contrastive(self.folder / "pairs.jsonl", 60)
            made = save_run(folder, self.encoder, data, "task=embedding", "method=full", scale=0.02)
        assert prepared(made, folder / "exports") == 0
        (export,) = (folder / "exports").iterdir()
        assert (export / "reference.json").stat().st_mode & 0o077 == 0
        return export

    def copy(self, name: str, target: Path) -> Path:
        return Path(shutil.copytree(self.run(name), target))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


def engines(folder: Path, kind=LocalEngine, **given):
    folder.chmod(0o700)
    short = Path(os.environ.get("TMPDIR", "/tmp")) / f"dstune-test-{os.getpid()}-{abs(hash(str(folder))) % 10**8}"
    short.mkdir(mode=0o700, exist_ok=True)
    limits = Limits(threads=1)
    return lambda source, base: kind(source, base, folder, short, limits, **given)


def real_vllm(folder: Path):
    python = os.environ.get("DSTUNE_VLLM_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("needs vLLM in an environment of its own: DSTUNE_VLLM_PYTHON=/path/to/its/bin/python")
    words = ["--enforce-eager", "--max-model-len", "256", "--gpu-memory-utilization", "0.3"]
    return engines(folder, VllmEngine, python=python, number_format="float32", arguments=words)


def vllm(folder: Path):
    python = vllm_double.install(folder / "venv")
    return engines(folder, VllmEngine, python=str(python), number_format="float32")


def started(fleet: Fleet, *sources, then=None):
    """What `then(fleet)` returns, of a fleet that serves these."""

    async def main():
        await fleet.start(list(sources))
        try:
            return (
                await then(fleet) if then is not None else {name: model.proof for name, model in fleet.models.items()}
            )
        finally:
            await fleet.stop()

    return asyncio.run(main())


def refusal(fleet: Fleet, *sources) -> str:
    with pytest.raises((DstuneError, EngineDown)) as caught:
        started(fleet, *sources)
    return str(caught.value)


def digest_again(export: Path) -> None:
    """Let the reference of an edited export hold the digests of now, so that rows alone are compared."""
    reference = json.loads((export / "reference.json").read_text())
    base = {name: digest for name, digest in reference["files"].items() if name.startswith("base/")}
    (export / "reference.json").write_text(json.dumps(reference | {"files": digest_files(export) | base}))


# -- the same model ---------------------------------------------------------------------------------------------------


def test_two_adapters_of_one_base_and_a_third_one_while_requests_run(shelf, tmp_path):
    """With the official client over a real socket."""

    async def use(fleet: Fleet):
        async with open_gateway(fleet, tmp_path, shelf) as (client, root):
            listed = {model.id: model.model_extra["parity"]["status"] async for model in client.models.list()}
            assert listed == {"base": "base", "a": "proven", "b": "proven"}
            texts = {name: await says(client, name) for name in listed}
            assert len(set(texts.values())) == 3

            running = [asyncio.create_task(says(client, name)) for name in ("a", "b", "base") * 6]
            added = await root.post("/admin/models", json={"name": "c", "path": str(shelf.run("lora-c"))})
            assert added.json()["parity"]["status"] == "proven", added.text
            assert await asyncio.gather(*running) == [texts[name] for name in ("a", "b", "base") * 6]
            assert await says(client, "c") not in texts.values()

            taken = {"name": "c", "path": str(shelf.run("lora-b"))}
            assert (await root.post("/admin/models", json=taken)).status_code == 400
            for path in (shelf.folder.parent, "/etc", f"{shelf.folder}/../..", shelf.run("full")):
                answer = await root.post("/admin/models", json={"name": "d", "path": str(path)})
                assert answer.status_code == 400, path
            assert (await root.delete("/admin/models/c")).status_code == 200
            with pytest.raises(openai.NotFoundError):
                await says(client, "c")
            assert (await root.delete("/admin/models/base")).status_code == 400

    sources = [resolve(name, str(shelf.run(f"lora-{name}"))) for name in ("a", "b")]
    shelf.run("lora-c")  # now: it would hold up the loop
    started(Fleet(engines(tmp_path)), *sources, then=use)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_an_engine_that_is_killed_under_load_comes_back_proven(shelf, tmp_path, kills):
    sources = [resolve(name, str(shelf.run(f"lora-{name}"))) for name in ("a", "b")]
    restarts = started(Fleet(engines(tmp_path)), *sources, then=killed(kills, shelf, tmp_path))
    assert restarts == kills


def killed(kills: int, shelf: Shelf, folder: Path):
    """What kills the first model's engine under load, so often. No answer ever comes from another model."""

    async def use(fleet: Fleet):
        statuses = {name: model.proof.status for name, model in fleet.models.items()}
        assert "proven" in statuses.values()
        async with open_gateway(fleet, folder, shelf) as (client, _):
            texts = {name: await says(client, name) for name in statuses}
            assert len(set(texts.values())) == len(texts)
            engine = next(iter(fleet.models.values())).engine
            for number in range(kills):
                asked = [*texts] * 8
                running = [asyncio.create_task(says(client, name)) for name in asked]
                await asyncio.sleep(0.05)
                os.killpg(engine.process.pid, signal.SIGKILL)
                found = await asyncio.gather(*running, return_exceptions=True)
                for name, text in zip(asked, found, strict=True):
                    lost = openai.InternalServerError | openai.APIConnectionError
                    assert text == texts[name] or isinstance(text, lost)
                    assert not isinstance(text, openai.InternalServerError) or text.status_code == 503
                for _ in range(2400):
                    if fleet.ready and engine.starts == number + 2:
                        break
                    await asyncio.sleep(0.2)
                assert {name: await says(client, name) for name in texts} == texts
                assert {name: model.proof.status for name, model in fleet.models.items()} == statuses
            return sum(fleet.restarts().values())

    return use


@asynccontextmanager
async def open_gateway(fleet: Fleet, folder: Path, shelf: Shelf):
    """The official client, and one with an admin's key."""
    database = Database.open_folder(folder)
    recorder = Recorder(database)
    gateway = Gateway(fleet, database, Settings(adapter_roots=(str(shelf.folder),)), recorder, ROUTES)
    key, admin = gateway.keys.add("one"), gateway.keys.add("root", admin=True)
    recorder.start()
    async with listening(gateway) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
        headers = {"authorization": f"Bearer {admin}"}
        async with client, httpx2.AsyncClient(base_url=url, headers=headers, timeout=120, trust_env=False) as root:
            yield client, root
    await recorder.stop()
    database.close()


async def says(client: openai.AsyncOpenAI, model: str) -> str:
    ask = [{"role": "user", "content": "w1 w2 w3"}]
    answer = await client.chat.completions.create(model=model, messages=ask, temperature=0, max_tokens=6)
    return answer.choices[0].message.content


def test_full_models_and_merged_ones(shelf, tmp_path):
    sources = resolve("full", str(shelf.run("full"))), resolve("merged", str(merged(shelf, tmp_path)))
    proofs = started(Fleet(engines(state(tmp_path / "state"))), *sources)
    assert {name: proof.status for name, proof in proofs.items()} == {"full": "proven", "merged": "proven"}
    assert all(proof.rows >= 10 and proof.difference < 1e-4 for proof in proofs.values())


def merged(shelf: Shelf, folder: Path) -> Path:
    from dstune.checkpoint.export import export_checkpoint
    from dstune.checkpoint.store import newest
    from dstune.inference.reference import add_reference

    run = shelf.run("lora-a").parent.parent
    made = export_checkpoint(run, newest(run), folder / "merged", merge=True)
    assert add_reference(made, run) == ""
    return made


def test_classifier_tagger_reranker_and_embedder(shelf, tmp_path):
    """Through the gateway; embeddings by the official client, which asks for base64."""

    async def use(fleet: Fleet):
        assert {model.proof.status for model in fleet.models.values()} == {"proven"}
        async with open_gateway(fleet, tmp_path, shelf) as (client, root):
            embedded = await client.embeddings.create(model="embedder", input=["w1 w2", "w3"])
            plain = await client.embeddings.create(model="embedder", input="w1 w2", encoding_format="float")
            assert len(embedded.data) == 2 and len(plain.data[0].embedding) == 32
            assert embedded.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
            flags = (await client.moderations.create(model="classifier", input="w1 w2")).results[0]
            assert flags.categories.model_extra == {"left": False, "right": flags.flagged}
            with pytest.raises(openai.BadRequestError) as refused:
                await client.embeddings.create(model="embedder", input="w1 " * 500)
            assert refused.value.code == "context_length_exceeded"
            with pytest.raises(openai.NotFoundError):
                await client.embeddings.create(model="classifier", input="w1")
            with pytest.raises(openai.BadRequestError):
                await client.embeddings.create(model="embedder", input="w1", dimensions=8)

            async def ask(name: str, path: str, **body):
                answer = await root.post(path, json={"model": name, **body})
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["total_tokens"] > 1
                return answer.json()

            close = (await ask("embedder", "/rerank", query="w1 w2", documents=["w3", "w1 w2"]))["results"]
            assert [one["index"] for one in close] == [1, 0]
            assert close[0]["relevance_score"] == pytest.approx(1)
            pairs = (await ask("reranker", "/rerank", query="w1 w2", texts=["w3", "w1 w2", "w5"], top_n=2))["items"]
            scores = (await ask("reranker", "/score", text_1="w1 w2", text_2=["w3", "w1 w2", "w5"]))["data"]
            best = sorted(scores, key=lambda one: -one["score"])[:2]
            assert [one["index"] for one in pairs] == [one["index"] for one in best]
            labels = (await ask("classifier", "/classify", input="w1 w2"))["data"][0]
            assert labels["label"] in ("left", "right") and sum(labels["probs"]) == pytest.approx(1)
            tags = (await ask("tagger", "/tags", input="w1  w40 w80"))["data"][0]
            assert [word["word"] for word in tags["words"]] == ["w1", "w40", "w80"]

    names = ("classifier", "tagger", "embedder", "reranker")
    sources = [resolve(name, str(shelf.run(name))) for name in names]
    sources = with_neutral_labels(sources, ["classifier=left"])
    started(Fleet(engines(tmp_path)), *sources, then=use)


@pytest.mark.ci
def test_a_reader_and_a_reward_model(shelf, tmp_path):
    """Proven, and their routes say what `dstune predict` says."""

    async def use(fleet: Fleet):
        assert {model.proof.status for model in fleet.models.values()} == {"proven"}
        async with open_gateway(fleet, tmp_path, shelf) as (_, root):

            async def ask(name: str, path: str, **body):
                answer = await root.post(path, json={"model": name, **body})
                return answer.json() if answer.status_code == 200 else answer

            context = "w1 w2 w3 w4 w5 w6"
            read = (await ask("reader", "/answers", question=["w2", "w5"], context=context))["data"]
            spans = [one["answer"] for one in read]
            assert all(span and span in context for span in spans)
            talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
            other = [*talk[:1], {"role": "assistant", "content": "w9"}]
            rewards = (await ask("judge", "/rewards", messages=[talk, other]))["data"]
            scores = [one["score"] for one in rewards]
            assert scores[0] != scores[1]
            assert (await ask("judge", "/rewards", messages=talk))["data"][0]["score"] == pytest.approx(
                scores[0], abs=1e-4
            )
            assert (await ask("judge", "/rewards", messages=talk[:1])).status_code == 400
            assert (await ask("judge", "/answers", question="w1", context="w2")).status_code == 404
            assert (await ask("reader", "/answers", question=["w1"] * 2, context=["w2"] * 3)).status_code == 400
        return spans, scores, talk, other

    names = ("reader", "judge")
    spans, scores, talk, other = started(
        Fleet(engines(tmp_path)), *(resolve(name, str(shelf.run(name))) for name in names), then=use
    )
    reader, judge = (dstune.load_run(shelf.run(name).parent.parent) for name in names)
    questions = [{"question": question, "context": "w1 w2 w3 w4 w5 w6"} for question in ("w2", "w5")]
    assert [row["predicted"] for row in reader.predict(questions)] == spans
    predicted = judge.predict([{"messages": talk}, {"messages": other}])
    assert [row["score"] for row in predicted] == pytest.approx(scores, abs=1e-4)


# -- another model ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["local", "vllm", pytest.param("real vllm", marks=pytest.mark.slow)])
def test_what_is_not_the_trained_model_is_refused(shelf, tmp_path, kind):
    """A changed template, tensors under another prefix, another base, zeros, a base that was changed: each by its reason."""
    from safetensors.torch import load_file, save_file

    kinds = {"local": engines, "vllm": vllm, "real vllm": real_vllm}
    width = WIDE if kind == "real vllm" else {}
    if width:
        shelf = Shelf(tmp_path / "shelf", **width)

    def fleet_of(name: str) -> Fleet:
        return Fleet(kinds[kind](state(tmp_path / name)), one_template=kind != "local")

    template = shelf.copy("lora-a", tmp_path / "template")
    file = template / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant\n", "assistant"))
    assert "edited since it was exported: chat_template.jinja" in refusal(fleet_of("0"), resolve("x", str(template)))
    digest_again(template)
    assert "another prompt than in training" in refusal(fleet_of("1"), resolve("x", str(template)))

    def changed(name: str, change) -> Path:
        folder = shelf.copy("lora-a", tmp_path / name)
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(change(weights), folder / "adapter_model.safetensors", {"format": "pt"})
        return folder

    renamed = changed("renamed", lambda w: {key.replace("base_model.model.", "base_model."): v for key, v in w.items()})
    assert "the base lacks" in refusal(fleet_of("2"), resolve("x", str(renamed)))

    zeros = changed("zeros", lambda w: {key: value * 0 for key, value in w.items()})
    told = refusal(fleet_of("3"), resolve("x", str(zeros)))
    assert "not the model that was trained" in told or "no effect" in told

    other = save_decoder(tmp_path / "other", seed=9, **width)
    settings = json.loads((template / "adapter_config.json").read_text())
    moved = shelf.copy("lora-a", tmp_path / "moved")
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(other)}))
    assert "not the model that was trained" in refusal(fleet_of("4"), resolve("x", str(moved)))

    small = save_decoder(tmp_path / "small", hidden_size=16)
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(small)}))
    assert "has the shape" in refusal(fleet_of("5"), resolve("x", str(moved)))


def test_an_adapter_of_zeros_has_no_effect_even_if_its_reference_agrees(shelf, tmp_path):
    from safetensors.torch import load_file, save_file

    zeros = shelf.copy("lora-a", tmp_path / "zeros")
    weights = load_file(zeros / "adapter_model.safetensors")
    save_file({key: value * 0 for key, value in weights.items()}, zeros / "adapter_model.safetensors", {"format": "pt"})
    from transformers import AutoModelForCausalLM

    from dstune.inference.reference import _scored

    model = AutoModelForCausalLM.from_pretrained(shelf.base).eval()
    reference = json.loads((zeros / "reference.json").read_text())
    reference["rows"] = [_scored(row, model) for row in reference["rows"]]
    (zeros / "reference.json").write_text(json.dumps(reference))
    assert "has no effect" in refusal(Fleet(engines(state(tmp_path / "s"))), resolve("x", str(zeros)))


def test_vllm_by_its_command_line(shelf, tmp_path):
    async def use(fleet: Fleet):
        added = await fleet.add(resolve("b", str(shelf.run("lora-b"))))
        engine = fleet.models["a"].engine
        body = {"messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 6}
        texts = [
            (await engine.ask("POST", "/v1/chat/completions", {"model": m, **body}))["choices"] for m in ("a", "b")
        ]
        return {name: model.proof for name, model in fleet.models.items()}, added, texts

    proofs, added, texts = started(
        Fleet(vllm(tmp_path), one_template=True), resolve("a", str(shelf.run("lora-a"))), then=use
    )
    assert (proofs["a"].status, added.proof.status) == ("proven", "proven")
    assert proofs["a"].difference < 1e-4 and proofs["a"].effect > 1e-3
    assert texts[0] != texts[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it starts three times, a minute or more each
def test_the_real_vllm(tmp_path):
    """Two adapters, one added while it runs; all weights, and merged ones."""
    shelf = Shelf(tmp_path / "shelf", **WIDE)

    async def use(fleet: Fleet):
        added = await fleet.add(resolve("b", str(shelf.run("lora-b"))))
        async with open_gateway(fleet, tmp_path, shelf) as (client, _):
            texts = [await says(client, name) for name in fleet.models]
        return added.proof, {name: model.proof.status for name, model in fleet.models.items()}, texts

    added, statuses, texts = started(
        Fleet(real_vllm(tmp_path), one_template=True), resolve("a", str(shelf.run("lora-a"))), then=use
    )
    assert statuses == {"base": "base", "a": "proven", "b": "proven"} and added.difference < 1e-4
    assert len(set(texts)) == 3
    for number, folder in enumerate((shelf.run("full"), merged(shelf, tmp_path))):
        proofs = started(Fleet(real_vllm(state(tmp_path / str(number)))), resolve("x", str(folder)))
        assert proofs["x"].status == "proven"


@pytest.mark.slow
@pytest.mark.timeout(3600)  # it starts six times, and is proven each time
def test_the_real_vllm_is_killed_five_times(tmp_path):
    shelf = Shelf(tmp_path / "shelf", **WIDE)
    sources = [resolve(name, str(shelf.run(f"lora-{name}"))) for name in ("a", "b")]
    fleet = Fleet(real_vllm(tmp_path), one_template=True)
    assert started(fleet, *sources, then=killed(5, shelf, tmp_path)) == 5


class LlamaServers:
    """GGUF exports of adapters of one base, and fleets that serve them; skips where the server is not installed."""

    def __init__(self, folder: Path, data: Path, kind: str, *, begins: bool = False):
        self.program = os.environ.get("DSTUNE_LLAMA_SERVER", "")
        if not Path(self.program).is_file():
            pytest.skip("needs llama.cpp's server: DSTUNE_LLAMA_SERVER=/path/to/llama-server")
        from tests.support.gguf_models import save_model

        self.folder, self.data, self.kind = folder, data, kind
        self.base = save_model(folder / "model", "llama", begins=begins)

    def export(self, name: str, seed: int) -> Path:
        from dstune.checkpoint.export import export_gguf
        from dstune.checkpoint.store import newest
        from dstune.inference.reference import add_reference

        words = (*LORA, "data.max_length=96")
        run = save_run(self.folder / name, self.base, self.data, *words, seed=seed, scale=0.05)
        file = export_gguf(run, newest(run), self.folder / f"{name}-export", self.kind)
        assert add_reference(file.parent, run) == ""
        return file

    def fleet(self, name: str) -> Fleet:
        given = {"program": self.program, "arguments": ["--threads", "1"]}
        return Fleet(engines(state(self.folder / name), LlamaCppEngine, **given))


@pytest.mark.slow
def test_the_real_llama_server_is_killed_five_times(shelf, tmp_path):
    servers = LlamaServers(tmp_path, shelf.chat, "f32")
    sources = [resolve(name, str(servers.export(name, seed).parent)) for name, seed in (("one", 1), ("two", 2))]
    assert started(servers.fleet("1"), *sources, then=killed(5, shelf, tmp_path)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_the_real_llama_server(shelf, tmp_path, kind):
    """Proven where a bound is known, also where a token begins each text; another template and other weights are refused."""
    servers = LlamaServers(tmp_path, shelf.chat, kind, begins=kind == "f16")

    async def use(fleet: Fleet):
        async with open_gateway(fleet, tmp_path, shelf) as (client, _):
            ask = {"model": "x", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 6}
            whole = await client.chat.completions.create(**ask, temperature=0, logprobs=True, top_logprobs=0)
            # Tokens that are a part of a character come together, with one of them.
            assert 0 < len(whole.choices[0].logprobs.content) <= whole.usage.completion_tokens
            text = whole.choices[0].message.content
            parts = await client.chat.completions.create(**ask, temperature=0, stream=True)
            assert "".join([part.choices[0].delta.content or "" async for part in parts if part.choices]) == text
            drawn = [await client.chat.completions.create(**ask, seed=seed) for seed in (1, 1, 2)]
            texts = [one.choices[0].message.content for one in drawn]
            assert texts[0] == texts[1] != texts[2]
            with pytest.raises(openai.BadRequestError, match="control token"):
                await client.chat.completions.create(**ask | {"messages": [{"role": "user", "content": "<|im_end|>"}]})
        return fleet.models["x"].proof

    file = servers.export("one", 1)
    proof = started(servers.fleet("1"), resolve("x", str(file.parent)), then=use)
    assert proof.status == ("unproven" if kind == "q8_0" else "proven"), proof
    if kind != "q8_0":
        other = servers.export("two", 2)
        kept = file.read_bytes()
        file.write_bytes(other.read_bytes())
        assert "not the model that was trained" in refusal(servers.fleet("2"), resolve("x", str(file.parent)))
        file.write_bytes(kept)
    template = file.parent / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant"))
    digest_again(file.parent)
    assert "another prompt than in training" in refusal(servers.fleet("3"), resolve("x", str(file.parent)))


def test_a_model_without_a_reference_is_served_and_listed_as_unproven(shelf, tmp_path):
    plain = shelf.copy("full", tmp_path / "plain")
    (plain / "reference.json").unlink()
    proofs = started(Fleet(engines(state(tmp_path / "1"))), resolve("x", str(plain)))
    assert proofs["x"].status == "unproven"
    told = refusal(Fleet(engines(state(tmp_path / "2")), require_proof=True), resolve("x", str(plain)))
    assert "unproven" in told


def state(folder: Path) -> Path:
    folder.mkdir()
    return folder
