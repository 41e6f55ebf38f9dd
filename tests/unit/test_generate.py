"""The verb `generate`: answers, sampling, conversations, adapters, a terminal."""

from __future__ import annotations

import builtins
import io
import json
import signal
import sys
from pathlib import Path

import pytest
import torch

from dstune.data.stopping import stop_token_ids
from dstune.generation.answers import generate_answers
from dstune.inference import generate
from dstune.inference.prompts import Request, read_file
from dstune.inference.voices import BASE, Speaker, Voice
from dstune.inference.writer import Answer, Sampling, Writer
from tests.support.generation import Terminal, answers, expected, refusal
from tests.support.tiny import save_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("generate") / "decoder")


# -- how it answers ---------------------------------------------------------------------------------------------------


def test_sampling_depends_on_the_seed_only(decoder, capsys):
    drawn = [
        answers(capsys, decoder, "--prompt", "w1", "--temperature", 1.5, "--seed", seed, "--max-new-tokens", 12)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("seed", [0, 3, -3, 10**12])
def test_a_seed_may_be_any_whole_number(decoder, capsys, monkeypatch, seed):
    seeded = []
    monkeypatch.setattr(torch, "manual_seed", lambda given: seeded.append(torch.Generator().manual_seed(given)))
    for given in (seed, seed + 2**44, seed - 10**6 * 2**44):
        answers(capsys, decoder, "--prompt", "w1", "--temperature", 1, "--seed", given, "--max-new-tokens", 1)
    expected_state = torch.Generator().manual_seed(seed * 2**20).get_state()
    assert all(torch.equal(one.get_state(), expected_state) for one in seeded) and len(seeded) == 3


def test_an_answer_ends_with_the_turn_even_if_the_model_does_not_say_so(decoder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(decoder).eval(), AutoTokenizer.from_pretrained(decoder)
    tokenizer.eos_token = "</s>"
    model.generation_config.eos_token_id = 2
    writer = Writer(Speaker(model, {BASE: Voice(tokenizer, chat=True)}), Sampling(max_new_tokens=5))
    request = Request("w1", "here")
    hidden = {}
    hook = model.model.norm.register_forward_hook(lambda _, __, output: hidden.update(last=output[0, -1].detach()))
    with torch.no_grad():
        model(input_ids=torch.tensor([writer.prompt_ids(request)]))
        hook.remove()
        model.lm_head.weight.zero_()
        model.lm_head.weight[4] = hidden["last"]  # now <|im_end|> is the most probable first token
    assert writer.answer([request]) == [Answer("", 1, "end")]
    # During training, too: after the end of the turn it would go on with w1.
    prompt = writer.prompt_ids(request)
    model.model.embed_tokens.weight.data[4] = 50 * model.model.embed_tokens.weight[10]
    with torch.no_grad():
        hook = model.model.norm.register_forward_hook(lambda _, __, output: hidden.update(next=output[0, -1].detach()))
        model(input_ids=torch.tensor([[*prompt, 4]]))
        hook.remove()
        first, following = hidden["last"], hidden["next"]
        model.lm_head.weight[4] = first - following * (first @ following) / (following @ following)
        model.lm_head.weight[10] = following - first * (first @ following) / (first @ first)
    assert generate_answers(model, tokenizer, [prompt], 2, stop_token_ids(tokenizer)) == [""]
    assert generate_answers(model, tokenizer, [prompt], 2, []) == ["w1"]


def test_answers_during_training(decoder):
    """Greedy, without padding, and the model goes on training as before."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(decoder), AutoTokenizer.from_pretrained(decoder)
    model.config.use_cache = False
    model.generation_config.temperature, model.generation_config.do_sample = 0.2, True
    settings = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    adapted = peft.get_peft_model(model, settings).train()  # starts as no change
    prompts = []
    for text in ("w1", "w2 w3 w4"):
        messages = [{"role": "user", "content": text}]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    found = generate_answers(adapted, tokenizer, prompts, 8, stop_token_ids(tokenizer))
    assert found == [expected(decoder, "w1"), expected(decoder, "w2 w3 w4")]
    assert adapted.training


def test_the_ends_of_an_answer(decoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.eos_token = "</s>"
    assert stop_token_ids(tokenizer) == [2, 4]
    # A line break may be in the answer itself, so it does not end one.
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}"
    assert stop_token_ids(tokenizer) == [2]


def test_a_template_without_conversations_ends_with_the_end_of_text(decoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = "{{ raise_exception('not for chats') }}"
    assert stop_token_ids(tokenizer) == [4]
    tokenizer.chat_template = None
    assert stop_token_ids(tokenizer) == [4]


def test_an_answer_fits_behind_its_prompt(decoder, capsys):
    (row,) = answers(capsys, decoder, "--plain", "--prompt", " ".join(["w1"] * 250), "--max-new-tokens", 50)
    assert row["tokens"] <= 6  # the model takes 256
    assert "has 300 tokens; the model takes 256" in refusal(decoder, "--plain", "--prompt", " ".join(["w1"] * 300))


def test_text_is_streamed_to_a_terminal(decoder, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert generate.main([str(decoder), "--prompt", "w1", "--max-new-tokens", "8"]) == 0
    assert screen.getvalue().strip() == expected(decoder, "w1")


def test_a_terminal_shows_no_stop_text(decoder, monkeypatch):
    first, second = expected(decoder, "w1").split()[:2]
    stop = f"{first} {second}"
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert generate.main([str(decoder), "--prompt", "w1", "--max-new-tokens", "8", "--stop", stop]) == 0
    assert screen.getvalue() == "\n", "the text before it, which is empty"


def test_a_model_that_asks_for_beams_is_streamed_token_by_token(decoder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(decoder)
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert generate.main([str(tmp_path), "--prompt", "w1", "--max-new-tokens", "8"]) == 0
    assert screen.getvalue().strip() == expected(decoder, "w1")


def test_text_without_a_terminal(decoder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1\n"))
    assert generate.main([str(decoder), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == expected(decoder, "w1") + "\n"


def test_a_conversation_is_remembered(decoder, monkeypatch):
    typed = iter(["w1", "w2", "/reset", "w2", "/help", "/exit", "never"])

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    conversations = []

    def stream(writer, request, show, interrupted):
        conversations.append(request.messages)
        return Answer("said", 1, "end")

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(Writer, "stream", stream)
    assert generate.main([str(decoder)]) == 0
    user = [{"role": "user", "content": content} for content in ("w1", "w2")]
    assert conversations == [[user[0]], [user[0], {"role": "assistant", "content": "said"}, user[1]], [user[1]]]


def test_a_batch_answers_as_one_by_one(decoder, tmp_path, capsys):
    """Padding on the left changes nothing, whatever the lengths."""
    prompts = ["w1", "w2 w3 w4 w5 w6 w7", "w8 w9", "w10 w11 w12"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    command = (decoder, "--input", tmp_path / "p.txt", "--max-new-tokens", 8)
    together = answers(capsys, *command, "--batch-size", 4)
    assert together == answers(capsys, *command, "--batch-size", 1)
    assert [row["answer"] for row in together] == [expected(decoder, prompt) for prompt in prompts]


def test_a_long_prompt_does_not_cut_its_neighbours(decoder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(decoder).eval(), AutoTokenizer.from_pretrained(decoder)
    writer = Writer(Speaker(model, {BASE: Voice(tokenizer, chat=False)}), Sampling(max_new_tokens=9), plain=True)
    short, long = Request("w1 w2", "1"), Request(" ".join(["w3"] * 252), "2")
    alone = writer.answer([short])[0]
    found = writer.answer([long, short])
    assert found[0].tokens <= 4 and found[1] == alone


def test_a_stop_text_ends_the_answer(decoder, capsys):
    command = (decoder, "--plain", "--max-new-tokens", 12)
    rows = answers(capsys, *command, *(f"--prompt=w{number}" for number in range(40)))
    row = next(row for row in rows if len(set(row["answer"].split())) > 1)
    first, *others = row["answer"].split()
    stop = next(word for word in others if word not in first)
    (cut,) = answers(capsys, *command, "--prompt", row["prompt"], "--stop", stop)
    assert cut["ended"] == "stop" and cut["answer"] == row["answer"].partition(stop)[0].strip() != ""
    assert cut["tokens"] <= row["tokens"]


def test_a_stop_text_ends_the_count_of_tokens(decoder):
    """Also where others of the batch go on, which pads the row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(decoder).eval(), AutoTokenizer.from_pretrained(decoder)
    stop = expected(decoder, "w1").split()[1]
    writer = Writer(Speaker(model, {BASE: Voice(tokenizer, chat=True)}), Sampling(max_new_tokens=12, stop=(stop,)))
    requests = [Request(f"w{number}", "here") for number in range(1, 9)]
    together = writer.answer(requests)
    assert together[0].tokens == 2 < max(answer.tokens for answer in together)
    assert together == [writer.answer([request])[0] for request in requests]


def test_a_system_message_comes_first(decoder, capsys, tmp_path):
    rows = [{"prompt": "w1"}, {"messages": [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1"}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = (decoder, "--max-new-tokens", 8)
    first, second = answers(capsys, *command, "--input", tmp_path / "p.jsonl", "--system", "w9")
    assert first["answer"] == second["answer"], "a conversation's own system message stays"
    assert first["answer"] != answers(capsys, *command, "--prompt", "w1")[0]["answer"]
    assert "--system" in refusal(decoder, "--plain", "--prompt", "w1", "--system", "w9")


# -- adapters by name -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(decoder, tmp_path_factory) -> dict[str, Path]:
    import peft
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), settings)
        adapted.save_pretrained(folder / name)
    return {"a": folder / "a", "b": folder / "b"}


def test_conversations_of_a_file_are_read_as_those_of_training(tmp_path):
    parts = [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2"}]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given = [
        [{"role": "developer", "content": "w9"}, {"role": "user", "content": parts}],
        [{"from": "human", "value": "w1"}],
        [
            {"role": "user", "content": "w1"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "w2"},
        ],
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in given))
    first, second, third = (request.messages for request in read_file(file))
    assert first == [{"role": "system", "content": "w9"}, {"role": "user", "content": parts}]
    assert second == [{"role": "user", "content": "w1"}]
    assert third[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_a_prompt_holds_every_character_but_a_line_feed(tmp_path):
    for name, line in (
        ("a.txt", "w1\u2028w2\x0cw3"),
        ("a.jsonl", json.dumps({"prompt": "w1\u2028w2\x0cw3"}, ensure_ascii=False)),
    ):
        (tmp_path / name).write_bytes(f"{line}\r\n{line}".encode("utf-8-sig"))
        assert [request.text for request in read_file(tmp_path / name)] == ["w1\u2028w2\x0cw3"] * 2


def test_rows_choose_an_adapter_by_name(decoder, adapters, tmp_path, capsys):
    rows = [{"prompt": "w1", "adapter": name} for name in ("a", "b", "base", "a")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "w1"}])))
    given = [f"--adapter={name}={path}" for name, path in adapters.items()]
    found = answers(capsys, decoder, *given, "--input", tmp_path / "p.jsonl", "--max-new-tokens", 8)
    assert [row["adapter"] for row in found] == ["a", "b", "base", "a", "a"]
    alone = [answers(capsys, adapters[name], "--prompt", "w1", "--max-new-tokens", 8)[0]["answer"] for name in "ab"]
    assert [row["answer"] for row in found] == [alone[0], alone[1], expected(decoder, "w1"), alone[0], alone[0]]
    assert len({row["answer"] for row in found}) == 3
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "w1", "adapter": "c"}))
    text = refusal(decoder, *given, "--input", tmp_path / "p.jsonl")
    assert "p.jsonl:1=c" in text and "a, b" in text


def test_adapters_that_are_none(decoder, adapters, tmp_path):
    assert "is no adapter" in refusal(decoder, "--prompt", "w1", "--adapter", f"x={decoder}")
    assert "is not NAME=PATH" in refusal(decoder, "--prompt", "w1", "--adapter", "x")
    twice = [f"--adapter=a={adapters['a']}", f"--adapter=a={adapters['b']}"]
    assert "is taken" in refusal(decoder, "--prompt", "w1", *twice)
    other = save_decoder(tmp_path / "other", hidden_size=64)
    assert "does not fit" in refusal(other, "--prompt", "w1", "--adapter", f"a={adapters['a']}")


def test_a_conversation_changes_its_adapter(decoder, adapters, monkeypatch, capsys):
    typed = iter(["w1", "/adapter b", "/reset", "w1", "/adapter", "/adapter c", "/exit"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", lambda _: next(typed))
    given = [f"--adapter={name}={path}" for name, path in adapters.items()]
    assert generate.main([str(decoder), *given, "--max-new-tokens", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    alone = [answers(capsys, adapters[name], "--prompt", "w1", "--max-new-tokens", 8)[0]["answer"] for name in "ab"]
    assert [lines[1].strip(), lines[3].strip()] == alone
    assert lines[2] == lines[4] == "a, [b], base"
    assert lines[5] == "there is no adapter c; there are a, [b], base"


def test_ctrl_c_ends_the_answer_and_not_the_program(decoder, monkeypatch, capsys):
    typed = iter(["w1", "w2", "/exit"])
    conversations = []
    real = Writer.stream

    def stream(writer, request, show, interrupted):
        conversations.append(request.messages)

        def interrupt(piece: str) -> None:
            show(piece)
            if len(conversations) == 1 and not interrupted():
                signal.raise_signal(signal.SIGINT)

        return real(writer, request, interrupt, interrupted)

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", lambda _: next(typed))
    monkeypatch.setattr(Writer, "stream", stream)
    before = signal.getsignal(signal.SIGINT)
    assert generate.main([str(decoder), "--max-new-tokens", "40"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    kept = conversations[1][1]["content"]
    assert 1 <= len(kept.split()) < len(expected(decoder, "w1", count=40).split()), (
        "what was written stays in the history"
    )


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_bad_values_are_refused_together(decoder):
    text = refusal(decoder, "--prompt", "w1", "--max-new-tokens", 0, "--temperature", -1)
    assert "--max-new-tokens=0" in text and "--temperature=-1.0" in text
    assert "--top-p and --top-k need a temperature above 0" in refusal(decoder, "--prompt", "w1", "--top-p", 0.9)
