"""A server that samples gets the weights that train, under names that say which they are; what it answers is checked in whole, and
one that is another model is noticed and named."""

from __future__ import annotations

import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError

import pytest
import torch
from support.rollout_server import RolloutServer
from support.tiny import save_decoder
from transformers import AutoModelForCausalLM

from dstune.core.errors import UserError
from dstune.generation import batch, completions
from dstune.generation.completions import sample_completions, sample_continuously
from dstune.models.heads.base import IGNORED
from dstune.tasks.reinforcement import grade, rules, sampler_check, served_sampler, vllm_server
from dstune.tasks.reinforcement.config import ReinforcementConfig, Rollout
from dstune.tasks.reinforcement.head import PolicyHead
from dstune.tasks.reinforcement.published_weights import unservable
from dstune.tasks.reinforcement.sampler_check import examine, is_allowed, looks_like
from dstune.tasks.reinforcement.served_sampler import ServedSampler
from dstune.trainer.rollouts import RolloutsUnavailable

PROMPTS = [(7, [10, 11, 12]), (3, [20]), (5, [30, 31, 32, 33, 34])]
PAD, END = 2, 4
ALONE = SimpleNamespace(is_main=True, gather=lambda value: [value], broadcast=lambda value: value, any=bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(folder):
    with RolloutServer(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(server):
    server.restart()
    server.fault, server.failures, server.is_asleep = "", 0, False
    server.requests.clear()


def plain(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(folder: Path, seed: int = 0, **settings):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(plain(folder), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings))
    move(model, seed)
    return model.eval()


def move(model, seed: int) -> None:
    """As a few steps of training do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def sampler_of(model, server, run_dir: Path, **settings) -> ServedSampler:
    task = ReinforcementConfig(
        rollout=Rollout.vllm,
        rollout_url=server.address,
        **({"max_new_tokens": 24, "rollout_seconds": 120.0} | settings),
    )
    return ServedSampler(task, SimpleNamespace(module=model), ALONE, run_dir, {END})


def write(sampler: ServedSampler, *, step: int = 1, samples: int = 4):
    sampler.publish()
    return sampler.complete(PROMPTS, samples, (0, step))


def head_and_batch(model, completions, temperature: float = 1.0):
    prompts = dict(PROMPTS)
    rows = [(prompts[one.prompt], one) for one in completions]
    width = max(len(prompt) + len(one.ids) for prompt, one in rows)
    batch = {
        "input_ids": torch.full((len(rows), width), PAD),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORED),
        "sampled": torch.zeros(len(rows), width),
        "advantages": torch.zeros(len(rows)),
    }
    for row, (prompt, one) in enumerate(rows):
        whole, answer = len(prompt) + len(one.ids), slice(len(prompt), len(prompt) + len(one.ids))
        batch["input_ids"][row, :whole] = torch.tensor([*prompt, *one.ids])
        batch["attention_mask"][row, :whole] = 1
        batch["labels"][row, answer] = torch.tensor(one.ids)
        batch["sampled"][row, answer] = torch.tensor(one.logps)
    return PolicyHead(ReinforcementConfig(temperature=temperature), model), batch


def verdict(model, completions, temperature: float = 1.0) -> str:
    """What the check says; empty where it finds nothing."""
    head, batch = head_and_batch(model, completions, temperature)
    found = examine(head, model, [batch], temperature)
    signed, absolute, largest = (float(value) for value in (
        found.tokens.mean(), found.tokens.abs().mean(), found.tokens.abs().max()
    ))  # fmt: skip
    if is_allowed(torch.float32, signed, absolute, largest):
        return ""
    return looks_like(found, temperature, sampler_check.allowed(torch.float32)[1])


def test_an_adapter_is_published_by_its_content_and_samples_as_it_trains(folder, server, tmp_path):
    model = adapted(folder)
    sampler = sampler_of(model, server, tmp_path, temperature=0.8)
    first = write(sampler)
    assert [(one.prompt, one.sample) for one in first] == [(n, k) for n, _ in PROMPTS for k in range(4)]
    assert {one.version for one in first} == {sampler.version}
    assert verdict(model, first, 0.8) == ""
    assert len({tuple(one.ids) for one in first}) > 6
    body = server.bodies("/v1/completions")[0]
    exact = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
    assert {name: body[name] for name in exact} == exact, "whatever the model's generation_config.json says"
    assert body["prompt"] in [tokens for _, tokens in PROMPTS], "tokens, not text"
    write(sampler)
    assert len(server.bodies("/v1/load_lora_adapter")) == 1, "the same weights are not sent again"
    earlier = sampler.version
    move(model, 1)
    second = write(sampler, step=2)
    assert sampler.version != earlier and list(server.adapters) == [sampler.version], "the old one is unloaded"
    assert [path.name for path in (tmp_path / "sampler").iterdir()] == [sampler.version], "and removed"
    assert verdict(model, second, 0.8) == ""


def test_runs_that_share_a_folder_leave_each_others_weights(folder, server, tmp_path):
    """Both begin with the same weights, which have one name."""
    model = adapted(folder)
    samplers = [sampler_of(model, server, tmp_path / run, rollout_folder=str(tmp_path)) for run in ("a/run", "b/run")]
    first, second = (sampler.publish() for sampler in samplers)
    assert first == second
    move(model, 1)
    changed = samplers[0].publish()
    assert sorted(path.name for path in tmp_path.glob("run-*/dstune-*")) == sorted([second, changed])
    move(model, 2)
    latest = sampler_of(model, server, tmp_path / "a" / "run", rollout_folder=str(tmp_path)).publish()
    assert sorted(path.name for path in tmp_path.glob("run-*/dstune-*")) == sorted([second, latest]), "started again"


def test_whole_weights_are_read_from_a_folder(folder, server, tmp_path):
    model = plain(folder)
    sampler = sampler_of(model, server, tmp_path, rollout_sleep=True)
    for step in (1, 2):
        move(model, step)
        assert verdict(model, write(sampler, step=step)) == ""
        sampler.rest()
        assert server.is_asleep
    routes = [path for path, _ in server.requests if path not in ("/v1/completions", "/v1/models")]
    assert routes == ["/wake_up", "/collective_rpc", "/reset_prefix_cache", "/sleep?level=1"] * 2


def test_a_server_that_fails_is_asked_again_and_given_its_weights_again(folder, server, tmp_path):
    for model in (adapted(folder), plain(folder)):
        move(model, 3)
        sampler = sampler_of(model, server, tmp_path)
        whole = write(sampler)
        sampler.publish()
        server.restart()
        server.failures = 2
        again = sampler.complete(PROMPTS, 4, (0, 1))
        assert [one.ids for one in again] == [one.ids for one in whole]


def test_a_server_that_stays_away_lets_the_run_leave(folder, server, tmp_path):
    sampler = sampler_of(plain(folder), server, tmp_path, rollout_seconds=0.5)
    server.failures = 10**6
    with pytest.raises(RolloutsUnavailable, match="503"):
        write(sampler)
    gone = SimpleNamespace(address="http://127.0.0.1:9")
    with pytest.raises(RolloutsUnavailable, match="refused"):
        write(sampler_of(plain(folder), gone, tmp_path, rollout_seconds=0.5))


@pytest.mark.parametrize(
    ("fault", "said"),
    {
        "other name": "in place of",
        "other end": "elsewhere than at an end token",
        "too long": "limit is 256",
    }.items(),
)
def test_what_it_answers_is_checked(folder, server, tmp_path, fault, said):
    server.fault = fault
    sampler = sampler_of(adapted(folder), server, tmp_path, max_new_tokens=252 if fault == "too long" else 24)
    with pytest.raises(UserError, match=said):
        write(sampler)


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_an_end_token_at_the_last_place_ends_a_completion(finish):
    """Whatever the server looks at first."""
    choice = {"finish_reason": finish, "token_ids": [5, END], "logprobs": {"token_logprobs": [-1.0, -1.0]}}
    assert vllm_server._read_choice(choice, [1], vllm_server.Sampling(2, 1.0, {END}, 64)).ended
    with pytest.raises(vllm_server.ServerRefused, match="elsewhere"):
        vllm_server._read_choice(choice | {"finish_reason": "length"}, [1], vllm_server.Sampling(3, 1.0, {END}, 64))


def test_a_key_is_one_line_and_never_shown(monkeypatch):
    monkeypatch.setenv(served_sampler.KEY, "secret\n")
    assert served_sampler.read_key() == "secret"
    monkeypatch.setenv(served_sampler.KEY, "sec\nret")
    with pytest.raises(UserError) as told:
        served_sampler.read_key()
    assert "sec" not in str(told.value)


def test_a_key_does_not_follow_a_redirect():
    """To a sampler, and to a judge."""
    keys = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/elsewhere":
                keys.append(self.headers.get("Authorization"))
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        address = f"http://127.0.0.1:{http.server_port}"
        with pytest.raises(vllm_server.ServerRefused, match="302"):
            vllm_server.VllmServer(address, "secret", 5.0).base_model()
        with pytest.raises(HTTPError):
            grade.post(f"{address}/v1/chat/completions", {}, 5.0, "secret")
        http.shutdown()
    assert not keys


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://host:80a",
        "ftp://host",
        "http://user:pw@host",
        "http://host:0",
        "http://host/?a=b",
        "http://a b",
    ],
)
def test_an_address_that_no_server_has_is_refused(url):
    assert (reason := rules._wrong_address(url)) and url not in reason
    assert not rules._wrong_address("http://[::1]:8000/prefix") and not rules._wrong_address("https://host")


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 2}}]
)
def test_adapters_that_a_server_would_not_load_whole_are_refused(folder, kind):
    assert unservable(adapted(folder)) == ""
    assert unservable(adapted(folder, **kind))


LOOKS = {
    "stale": sampler_check.OTHER_WEIGHTS,
    "lost adapter": sampler_check.LOST_ADAPTER,
    "top-p": sampler_check.CUT_OFF,
    "temperature": "temperature 0.7",
    "other prompt": sampler_check.OTHER_PROMPT,
}


@pytest.mark.parametrize("fault", LOOKS)
def test_a_server_that_is_another_model_is_named(folder, server, tmp_path, fault):
    model = adapted(folder)
    sampler = sampler_of(model, server, tmp_path)
    server.fault = fault
    completions = write(sampler, samples=16)
    if fault == "stale":
        assert verdict(model, completions) == ""
        move(model, 1)
        completions = write(sampler, step=2, samples=16)
        assert {one.version for one in completions} == {sampler.version}, "under the new label"
    assert LOOKS[fault] in verdict(model, completions)


def test_log_probabilities_before_the_temperature_are_named(folder, server, tmp_path):
    model = adapted(folder)
    server.fault = "raw"
    completions = write(sampler_of(model, server, tmp_path, temperature=0.7), samples=8)
    assert "temperature 1 " in verdict(model, completions, 0.7)


def in_process(model, mode: str, *, temperature: float = 1.0, samples: int = 16, prompts=PROMPTS):
    settings = {"samples": samples, "max_new_tokens": 24, "temperature": temperature, "ends": {END}, "padding": PAD}
    if mode == "fast":
        return sample_continuously(
            model, prompts, rows=3 * samples, keys=(0, 1), device=torch.device("cpu"), **settings
        )
    width = max(len(tokens) for _, tokens in prompts)
    ids = torch.tensor([[PAD] * (width - len(tokens)) + tokens for _, tokens in prompts])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for _, tokens in prompts])
    numbers = [number for number, _ in prompts]
    return sample_completions(model, ids, mask, numbers, keys=(0, 1), goes_on=bool, **settings)


def plant(monkeypatch, fault: str) -> None:
    last_logits, draw = batch.last_logits, completions.draw

    def padding_read(model, ids, mask, *given):
        return last_logits(model, ids, mask if mask is None else torch.ones_like(mask), *given)

    def top_p(logits, temperature, keys):
        ordered, places = torch.softmax(logits.float() / temperature, -1).sort(descending=True)
        cut = torch.zeros_like(ordered).scatter(1, places, (ordered.cumsum(-1) - ordered > 0.9).float()) > 0
        return draw(logits.masked_fill(cut, -math.inf), temperature, keys)

    if fault == "padding read":
        monkeypatch.setattr(batch, "last_logits", padding_read)
    elif fault == "top-p":
        monkeypatch.setattr(completions, "draw", top_p)


@pytest.mark.ci
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("fault", [*LOOKS, "padding read"])
def test_a_sampler_in_this_process_that_is_another_model_is_named(folder, monkeypatch, mode, fault):
    model = adapted(folder)
    assert verdict(model, in_process(model, mode)) == ""
    plant(monkeypatch, fault)
    expected = {**LOOKS, "padding read": sampler_check.PADDING}[fault]
    if fault == "stale":
        completions = in_process(model, mode)
        move(model, 1)
    elif fault == "lost adapter":
        with model.disable_adapter():
            completions = in_process(model, mode)
    elif fault == "other prompt":
        completions = in_process(model, mode, prompts=[(n, [10, 11, 12, 13, *tokens]) for n, tokens in PROMPTS])
    else:
        completions = in_process(model, mode, temperature=0.7 if fault == "temperature" else 1.0)
    assert expected in verdict(model, completions)
