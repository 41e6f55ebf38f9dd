"""A checkpoint of a run as a plain Hugging Face folder, and the verb `dstune export`.

The model is built by the same two functions as for training, so names, head, labels and adapters are the run's own.
transformers and peft then write their own formats, from the weights in the shards.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.checkpoint import store
from dstune.config.compose import read_run
from dstune.config.schema import Attention, HeadConfig, InitialWeights, LoraConfig, ModelConfig, RunConfig
from dstune.errors import EXIT_DONE, Problem, UserError

if TYPE_CHECKING:
    import torch

MAX_SHARD_SIZE = "5GB"


def export_checkpoint(run_dir: Path, checkpoint: Path, out: Path, *, merge: bool = False, force: bool = False) -> Path:
    """Write the weights of `checkpoint`, one of the run's, to `out`, in the model's storage dtype. Needs one process.

    Full and head runs give a whole model, LoRA runs an adapter on the hub id or folder of the base (with `merge`, or
    where the base has random weights and so exists nowhere else, a whole model too). Tokenizer and chat template are
    always there. `out` appears whole or not at all; a former export is replaced with `force` only.

    Raises UserError where `out` exists, or the base model is no longer to be found.
    """
    _check_free(out, force)
    aside = out.with_name(f"{out.name}{store.INCOMPLETE}")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    with _outside_of_zero3():
        _write(read_run(run_dir / "run.yaml").config, checkpoint, aside, merge)
    if out.exists():
        shutil.rmtree(out)
    aside.rename(out)
    return out


def exported(run_dir: Path, scratch: Path, *, merge: bool = False) -> Path:
    """The folder with what a run has learnt: its `export/` unless a newer checkpoint was saved since, else an export of
    the newest one into `scratch`. With `merge` it is a whole model, never an adapter.

    Raises UserError where the run has saved nothing.
    """
    folder, newest = run_dir / "export", store.newest(run_dir)
    description = folder / "config.json"
    if not description.is_file() and not merge:
        description = folder / "adapter_config.json"
    if description.is_file():
        saved = (newest / store.COMMITTED).stat().st_mtime_ns if newest else 0
        if description.stat().st_mtime_ns >= saved:
            return folder
    return export_checkpoint(run_dir, find_checkpoint(run_dir, "last"), scratch / "export", merge=merge)


def _write(config: RunConfig, checkpoint: Path, folder: Path, merge: bool) -> None:
    from transformers.utils import logging

    from dstune.checkpoint.shards import Weights
    from dstune.data.stopping import stop_token_ids
    from dstune.models.load import load_config, load_tokenizer

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(config.model)
    adapter = isinstance(config.method, LoraConfig)
    merge = adapter and (merge or config.model.weights is InitialWeights.random)
    built = _build(config, tokenizer, tuple(store.read_state(checkpoint)["labels"]), merge)
    weights = Weights(checkpoint)
    trained = [name for name, parameter in built.module.named_parameters() if parameter.requires_grad]
    absent = [name for name in trained if name not in weights]
    assert not absent, f"{checkpoint} has no weights for {absent[:3]}"

    if merge:
        built.module.load_state_dict(dict(weights), strict=False)
        model = built.module.merge_and_unload()
        state = {name: weight.to(built.dtype) for name, weight in model.state_dict().items()}
    elif adapter:
        model = built.module
        state = dict(weights)  # stays in fp32: adapters are small, and peft computes them in fp32
    else:
        model = built.module
        state = {name: weight for name, weight in model.state_dict().items() if not weight.is_meta}
        state |= {name: _cast(weights[name], built.dtype) for name in weights}

    stops = stop_token_ids(tokenizer)
    _set_generation(config.model, model, stops, tokenizer.pad_token_id)
    if adapter and not merge:
        settings = model.peft_config["default"]
        settings.base_model_name_or_path = _named(config.model.path)
        settings.revision = config.model.revision
        # Asked explicitly, since peft would ask the hub otherwise.
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=built.resized)
        (folder / "README.md").unlink(missing_ok=True)  # peft's form for a model card, not filled in
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    else:
        # Training has no use for the cache of past keys and values; generation has.
        model.config.use_cache = load_config(config.model).use_cache
        model.to(built.dtype).save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class _Built:
    module: Any
    """As in training. Its weights are those before training, or have no memory where the checkpoint has them all."""
    dtype: torch.dtype
    """In which the model is stored: that of its config.json."""
    resized: bool
    """Whether the vocabulary was enlarged for the tokenizer."""


def _build(config: RunConfig, tokenizer: Any, labels: tuple[str, ...], merge: bool) -> _Built:
    import torch

    from dstune.models.load import load_config, load_model
    from dstune.models.peft import apply_method

    architecture = load_config(config.model)
    dtype = architecture.dtype or torch.float32
    resized = len(tokenizer) > architecture.get_text_config().vocab_size
    config = replace(
        config,
        # Any attention has the same weights; eager is there for every model, on a machine without GPU too.
        model=replace(config.model, attention=Attention.eager),
        trainer=replace(config.trainer, activation_checkpointing=False),
    )
    if merge or isinstance(config.method, HeadConfig) or resized:
        # Merging adds two weights: in fp32, and rounded once.
        loaded = load_model(config, tokenizer, labels, torch.float32 if merge else dtype)
        return _Built(apply_method(config, loaded), dtype, resized)
    config = replace(config, model=replace(config.model, weights=InitialWeights.random))
    with torch.device("meta"):
        return _Built(apply_method(config, load_model(config, tokenizer, labels, dtype)), dtype, resized)


def _cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def _set_generation(config: ModelConfig, model: Any, stops: list[int], pad_token_id: int | None) -> None:
    """Give the model the generation settings of its base, with `stops` added to what ends an answer."""
    from transformers import GenerationConfig

    from dstune.models.load import local_path

    if not model.can_generate():
        return
    try:
        generation = GenerationConfig.from_pretrained(
            local_path(config.path), revision=config.revision or "main", local_files_only=True
        )
    except OSError:
        generation = model.generation_config
    before = generation.eos_token_id
    ends = sorted({*stops, *(before if isinstance(before, list) else [] if before is None else [before])})
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation.pad_token_id = pad_token_id
    try:
        generation.validate(strict=True)
    except ValueError:
        # Some published models have sampling values and do not switch sampling on, which saving refuses.
        generation.do_sample = True
    model.generation_config = generation


def _named(path: str) -> str:
    """The base model as others find it: a folder's whole path, or the hub id."""
    from dstune.models.load import local_path

    local = local_path(path)
    return str(Path(local).resolve()) if Path(local).exists() else local


@contextmanager
def _outside_of_zero3() -> Iterator[None]:
    """Load a whole model in this process even where transformers knows of a ZeRO-3 run that is going on."""
    from transformers.integrations import deepspeed

    keep = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = keep


def _check_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise UserError(Problem("--out", "exists already", "give another folder, or --force to replace it", str(out)))
    if not any((out / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(Problem("--out", "is no former export, so it is not replaced", "give another folder", str(out)))


# -- the verb ---------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """`dstune export RUN`. Raises UserError; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dstune export", description="A run's checkpoint as a Hugging Face folder.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--checkpoint", default="last", help="a step, `best` or `last` (default)")
    parser.add_argument("--out", type=Path, help="folder to write; RUN/export, with --merge RUN/export-merged")
    parser.add_argument("--merge", action="store_true", help="merge a LoRA adapter into its base model")
    parser.add_argument("--force", action="store_true", help="replace a former export")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    run_dir = run_directory(arguments.run)
    checkpoint = find_checkpoint(run_dir, arguments.checkpoint)
    method = read_run(run_dir / "run.yaml").config.method
    if arguments.merge and not isinstance(method, LoraConfig):
        raise UserError(Problem("--merge", f"the run trained with method={method.name}: there is nothing to merge"))
    out = arguments.out or run_dir / ("export-merged" if arguments.merge else "export")
    export_checkpoint(run_dir, checkpoint, out, merge=arguments.merge, force=arguments.force)
    if arguments.json:
        kind = "adapter" if (out / "adapter_config.json").exists() else "model"
        print(json.dumps({"export": str(out), "kind": kind, "checkpoint": str(checkpoint)}))
    else:
        print(f"{checkpoint.name} -> {out}")
    return EXIT_DONE


def run_directory(path: Path) -> Path:
    """`path` if it is the directory of a run. Raises UserError."""
    if not (path / "run.yaml").is_file():
        reason = "has no run.yaml, so it is no run directory" if path.is_dir() else "there is no such run directory"
        raise UserError(
            Problem("RUN", reason, "give the directory of a run, for example runs/NAME/DATE_TIME", str(path))
        )
    return path


def find_checkpoint(run_dir: Path, which: str) -> Path:
    """The whole checkpoint of a step, the `best` or the `last` one. Raises UserError."""
    whole = [info for info in store.listing(run_dir) if info.committed]
    found = store.newest(run_dir) if which == "last" else store.best(run_dir) if which == "best" else None
    if which.isdigit():
        found = next((info.path for info in whole if info.step == int(which)), None)
    if found is None:
        there = (
            f"there are steps {', '.join(str(info.step) for info in whole)}" if whole else "the run has saved none yet"
        )
        raise UserError(Problem("--checkpoint", f"there is no such whole checkpoint in {run_dir}", there, which))
    return found
