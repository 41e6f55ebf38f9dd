"""Every parser of foreign text with made-up and damaged inputs (benchmarks/fuzz.py), and what that has found before."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz import fuzz
from benchmarks.fuzz_inputs import (
    ADAPTER,
    AXOLOTL,
    CHAT,
    DEEPSPEED,
    ENVIRONMENT,
    FACTORS,
    LLAMA_FACTORY,
    METRICS,
    REFERENCE,
    RESULT,
    TRIAL,
    TRL,
    as_json,
    yaml_text,
)
from benchmarks.fuzz_parsers import parsers, prepare
from benchmarks.fuzz_serve import CHUNK

INPUTS = {"template": 12, "run.yaml": 40, "adapter_config.json": 40}
PARSERS = parsers()


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    prepare()


@pytest.mark.parametrize("name", PARSERS)
def test_made_up_inputs(name: str, tmp_path: Path) -> None:
    found = fuzz(PARSERS[name], INPUTS.get(name, 100), 12_345, tmp_path)
    assert not found["findings"]
    assert found["inputs"] >= 10


def content_of(content: Any) -> bytes:
    return json.dumps(CHAT | {"messages": [{"role": "user", "content": content}, CHAT["messages"][4]]}).encode()


def run_with(**files: bytes) -> dict[str, bytes]:
    return {".".join(name.rsplit("_", 1)): content for name, content in files.items()}


def header_of(change: dict[str, Any]) -> bytes:
    header = as_json({name: factor | change for name, factor in FACTORS.items()}).encode()
    return len(header).to_bytes(8, "little") + header


def event_of(**change: Any) -> bytes:
    return b"data: " + as_json(CHUNK | change).encode() + b"\n\n"


KEPT: list[tuple[str, Any]] = [
    ("safetensors", b'{"weight_map": {"a": ["b"]}}'),
    ("sweep", {"sweep.yaml": b"\0", "trials": [as_json(TRIAL).encode()]}),
    (
        "template",
        "{% for i in range(99999) %}{{ messages|length ** 9 ** 9 }}{% endfor %}{{ range(99999)|list|length }}",
    ),
    ("events of an engine", event_of(choices=-1)),
    ("events of an engine", event_of(choices=[[]])),
    ("events of an engine", event_of(choices=[{"index": [0], "delta": {"tool_calls": [[]]}}])),
    ("events of an engine", event_of(choices=[{"index": 0, "delta": {"content": {}, "tool_calls": [1]}}])),
    ("events of an engine", event_of(choices=[{"index": 0, "delta": {"content": "a"}}]).replace(b'"a"', b'"\\ud800"')),
    (
        "events of an engine",
        event_of().replace(b'"index":0', b'"index":1e999').replace(b'"index": 0', b'"index": 1e999'),
    ),
    ("answer of an engine", b'{"choices": [1], "output": [[]]}'),
    ("modules.json", {"modules.json": b"[1]"}),
    ("modules.json", {"modules.json": b'[{"type": "a.Pooling"}]', "1_Pooling/config.json": b"[]"}),
    ("modules.json", {"modules.json": b'[{"type": "a.Pooling", "path": 1}]', "sentence_bert_config.json": b"[1]"}),
    ("importance.json", b'{"tensors": 1}'),
    ("importance.json", b'{"unit": "entries", "tensors": [{"name": "a", "trained": 1, "shape": [1e9]}]}'),
    (
        "metrics of a run that goes on",
        b'{"step": 1, "step_seconds": "a", "eval/seconds": []}\n{"step": "a"}\n{"step": 2.5}\n',
    ),
    ("metrics of a run that goes on", b'{"step": 1, "step_seconds": 1' + b"0" * 400 + b"}\n"),
    ("rows.jsonl", content_of([{"type": {"x": 1}, "text": "a"}])),
    ("rows.jsonl", content_of([None])),
    *(("rows.jsonl", as_json(CHAT | {"tools": [{"function": odd}]}).encode()) for odd in (1, "f", [0.5])),
    ("rows.jsonl", content_of([["a"]])),
    ("axolotl", yaml_text(AXOLOTL | {"val_set_size": {"x": 1}})),
    ("axolotl", yaml_text(AXOLOTL | {"learning_rate": {"=1+1": [None]}})),
    ("axolotl", yaml_text(AXOLOTL | {"datasets": [None]})),
    ("llama-factory", yaml_text(LLAMA_FACTORY | {"num_train_epochs": {"x": 1}})),
    ("trl", yaml_text(TRL | {"gradient_accumulation_steps": [8]})),
    ("trl", yaml_text(TRL | {"warmup_steps": {"x": 1}})),
    ("deepspeed", as_json(DEEPSPEED | {"scheduler": {"type": "WarmupLR", "params": [1]}}).encode()),
    ("records", run_with(metrics_jsonl=as_json(METRICS[1] | {"step": [1]}).encode())),
    ("report", run_with(run_yaml=b"config: {}", data_report_json=b'{"train": {"rows": 3, "truncated": [1]}}')),
    (
        "report",
        run_with(run_yaml=b"config: {}", environment_json=as_json(ENVIRONMENT | {"launches": {"x": [None]}}).encode()),
    ),
    ("report", run_with(run_yaml=b"config: {}", result_json=as_json(RESULT | {"eval_final": {"loss": []}}).encode())),
    ("summary", run_with(samples_jsonl=b'{"step": 1}\n{"step": 2, "prompt": [1]}')),
    (
        "sweep",
        {
            "sweep.yaml": b"objective: [loss]",
            "trials": [b'{"name": "a", "number": 1, "values": {}, "objective": [{}]}'],
        },
    ),
    ("sweep", {"sweep.yaml": b"objective: []", "trials": [b'{"name": "../a", "number": 1, "values": {}}']}),
    ("sweep", {"sweep.yaml": b"", "trials": [b'{"name": "a", "number": 1, "values": {}, "seconds": NaN}']}),
    ("llama-factory", yaml_text(LLAMA_FACTORY | {"dataset_dir": "x" * 300})),
    ("dstune.json", b'{"x": 1}'),
    ("adapter_config.json", b'{"peft_type": "LORA", "r": 8, "modules_to_save": [null]}'),
    ("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "a", "target_modules": ["a", null]}'),
    ("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "a", "target_modules": 1.5}'),
    ("adapter_config.json", as_json(ADAPTER | {"lora_alpha": 10**400}).encode()),
    ("reference.json", as_json(REFERENCE | {"rows": [{"messages": []}]}).encode()),
    ("reference.json", b'{"format": 1, "rows": [[null]]}'),
    ("reference.json", as_json(REFERENCE | {"format": 2}).encode()),
    ("reference.json", as_json(REFERENCE | {"format": 2, "files": {"config.json": 1}}).encode()),
    ("reference.json", as_json(REFERENCE | {"format": 2, "files": {}, "edited": [[{}]]}).encode()),
    (
        "reference.json",
        as_json(REFERENCE | {"format": 2, "files": {"\x1b.json": {"sha256": "", "values": {"a": [1]}}}}).encode(),
    ),
    (
        "served adapter",
        {"adapter_model.safetensors": header_of({"shape": [2]}), "adapter_config.json": as_json(ADAPTER).encode()},
    ),
    (
        "served adapter",
        {"adapter_model.safetensors": header_of({"shape": [1e999]}), "adapter_config.json": as_json(ADAPTER).encode()},
    ),
    ("slurm", "12|12|RUNNING\na notice of the site\n"),
    ("probe", "DSTUNE_PROBE [1"),
]


@pytest.mark.parametrize("case", range(len(KEPT)), ids=lambda case: f"{case} {KEPT[case][0]}")
def test_what_was_found_before(case: int, tmp_path: Path) -> None:
    name, given = KEPT[case]
    parser = PARSERS[name]
    with contextlib.suppress(parser.allowed):
        parser.parse(given, tmp_path)


def test_an_arrow_file_that_leads_out_of_itself_ends_no_process(tmp_path: Path) -> None:
    """Arrow itself believes offsets: reading the rows crashed."""
    found = fuzz(PARSERS["rows.arrow"], 200, 1, tmp_path)
    assert not found["findings"]
