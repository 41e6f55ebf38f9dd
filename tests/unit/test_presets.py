"""What preset files promise: packaged chat templates train the assistant's words, models of other kinds are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.configs import run_config
from unit.data_helpers import byte_tokenizer, data_run, prepared, write_jsonl

from dstune.chat_templates import NAMES, PROMPTS, prompt_path, template_path
from dstune.config.data_schema import DataConfig, SplitConfig
from dstune.config.schema import ModelConfig
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.data.build import prove
from dstune.data.chat.template import ChatTemplate
from dstune.data.collate import NO_TARGET
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
    "phi4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant"
    "<|im_sep|>Yes.<|im_end|><|im_start|>user<|im_sep|>And?<|im_end|><|im_start|>assistant<|im_sep|>No.<|im_end|>",
    "deepseek_r1": "<s>Be brief.<｜User｜>Hi<｜Assistant｜>Yes.<｜end▁of▁sentence｜>"  # noqa: RUF001
    "<｜User｜>And?<｜Assistant｜><think>\n\n</think>\n\nNo.<｜end▁of▁sentence｜>",  # noqa: RUF001
    "gpt_oss": "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2026-01-15\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included "
    "for every message.<|end|><|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|><|start|>user<|message|>Hi<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Yes.<|end|><|start|>user<|message|>And?<|end|>"
    "<|start|>assistant<|channel|>final<|message|>No.<|return|>",
    "gemma4": "<s><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nYes.<turn|>\n"
    "<|turn>user\nAnd?<turn|>\n<|turn>model\nNo.<turn|>\n",
    "granite": "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>Yes.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>And?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>No.<|end_of_text|>\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYes.<|end|>\n"
    "<|user|>\nAnd?<|end|>\n<|assistant|>\nNo.<|end|>\n",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes.</s>\n\n### Instruction:\nAnd?\n\n### Response:\nNo.</s>",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes. </s><s>[INST] And? [/INST] No. </s>",
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: Yes.</s>USER: And? ASSISTANT: No.</s>",
}
MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "mistral_tekken": ("<s>", "</s>", "[INST]", "[/INST]"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "gemma4": ("<|tool_response>", "<|turn>", "<turn|>"),
    "granite": ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<|end_of_text|>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "alpaca": ("<s>", "</s>"),
    "llama2": ("<s>", "</s>"),
    "vicuna": ("<s>", "</s>"),
    "deepseek_r1": ("<s>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    "gpt_oss": ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
}


def tokenizer(name: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=list(MARKERS[name]), bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = (prompt_path(name) if name in PROMPTS else template_path(name)).read_text()
    return wrapped


def test_every_packaged_template_is_in_the_table():
    assert {*NAMES, *PROMPTS} == set(RENDERED)


@pytest.mark.parametrize("name", sorted({*RENDERED} - {"deepseek_r1", "gpt_oss"}))
def test_a_template_renders_its_family_s_format_and_trains_the_assistant_s_turns(name):
    from dstune.data.render import ChatRenderer

    renderer = ChatRenderer(tokenizer(name), None)
    (passage,) = renderer.passages(MESSAGES)
    assert passage.text == RENDERED[name]
    end = "</s>" if name in ("mistral", "mistral_tekken", *PROMPTS) else MARKERS[name][-1]
    end = f" {end}" if name == "llama2" else end
    trained = [passage.text[place.start : place.end].strip() for place in passage.places]
    assert trained == [f"Yes.{end}", f"No.{end}"]


def test_deepseek_r1_closes_the_reasoning_that_the_prompt_opens():
    from dstune.data.render import ChatRenderer

    asked = {"role": "user", "content": "Hi"}
    messages = [asked, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, *MESSAGES[3:]]
    end = MARKERS["deepseek_r1"][-1]
    trained = [
        passage.text[place.start : place.end]
        for passage in ChatRenderer(tokenizer("deepseek_r1"), None).passages(messages)
        for place in passage.places
    ]
    assert trained == [f"Hm.\n</think>\n\nYes.{end}", f"\n</think>\n\nNo.{end}"]


def test_gpt_oss_ends_with_the_token_that_a_server_waits_for():
    """`<|return|>`, also where the history has `<|end|>`; and a call with its reasoning is not rewritten by its answer."""
    from dstune.data.render import ChatRenderer

    renderer = ChatRenderer(tokenizer("gpt_oss"), "2026-01-15")
    (passage,) = renderer.passages(MESSAGES)
    assert passage.text == RENDERED["gpt_oss"]
    assert [place.label and place.label[1] for place in passage.places] == ["<|return|>", None]
    call = {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "Hm."}
    (passage,) = renderer.passages([MESSAGES[1], call, *WITH_TOOLS[3:]], tools=TOOLS)
    trained = [passage.text[place.start : place.end] for place in passage.places]
    called = "<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>"
    assert trained == [
        f'<|channel|>analysis<|message|>Hm.<|end|>{called}{{"city": "Paris"}}<|call|>',
        "<|channel|>final<|message|>It is sunny.<|return|>",
    ]


@pytest.mark.parametrize("name", RENDERED)
def test_a_prompt_is_the_beginning_of_the_conversation(name):
    prompt = ChatTemplate(tokenizer(name), "2026-01-15").text(MESSAGES[:-1], prompt=True)
    assert RENDERED[name].startswith(prompt)


def test_model_files_name_each_path_once_and_only_packaged_templates():
    paths = [values["path"] for values in MODELS.values()]
    assert len(set(paths)) == len(paths) >= 45
    assert {values["chat_template"] for values in MODELS.values() if "chat_template" in values} <= set(NAMES)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_for_named_hardware_state_their_memory(path):
    text = path.read_text()
    if "llama3" in path.stem or "qwen3" in path.stem or path.stem == "modernbert_1gpu":
        assert "Memory" in text
        assert "bytes" in text


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_refused_with_the_task_they_need(tmp_path, kind):
    from transformers import BartConfig, T5Config

    (T5Config if kind == "t5" else BartConfig)(d_model=16).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    problems = [str(problem) for problem in description_problems(tmp_path, model, run_config(model=model))]
    assert any(f"{kind} is an encoder-decoder" in text and "task=seq2seq" in text for text in problems)
    packed = run_config(model=model, task=Seq2SeqConfig(), data=DataConfig(train="x", packing=True))
    problems = [str(problem) for problem in description_problems(tmp_path, model, packed)]
    assert any("data.packing" in text and "encoder-decoder" in text for text in problems)
    separate = replace(packed, data=DataConfig(train="x", packing=False))
    assert not any("encoder-decoder" in str(problem) for problem in description_problems(tmp_path, model, separate))
    noisy = replace(model, neftune_alpha=5.0)  # the lengths of sources are not those of targets
    (problem, *_) = description_problems(tmp_path, noisy, replace(separate, model=noisy))
    assert (problem.where, problem.value) == ("model.neftune_alpha", "5")


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
    with pytest.raises(UserError, match="chatml, deepseek_r1, gemma, gemma4, gpt_oss, granite, llama3"):
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
        ("gemma4", "gemma4_v5", MESSAGES, None),
        ("gemma4", "gemma4_v5", WITH_TOOLS, TOOLS),
        ("gemma4", "gemma4_v5", REASONED, None),
        ("gpt_oss", "gptoss", MESSAGES, None),
        ("gpt_oss", "gptoss", WITH_TOOLS, TOOLS),
        ("gpt_oss", "gptoss", REASONED, None),
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
    for conversation in (messages, [message for message in messages[:2] if message["role"] != "assistant"]):
        asks_for_answer = conversation is not messages
        expected = ours.apply_chat_template(
            conversation, chat_template=theirs, add_generation_prompt=asks_for_answer, return_dict=False, **given
        )
        found = ours.apply_chat_template(
            conversation, add_generation_prompt=asks_for_answer, return_dict=False, tools=tools
        )
        assert ours.decode(found) == ours.decode(expected)
        assert found == expected


NESTED = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"type": "string"}, "description": "some"},
        "any": {"type": "array"},
        "unit": {"type": "string", "enum": ["C", "F"], "description": "which"},
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y": {"type": "boolean"}},
            "required": ["x"],
        },
        "days": {"type": "integer", "default": 3},
    },
    "required": ["unit"],
}


@pytest.mark.parametrize(
    ("name", "family"),
    [("gpt_oss", "gptoss"), ("gemma4", "gemma4_v5"), ("chatml", "qwen3_instruct_2507"), ("llama3", "llama3_1")],
)
def test_what_tools_take_is_written_as_the_family_writes_it(name, family):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    ours = tokenizer(name)
    given = {"bos_token": "<|begin_of_text|>"} if name == "llama3" else {}
    tools = [{"type": "function", "function": {"name": "f", "description": "Does", "parameters": NESTED}}, *TOOLS]
    found, expected = (
        ours.apply_chat_template(
            MESSAGES[1:2], chat_template=of, tools=tools, add_generation_prompt=True, return_dict=False, **given
        )
        for of in (None, (folder / f"{family}.jinja").read_text(encoding="utf-8"))
    )
    assert ours.decode(found) == ours.decode(expected)
    assert found == expected


def test_a_family_that_shows_the_prompt_alone_has_the_context_of_ours():
    """DeepSeek R1's own template drops the reasoning of every turn; what it prompts with is what ours trains behind."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    ours = tokenizer("deepseek_r1")
    theirs = (folder / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
    conversation = [MESSAGES[0], REASONED[0], REASONED[1], MESSAGES[3]]
    found, expected = (
        ours.apply_chat_template(conversation, chat_template=of, add_generation_prompt=True, return_dict=False)
        for of in (None, theirs)
    )
    assert found == expected


@pytest.mark.parametrize("name", ["llama3", "gpt_oss"])
def test_formats_of_one_call_refuse_several_by_that_reason(name):
    """As their families do; a server could not write them either."""
    from dstune.data.render import ChatRenderer, RenderError

    one = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [one, one]}]
    renderer = ChatRenderer(tokenizer(name), "2025-03-09")
    assert renderer.passages([messages[0], {**messages[1], "tool_calls": [one]}])
    with pytest.raises(RenderError, match="this format has one tool call in a message"):
        renderer.passages(messages)


def test_a_base_model_speaks_by_prompts(tmp_path):
    """The answer is the target, the end of the text included; Alpaca's input has its own heading."""
    config = data_run(
        write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}]),
        split=SplitConfig(validation=0.0),
    )
    config = replace(config, model=ModelConfig(path="x", prompt_template="alpaca"))
    tokens = byte_tokenizer(prompt_path("alpaca").read_text(), eos="</s>")
    data = prepared(config, tokens, tmp_path / "cache")
    (sample,) = data.train.table
    text = tokens.decode([token for token, label in zip(*sample_of(sample), strict=True) if label == NO_TARGET])
    assert text.endswith(
        "paired with an input that provides further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert tokens.decode([label for label in sample["labels"] if label != NO_TARGET]) == "3</s>"
    assert prove(config, tokens, data).turns == 2  # the row, which is the longest one too


def sample_of(sample):
    return sample["input_ids"], sample["labels"]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ModelConfig(path="x", prompt_template="alpacca"), "expected one of alpaca, llama2, vicuna"),
        (ModelConfig(path="x", prompt_template="vicuna", chat_template="chatml"), "leave one of the two out"),
    ],
)
def test_prompts_that_are_not_known_or_have_no_place_are_refused(model, reason):
    problems = [str(problem) for problem in find_problems(run_config(model=model, data=DataConfig(train="x")))]
    assert any("model.prompt_template" in text and reason in text for text in problems)
