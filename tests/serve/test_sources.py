"""What the command line names, what folders and addresses are allowed, which fields are known, and templates of Ollama."""

from __future__ import annotations

import json
import socket

import pytest

from dstune.checkpoint.ollama import go_template, modelfile
from dstune.core.errors import UserError
from dstune.protocols import TASKS
from dstune.serve import command, fields, options, source
from dstune.serve.engines.remote import check_address
from dstune.serve.errors import ApiError
from dstune.serve.gateway.routes import INFERENCE
from dstune.serve.source import parse_models, resolve


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        command.main(list(words))
    return str(caught.value)


def test_names_and_paths():
    assert parse_models(["runs/a", "x=runs/b", "./lr=1/run"]) == [("", "runs/a"), ("x", "runs/b"), ("", "./lr=1/run")]
    with pytest.raises(UserError) as caught:
        parse_models(["a b=c", "d="])
    assert len(caught.value.problems) == 2


def test_a_name_that_no_address_takes_is_refused_with_the_command(tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    with pytest.raises(UserError) as caught:
        resolve("", str(folder))
    assert f"dstune serve my-model='{folder}'" in str(caught.value)


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
    assert "pip install '.[serve]' in a clone of dstune" in refusal("m", "--state", str(tmp_path / "s"))


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


def test_a_registered_model_is_served_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "registry_of", lambda path: path if path.startswith("models:/") else None)
    monkeypatch.setattr(source, "local_path", lambda path, key: str(tmp_path) if path.startswith("models:/") else path)
    (tmp_path / "config.json").write_text("{}")
    assert [resolve("", f"models:/{path}").name for path in ("film@champion", "main.reviews.film/3")] == [
        "film",
        "film",
    ]
    served = resolve("mine", "models:/film/3")
    assert (served.name, served.folder) == ("mine", tmp_path.resolve())


def test_every_field_has_a_check_that_refuses_something():
    """A field that takes anything would be passed on unseen."""
    for route in INFERENCE.values():
        for name in route.model_fields.keys() - {"metadata"}:
            for value in ([[[object()]]], {"a": {"b": "c"}}):
                with pytest.raises(ApiError) as caught:
                    fields.checked({name: value}, route, route.model_fields)
                assert (caught.value.param, caught.value.code) == (name, "invalid_value")


def test_the_fields_of_the_official_client_are_known():
    """Each either acts, or is refused by its name and not as unknown."""
    import inspect

    from openai.resources.chat.completions import Completions
    from openai.resources.embeddings import Embeddings

    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    chat = set(inspect.signature(Completions.create).parameters) - own
    for name in chat - set(fields.Chat.model_fields):
        with pytest.raises(ApiError) as caught:
            fields.checked({"messages": [{"role": "user", "content": "a"}], name: {"x": 1}}, fields.Chat, ())
        assert caught.value.param in (name, "messages")
    assert set(inspect.signature(Embeddings.create).parameters) - own <= set(fields.Embedding.model_fields)


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
