"""The verb `generate`: what it answers from, what it refuses, what it prints."""

from __future__ import annotations

import builtins
import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from dstune.checkpoint import store
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.core.errors import UserError
from dstune.data.stopping import stop_token_ids
from dstune.inference import generate
from dstune.inference.answers_file import AnswersFile
from dstune.inference.prompts import Request
from dstune.inference.voices import BASE, Speaker, Voice
from dstune.inference.writer import Answer, Sampling, Writer
from dstune.models.generation import generate_answers
from tests.support.tiny import save_decoder, save_encoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("generate") / "decoder")


def expected(folder: Path, prompt: str, *, chat: bool = True, count: int = 8) -> str:
    """What transformers alone answers, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt").input_ids
    with torch.no_grad():
        tokens = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def answers(capsys, *arguments: object) -> list[dict]:
    assert generate.main([*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        generate.main(list(map(str, arguments)))
    return str(caught.value)


# -- what it answers from ---------------------------------------------------------------------------------------------


def test_a_model_folder(decoder, capsys):
    rows = answers(capsys, decoder, "--prompt", "w1 w2", "--prompt", "w3", "--max-new-tokens", 8)
    assert [row["prompt"] for row in rows] == ["w1 w2", "w3"]
    assert [row["answer"] for row in rows] == [expected(decoder, "w1 w2"), expected(decoder, "w3")]
    assert all(1 <= row["tokens"] <= 8 for row in rows)


def test_plain_goes_on_with_the_text(decoder, capsys):
    (row,) = answers(capsys, decoder, "--plain", "--prompt", "w1 w2", "--max-new-tokens", 8)
    assert row["answer"] == expected(decoder, "w1 w2", chat=False) != expected(decoder, "w1 w2")


def saved_run(folder: Path, model: Path, *overrides: str) -> Path:
    """A run directory with one checkpoint at stage 0, whose weights are twice the base model's."""
    run_dir = folder / "run"
    run_dir.mkdir()
    write_run(run_dir / "run.yaml", compose([f"model.path={model}", "data=files", "data.train=x.jsonl", *overrides]))
    save_step(run_dir, model, 3, factor=2)
    return run_dir


def save_step(run_dir: Path, model: Path, step: int, *, factor: float) -> Path:
    """Another checkpoint, whose weights are `factor` times the model's."""
    from transformers import AutoModelForCausalLM

    written = store.folder(run_dir) / f"{store.tag(step)}.incomplete"
    written.mkdir(parents=True)
    trained = AutoModelForCausalLM.from_pretrained(model)
    module = {name: parameter.detach() * factor for name, parameter in trained.named_parameters()}
    state = {"module": module, "buffer_names": [], "global_steps": step}
    torch.save(state, written / "mp_rank_00_model_states.pt")
    return store.commit(written, {"step": step, "labels": [], "best": None})


def test_a_run_is_answered_from_its_export(decoder, tmp_path, capsys):
    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    other = save_decoder(run_dir / "export", seed=7)
    (other / "dstune.json").write_text(json.dumps({"checkpoint": "step-00000003"}))
    (row,) = answers(capsys, run_dir, "--prompt", "w5", "--max-new-tokens", 8)
    assert row["answer"] == expected(other, "w5") != expected(decoder, "w5")


def test_a_run_without_export_is_answered_from_its_checkpoint(decoder, tmp_path, capsys):
    from dstune.checkpoint.export import export_checkpoint

    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    (row,) = answers(capsys, run_dir, "--prompt", "w5", "--max-new-tokens", 8)
    assert not (run_dir / "export").exists()
    folder = export_checkpoint(run_dir, store.newest(run_dir), tmp_path / "out")
    assert row["answer"] == expected(folder, "w5") != expected(decoder, "w5")


def test_an_export_of_another_checkpoint_is_not_what_was_requested(decoder, tmp_path, capsys):
    from dstune.checkpoint import export
    from dstune.inference import export_command

    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    newer = save_step(run_dir, decoder, 5, factor=-1)
    assert export_command.main([str(run_dir), "--checkpoint", "3"]) == 0  # after step 5 was saved
    last = export.export_checkpoint(run_dir, newer, tmp_path / "last")
    capsys.readouterr()
    requested = ["--prompt", "w5", "--max-new-tokens", 8]
    (row,) = answers(capsys, run_dir, *requested)
    assert row["answer"] == expected(last, "w5") != expected(run_dir / "export", "w5")
    (row,) = answers(capsys, run_dir, *requested, "--checkpoint", 3)
    assert row["answer"] == expected(run_dir / "export", "w5")
    scratch = tmp_path / "scratch"
    assert export.exported(run_dir, scratch, which="3") == run_dir / "export"
    (run_dir / "export" / "dstune.json").unlink()  # nothing says what it was made of
    assert export.exported(run_dir, scratch, which="3") == scratch / "export"


def damage(checkpoint: Path) -> str:
    """Change one byte of the weights; the size stays. Returns the file's name."""
    file = checkpoint / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


def test_a_damaged_checkpoint_is_refused_and_a_whole_one_named(decoder, tmp_path, capsys):
    from dstune.inference import export_command

    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    for step in (4, 5):
        name = damage(save_step(run_dir, decoder, step, factor=-1))
    with pytest.raises(UserError) as caught:
        export_command.main([str(run_dir)])
    (problem,) = caught.value.problems
    assert problem.where.endswith("step-00000005") and name in problem.reason
    assert not (run_dir / "export").exists()
    text = refusal(run_dir, "--prompt", "w1")
    assert name in text and problem.fix in text
    # The fix works as it stands: the newest whole one is step 3.
    program, verb, *arguments = problem.fix.split()
    assert (program, verb) == ("dstune", "export") and arguments[:3] == [str(run_dir), "--checkpoint", "3"]
    assert export_command.main(arguments) == 0
    damage(store.folder(run_dir) / "step-00000003")
    assert "no other checkpoint" in refusal(run_dir, "--prompt", "w1", "--checkpoint", 3)


def test_what_an_incomplete_save_left_is_no_checkpoint(decoder, tmp_path, capsys):
    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    whole = store.newest(run_dir)
    incomplete_reasons = whole.with_name("step-00000040.incomplete")
    incomplete_reasons.mkdir()
    text = refusal(incomplete_reasons, "--prompt", "w1")
    assert "is no whole checkpoint" in text and str(run_dir) in text
    text = refusal(decoder, "--prompt", "w1", "--adapter", f"mine={incomplete_reasons}")
    assert "--adapter mine" in text and "is no whole checkpoint" in text
    (row,) = answers(capsys, whole, "--prompt", "w5", "--max-new-tokens", 8)
    assert row["answer"]


def test_a_run_on_plain_text_goes_on_with_the_text(decoder, tmp_path, capsys):
    run_dir = saved_run(tmp_path, decoder, "task=causal_lm", "method=full")
    shutil.copytree(decoder, run_dir / "export")
    (run_dir / "export" / "dstune.json").write_text(json.dumps({"checkpoint": "step-00000003"}))
    (run_dir / "export" / "config.json").touch()  # newer than the checkpoint
    (row,) = answers(capsys, run_dir, "--prompt", "w5", "--max-new-tokens", 8)
    assert row["answer"] == expected(decoder, "w5", chat=False)


def test_an_adapter_is_put_on_its_base(decoder, tmp_path, capsys):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "merged")
    (row,) = answers(capsys, tmp_path / "adapter", "--prompt", "w5", "--max-new-tokens", 8)
    assert row["answer"] == expected(tmp_path / "merged", "w5") != expected(decoder, "w5")


# -- how it answers ---------------------------------------------------------------------------------------------------


def test_sampling_depends_on_the_seed_only(decoder, capsys):
    drawn = [
        answers(capsys, decoder, "--prompt", "w1", "--temperature", 1.5, "--seed", seed, "--max-new-tokens", 12)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


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


def test_prompts_of_files(decoder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("w1\n\nw2 w3\n")
    rows = answers(capsys, decoder, "--file", tmp_path / "p.txt", "--max-new-tokens", 4)
    assert [row["prompt"] for row in rows] == ["w1", "w2 w3"]
    conversation = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    lines = [json.dumps({"prompt": "w1"}), json.dumps({"messages": conversation})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    rows = answers(capsys, decoder, "--file", tmp_path / "p.jsonl", "--max-new-tokens", 4)
    assert [row["prompt"] for row in rows] == ["w1", conversation]
    assert rows[0]["answer"] == expected(decoder, "w1", count=4)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_is_streamed_to_a_terminal(decoder, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert generate.main([str(decoder), "--prompt", "w1", "--max-new-tokens", "8"]) == 0
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

    requested = []

    def stream(writer, request, show, interrupted):
        requested.append(request.messages)
        return Answer("said", 1, "end")

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(Writer, "stream", stream)
    assert generate.main([str(decoder)]) == 0
    user = [{"role": "user", "content": content} for content in ("w1", "w2")]
    assert requested == [[user[0]], [user[0], {"role": "assistant", "content": "said"}, user[1]], [user[1]]]


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
    requested = []
    real = Writer.stream

    def stream(writer, request, show, interrupted):
        requested.append(request.messages)

        def interrupt(piece: str) -> None:
            show(piece)
            if len(requested) == 1 and not interrupted():
                signal.raise_signal(signal.SIGINT)

        return real(writer, request, interrupt, interrupted)

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", lambda _: next(typed))
    monkeypatch.setattr(Writer, "stream", stream)
    before = signal.getsignal(signal.SIGINT)
    assert generate.main([str(decoder), "--max-new-tokens", "40"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    kept = requested[1][1]["content"]
    assert 1 <= len(kept.split()) < len(expected(decoder, "w1", count=40).split()), (
        "what was written stays in the history"
    )


# -- a file of answers ------------------------------------------------------------------------------------------------


def test_answers_into_a_file(decoder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("w1\nw2\nw3\n")
    command = [str(decoder), "--input", str(tmp_path / "p.txt"), "--max-new-tokens", "4", "--batch-size", "2"]
    assert generate.main([*command, "--output", str(tmp_path / "a.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["w1", "w2", "w3"]
    assert rows == answers(capsys.readouterr() and capsys, *command)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("a.")] == ["a.jsonl"]
    assert "exists already" in refusal(*command, "--output", tmp_path / "a.jsonl")


def test_a_table_is_no_list_of_prompts(decoder, tmp_path):
    (tmp_path / "p.csv").write_text("review,stars\ngood,5\n")
    assert "which column is the prompt" in refusal(str(decoder), "--input", tmp_path / "p.csv")


def test_a_killed_command_goes_on(decoder, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("\n".join(f"w{number}" for number in range(7)))
    sampled = ["--temperature", "1.2", "--seed", "3", "--max-new-tokens", "6", "--batch-size", "2"]
    command = [str(decoder), "--input", str(tmp_path / "p.txt"), *sampled, "--output"]
    assert generate.main([*command, str(tmp_path / "whole.jsonl")]) == 0
    real, batches = Writer.answer, []

    def killed(writer, requests, number=0):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(number)
        return real(writer, requests, number)

    monkeypatch.setattr(Writer, "answer", killed)
    part = tmp_path / "a.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        generate.main([*command, str(tmp_path / "a.jsonl")])
    assert not (tmp_path / "a.jsonl").exists()
    with part.open("a") as stream:
        stream.write('{"prompt": "w4", "answ')  # torn in the middle of a row
    assert "other settings" in refusal(*command, tmp_path / "a.jsonl", "--top-p", 0.5)
    batches.clear()
    monkeypatch.setattr(Writer, "answer", real)
    assert generate.main([*command, str(tmp_path / "a.jsonl")]) == 0
    assert "4 of 7 answers are there already" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_only_whole_batches_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    begun = AnswersFile(path, {"model": "m"}, 2)
    begun.append([{"n": 0}, {"n": 1}])
    begun.append([{"n": 2}])
    again = AnswersFile(path, {"model": "m"}, 2)
    assert again.done == 2
    again.append([{"n": 2}, {"n": 3}])
    again.finish()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    assert AnswersFile(path, {"model": "other"}, 2, force=True).done == 0


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_bad_values_are_refused_together(decoder):
    text = refusal(decoder, "--prompt", "w1", "--max-new-tokens", 0, "--temperature", -1)
    assert "--max-new-tokens=0" in text and "--temperature=-1.0" in text
    assert "greedy answers draw nothing" in refusal(decoder, "--prompt", "w1", "--top-p", 0.9)


def test_bad_rows_are_named_by_file_and_line(decoder, tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [
        '{"prompt": "w1"}',
        "{torn",
        '{"text": "w"}',
        "[1]",
        '{"messages": [{"role": "assistant", "content": "w"}]}',
        '{"prompt": " "}',
    ]
    path.write_text("\n".join(rows))
    text = refusal(decoder, "--file", path)
    assert all(f"{path}:{line}" in text for line in (2, 3, 4, 5, 6)) and f"{path}:1" not in text
    assert "cannot be read: No such file" in refusal(decoder, "--file", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "no prompts" in refusal(decoder, "--file", tmp_path / "empty.txt")
    assert "the prompt is empty" in refusal(decoder, "--prompt", " ")


def test_models_that_write_no_text(tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    assert "is no language model" in refusal(encoder, "--prompt", "w1")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    overrides = [f"model.path={encoder}", "data=files", "data.train=x.jsonl", "task=classification", "method=full"]
    write_run(run_dir / "run.yaml", compose([*overrides, "data.packing=false"]))
    assert "writes no text" in refusal(run_dir, "--prompt", "w1")
    (encoder / "dstune.json").write_text(json.dumps({"task": {"name": "classification"}}))
    assert f"dstune predict {encoder}" in refusal(encoder, "--prompt", "w1")
    (encoder / "dstune.json").unlink()
    for kind in ("TokenClassification", "QuestionAnswering"):  # of other origin, known by its head
        config = json.loads((encoder / "config.json").read_text()) | {"architectures": [f"BertFor{kind}"]}
        (encoder / "config.json").write_text(json.dumps(config))
        assert "writes no text" in refusal(encoder, "--prompt", "w1")


def test_a_model_that_is_not_there(tmp_path):
    assert "MODEL" in refusal(tmp_path / "nowhere", "--prompt", "w1")


def test_a_run_without_a_checkpoint(decoder, tmp_path):
    run_dir = saved_run(tmp_path, decoder, "task=chat", "method=full")
    shutil.rmtree(store.folder(run_dir))
    assert "has saved none yet" in refusal(run_dir, "--prompt", "w1")
