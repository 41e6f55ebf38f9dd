"""What `dstune-verify` does with a model, or a DeepSpeed file, of a stranger."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dstune_verify import network, rank, runner
from dstune_verify.cases import CRASHED, CheckCase, Outcome
from dstune_verify.command import main
from dstune_verify.environment import check_same_packages
from dstune_verify.verdict import line_of

SMALL = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 96, "vocab_size": 200,
}  # fmt: skip


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_the_file_of_a_model_names_no_kernel(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[Any] = []

    def record(self: Any, implementation: Any, *arguments: Any, **options: Any) -> str:
        requested.append(implementation)
        return "eager"

    from transformers import LlamaForCausalLM

    for name in ("_check_and_adjust_attn_implementation", "_check_and_adjust_experts_implementation"):
        monkeypatch.setattr(LlamaForCausalLM, name, record)
    network.build(network.shrink(SMALL | {key: "someone/kernel"}))
    network.build(network.shrink(SMALL | {"attn_implementation": "eager"}))
    assert "someone/kernel" not in requested and "eager" in requested


@pytest.mark.parametrize("key", ["num_labels", "num_nextn_predict_layers", "encoder_layers"])
def test_the_file_of_a_model_takes_no_memory(key: str) -> None:
    """Unknown numbers of layers are refused, those of known names are small."""
    with pytest.raises(network.CannotShrink, match="is 1,000,000,000"):
        network.shrink(SMALL | {"num_unheard_of": 10**9})
    assert network.shrink(SMALL | {key: 10**9}).get(key, 0) < 10


@pytest.mark.parametrize("option", ["--deepspeed", "--model"])
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "deep", "escapes"])
def test_a_file_that_never_ends_or_speaks_to_the_terminal_is_refused(
    kind: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "sparse":
        with file.open("wb") as stream:
            stream.truncate(2**40)
    elif kind == "deep":
        file.write_text('{"a":' * 400 + "1" + "}" * 400)
    else:
        file = tmp_path / "\x1b]0;mine\x07.json"
    assert main([option, str(file)]) == 2
    said = capsys.readouterr().err
    assert "dstune-verify: " in said and "\x1b" not in said


def test_the_text_of_a_case_is_visible() -> None:
    assert line_of(Outcome("a", CRASHED, "no model type \x1b[2J\u202e")).endswith("no model type \\x1b[2J\\u202e")


def test_no_other_user_reaches_the_store_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a port, everybody on this machine could answer for a rank."""
    orders = []

    def start(command: Any, env: dict[str, str], **options: Any) -> None:
        orders.append(json.loads(Path(env[rank.ORDER]).read_text()))

    monkeypatch.setattr(runner.subprocess, "Popen", start)
    runner._Rank(runner.Runner(None, 2), 0, 0, 1, [CheckCase("a", "torch", check_same_packages)], tmp_path)
    assert orders[0]["place"]["file"] == str(tmp_path / "store")
