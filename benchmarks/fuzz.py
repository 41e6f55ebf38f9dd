#!/usr/bin/env python3
"""Give every parser of foreign text made-up and damaged inputs: none may raise what is no message, or take more than 2 s.

usage: python benchmarks/fuzz.py [--inputs 200000] [--only NAME,NAME] [--seed 0] [--output fuzz.jsonl] [--list]

Inputs come from hypothesis: valid examples with parts replaced, removed or cut, and values of any shape. The output has
a line for each round of ROUND inputs; a run that is started again with it goes on behind the last one. A round is a process: a crash is a finding too. Exit code 1:
something was found (each finding with the input, to be kept as a case in tests/security/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dstune.core.errors import UserError

ROUND = 500
SECONDS = 2.0
"""Processor time for one input."""
HANGS_SECONDS = 20
"""After which an input is given up."""


class TooSlow(BaseException):
    """No Exception, which a parser might catch."""


# ---- inputs ----

HOSTILE = [
    "", "\0", "\x1b[2J", "\n", "‮", "\ud800", "${oc.env:HOME}", "${", "../../etc/passwd", "/dev/zero", "-oProxyCommand=x", "{{ 1/0 }}",
    "1" * 5000, "[" * 3000, "nan", "NaN", "inf", "-0", "1e999", "0x10", "a" * 3000, "=1+1", "<script>", "null", "~", "!!python/object:x",
    "2024-13-45", "1:99:99", "%", "%s%n", "{}", "[]", "*a", "&a [*a]", "(a+)+$", "|", "@", ":", "\t", "\r", "\ufeff", "é", "𝔘", "''",
]  # fmt: skip
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

texts = st.sampled_from(HOSTILE) | st.text(max_size=12)
leaves = st.none() | st.sampled_from(NUMBERS) | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be replaced in a value of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_in(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any, how: str) -> Any:
    """`value` with what stands at `path` replaced by `new`, removed, wrapped, or with `new` beside it."""
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
def like(draw: Any, example: Any) -> Any:
    """`example` with one to four changes."""
    value = example
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(list(places_in(value))))
        value = replaced(
            value, path, draw(values), draw(st.sampled_from(["replace", "replace", "remove", "wrap", "beside"]))
        )
    return value


def as_json(value: Any) -> str:
    with digits():
        return json.dumps(value, default=str)


@contextmanager
def digits() -> Iterator[None]:
    """Numbers of any length can be written; parsers have Python's own limit."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """`content` with bytes replaced, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        more = draw(st.sampled_from([one.encode("utf-8", "surrogatepass") for one in HOSTILE]) | st.binary(max_size=8))
        match draw(st.sampled_from(["put", "cut", "over", "end", "double"])):
            case "put":
                data[at:at] = more
            case "cut":
                del data[at : at + draw(st.integers(1, 60))]
            case "over":
                data[at : at + len(more)] = more
            case "end":
                del data[at:]
            case _:
                data[at:at] = data[: draw(st.integers(0, 200))]
    return bytes(data)


def json_file(example: Any) -> st.SearchStrategy[bytes]:
    """A file of JSON like `example`: changed as a value, or damaged as text."""
    text = json.dumps(example).encode()
    return (
        like(example).map(lambda value: as_json(value).encode("utf-8", "surrogatepass"))
        | damaged(text)
        | values.map(lambda value: as_json(value).encode("utf-8", "surrogatepass"))
    )


def yaml_text(value: Any) -> bytes:
    with digits():
        try:
            return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
        except yaml.YAMLError:
            return as_json(value).encode("utf-8", "surrogatepass")


def yaml_file(example: Any) -> st.SearchStrategy[bytes]:
    return like(example).map(yaml_text) | damaged(yaml_text(example)) | values.map(yaml_text)


# ---- parsers ----


@dataclass(frozen=True)
class Parser:
    name: str
    inputs: st.SearchStrategy[Any]
    parse: Callable[[Any, Path], object]
    """Gets an input and an empty folder."""
    allowed: tuple[type[BaseException], ...] = (UserError,)
    weight: float = 1.0
    """Of all inputs, as a multiple of an even share."""


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


@cache
def configuration(*overrides: str) -> Any:
    from dstune.config.compose import compose

    return compose(["data.train=rows.jsonl", *overrides]).config


def check_rows(rows: Any, tasks: tuple[str, ...] | None = None) -> None:
    """Bring rows to one shape, under every task that reads rows."""
    from dstune.data.rows import RowError, canonical, normalise, recognise
    from dstune.protocols import TASKS

    rows = [row for row in rows if row.fields is not None]
    for task in TASKS if tasks is None else tasks:
        config = TASKS[task].Config()
        for row in rows[:3]:
            try:
                fmt = recognise(row.fields, {}, "auto", config, "rows:1")
                canonical(normalise(row.fields, fmt, {}, config))
            except (UserError, RowError):
                continue


def rows_of_file(name: str) -> Callable[[bytes, Path], None]:
    def parse(content: bytes, folder: Path) -> None:
        from dstune.config.data_schema import TextRows
        from dstune.data import sources
        from dstune.data.files import DataFile

        file = folder / name
        file.write_bytes(content)
        check_rows(
            list(sources.read(DataFile(file, text_rows=TextRows.paragraph if name.endswith(".md") else TextRows.line))),
            ("chat",),
        )

    return parse


def one_row(fields: Any, folder: Path) -> None:
    from dstune.data.files import DataFile, RawRow

    if isinstance(fields, dict):
        check_rows([RawRow(DataFile(folder / "rows.jsonl"), 1, fields)])


def jsonl(rows: list[Any]) -> bytes:
    return "\n".join(map(as_json, rows)).encode("utf-8", "surrogatepass")


def csv_text(cells: list[list[str]]) -> bytes:
    return "\n".join(",".join(row) for row in cells).encode("utf-8", "surrogatepass")


@cache
def tables() -> dict[str, bytes]:
    import gzip
    import io
    import zipfile

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    labelled = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features).data.table
    messages = pa.table(
        {"messages": [CHAT["messages"][:2], CHAT["messages"][:2]], "at": pa.array([0, 1], pa.timestamp("us"))}
    )
    found = {}
    for name, table in (("labelled", labelled), ("messages", messages)):
        parquet, arrow, stream = io.BytesIO(), io.BytesIO(), io.BytesIO()
        pq.write_table(table, parquet)
        with pa.ipc.new_file(arrow, table.schema) as writer:
            writer.write_table(table)
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        found |= {
            f"parquet {name}": parquet.getvalue(),
            f"arrow {name}": arrow.getvalue(),
            f"stream {name}": stream.getvalue(),
        }
    found["gzip"] = gzip.compress(jsonl([CHAT, CHAT]), mtime=0)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("rows.jsonl", jsonl([CHAT]))
    found["zip"] = archive.getvalue()
    return found


def table_files(kind: str) -> st.SearchStrategy[bytes]:
    return st.deferred(
        lambda: st.one_of([damaged(content) for name, content in tables().items() if name.startswith(kind)])
    )


def zipped(content: bytes, folder: Path) -> None:
    from dstune.data import sources

    file = folder / "rows.zip"
    file.write_bytes(content)
    for one in sources.expand(str(file), "data.train"):
        check_rows(list(sources.read(one)), ("chat",))


def saved_set(content: bytes, folder: Path) -> None:
    from dstune.data import sources

    (folder / "state.json").write_bytes(content)
    (folder / "dataset_info.json").write_bytes(content)
    (folder / "dataset_dict.json").write_bytes(content) if content.startswith(b'{"splits') else None
    for file in sources.expand(str(folder), "data.train"):
        assert file.path.resolve().is_relative_to(folder.resolve()), f"reads {file.path}"


def prompts_file(content: bytes, folder: Path) -> None:
    from dstune.inference.prompts import read_file

    (folder / "prompts.jsonl").write_bytes(content)
    read_file(folder / "prompts.jsonl")


PIECES = [
    "{{ messages }}", "{{ messages[0].content }}", "{{ bos_token }}", "{% for m in messages %}", "{% endfor %}", "{% if m %}", "{% endif %}",
    "{% set x = 1 %}", "{{ m['content'] }}", "{{ m.role }}", "<|im_end|>", "{% generation %}", "{% endgeneration %}", "{{ 10**(10**9) }}",
    "{{ 'a' * 10**10 }}", "{{ range(99999)|list|length }}", "{% macro f() %}{{ f() }}{% endmacro %}", "{{ f() }}", "{{ 1/0 }}", "{{ m | tojson }}",
    "{% set ns = namespace(t='aaaa') %}", "{% set ns.t = ns.t ~ ns.t %}", "{% for i in range(99999) %}", "{{ ''.__class__ }}",
    "{{ raise_exception('x') }}", "{{ strftime_now('%Y') }}", "{# #}", "{{", "}}", "{%", "%}", "{{ tools }}", "{{ (1,) * 999999 }}", "{{ 'a'|center(10**10) }}",
    "{% if tools %}", "{{ messages|length ** 9 ** 9 }}", "{{ messages | sort(attribute='role') }}", "{% include 'x' %}", "{{ cycler }}",
]  # fmt: skip


@cache
def tokenizer() -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from unit.data_helpers import byte_tokenizer

    return byte_tokenizer()


def template(text: str, folder: Path) -> None:
    from dstune.data.chat.template import RenderError
    from dstune.data.render import ChatRenderer

    own = tokenizer()
    own.chat_template = text
    renderer = ChatRenderer(own, "2025-03-09")
    try:
        renderer.passages([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    except RenderError:
        return


def templates() -> st.SearchStrategy[str]:
    def good() -> str:
        return str(tokenizer().chat_template)

    pieces = st.lists(st.sampled_from(PIECES) | texts, min_size=1, max_size=8).map("".join)
    changed = st.deferred(lambda: damaged(good().encode()).map(lambda raw: raw.decode("utf-8", "replace")))
    beside = st.deferred(lambda: st.builds(lambda before, after: f"{before}{good()}{after}", pieces, pieces))
    return pieces | changed | beside


AXOLOTL = {
    "base_model": "org/model", "datasets": [{"path": "rows.jsonl", "type": "chat_template", "split": "train"}], "sequence_len": 512, "adapter": "lora",
    "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj"], "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 3,
    "learning_rate": 2e-4, "optimizer": "adamw_torch", "lr_scheduler": "cosine", "warmup_ratio": 0.1, "val_set_size": 0.05, "deepspeed": "zero2.json",
    "bf16": "auto", "output_dir": "out", "special_tokens": {"pad_token": "x"}, "wandb_project": "p",
}  # fmt: skip
LLAMA_FACTORY = {
    "model_name_or_path": "org/model", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all", "lora_rank": 8, "dataset": "a,b",
    "dataset_dir": "data", "template": "qwen", "cutoff_len": 512, "per_device_train_batch_size": 1, "learning_rate": 1e-4, "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "val_size": 0.1, "eval_strategy": "steps", "eval_steps": 50, "output_dir": "o", "bf16": True, "deepspeed": "ds.json",
}  # fmt: skip
TRL = {
    "model_name_or_path": "org/model", "dataset_name": "org/rows", "dataset_config": "x", "learning_rate": 1e-4, "use_peft": True, "lora_r": 8,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "max_length": 512, "packing": True, "eos_token": "x", "eval_strategy": "epoch",
    "warmup_steps": 10, "lora_target_modules": ["q_proj"], "dataset_train_split": "train", "attn_implementation": "sdpa", "torch_dtype": "bfloat16",
}  # fmt: skip


def imported(content: bytes, folder: Path) -> None:
    from dstune.importing import convert as conversion
    from dstune.importing.files import read, tool_of

    file = folder / "config.yaml"
    file.write_bytes(content)
    raw = read(file)
    # Composing the experiment takes 100 times as long, and Hydra's parser is not ours: one in so many.
    composes = hash(content) % 50 == 0
    with mock.patch.object(conversion, "problems_of", conversion.problems_of if composes else lambda text: []):
        found = conversion.convert(raw, tool_of(raw, None, str(file)), file)
    yaml.safe_load(found.text)


def imported_script(content: bytes, folder: Path) -> None:
    from dstune.importing.files import read

    (folder / "train.sh").write_bytes(content)
    read(folder / "train.sh")


DEEPSPEED = {
    "train_batch_size": "auto", "bf16": {"enabled": True}, "fp16": {"enabled": "auto", "loss_scale": 0}, "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "reduce_bucket_size": 5e8, "overlap_comm": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}}, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
}  # fmt: skip
ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "num_processes": 2,
    "deepspeed_config": {"zero_stage": 2},
}


def deepspeed(name: str) -> Callable[[bytes, Path], None]:
    def parse(content: bytes, folder: Path) -> None:
        from dstune.config.deepspeed_file import read

        (folder / name).write_bytes(content)
        read(folder / name)

    return parse


def hostfile(content: bytes, folder: Path) -> None:
    from dstune.launch.host_slots import chosen, read

    (folder / "hostfile").write_bytes(content)
    text = content.decode("utf-8", "replace")
    hosts = read(str(folder / "hostfile"))
    chosen(hosts, text[:60] or None, None)


LAUNCH = {"id": "x", "pid": 1, "started": 1.0, "host": "h", "processes": 2, "jobs": [], "launcher": "slurm"}
RESULT = {
    "status": "completed", "reason": "r", "steps": 3, "world_size": 2, "tokens": 5, "seconds": 1.5, "tokens_per_second": 3.0, "peak_memory_gib": 1.0,
    "eval_initial": {"loss": 2.0}, "eval_final": {"loss": 1.0, "tokens": 3}, "best": {"metric": "loss", "value": 1.0, "step": 2}, "test": {"loss": 1.0},
    "checkpoint": "checkpoints/step-00000003", "export": "export", "nonfinite_steps": 0, "overflow_steps": 0,
}  # fmt: skip
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


@cache
def run_yaml() -> dict[str, Any]:
    from dstune.config.convert import to_dict

    return {"format": 2, "dstune_version": "0.1", "overrides": ["a=b"], "config": to_dict(configuration())}


run_files = st.fixed_dictionaries(
    {
        "launch.json": json_file(LAUNCH),
        "result.json": json_file(RESULT),
        "metrics.jsonl": st.lists(like(METRICS[1]) | like(METRICS[2]) | like(METRICS[0]), max_size=4).map(jsonl)
        | damaged(jsonl(METRICS)),
        "samples.jsonl": st.lists(like(SAMPLES[0]), max_size=3).map(jsonl),
        "environment.json": json_file(ENVIRONMENT),
        "data_report.json": json_file(DATA_REPORT),
        "run.yaml": st.deferred(lambda: yaml_file(run_yaml())) | st.deferred(lambda: st.just(yaml_text(run_yaml()))),
    }
)


def in_run(files: dict[str, bytes], folder: Path) -> Path:
    run = folder / "run"
    run.mkdir()
    for name, content in files.items():
        (run / name).write_bytes(content)
    return run


def records_of_run(files: dict[str, bytes], folder: Path) -> None:
    from dstune.launch import attempt, records
    from dstune.launch.manage import status_of

    run = in_run(files, folder)
    records.read_launch(run)
    records.read_result(run)
    records.read_metrics(run)
    status_of(run).to_json(run)
    attempt.of_files(run, 2, "none")


def runs_verb(files: dict[str, bytes], folder: Path) -> None:
    from dstune.launch.runs import as_text, listed

    in_run(files, folder)
    found = listed(folder)
    assert len(found) == 1, "a bad directory is listed too"
    as_text(found, [folder])


def report(files: dict[str, bytes], folder: Path) -> None:
    from dstune.report.page import write

    write([in_run(files, folder)], folder / "report.html")


def summary_of(files: dict[str, bytes], folder: Path) -> None:
    from dstune.launch.summary import summary

    summary(in_run(files, folder))


TRIAL = {
    "name": "t1",
    "number": 1,
    "values": {"optimizer.lr": 1e-3},
    "status": "completed",
    "objective": {"loss": 1.0},
    "seconds": 3.0,
    "starts": 1,
}


def sweep(files: dict[str, Any], folder: Path) -> None:
    from dstune.launch.runs import as_text, listed
    from dstune.report.sweep_page import write

    (folder / "trials").mkdir()
    (folder / "sweep.yaml").write_bytes(files["sweep.yaml"])
    for number, content in enumerate(files["trials"]):
        (folder / "trials" / f"t{number}.json").write_bytes(content)
    as_text(listed(folder), [folder])
    write(folder, folder / "sweep.html")


def stored_run(content: bytes, folder: Path) -> None:
    from dstune.config.compose import read_run_content
    from dstune.config.convert import from_dict

    (folder / "run.yaml").write_bytes(content)
    from_dict(read_run_content(folder / "run.yaml")["config"], "run.yaml")


STATE = {
    "format": 2, "step": 3, "world_size": 2, "labels": ["a"], "best": {"step": 3}, "weights_only": False,
    "train": {
        "step": 3, "planned_steps": 9, "left_out_batches": 0, "tokens": 10, "targets": 1.0, "seconds": 1.0, "save_seconds": 0.1,
        "best": {"metric": "loss", "value": 1.0, "step": 3}, "evaluation_due": False, "eval_initial": {"loss": 2.0}, "eval_last": None,
        "eval_last_step": -1, "cursor": None, "results": {}, "callbacks": {"memory": {"peak_memory_gib": 1.0}},
    },
}  # fmt: skip
COMMITTED = {"files": {"state.json": {"bytes": 3, "xxh3_64": "0"}}}


def checkpoint(files: dict[str, bytes], folder: Path) -> None:
    from dstune.checkpoint import store
    from dstune.trainer.state import TrainState

    place = folder / "checkpoints" / "step-00000003"
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    store.listing(folder)
    store.newest(folder)
    # As if its marker were right.
    (place / "COMMITTED").write_text(json.dumps({"files": {"state.json": {"bytes": len(files["state.json"])}}}))
    store.listing(folder)
    store.damaged_files(place)
    saved = store.read_state(place).get("train")
    if isinstance(saved, dict):
        TrainState.from_dict(saved)


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "vocab_size": 100, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
KINDS = ["llama", "gemma2", "mixtral", "qwen3_moe", "bert", "deberta-v2", "modernbert", "t5", "bart"]


def model_folder(content: bytes, folder: Path) -> None:
    from dstune.checkpoint.record import task_of_head
    from dstune.config.architectures import row_limit
    from dstune.config.schema import ModelConfig
    from dstune.launch.preflight import description_problems
    from dstune.planning.architecture import architecture
    from dstune.planning.source import config_json

    (folder / "config.json").write_bytes(content)
    description_problems(folder, ModelConfig(path=str(folder)), configuration())
    task_of_head(folder)
    found = config_json(ModelConfig(path=str(folder)))
    row_limit(found)
    architecture(found)


ADAPTER = {
    "peft_type": "LORA", "base_model_name_or_path": "org/model", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj"],
    "modules_to_save": None, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {}, "use_rslora": False, "bias": "none", "task_type": "CAUSAL_LM",
}  # fmt: skip
MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(4) for name in "qkvo"]


def adapter(content: bytes, folder: Path) -> None:
    from dstune.checkpoint.serving import vllm_problems
    from dstune.config.convert import convert
    from dstune.core.limits import check_patterns
    from dstune.inference.resolve_model import adapter_settings, base_of
    from dstune.methods.lora.config import LoraConfig
    from dstune.protocols import method_of

    (folder / "adapter_config.json").write_bytes(content)
    settings = adapter_settings(folder)
    check_patterns(settings, MODULES, "method.adapter")
    vllm_problems(folder)
    try:
        method_of(LoraConfig(adapter=str(folder))).resolve()
    finally:
        base_of(folder, configuration().model)
    del convert


RECORD = {
    "dstune": "0.1", "task": {"name": "classification", "labels": ["a", "b"], "multi_label": False}, "data": {"format": "auto", "max_length": 64, "packing": False},
    "base_model": "org/model", "revision": None, "method": "lora", "step": 3, "checkpoint": "step-3",
}  # fmt: skip


def record(content: bytes, folder: Path) -> None:
    from dstune.checkpoint.record import recorded_overrides

    (folder / "dstune.json").write_bytes(content)
    recorded_overrides(folder, [])


def rank_error(content: bytes, folder: Path) -> None:
    from dstune.launch.attempt import read_errors

    (folder / "logs").mkdir()
    (folder / "logs" / "rank-0.error").write_bytes(content)
    read_errors(folder, 1)


def slurm(output: str, folder: Path) -> None:
    import subprocess

    from dstune.launch.slurm import jobs
    from dstune.protocols.launcher import Unreachable

    done = subprocess.CompletedProcess([], 0, output, "")
    with (
        mock.patch.object(subprocess, "run", lambda *_, **__: done),
        mock.patch.object(jobs, "require", lambda _: None),
    ):
        for call in (
            lambda: [str(job) for job in jobs.ask(["12", "12_3"])],
            lambda: jobs.submit(folder / "x", {}),
            lambda: jobs.probe(needed=False),
        ):
            try:
                call()
            except (UserError, Unreachable):
                continue


def probed(output: str, folder: Path) -> None:
    from dstune.launch.hosts import _facts, explain

    _facts(output)
    explain("host", 255, output)


def weights(content: bytes, folder: Path) -> None:
    """The header of a safetensors file, and the index of several."""
    from dstune.core.errors import DstuneError
    from dstune.methods._peft.files import tensors_of
    from dstune.models.base_weights import tensor_files

    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "model.safetensors.index.json").write_bytes(content)
    for read in (lambda: tensors_of(folder, "method.adapter"), lambda: tensor_files(folder)):
        try:
            read()
        except (DstuneError, LookupError):
            continue


@cache
def safetensors_bytes() -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return save({"a.lora_A.weight": np.zeros((2, 3), np.float32)}, {"format": "pt"})


def error_of(text: str) -> bytes:
    return json.dumps(
        {"type": text, "message": "m", "problems": [{"where": "w", "reason": "r", "fix": "f", "value": "v"}]}
    ).encode()


def parsers() -> dict[str, Parser]:
    lines = [json.dumps(CHAT), json.dumps({"messages": CHAT["messages"][1:3]})]
    cells = st.lists(st.lists(texts | st.sampled_from(['"a"', '"a\nb"', '"', "messages"]), max_size=5), max_size=5)
    found = [
        Parser("row", st.one_of([like(row) for row in ROWS.values()]), one_row, weight=3),
        Parser(
            "rows.jsonl",
            st.lists(like(CHAT), max_size=3).map(jsonl) | damaged("\n".join(lines).encode()),
            rows_of_file("rows.jsonl"),
            weight=2,
        ),
        Parser(
            "rows.json",
            json_file([CHAT, CHAT]) | damaged("\n".join(lines).encode()),
            rows_of_file("rows.json"),
            weight=2,
        ),
        Parser("rows.csv", cells.map(csv_text) | damaged(b'text,label\n"a ""b""",x\nc,y\n'), rows_of_file("rows.csv")),
        Parser("rows.txt", damaged(b"one\n\ntwo three\n") | st.binary(max_size=60), rows_of_file("rows.md")),
        Parser(
            "rows.conllu",
            damaged(b"# x\n1\tA\ta\tDET\t_\t_\t0\troot\t_\t_\n\n1-2\tAB\n" * 2),
            rows_of_file("rows.conllu"),
        ),
        Parser("rows.parquet", table_files("parquet"), rows_of_file("rows.parquet")),
        Parser("rows.arrow", table_files("arrow") | table_files("stream"), rows_of_file("rows.arrow")),
        Parser("rows.jsonl.gz", table_files("gzip"), rows_of_file("rows.jsonl.gz"), weight=0.5),
        Parser("rows.zip", table_files("zip"), zipped, weight=0.5),
        Parser(
            "saved data set", json_file({"_data_files": [{"filename": "data.arrow"}], "splits": ["train"]}), saved_set
        ),
        Parser(
            "prompts",
            json_file({"prompt": "p", "adapter": "a"}) | json_file({"messages": CHAT["messages"][:2]}),
            prompts_file,
        ),
        Parser("template", templates(), template, weight=0.1),
        Parser("axolotl", yaml_file(AXOLOTL), imported),
        Parser("llama-factory", yaml_file(LLAMA_FACTORY), imported),
        Parser("trl", yaml_file(TRL), imported),
        Parser(
            "script",
            damaged(b"accelerate launch train.py \\\n --learning_rate=1e-4 --lora_target a b\n"),
            imported_script,
        ),
        Parser("deepspeed", json_file(DEEPSPEED), deepspeed("ds.json")),
        Parser("accelerate", yaml_file(ACCELERATE), deepspeed("ds.yaml")),
        Parser(
            "hostfile",
            damaged(b"node1 slots=4\n# x\nnode2 slots=2 # y\n")
            | texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
            hostfile,
        ),
        Parser("records", run_files, records_of_run, weight=0.5),
        Parser("runs", run_files, runs_verb, (), weight=0.5),
        Parser("report", run_files, report, weight=0.5),
        Parser("summary", run_files, summary_of, weight=0.5),
        Parser(
            "sweep",
            st.fixed_dictionaries(
                {"sweep.yaml": yaml_file({"objective": ["loss"]}), "trials": st.lists(json_file(TRIAL), max_size=3)}
            ),
            sweep,
            weight=0.5,
        ),
        Parser("run.yaml", st.deferred(lambda: yaml_file(run_yaml())), stored_run, weight=0.3),
        Parser(
            "checkpoint",
            st.fixed_dictionaries({"state.json": json_file(STATE), "COMMITTED": json_file(COMMITTED)}),
            checkpoint,
        ),
        Parser("config.json", st.one_of([json_file(LLAMA | {"model_type": kind}) for kind in KINDS]), model_folder),
        Parser("adapter_config.json", json_file(ADAPTER), adapter, weight=0.5),
        Parser("dstune.json", json_file(RECORD), record),
        Parser("rank error", json_file(json.loads(error_of("UserError"))), rank_error),
        Parser(
            "slurm",
            (
                texts
                | damaged(b"12|12|RUNNING|None|node1\n12_3|15|PENDING|(Priority)|\n").map(
                    lambda raw: raw.decode("utf-8", "replace")
                )
            ),
            slurm,
        ),
        Parser(
            "probe", json_file({"time": 1.0}).map(lambda raw: "DSTUNE_PROBE " + raw.decode("utf-8", "replace")), probed
        ),
        Parser(
            "safetensors",
            st.deferred(lambda: damaged(safetensors_bytes())) | json_file({"weight_map": {"a": "b"}}),
            weights,
        ),
    ]
    return {one.name: one for one in found}


# ---- running ----


@dataclass
class Finding:
    parser: str
    error: str
    place: str
    given: str


class Measured:
    """A parser that notes what goes wrong instead of raising it."""

    def __init__(self, parser: Parser, root: Path):
        self.parser, self.root = parser, root
        self.findings: dict[str, Finding] = {}
        self.inputs = 0
        self.slowest = 0.0

    def __call__(self, given: Any) -> None:
        self.inputs += 1
        (self.root / "input").write_text(repr(given)[:3000], errors="replace")
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            began = spent()
            try:
                signal.signal(signal.SIGALRM, _give_up)
                signal.alarm(HANGS_SECONDS * 6)
                self.parser.parse(given, Path(folder))
            except self.parser.allowed:
                pass
            except (Exception, TooSlow) as error:
                self.note(f"{type(error).__name__}: {str(error)[:200]}", given, _place(error))
            finally:
                signal.alarm(0)
        seconds = spent() - began if self.inputs > 1 else 0.0  # the first one imports the parser
        self.slowest = max(self.slowest, seconds)
        if seconds > SECONDS:
            self.note(f"slow: {seconds:.1f} s", given, "")

    def note(self, error: str, given: Any, place: str) -> None:
        self.findings.setdefault(place or error[:4], Finding(self.parser.name, error, place, repr(given)[:3000]))


def spent() -> float:
    """Processor time of this process and its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _give_up(number: int, frame: Any) -> None:
    raise TooSlow(f"not done after {HANGS_SECONDS * 6} s")


def _place(error: BaseException) -> str:
    """The last line of dstune in a traceback."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/dstune/" in frame.filename]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else "elsewhere"


def fuzz(parser: Parser, inputs: int, number: int, root: Path) -> dict[str, Any]:
    """A round in a process of its own: `inputs` inputs that follow from `number`."""
    answer = root / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            measured = _round(parser, inputs, number, root)
            findings = [vars(finding) for finding in measured.findings.values()]
            answer.write_text(
                json.dumps({"inputs": measured.inputs, "slowest": measured.slowest, "findings": findings})
            )
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if answer.exists():
        found: dict[str, Any] = json.loads(answer.read_text())
        return found
    last = (root / "input").read_text(errors="replace") if (root / "input").exists() else ""
    crash = Finding(parser.name, f"the process ended: {os.waitstatus_to_exitcode(status)}", "", last)
    return {"inputs": inputs, "slowest": 0.0, "findings": [vars(crash)]}


def _round(parser: Parser, inputs: int, number: int, root: Path) -> Measured:
    measured = Measured(parser, root)
    quiet = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ]
    run = settings(max_examples=inputs, database=None, deadline=None, suppress_health_check=quiet)(
        given(parser.inputs)(measured.__call__)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed(number)(run)()
    return measured


def scratch() -> Path | None:
    """A file system in memory, where there is one."""
    place = Path("/dev/shm")
    return place if os.access(place, os.W_OK) else None


def main(argv: list[str]) -> int:
    known = parsers()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--inputs", type=int, default=200_000, help="over all parsers")
    arguments.add_argument("--only", default="", help="names of parsers")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--output", type=Path, default=Path("fuzz.jsonl"))
    arguments.add_argument("--list", action="store_true")
    requested = arguments.parse_args(argv)
    chosen = [known[name] for name in requested.only.split(",")] if requested.only else list(known.values())
    if requested.list:
        print("\n".join(one.name for one in chosen))
        return 0
    done: dict[str, int] = {}
    rounds: dict[str, int] = {}
    if requested.output.exists():
        for line in requested.output.read_text().splitlines():
            row = json.loads(line)
            done[row["parser"]] = done.get(row["parser"], 0) + row["inputs"]
            rounds[row["parser"]] = rounds.get(row["parser"], 0) + 1
    weight = sum(one.weight for one in chosen)
    wanted = {one.name: math.ceil(requested.inputs * one.weight / weight) for one in chosen}
    found = 0
    with tempfile.TemporaryDirectory(dir=scratch()) as root, requested.output.open("a") as output:
        # A round of each in turn, so that a run that is cut short has seen all of them.
        while left := [one for one in chosen if done.get(one.name, 0) < wanted[one.name]]:
            for parser in left:
                number = rounds.get(parser.name, 0)
                count = min(ROUND, wanted[parser.name] - done.get(parser.name, 0))
                answer = fuzz(parser, count, requested.seed + number, Path(root))
                done[parser.name] = done.get(parser.name, 0) + answer["inputs"]
                rounds[parser.name] = number + 1
                found += len(answer["findings"])
                print(json.dumps({"parser": parser.name, "round": number, **answer}), file=output, flush=True)
                counts = (
                    f"{answer['inputs']} inputs, slowest {answer['slowest']:.2f} s, {len(answer['findings'])} findings"
                )
                print(f"{sum(done.values()):>7} {parser.name}: {counts}", flush=True)
                for finding in answer["findings"]:
                    print(
                        f"    {finding['error']}\n      {finding['place']}\n      {finding['given'][:300]}", flush=True
                    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
