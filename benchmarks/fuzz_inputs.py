"""Inputs of `fuzz.py`: valid examples of all that dstune parses, and what changes and damages them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

HOSTILE = [
    "",
    "\0",
    "\x1b[2J",
    "\n",
    "‮",
    "\ud800",
    "${oc.env:HOME}",
    "${",
    "../../etc/passwd",
    "/dev/zero",
    "-oProxyCommand=x",
    "{{ 1/0 }}",
    "1" * 5000,
    "[" * 3000,
    "nan",
    "NaN",
    "inf",
    "-0",
    "1e999",
    "0x10",
    "a" * 3000,
    "=1+1",
    "<script>",
    "null",
    "~",
    "!!python/object:x",
    "2024-13-45",
    "1:99:99",
    "%",
    "%s%n",
    "{}",
    "[]",
    "*a",
    "&a [*a]",
    "(a+)+$",
    "|",
    "@",
    ":",
    "\t",
    "\r",
    "\ufeff",
    "é",
    "\U0001d518",
    "''",
]
NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    1e308,
    5e-324,
    math.inf,
    -math.inf,
    math.nan,
    0.5,
    1e8,
    True,
    False,
]

ANY = st.characters(exclude_categories=())
"""Every code point, halves of characters included."""
Draw = Callable[[SearchStrategy[Any]], Any]
Make = SearchStrategy[Any]
"""What makes an input: hypothesis draws from it, and makes what fails as small as it can."""

text: Make = st.one_of(
    st.sampled_from(HOSTILE), st.text(st.characters(max_codepoint=126), max_size=11), st.text(ANY, max_size=11)
)
value: Make = st.recursive(
    st.one_of(st.none(), st.sampled_from(NUMBERS), text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=12,
)
"""A value of JSON of any shape."""
one_of = st.one_of
just = st.just


def lists(make: Make, most: int) -> Make:
    return st.lists(make, max_size=most)


def fixed(makes: Mapping[str, Make]) -> Make:
    return st.fixed_dictionaries(dict(makes))


def mapped(make: Make, change: Callable[[Any], Any]) -> Make:
    return make.map(change)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where something can be replaced in a value of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_in(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any, how: str) -> Any:
    """Return `value` with what stands at `path` replaced by `new`, removed, wrapped, or with `new` beside it."""
    if not path:
        return {"replace": new, "wrap": [value], "beside": {"x": new, "value": value}}.get(how, new)
    copy = dict(value) if isinstance(value, dict) else list(value)
    if how == "remove" and len(path) == 1:
        del copy[path[0]]
    elif how == "beside" and len(path) == 1 and isinstance(copy, dict):
        copy[str(new)[:40]] = copy[path[0]]
    else:
        copy[path[0]] = replaced(copy[path[0]], path[1:], new, how)
    return copy


@st.composite
def like(draw: Draw, example: Any) -> Any:
    """Return `example` with one to four changes."""
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(list(places_in(example))))
        how = draw(st.sampled_from(("replace", "remove", "wrap", "beside")))
        example = replaced(example, path, draw(value), how)
    return example


def as_json(value: Any) -> str:
    with digits():
        return json.dumps(value, default=str)


@contextmanager
def digits() -> Iterator[None]:
    """Allow numbers of any length to be written, within the block; parsers have Python's own limit."""
    limit_before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit_before)


@st.composite
def damaged(draw: Draw, content: bytes) -> bytes:
    """Return `content` with bytes replaced, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        inserted = draw(st.one_of(st.binary(max_size=7), text.map(lambda part: part.encode("utf-8", "surrogatepass"))))
        match draw(st.sampled_from(("put", "cut", "over", "end", "double"))):
            case "put":
                data[at:at] = inserted
            case "cut":
                del data[at : at + draw(st.integers(1, 60))]
            case "over":
                data[at : at + len(inserted)] = inserted
            case "end":
                del data[at:]
            case _:
                data[at:at] = data[: draw(st.integers(0, 200))]
    return bytes(data)


def json_bytes(value: Any) -> bytes:
    return as_json(value).encode("utf-8", "surrogatepass")


def json_file(example: Any) -> Make:
    """Return a file of JSON like `example`: changed as a value, or damaged as text."""
    return one_of(mapped(like(example), json_bytes), damaged(json.dumps(example).encode()), mapped(value, json_bytes))


def yaml_text(value: Any) -> bytes:
    with digits():
        try:
            return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
        except yaml.YAMLError:
            return json_bytes(value)


def yaml_file(example: Any) -> Make:
    content = yaml_text(example)
    return one_of(mapped(like(example), yaml_text), damaged(content), mapped(value, yaml_text))


# ---- examples ----

CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "a",
            "reasoning_content": "r",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
            "weight": 1,
        },
        {"role": "tool", "content": "t", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
        }
    ],
    "chat_template_kwargs": {"enable_thinking": True},
}

ROWS: dict[str, dict[str, Any]] = {
    "chat": CHAT,
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "alpaca": {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "system": "s"},
    "causal_lm": {"text": "some text"},
    "classification": {"text": "t", "label": "x"},
    "labels": {"text": "t", "label": ["x", 1]},
    "preference": {"prompt": "p", "chosen": [{"role": "assistant", "content": "c"}], "rejected": "r"},
    "feedback": {"prompt": "p", "completion": "c", "label": True},
    "embedding": {"anchor": "a", "positive": "b", "negative": ["c"], "score": 0.5},
    "token_classification": {"tokens": ["a", "b"], "tags": ["O", "B-X"]},
    "question_answering": {"question": "q", "context": "a b", "answers": {"text": ["a"], "answer_start": [0]}},
    "squad": {"title": "t", "paragraphs": [{"context": "a b", "qas": [{"id": "1", "question": "q", "answers": []}]}]},
    "seq2seq": {"source": "s", "target": "t"},
}

PIECES = [
    "{{ messages }}",
    "{{ messages[0].content }}",
    "{{ bos_token }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if m %}",
    "{% endif %}",
    "{% set x = 1 %}",
    "{{ m['content'] }}",
    "{{ m.role }}",
    "<|im_end|>",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ 10**(10**9) }}",
    "{{ 'a' * 10**10 }}",
    "{{ range(99999)|list|length }}",
    "{% macro f() %}{{ f() }}{% endmacro %}",
    "{{ f() }}",
    "{{ 1/0 }}",
    "{{ m | tojson }}",
    "{% set ns = namespace(t='aaaa') %}",
    "{% set ns.t = ns.t ~ ns.t %}",
    "{% for i in range(99999) %}",
    "{{ ''.__class__ }}",
    "{{ raise_exception('x') }}",
    "{{ strftime_now('%Y') }}",
    "{# #}",
    "{{",
    "}}",
    "{%",
    "%}",
    "{{ tools }}",
    "{{ (1,) * 999999 }}",
    "{{ 'a'|center(10**10) }}",
    "{% if tools %}",
    "{{ messages|length ** 9 ** 9 }}",
    "{{ messages | sort(attribute='role') }}",
    "{% include 'x' %}",
    "{{ cycler }}",
]

AXOLOTL = {
    "base_model": "org/model",
    "datasets": [{"path": "rows.jsonl", "type": "chat_template", "split": "train"}],
    "sequence_len": 512,
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_modules": ["q_proj"],
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_epochs": 3,
    "learning_rate": 2e-4,
    "optimizer": "adamw_torch",
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.1,
    "val_set_size": 0.05,
    "deepspeed": "zero2.json",
    "bf16": "auto",
    "output_dir": "out",
    "special_tokens": {"pad_token": "x"},
    "wandb_project": "p",
}

LLAMA_FACTORY = {
    "model_name_or_path": "org/model",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_rank": 8,
    "dataset": "a,b",
    "dataset_dir": "data",
    "template": "qwen",
    "cutoff_len": 512,
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "val_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "output_dir": "o",
    "bf16": True,
    "deepspeed": "ds.json",
}

TRL = {
    "model_name_or_path": "org/model",
    "dataset_name": "org/rows",
    "dataset_config": "x",
    "learning_rate": 1e-4,
    "use_peft": True,
    "lora_r": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "max_length": 512,
    "packing": True,
    "eos_token": "x",
    "eval_strategy": "epoch",
    "warmup_steps": 10,
    "lora_target_modules": ["q_proj"],
    "dataset_train_split": "train",
    "attn_implementation": "sdpa",
    "torch_dtype": "bfloat16",
}

DEEPSPEED = {
    "train_batch_size": "auto",
    "bf16": {"enabled": True},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": 5e8,
        "overlap_comm": True,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
}

ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "num_processes": 2,
    "deepspeed_config": {"zero_stage": 2},
}

LAUNCH = {"id": "x", "pid": 1, "started": 1.0, "host": "h", "processes": 2, "jobs": [], "launcher": "slurm"}

RESULT = {
    "status": "completed",
    "reason": "r",
    "steps": 3,
    "world_size": 2,
    "tokens": 5,
    "seconds": 1.5,
    "tokens_per_second": 3.0,
    "peak_memory_gib": 1.0,
    "eval_initial": {"loss": 2.0},
    "eval_final": {"loss": 1.0, "tokens": 3},
    "best": {"metric": "loss", "value": 1.0, "step": 2},
    "test": {"loss": 1.0},
    "checkpoint": "checkpoints/step-00000003",
    "export": "export",
    "nonfinite_steps": 0,
    "overflow_steps": 0,
}

METRICS = [
    {"step": 0, "eval/loss": 2.0, "eval/seconds": 0.1},
    {
        "step": 1,
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 5,
        "step_seconds": 0.1,
        "tokens_per_second": 5.0,
        "peak_memory_gib": 1.0,
    },
    {"step": 2, "loss": 1.5, "lr": 1e-3, "skipped": "nonfinite", "epoch": 0.5, "eval/loss": 1.2, "eval/accuracy": 0.5},
]

FACTORS = {
    f"base_model.model.a.lora_{which}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 24]}
    for which, shape in (("A", [2, 3]), ("B", [2, 2]))
}
REFERENCE = {
    "format": 1,
    "dtype": "float32",
    "template_date": None,
    "step": 3,
    "rows": [
        {"messages": CHAT["messages"][:2], "prompt_ids": [1, 2], "target_ids": [3], "logprobs": [-0.5]},
        {"row": {"text": "a"}, "ids": [1, 2], "answer": {"vector": [0.5]}},
    ],
}
SAMPLES = [{"step": 0, "prompt": "p", "answer": "a", "reference": "r"}, {"step": 2, "prompt": "p", "answer": "b"}]

ENVIRONMENT = {
    "launches": [{"host": "h", "gpus": ["x"], "packages": {"torch": "2"}, "world_size": 2}],
    "python": "3.11",
    "packages": {"torch": "2"},
}

DATA_REPORT = {
    "train": {"rows": 3, "tokens": 10, "truncated": 0, "labels": {"x": 1}},
    "validation": {"rows": 1},
    "seconds": 1.0,
    "clean": {},
}

TRIAL = {
    "name": "t1",
    "number": 1,
    "values": {"optimizer.lr": 1e-3},
    "status": "completed",
    "objective": {"loss": 1.0},
    "seconds": 3.0,
    "starts": 1,
}

STATE = {
    "format": 2,
    "step": 3,
    "world_size": 2,
    "labels": ["a"],
    "best": {"step": 3},
    "weights_only": False,
    "train": {
        "step": 3,
        "planned_steps": 9,
        "left_out_batches": 0,
        "tokens": 10,
        "targets": 1.0,
        "seconds": 1.0,
        "save_seconds": 0.1,
        "best": {"metric": "loss", "value": 1.0, "step": 3},
        "evaluation_due": False,
        "eval_initial": {"loss": 2.0},
        "eval_last": None,
        "eval_last_step": -1,
        "cursor": None,
        "results": {},
        "callbacks": {"memory": {"peak_memory_gib": 1.0}},
    },
}

COMMITTED = {"files": {"state.json": {"bytes": 3, "xxh3_64": "0"}}}

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "architectures": ["LlamaForCausalLM"],
}

KINDS = ["llama", "gemma2", "mixtral", "qwen3_moe", "bert", "deberta-v2", "modernbert", "t5", "bart"]

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": 2,
            "content": "<s>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ],
    "normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|b)+| ?c*"}, "behavior": "Isolated", "invert": False},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"},
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<s>",
    "model_max_length": 64,
    "extra_special_tokens": ["<s>"],
    "added_tokens_decoder": {"2": {"content": "<s>", "special": True}},
    "chat_template": "{{ messages }}",
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/model",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj"],
    "modules_to_save": None,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {},
    "use_rslora": False,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}

MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(4) for name in "qkvo"]

RECORD = {
    "dstune": "0.1",
    "task": {"name": "classification", "labels": ["a", "b"], "multi_label": False},
    "data": {"format": "auto", "max_length": 64, "packing": False},
    "base_model": "org/model",
    "revision": None,
    "method": "lora",
    "step": 3,
    "checkpoint": "step-3",
}
