"""Exports a checkpoint of a run as a plain Hugging Face folder (`dstune.inference.export_command` is the verb).

The folder is written under another name and renamed when it is complete. It has weights, configuration and tokenizer
(`model_folder.py`), a model card (`card.py`), and a record of the run for `dstune evaluate` (`record.py`).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.checkpoint import store
from dstune.checkpoint.model_code import is_of_base
from dstune.checkpoint.quantization import K_TYPES, Quantization, require_package
from dstune.checkpoint.record import NAME as RECORD
from dstune.checkpoint.record import read_record, write_record
from dstune.config.rope import RopeConfig
from dstune.config.run_file import read_run
from dstune.config.schema import InitialWeights, ModelConfig, RunConfig
from dstune.config.trust import Use
from dstune.core.errors import Problem, UserError
from dstune.core.files import INCOMPLETE
from dstune.core.parsing import object_in
from dstune.protocols import method_of, task_of
from dstune.protocols.method import MethodConfig

MAX_SHARD_SIZE = "5GB"


def export_checkpoint(
    run_dir: Path,
    checkpoint: Path,
    out: Path,
    *,
    config: RunConfig | None = None,
    merge: bool = False,
    force: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    with_dropped: bool = True,
) -> Path:
    """Write the weights of `checkpoint`, one of the run's, to `out`, in the model's storage dtype. Needs one process.

    config: of the run; read from its `run.yaml` where it is not given.

    Full and head runs give a whole model, LoRA runs an adapter on the hub id or folder of the base (with `merge`, or
    where the base has random weights and so exists nowhere else, a whole model too). Tokenizer, chat template, the base's
    processor files and a model card are there too. `out` appears whole or not at all; a former export is replaced with
    `force` only.

    with_dropped: a whole model has the tensors of the base that transformers drops on loading, too.

    Memory: one file of at most `max_shard_size` (bytes, or text such as "5GB"), or the largest tensor. The base model is
    loaded as a whole only where transformers joins tensors of its files, or its vocabulary was enlarged.

    Raises UserError where `out` exists, or the base model is no longer to be found.
    """
    check_free(out, force)
    config = config or read_run(run_dir / "run.yaml", use=Use.weights).config
    if config.model.rope.type is not None and method_of(config.method).adapter and not merge:
        reason = "an adapter's folder has no place for model.rope, and servers would load the base as it was"
        raise UserError(Problem("--merge", reason, f"dstune export {run_dir} --merge"))
    with temporary_folder(out) as folder, quietly():
        from dstune.checkpoint.answer_files import record_files
        from dstune.checkpoint.card import write_card
        from dstune.checkpoint.model_folder import write_model
        from dstune.zero.parts import whole_loading

        state = store.read_state(checkpoint)
        with whole_loading():
            architecture = write_model(
                config, checkpoint, folder, merge=merge, max_shard_size=max_shard_size, with_dropped=with_dropped
            )
        write_record(folder, config, state, checkpoint.name, run_dir, architecture)
        write_card(folder, run_dir, config, state, adapter=(folder / "adapter_config.json").is_file())
        record_files(folder)
    return out


def export_gguf(run_dir: Path, checkpoint: Path, out: Path, kind: str, *, force: bool = False) -> Path:
    """Write the whole model of `checkpoint` (an adapter merged) to `out/NAME-KIND.gguf`, with its card. Returns the file.

    kind: one of `GGUF_TYPES`. Needs room on the disk for the model twice. `out` appears whole or not at all.

    Raises UserError where `out` exists, or architecture or tokenizer have no GGUF form: before any work.
    """
    check_free(out, force)
    require_package(Quantization("gguf", kind))
    config = read_run(run_dir / "run.yaml", use=Use.weights).config
    with quietly():
        from dstune.checkpoint.answer_files import record_files
        from dstune.models.load import load_config

        check_gguf(config, load_config(config.model))
    with temporary_folder(out) as folder:
        # llama.cpp has no names for what transformers drops.
        merge = method_of(config.method).merges
        whole = export_checkpoint(run_dir, checkpoint, folder / "whole", config=config, merge=merge, with_dropped=False)
        file = write_gguf_export(config, whole, folder, kind)
        shutil.rmtree(whole)
        record_files(folder)
    return out / file.name


def check_gguf(config: RunConfig, architecture: Any) -> None:
    """Raise UserError if the run's model or its tokenizer cannot be written as GGUF."""
    from dstune.checkpoint.gguf_families import FAMILIES, check_architecture
    from dstune.checkpoint.gguf_vocabulary import read_vocabulary
    from dstune.models.load import load_tokenizer

    if not task_of(config.task).generates:
        reason = f"task={config.task.name} trains no model that writes text, and GGUF is written for those alone"
        raise UserError(Problem("--gguf", reason, "export without --gguf", architecture.model_type))
    check_architecture(architecture)
    text = architecture.get_text_config()
    read_vocabulary(load_tokenizer(config.model), text.vocab_size, FAMILIES[text.model_type].vocabulary)


def write_gguf_export(config: RunConfig, whole: Path, folder: Path, kind: str) -> Path:
    """Write the complete model in `whole` to `folder` as GGUF, with the files that a server needs beside it. Returns the file."""
    from dstune.checkpoint.gguf_file import write_gguf
    from dstune.checkpoint.ollama import modelfile
    from dstune.data.stopping import stop_token_ids
    from dstune.models.load import load_tokenizer

    file = folder / f"{config.run.name}-{kind}.gguf"
    if kind in K_TYPES:
        from dstune.checkpoint.llama_quantize import write_k_type

        plain = folder / f"plain{INCOMPLETE}"
        narrow = object_in(whole / "config.json").get("dtype") == "bfloat16"
        write_gguf(whole, plain, "bf16" if narrow else "f32", config.run.name)
        write_k_type(plain, file, kind)
        plain.unlink()
    else:
        write_gguf(whole, file, kind, config.run.name)
    # What a server needs beside the file: the tokenizer's control tokens, the template, and Ollama's settings.
    tokenizer = load_tokenizer(replace(config.model, path=str(whole), revision=None, chat_template=None))
    text = modelfile(file.name, tokenizer, stop_token_ids(tokenizer), task_of(config.task).template_date)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    for name in (RECORD, "README.md", "tokenizer.json", "chat_template.jinja"):
        if (whole / name).is_file():
            shutil.copy(whole / name, folder / name)
    return file


def existing_or_new_export(run_dir: Path, scratch: Path, *, which: str = "last", merge: bool = False) -> Path:
    """Return the folder of an export of the checkpoint `which`: a step, `best` or `last`. It is the run's `export/` if that is of
    this checkpoint (`current_export`), else a new export in `scratch`. With `merge` it is a complete model, never an adapter.

    Raises UserError if the run has saved no such checkpoint, or its files are damaged.
    """
    export = current_export(run_dir, which=which, merge=merge)
    if export is not None:
        return export
    checkpoint = find_checkpoint(run_dir, which)
    refuse_damaged(run_dir, checkpoint)
    return export_checkpoint(run_dir, checkpoint, scratch / "export", merge=merge)


def model_of_export(model: ModelConfig, folder: Path) -> ModelConfig:
    """Return the run's `model` read from `folder`, with the configuration, tokenizer and chat template that the run trained
    with."""
    return replace(
        model,
        path=str(folder),
        revision=None,
        weights=InitialWeights.pretrained,
        chat_template=None,
        rope=RopeConfig(),
        config_overrides={},
    )


def current_export(run_dir: Path, *, which: str = "last", merge: bool = False) -> Path | None:
    """Return the run's `export/` if it was made from this checkpoint, or no checkpoint is left, and it has no code other than the
    base model's; else None. Raises UserError as `existing_or_new_export` does."""
    folder = run_dir / "export"
    config = read_run(run_dir / "run.yaml", use=Use.weights).config
    foreign = config.model.trust_remote_code and not is_of_base(folder, config.model)
    description = folder / "config.json"
    if not description.is_file() and not merge:
        description = folder / "adapter_config.json"
    exists = description.is_file()
    if exists and which == "last" and store.newest(run_dir) is None:  # all checkpoints were removed
        if foreign:
            reason = "it carries code that is not known to be that of its base model, which alone the run trusts"
            raise UserError(Problem(str(folder), reason, f"read it; then give {folder} with --trust-remote-code"))
        return folder
    checkpoint = find_checkpoint(run_dir, which)
    if exists and not foreign and read_record(folder).get("checkpoint") == checkpoint.name:
        # A run that continued from an earlier checkpoint may have saved the same step again since.
        saved = (checkpoint / store.COMMITTED).stat().st_mtime_ns
        if description.stat().st_mtime_ns >= saved:
            return folder
    return None


@contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `out` when the block ends without an error."""
    folder = out.with_name(f"{out.name}{INCOMPLETE}")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    yield folder
    if out.is_symlink():
        out.unlink()  # what it leads to is not ours
    elif out.exists():
        shutil.rmtree(out)
    folder.rename(out)


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the messages of DeepSpeed, bitsandbytes and torch when peft imports them: none of them concerns the export."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if importlib.util.find_spec("deepspeed") is not None:
        from dstune.zero import accelerator

        if not accelerator.present():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def check_free(out: Path, force: bool) -> None:
    """Raise UserError if `out` exists, unless it is a former export and `force` allows replacing it."""
    if not out.exists():
        return
    if not force:
        step = read_record(out).get("step")
        reason = "exists already" if step is None else f"exists already: the export of step {step}"
        raise UserError(
            Problem("--out", reason, "give another folder, or --force (in Python force=True) to replace it", str(out))
        )
    former = [out / name for name in ("config.json", "adapter_config.json")]
    if not any(path.is_file() for path in former) and not list(out.glob("*.gguf")):
        raise UserError(Problem("--out", "is no former export, so it is not replaced", "give another folder", str(out)))


# -- checks of the request -------------------------------------------------------------------------------------------


def refuse_unmergeable(flag: str, config: MethodConfig) -> None:
    """Raise UserError if `flag` (`--merge`, `--gguf`, `--quantize`) needs a merged model and the method has nothing to merge."""
    method = method_of(config)
    if method.merges or (flag in ("--gguf", "--quantize") and not method.adapter):
        return
    if method.adapter:
        reason = (
            f"what method={method.name} trained stands in front of each row: the model's own weights cannot hold it"
        )
        raise UserError(Problem(flag, reason, f"leave out {flag}: the export is an adapter that peft loads"))
    raise UserError(Problem(flag, f"the run trained with method={method.name}: there is nothing to merge"))


def run_directory(path: Path) -> Path:
    """Return `path` if it is the directory of a run. Raises UserError."""
    if not (path / "run.yaml").is_file():
        reason = "has no run.yaml, so it is no run directory" if path.is_dir() else "there is no such run directory"
        raise UserError(
            Problem("RUN", reason, "give the directory of a run, for example runs/NAME/DATE_TIME", str(path))
        )
    return path


def find_checkpoint(run_dir: Path, which: str) -> Path:
    """Return the whole checkpoint of a step, the `best` or the `last` one. Raises UserError."""
    whole = [info for info in store.listing(run_dir) if info.committed]
    checkpoint = store.newest(run_dir) if which == "last" else store.best(run_dir) if which == "best" else None
    if which.isdigit():
        checkpoint = next((info.path for info in whole if info.step == int(which)), None)
    if checkpoint is None:
        choices = (
            f"there are steps {', '.join(str(info.step) for info in whole)}" if whole else "the run has saved none yet"
        )
        raise UserError(Problem("--checkpoint", f"there is no such whole checkpoint in {run_dir}", choices, which))
    return checkpoint


def refuse_damaged(run_dir: Path, checkpoint: Path) -> None:
    """Raise UserError if files of `checkpoint` have changed since the save; it names the newest other checkpoint that is intact."""
    try:
        damaged = store.damaged_files(checkpoint)
    except FileNotFoundError:
        reason = "the run went on and has removed it"
        raise UserError(Problem(str(checkpoint), reason, "give the command again: it takes a newer one")) from None
    if not damaged:
        return
    others = [info for info in store.listing(run_dir) if info.committed and info.path != checkpoint]
    step = next((info.step for info in reversed(others) if not store.damaged_files(info.path)), None)
    fix = f"dstune export {run_dir} --checkpoint {step} --out {run_dir}/export-step-{step}"
    if step is None:
        fix = "no other checkpoint of the run is whole: bring these files back from a copy"
    files = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
    raise UserError(Problem(str(checkpoint), f"is damaged, these files are not as they were saved: {files}", fix))
