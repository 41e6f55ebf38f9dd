"""Program of the tests of loading at stage 3, on every rank: models in parts beside the same models loaded whole.

Prints a line of JSON: by the name of a case which parameters and buffers differ, whether all parameters are in parts, the
types that the configurations have, how many bytes were sent from rank 0, and whether the loading replaced torch's linear.
Under "lost" rank 0 says what it raises where the other ranks have ended while it loads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from support.ranks import start_rank
from support.tiny import save_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dstune.config.compose import compose
from dstune.config.schema import Precision
from dstune.models.load import load_model, load_tokenizer
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.parts import gathered, is_partitioned, partitioned_loading
from dstune.zero.precision import DTYPES

SHAPE = {"vocab_size": 105, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
DECODER = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 10, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WRITER = ["task=causal_lm", "data=files", "data.train=nothing.jsonl", "data.packing=false"]
LABELS = ["task=classification", "data=files", "data.train=nothing.jsonl", "data.packing=false"]
CASES = {
    "as stored": ("llama", DECODER | {"tie_word_embeddings": True}, torch.bfloat16, Precision.bf16, WRITER),
    "several files": ("qwen2", DECODER, torch.float32, Precision.fp32, WRITER),
    # Gemma multiplies embeddings by sqrt(40), which bf16 rounds.
    "rounded buffer": ("gemma3_text", DECODER, torch.bfloat16, Precision.fp32, WRITER),
    "new head": ("bert", SHAPE | {"intermediate_size": 48}, torch.float32, Precision.bf16, LABELS),
    "added tokens": ("llama", DECODER, torch.bfloat16, Precision.fp32, [*WRITER, "model.add_tokens=[one,two]"]),
    "joined experts": ("qwen3_moe", DECODER | EXPERTS, torch.float32, Precision.fp32, WRITER),
    "other files": ("llama", DECODER, torch.float32, Precision.fp32, WRITER),
}


def main() -> None:
    world = start_rank()
    root = Path(json.loads(sys.argv[1]))
    outcome = {}
    for case, (kind, changes, stored, precision, overrides) in CASES.items():
        seeds = range(world.size if case == "other files" else 1)
        folders = [root / f"{case} of {seed}" for seed in seeds]
        if world.is_main:
            for seed in seeds:
                save(folders[seed], kind, changes, stored, seed)
        world.barrier()
        outcome[case] = load(folders[world.rank % len(folders)], folders[0], precision, overrides, world)
    world.barrier()
    if world.rank:
        print(json.dumps(outcome), flush=True)
        os._exit(0)
    try:
        load(folders[0], folders[0], precision, overrides, world)
    except Exception as error:
        outcome["lost"] = type(error).__name__
    print(json.dumps(outcome), flush=True)
    os._exit(0)


def save(folder: Path, kind: str, changes: dict, stored: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    auto = AutoModel if kind == "bert" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **changes)).to(stored)
    model.save_pretrained(folder, max_shard_size="20KB" if kind == "qwen2" else "5GB")
    save_tokenizer(folder)


def load(folder: Path, expected: Path, precision: Precision, overrides: list[str], world) -> dict:
    """The model of `folder` in parts, beside that of `expected` whole."""
    labels = ("no", "yes") if "task=classification" in overrides else ()
    precise = f"trainer.precision={precision.name}"

    def loaded(folder: Path, stage: int):
        config = compose([*overrides, precise, f"model.path={folder}", f"zero.stage={stage}"]).config
        settings = deepspeed_config(config, world.size, precision, on_gpu=False)
        torch.manual_seed(world.rank)  # nothing may depend on what a rank draws
        with partitioned_loading(settings):
            return load_model(config, load_tokenizer(config.model), labels, DTYPES[precision])

    whole = loaded(expected, 2)
    plain, sent = torch.nn.functional.linear, 0
    send = torch.distributed.broadcast

    def counting(tensor, *args, **kwargs):
        nonlocal sent
        sent += tensor.nbytes
        return send(tensor, *args, **kwargs)

    torch.distributed.broadcast = counting
    try:
        parts = loaded(folder, 3)
    finally:
        torch.distributed.broadcast = send
    right = dict(whole.named_parameters()) | dict(whole.named_buffers())
    in_parts = all(is_partitioned(parameter) and parameter.numel() == 0 for parameter in parts.parameters())
    with gathered(list(parts.parameters())):
        found = dict(parts.named_parameters()) | dict(parts.named_buffers())
        wrong = [name for name in right if not same(found.get(name), right[name])]
    return {
        "wrong": wrong + sorted(found.keys() - right.keys()),
        "in_parts": in_parts,
        "dtype": [str(parts.config.dtype), str(whole.config.dtype)],
        "sent": sent,
        "own_linear": torch.nn.functional.linear is not plain,
    }


def same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


main()
