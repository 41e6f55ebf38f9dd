"""What preset files promise: packaged chat templates train the assistant's words, models of other kinds are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.configs import run_config

from dstune.chat_templates import NAMES, template_path
from dstune.config.data_schema import DataConfig
from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.launch.preflight import description_problems, resolve_run
from dstune.tasks.seq2seq.config import Seq2SeqConfig

CONF = Path(__file__).parents[2] / "conf"
MODELS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF / "model").glob("*.yaml"))}
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]

RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\nNo.<end_of_turn>\n",
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST] Yes.</s>[INST] And?[/INST] No.</s>",
    "mistral_tekken": "<s>[INST]Be brief.\n\nHi[/INST]Yes.</s>[INST]And?[/INST]No.</s>",
}
MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "mistral_tekken": ("<s>", "</s>", "[INST]", "[/INST]"),
}


def tokenizer(name: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=list(MARKERS[name]))
    wrapped.chat_template = template_path(name).read_text()
    return wrapped


def test_every_packaged_template_is_in_the_table():
    assert set(NAMES) == set(RENDERED)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_renders_its_family_s_format_and_trains_the_assistant_s_turns(name):
    from dstune.data.render import ChatRenderer

    renderer = ChatRenderer(tokenizer(name), None)
    (passage,) = renderer.passages(MESSAGES)
    assert passage.text == RENDERED[name]
    end = MARKERS[name][1] if name.startswith("mistral") else MARKERS[name][-1]
    trained = [passage.text[place.start : place.end].strip() for place in passage.places]
    assert trained == [f"Yes.{end}", f"No.{end}"]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_beginning_of_the_conversation(name):
    from dstune.data.render import ChatRenderer

    prompt = ChatRenderer(tokenizer(name), None).text(MESSAGES[:-1], add_generation_prompt=True)
    assert RENDERED[name].startswith(prompt)


def test_model_files_name_each_path_once_and_only_packaged_templates():
    paths = [values["path"] for values in MODELS.values()]
    assert len(set(paths)) == len(paths) >= 45
    assert {values["chat_template"] for values in MODELS.values() if "chat_template" in values} == set(NAMES)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_for_named_hardware_tell_their_memory(path):
    text = path.read_text()
    if "llama3" in path.stem or "qwen3" in path.stem or path.stem == "modernbert_1gpu":
        assert "Memory" in text
        assert "bytes" in text


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_refused_with_the_task_they_need(tmp_path, kind):
    from transformers import BartConfig, T5Config

    (T5Config if kind == "t5" else BartConfig)(d_model=16).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    report = [str(problem) for problem in description_problems(tmp_path, model, run_config(model=model))]
    assert any(f"{kind} is an encoder-decoder" in text and "task=seq2seq" in text for text in report)
    packed = run_config(model=model, task=Seq2SeqConfig(), data=DataConfig(train="x", packing=True))
    report = [str(problem) for problem in description_problems(tmp_path, model, packed)]
    assert any("data.packing" in text and "encoder-decoder" in text for text in report)
    separate = replace(packed, data=DataConfig(train="x", packing=False))
    assert not any("encoder-decoder" in str(problem) for problem in description_problems(tmp_path, model, separate))


def test_a_template_that_is_neither_a_name_nor_a_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    from dstune.config.schema import DataConfig

    def resolved(template: str) -> None:
        model = ModelConfig(path=str(tmp_path), chat_template=template)
        resolve_run(run_config(model=model, data=DataConfig(train=str(rows))))

    resolved("llama3")
    with pytest.raises(UserError, match="chatml, gemma, llama3"):
        resolved("lama3")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
WITH_TOOLS = [
    *MESSAGES[:2],
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]
SEVERAL_CALLS = [
    MESSAGES[1],
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Both."},
]
REASONED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}]


@pytest.mark.parametrize(
    ("name", "family", "messages", "tools"),
    [
        ("chatml", "qwen3_instruct_2507", MESSAGES, None),
        ("chatml", "qwen3_instruct_2507", WITH_TOOLS, TOOLS),
        ("chatml", "qwen3_instruct_2507", SEVERAL_CALLS, TOOLS),
        ("chatml", "qwen3", REASONED, None),
        ("llama3", "llama3", MESSAGES, None),
        ("llama3", "llama3_1", WITH_TOOLS, TOOLS),
        ("gemma", "gemma3", MESSAGES, None),
    ],
)
def test_a_packaged_template_is_the_family_s_own(name, family, messages, tools):
    """Token by token, with and without the generation prompt; the family's template is read where it is installed."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    if not (folder / f"{family}.jinja").is_file():
        pytest.skip(f"this version of trl has no template of {family}")
    ours = tokenizer(name)
    bos = {"llama3": "<|begin_of_text|>", "gemma": "<bos>"}.get(name)
    given = {"tools": tools, "bos_token": bos} if bos else {"tools": tools}
    theirs = (folder / f"{family}.jinja").read_text(encoding="utf-8")
    for formatted in (messages, [message for message in messages[:2] if message["role"] != "assistant"]):
        prompt = formatted is not messages
        expected = ours.apply_chat_template(
            formatted, chat_template=theirs, add_generation_prompt=prompt, return_dict=False, **given
        )
        found = ours.apply_chat_template(formatted, add_generation_prompt=prompt, return_dict=False, tools=tools)
        assert ours.decode(found) == ours.decode(expected)
        assert found == expected
