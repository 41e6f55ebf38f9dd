"""The local engine in this process: what it writes is what transformers writes, whatever is computed beside it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import pytest
import torch

from dstune.generation.sampler import Sampler
from tests.support.local_engine import Engine, body
from tests.support.tiny import save_decoder

# -- batches ----------------------------------------------------------------------------------------------------------


def test_requests_that_join_and_leave_a_batch_get_what_each_gets_alone(engine, plain):
    prompts = [" ".join(f"w{(i * j + i) % 90}" for j in range(i + 1)) for i in range(12)]

    async def test(client):
        async def one(number, text):
            await asyncio.sleep(0.01 * number)
            answer = await client.post("/v1/chat/completions", json=body(text, max_tokens=4 + 3 * number))
            return answer.json()["choices"][0]["message"]["content"]

        return await asyncio.gather(*(one(number, text) for number, text in enumerate(prompts)))

    found = engine.run(test)
    assert found == [plain(text, 4 + 3 * number) for number, text in enumerate(prompts)]
    assert engine.scheduler.state()["running"] == engine.scheduler.state()["waiting"] == 0


def test_a_prompt_longer_than_a_chunk_is_read_in_several(folder, plain):
    small = Engine(folder, chunk=3)
    text = " ".join(f"w{number}" for number in range(40))
    assert small.says(text) == [plain(text, 8)]
    small.close()


def test_models_whose_layers_look_at_the_last_tokens_only(tmp_path):
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    from tests.support.tiny import save_tokenizer

    torch.manual_seed(0)
    MistralForCausalLM(
        MistralConfig(
            vocab_size=105, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, sliding_window=6, initializer_range=0.2, eos_token_id=4,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    save_tokenizer(tmp_path)
    sliding = Engine(tmp_path)
    text = " ".join(f"w{number}" for number in range(20))
    ids = sliding.chat(text, return_token_ids=True, max_tokens=12)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        prompt = torch.tensor([ids["prompt_token_ids"]])
        expected = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert ids["choices"][0]["token_ids"] == [token for token in expected if token != 4]
    sliding.close()


def test_what_goes_wrong_with_one_answer_ends_it_alone(engine, monkeypatch):
    choose = Sampler.choose

    def fails(self, logits):
        if self.sampling.seed == 13:
            raise RuntimeError("no such luck")
        return choose(self, logits)

    monkeypatch.setattr(Sampler, "choose", fails)

    async def test(client):
        post = lambda seed: client.post("/v1/chat/completions", json=body(seed=seed, max_tokens=12))  # noqa: E731
        return await asyncio.gather(*(post(seed) for seed in (1, 13, 2)))

    codes = [answer.status_code for answer in engine.run(test)]
    assert codes == [200, 500, 200]
    assert engine.says() == engine.says()


def test_what_does_not_fit_is_refused_and_others_go_on(folder):
    small = Engine(folder, max_cached_tokens=64, max_sequences=2, max_waiting=1)

    async def test(client):
        post = lambda **fields: client.post("/v1/chat/completions", json=body(**fields))  # noqa: E731
        large = await post(max_tokens=100)
        several = await post(n=3)
        context = await post(max_tokens=300)
        many = await asyncio.gather(*(post(max_tokens=20) for _ in range(8)))
        return large, several, context, many

    large, several, context, many = small.run(test)
    assert [one.status_code for one in (large, several, context)] == [400, 400, 400]
    assert context.json()["error"]["code"] == "context_length_exceeded"
    codes = sorted({one.status_code for one in many})
    assert codes == [200, 503]
    small.close()


def test_a_call_whose_client_has_gone_does_not_end_the_computing(engine):
    """A parity request that is cancelled while it waits for the thread."""
    held, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        held.wait(30)

    first = engine.scheduler.call(hold)
    assert entered.wait(30)
    waiting = engine.scheduler.call(lambda: None)
    assert waiting.cancel()
    last = engine.scheduler.call(lambda: 7)
    held.set()
    first.result(30)
    assert last.result(30) == 7 and engine.scheduler.is_alive


def test_a_thread_that_ends_by_a_fault_is_reported(folder, monkeypatch):
    ended = threading.Event()
    own = Engine(folder, on_failure=ended.set)

    async def health(client):
        return (await client.get("/health")).status_code, (
            await client.post("/v1/chat/completions", json=body())
        ).status_code

    assert own.run(health) == (200, 200)
    monkeypatch.setattr(own.scheduler, "_run_calls", lambda: 1 / 0)
    waiting = own.scheduler.call(lambda: None)
    with pytest.raises(RuntimeError, match="stopping"):
        waiting.result(30)
    assert ended.wait(30)
    assert own.run(health) == (500, 503)
    own.close()


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory) -> dict[str, Path]:
    """Adapters of the model, and one of another width."""
    import peft
    from transformers import AutoModelForCausalLM

    made = {}
    for number, (name, base) in enumerate((("a", folder), ("b", folder), ("wide", None))):
        base = base or save_decoder(tmp_path_factory.mktemp("wide") / "base", hidden_size=16)
        torch.manual_seed(number)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 1)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        (made[name] / "dstune.json").write_text(json.dumps({"task": {"name": "chat"}}))
    return made


def test_a_name_that_is_given_to_another_adapter_answers_nothing_that_the_first_was_asked(folder, adapters):
    own = Engine(folder)

    async def test(client):
        load = {"lora_name": "x", "lora_path": str(adapters["a"])}
        assert (await client.post("/v1/load_lora_adapter", json=load)).status_code == 200
        first = (await client.post("/v1/chat/completions", json=body(model="x"))).json()
        held = own.model.adapter("x")
        stepped, goes = threading.Event(), threading.Event()
        step = own.scheduler._step

        def slow(key):
            step(key)
            if key[0] == held:
                stepped.set()
                goes.wait(30)

        own.scheduler._step = slow
        asked = body(model="x", max_tokens=40, logit_bias={str(n): -100 for n in own.model.ends("x")})
        running = asyncio.create_task(client.post("/v1/chat/completions", json=asked))
        await asyncio.to_thread(stepped.wait, 30)
        removed = asyncio.create_task(client.post("/v1/unload_lora_adapter", json={"lora_name": "x"}))
        await asyncio.sleep(0.05)
        goes.set()
        assert (await removed).status_code == 200
        load |= {"lora_path": str(adapters["b"])}
        assert (await client.post("/v1/load_lora_adapter", json=load)).status_code == 200
        second = (await client.post("/v1/chat/completions", json=body(model="x"))).json()
        return first, await running, second

    first, running, second = own.run(test)
    assert running.status_code == 500 and "removed" in running.json()["error"]["message"]
    assert first["choices"][0]["message"] != second["choices"][0]["message"]
    own.close()


def test_an_adapter_that_gets_the_name_of_another_one_lets_it_finish(folder, adapters):
    own = Engine(folder)

    def load(name: str) -> dict:
        return {"lora_name": "x", "lora_path": str(adapters[name]), "load_inplace": True}

    async def test(client):
        assert (await client.post("/v1/load_lora_adapter", json=load("a"))).status_code == 200
        asked = body(model="x", max_tokens=40, logit_bias={str(n): -100 for n in own.model.ends("x")})
        whole = (await client.post("/v1/chat/completions", json=asked)).json()
        held, step = own.model.adapter("x"), own.scheduler._step
        stepped, goes = threading.Event(), threading.Event()

        def slow(key):
            step(key)
            if key[0] == held:
                stepped.set()
                goes.wait(30)

        own.scheduler._step = slow
        running = asyncio.create_task(client.post("/v1/chat/completions", json=asked))
        await asyncio.to_thread(stepped.wait, 30)
        replaced = asyncio.create_task(client.post("/v1/load_lora_adapter", json=load("b")))
        await asyncio.sleep(0.05)
        goes.set()
        assert (await replaced).status_code == 200
        second = (await client.post("/v1/chat/completions", json=asked)).json()
        first = (await running).json()
        assert (await client.post("/v1/load_lora_adapter", json=load("b"))).status_code == 200
        return whole, first, second, held

    whole, first, second, held = own.run(test)
    assert first["choices"] == whole["choices"] != second["choices"]
    assert held not in own.model._retired, "nothing is written by it any more"
    own.close()


def test_an_adapter_that_does_not_fit_leaves_no_trace_in_other_answers(folder, adapters):
    """Where the model cannot be had back as it was, the engine ends, and the gateway starts it again."""
    load = lambda name: {"lora_name": name, "lora_path": str(adapters[name])}  # noqa: E731

    async def first(client):
        answer = await client.post("/v1/load_lora_adapter", json=load("wide"))
        return answer.status_code, (await client.post("/v1/chat/completions", json=body())).status_code

    ended = threading.Event()
    own = Engine(folder, on_failure=ended.set)
    assert own.run(first) == (400, 503)
    assert ended.wait(30) and not own.scheduler.is_alive
    own.close()

    async def later(client):
        plain = (await client.post("/v1/chat/completions", json=body())).json()["choices"]
        found = [(await client.post("/v1/load_lora_adapter", json=load(name))).status_code for name in ("a", "wide")]
        again = (await client.post("/v1/chat/completions", json=body())).json()["choices"]
        return found, plain == again, own.model.names

    own = Engine(folder, on_failure=ended.set)
    assert own.run(later) == ([200, 400], True, ["base", "a"])
    own.close()


def test_a_number_format_is_of_the_weights_alone(folder):
    from dstune.serve.engines.local.process import compute_in

    own = Engine(folder)
    compute_in("bfloat16", own.model.model)
    assert own.model.dtype == "bfloat16"
    rotary = {name: one.dtype for name, one in own.model.model.named_buffers() if "inv_freq" in name}
    assert rotary and set(rotary.values()) == {torch.float32}
    assert own.says(), "it answers"
    own.close()


def test_a_prompt_that_takes_long_to_render_stops_nobody(engine, monkeypatch):
    render, goes = engine.model.conversation_ids, threading.Event()

    def slow(*given):
        goes.wait(30)
        return render(*given)

    monkeypatch.setattr(engine.model, "conversation_ids", slow)

    async def test(client):
        long = asyncio.create_task(client.post("/v1/chat/completions", json=body()))
        await asyncio.sleep(0.05)
        assert (await asyncio.wait_for(client.get("/health"), 10)).status_code == 200 and not long.done()
        goes.set()
        return (await long).status_code

    assert engine.run(test) == 200


def test_a_stream_whose_client_goes_leaves_the_queue(folder):
    own = Engine(folder, max_sequences=1)
    held, goes = threading.Event(), asyncio.Event()

    async def main():
        own.scheduler.call(lambda: held.wait(30))
        read = [False]

        async def receive():
            if not read[0]:
                read[0] = True
                return {"type": "http.request", "body": json.dumps(body(stream=True)).encode()}
            await goes.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            goes.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
        await asyncio.wait_for(own.app(scope, receive, send), 30)  # while nothing is computed

    asyncio.run(main())
    held.set()
    time.sleep(0.2)
    assert own.scheduler.tokens == 0
    own.close()


def test_who_has_left_takes_no_place_in_the_queue(folder):
    """Also behind one that waits for room."""
    own = Engine(folder, max_sequences=1, max_waiting=2)
    held, begun = threading.Event(), threading.Event()
    own.scheduler.call(lambda: (begun.set(), held.wait(30)))
    begun.wait(30)

    async def test(client):
        waits, leaves = (asyncio.create_task(client.post("/v1/chat/completions", json=body())) for _ in range(2))
        while own.scheduler.state()["waiting"] < 2:
            await asyncio.sleep(0.01)
        leaves.cancel()
        for sequence in own.scheduler._waiting[1].sequences:  # as where a connection closes
            sequence.cancelled = True
        comes = asyncio.create_task(client.post("/v1/chat/completions", json=body()))
        await asyncio.sleep(0.2)
        held.set()
        return (await waits).status_code, (await comes).status_code

    assert own.run(test) == (200, 200)
    own.close()


def test_a_request_that_is_refused_computes_nothing(folder):
    own = Engine(folder)

    async def test(client):
        given = {"model": "base", "max_tokens": 200, "temperature": 0, "logit_bias": {"4": -100}}
        answer = await client.post("/v1/completions", json=given | {"prompt": ["w1", " ".join(["w2"] * 100)]})
        return answer.status_code

    assert own.run(test) == 400
    time.sleep(0.2)
    assert (own.scheduler.tokens, own.scheduler.state()["running"]) == (0, 0)
    own.close()
