"""The verb `prune`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core import files
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.core.stored_implementations import without_stored_implementations

if TYPE_CHECKING:
    import torch

    from dstune.config.schema import RunConfig

RECORD = "pruning.json"
"""File beside the pruned model that records its origin and what was removed."""
TOLERANCE = 1e-3
"""Largest accepted difference between the logits of the saved model and of the one in memory, relative to the largest logit."""

DESCRIPTION = """\
Cut a smaller model from a decoder: --layers keeps so many of its layers, --feed-forward so many neurons of each feed-forward block.
By --choose influence, and always for neurons, rows decide: give them as for training (data.train=FILE, task=causal_lm for texts).
The result is worse than what it was cut from until it is healed: dstune train task=distillation task.teacher=MODEL.
"""


def main(argv: list[str]) -> int:
    """Run the verb. Raises UserError; returns the exit code of the public contract."""
    arguments, overrides = _parse(argv)
    config = _configuration(arguments, overrides)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    record = prune(config, arguments, argv)
    print(json.dumps(record) if arguments.json else _report(record, arguments.output))
    return EXIT_DONE


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = VerbParser("dstune prune", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or sample")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--layers", type=int, metavar="N", help="how many layers stay")
    parser.add_argument("--keep", metavar="0,3,...", help="these layers stay, counted from 0")
    parser.add_argument(
        "--choose", choices=("even", "influence"), default="even", help="which ones (default: evenly spaced)"
    )
    parser.add_argument("--feed-forward", type=int, metavar="N", help="neurons of each feed-forward block that stay")
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="rows that are read to choose (default 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, words = parser.parse_known_args(argv)
    if options.layers is None and options.keep is None and options.feed_forward is None:
        raise UserError(Problem("--layers", "nothing is cut", "--layers N, --keep 0,3,... or --feed-forward N"))
    if options.layers is not None and options.keep is not None:
        raise UserError(Problem("--keep", "the layers are given twice", "--layers or --keep", options.keep))
    for flag in ("layers", "feed_forward", "rows"):
        if (value := getattr(options, flag)) is not None and value < 1:
            raise UserError(Problem(f"--{flag.replace('_', '-')}", "expected at least 1", value=str(value)))
    if options.output.exists():
        raise UserError(Problem("--output", "exists already", "another folder", str(options.output)))
    return options, words


def _needs_rows(arguments: argparse.Namespace) -> bool:
    by_influence = arguments.layers is not None and arguments.choose == "influence"
    return by_influence or arguments.feed_forward is not None


def _configuration(arguments: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """Compose the configuration of the model and the rows that choose layers or neurons. Raises UserError."""
    from dstune.config.compose import compose
    from dstune.config.validate import validate
    from dstune.launch import preflight

    if not _needs_rows(arguments):
        overrides = (
            [*overrides, "data=chitchat"] if not any(word.startswith("data") for word in overrides) else overrides
        )
    elif not any(word.startswith("data") for word in overrides):
        reason = "choosing by influence or by neurons needs rows to run the model on"
        raise UserError(Problem("data.train", reason, "data.train=FILE, with task=causal_lm for plain texts"))
    composed = compose([f"model.path={arguments.model}", "data.packing=false", *overrides])
    validate(composed.config)
    if not _needs_rows(arguments):
        from dataclasses import replace

        return replace(composed.config, model=preflight.resolve_model(composed.config.model, _silent))
    return preflight.resolve_run(composed.config, _silent, trains=False)


def _silent(text: str) -> None:
    print(f"dstune: {text}", file=sys.stderr)


def prune(config: RunConfig, arguments: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Write the smaller model; return the content of its `pruning.json`. Raises UserError."""
    import torch

    from dstune.compression import cut
    from dstune.config.stored_formats import bitsandbytes_bits
    from dstune.models.load import load_config, load_model, load_tokenizer

    if bits := bitsandbytes_bits(load_config(config.model).to_dict()):
        reason = f"its weights are stored in {bits} bits by bitsandbytes, which cannot be cut"
        raise UserError(Problem("MODEL", reason, "a copy of the model in 16 bits", arguments.model))
    tokenizer = load_tokenizer(config.model)
    model = load_model(config, tokenizer, (), torch.float32).eval()
    parameters_before = sum(parameter.numel() for parameter in model.parameters())
    samples = list(_samples(config, tokenizer, arguments.rows)) if _needs_rows(arguments) else []
    text = model.config.get_text_config(decoder=True)
    layers = len(cut.blocks_of(model))
    record: dict[str, Any] = {"model": arguments.model, "command": f"dstune prune {shlex.join(argv)}", "layers": layers}
    kept_layers = _kept_layers(arguments, layers)
    if arguments.layers is not None and arguments.choose == "influence":
        influences = cut.influences_of(model, samples)
        record["influences"] = [round(value, 6) for value in influences]
        kept_layers = cut.most_influential(influences, arguments.layers)
    if len(kept_layers) < layers:
        cut.keep_layers(model, kept_layers)
    record["kept"] = kept_layers
    if (neurons := arguments.feed_forward) is not None:
        if neurons >= text.intermediate_size:
            reason = f"the model has {text.intermediate_size:,}"
            raise UserError(Problem("--feed-forward", reason, "fewer", f"{neurons:,}"))
        cut.keep_neurons(model, cut.activations_of(model, samples), neurons)
        record["feed_forward"] = neurons
    record["parameters"] = [parameters_before, sum(parameter.numel() for parameter in model.parameters())]
    _save(model, tokenizer, arguments.output, record)
    return record


def _kept_layers(arguments: argparse.Namespace, layers: int) -> list[int]:
    from dstune.compression.cut import evenly_spaced

    if arguments.keep is not None:
        try:
            numbers = [int(word) for word in arguments.keep.split(",")]
        except ValueError:
            raise UserError(Problem("--keep", "expected numbers", "--keep 0,3,6", arguments.keep)) from None
        if numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= layers:
            reason = f"expected different numbers from 0 to {layers - 1}, in order"
            raise UserError(Problem("--keep", reason, "--keep 0,3,6", arguments.keep))
        return numbers
    if arguments.layers is None:
        return list(range(layers))
    if arguments.layers > layers:
        raise UserError(Problem("--layers", f"the model has {layers}", "fewer", str(arguments.layers)))
    return evenly_spaced(layers, arguments.layers)


def _samples(config: RunConfig, tokenizer: Any, count: int) -> Iterator[torch.Tensor]:
    """Yield the token ids of `count` evenly spaced training rows, int64 [tokens]."""
    import numpy as np
    import torch

    from dstune.core.paths import cache_root
    from dstune.core.rank_env import RankEnv
    from dstune.data.build import prepare
    from dstune.generation.answers import write_texts

    split = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "prune"), cache_root(), write=write_texts).train
    for index in np.linspace(0, len(split.lengths) - 1, min(count, len(split.lengths))).round().astype(int):
        yield torch.from_numpy(split.sample(int(index))["input_ids"].astype("int64"))


def _save(model: Any, tokenizer: Any, folder: Path, record: dict[str, Any]) -> None:
    """Write the model and read it back; `folder` appears only if the written model computes the same as the one in memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    temporary = folder.with_name(f"{folder.name}.incomplete")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    files.write(temporary / RECORD, json.dumps(record, indent=2) + "\n")
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        config = without_stored_implementations(AutoConfig.from_pretrained(temporary))
        reloaded = AutoModelForCausalLM.from_pretrained(temporary, config=config, dtype=torch.float32)
        reloaded_logits = reloaded(input_ids=tokens, use_cache=False).logits
    difference = float((expected - reloaded_logits).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        reason = f"the saved model computes other logits than the one in memory (they differ by {difference:.1%})"
        raise UserError(
            Problem("MODEL", reason, "another model: dstune cannot prune this architecture", record["model"])
        )
    temporary.rename(folder)


def _report(record: dict[str, Any], folder: Path) -> str:
    parameters_before, parameters_after = record["parameters"]
    kept_layers = ", ".join(map(str, record["kept"]))
    lines = [
        f"{folder}: {parameters_after:,} of {parameters_before:,} parameters; layers {kept_layers} of {record['layers']}"
    ]
    heal = f"dstune train task=distillation model.path={folder} task.teacher={record['model']} data.train=FILE"
    return "\n".join([*lines, f"heal it: {heal}"])
