"""The verb `dstune export`: writes a checkpoint as a folder, with a reference to compare servers with."""

from __future__ import annotations

import json
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dstune.checkpoint.copied import folder_for
from dstune.checkpoint.export import (
    MAX_SHARD_SIZE,
    check_free,
    current_export,
    export_checkpoint,
    export_gguf,
    find_checkpoint,
    refuse_damaged,
    refuse_unmergeable,
    run_directory,
)
from dstune.checkpoint.quantization import GGUF_TYPES, Measure, Quantization, parse_quantization
from dstune.checkpoint.serving import vllm_problems
from dstune.config.registered import fetch, pin, registry_of
from dstune.config.run_file import read_run
from dstune.config.run_links import refuse_links
from dstune.config.trust import Use
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.inference.hub_upload import check_base, check_repository, upload
from dstune.protocols import MODEL_REGISTRIES, ModelRegistry, method_of


def main(argv: list[str], measure: Measure | None = None) -> int:
    """Run `dstune export RUN`. measure: for `--quantize`, measures the losses. Raises UserError; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.rollback:
        _refuse_other_options(arguments, "rollback")
        return _roll_back(arguments)
    if registry_of(str(arguments.run)) is not None:
        return _write_version(arguments)
    run_dir = run_directory(arguments.run)
    if arguments.reference:
        return _renew_reference(arguments, run_dir)
    if arguments.register is not None:
        _registry_of(arguments.register).check(arguments.register)  # before any work
        if arguments.gguf:
            raise UserError(Problem("--register", "a GGUF file is no model of transformers", "leave out --gguf"))
    _check_push(arguments)
    quantization = _quantization(arguments)
    if arguments.out is None:
        refuse_links(run_dir)
    checkpoint = find_checkpoint(run_dir, arguments.checkpoint)
    config = read_run(run_dir / "run.yaml", use=Use.weights).config
    method = config.method
    if (
        arguments.push is not None
        and method_of(method).adapter
        and not (arguments.merge or arguments.gguf or quantization)
    ):
        check_base(config.model)
    for flag in ("--merge", "--gguf", "--quantize"):
        if getattr(arguments, flag.removeprefix("--")):
            refuse_unmergeable(flag, method)
    if not re.fullmatch(r"0*[1-9][0-9]*[KMGT]B", arguments.max_shard_size):
        reason = "must be a whole number above 0 with KB, MB, GB or TB behind it"
        raise UserError(Problem("--max-shard-size", reason, "--max-shard-size 5GB", arguments.max_shard_size))
    refuse_damaged(run_dir, checkpoint)
    out = _folder_of(arguments, run_dir)
    publishes = arguments.register is not None or arguments.push is not None
    if publishes and not arguments.force and _is_current(arguments, run_dir, out):
        return _publish(arguments, out, run_dir, checkpoint)
    check_free(out, arguments.force)
    with folder_for(out) as folder:
        described: dict[str, Any] = {}
        if quantization is not None:
            from dstune.checkpoint.quantize import export_quantized

            measure = None if arguments.no_loss else measure
            written, described = export_quantized(
                run_dir, checkpoint, folder, quantization, measure=measure, force=arguments.force
            )
            kind = "gguf" if quantization.type else "model"
            problems = [] if quantization.type else vllm_problems(folder)
        elif arguments.gguf:
            written = export_gguf(run_dir, checkpoint, folder, arguments.gguf, force=arguments.force)
            kind, problems = "gguf", []
        else:
            size = arguments.max_shard_size
            written = export_checkpoint(
                run_dir, checkpoint, folder, merge=arguments.merge, force=arguments.force, max_shard_size=size
            )
            kind = "adapter" if (folder / "adapter_config.json").exists() else "model"
            problems = vllm_problems(folder)
        with_reference = not arguments.no_reference and (quantization is None or bool(quantization.type))
        note = _reference(folder, run_dir) if with_reference else ""
        written = out / written.relative_to(folder)
    if publishes:
        return _publish(arguments, out, run_dir, checkpoint)
    if arguments.json:
        result: dict[str, Any] = {
            "export": str(written),
            "kind": kind,
            "checkpoint": str(checkpoint),
            "vllm_problems": problems,
        }
        result["reference"] = with_reference and not note
        if described:
            result["quantization"] = described
        print(json.dumps(result))
        return EXIT_DONE
    print(f"{checkpoint.name} -> {written}")
    if described:
        print(_losses(described))
    if kind == "adapter" and problems:
        print(f"vLLM does not serve this adapter ({'; '.join(problems)}): --merge gives a model that it serves")
    return EXIT_DONE


def _folder_of(arguments: Namespace, run_dir: Path) -> Path:
    if arguments.out:
        return Path(arguments.out)
    quantized, _, kind = (arguments.quantize or "").partition(":")
    if kind := kind or arguments.gguf or "":
        folder = run_dir / "export-gguf"
        has_other_type = any(folder.glob("*.gguf")) and not any(folder.glob(f"*-{kind}.gguf"))
        return run_dir / f"export-gguf-{kind}" if has_other_type and not arguments.force else folder
    return run_dir / (f"export-{quantized}" if quantized else "export-merged" if arguments.merge else "export")


def _quantization(arguments: Namespace) -> Quantization | None:
    """Return the format that `--quantize` names; None without it. Raises UserError."""
    if arguments.quantize is None:
        if arguments.no_loss:
            raise UserError(Problem("--no-loss", "no loss is measured", "add --quantize FORMAT, or leave it out"))
        return None
    if arguments.gguf:
        fix = f"--quantize gguf:{arguments.gguf} alone"
        raise UserError(Problem("--gguf", "stands beside --quantize", fix, arguments.gguf))
    if arguments.register is not None:
        reason = "what is registered can be trained from, and rounded weights cannot"
        raise UserError(Problem("--register", reason, "leave out --quantize", arguments.register))
    return parse_quantization(arguments.quantize)


def _losses(described: dict[str, Any]) -> str:
    """Format the loss before and after quantization as one line."""
    if "quantized" not in described:
        return "  its loss was not measured"
    rows = f"{described['rows']:,} {described['split']} rows"
    name = "loss" if "loss" in described["quantized"] else next(iter(described["quantized"]))
    before, after = described["original"][name], described["quantized"][name]
    return f"  {name} on {rows}: {before:.4f} as trained, {after:.4f} as {described['format']} ({after - before:+.4f})"


def _renew_reference(arguments: Namespace, run_dir: Path) -> int:
    """Accept edits of an export. Raises UserError."""
    _refuse_other_options(arguments, "reference", ("out", "merge", "gguf"))
    if arguments.out is None:
        refuse_links(run_dir)
    out = _folder_of(arguments, run_dir)
    from dstune.inference.reference import renew_reference

    renewal = renew_reference(out, run_dir)
    if arguments.json:
        print(json.dumps({"export": str(out), **asdict(renewal)}))
        return EXIT_DONE
    for change in renewal.changes:
        print(f"accepted: {change}")
    print(
        f"{out} has a new reference of {renewal.rows} rows, {renewal.other_prompts} of them with another prompt than in training"
    )
    return EXIT_DONE


def _is_current(arguments: Namespace, run_dir: Path, out: Path) -> bool:
    """Return whether the run's own export already is that of the checkpoint."""
    if arguments.out is not None or arguments.merge or arguments.quantize:
        return False
    return current_export(run_dir, which=arguments.checkpoint) == out


def _check_push(arguments: Namespace) -> None:
    """Raise UserError if the hub would refuse the upload, before any work."""
    if arguments.push is None:
        if arguments.public:
            raise UserError(Problem("--public", "nothing is uploaded", "add --push OWNER/NAME, or leave it out"))
        return
    if arguments.register is not None:
        raise UserError(Problem("--push", "stands beside --register", "run dstune export twice", arguments.push))
    check_repository(arguments.push, public=arguments.public)


def _publish(arguments: Namespace, out: Path, run_dir: Path, checkpoint: Path) -> int:
    """Register or upload the complete export in `out`."""
    if arguments.register is not None:
        return _register(arguments, out, run_dir, checkpoint)
    address = upload(out, arguments.push, public=arguments.public)
    if arguments.json:
        print(json.dumps({"export": str(out), "checkpoint": str(checkpoint), "commit": address}))
        return EXIT_DONE
    print(f"{checkpoint.name} -> {address}")
    return EXIT_DONE


def _register(arguments: Namespace, out: Path, run_dir: Path, checkpoint: Path) -> int:
    """Register the export in `out` at the address of `--register`, and print its version. Returns the exit code."""
    config = read_run(run_dir / "run.yaml", use=Use.weights).config
    address = arguments.register
    done = _registry_of(address).register(address, out, run_dir, config, _message)
    if arguments.json:
        print(json.dumps({"export": str(out), "checkpoint": str(checkpoint), **asdict(done)}))
        return EXIT_DONE
    moved = f", {done.alias} points to it" + (f" (before: {done.before})" if done.before else "") if done.alias else ""
    print(f"{checkpoint.name} -> {address.partition(':')[0]}:/{done.name}/{done.version}{moved}")
    return EXIT_DONE


def _registry_of(address: str) -> ModelRegistry:
    """Return the model registry for the scheme of an address. Raises UserError if there is none."""
    registry = MODEL_REGISTRIES.find(address.partition(":/")[0])
    if registry is None:
        addresses = ", ".join(other.addresses for other in MODEL_REGISTRIES.classes().values())
        reason = "is no place in a model registry" if addresses else "this installation knows no model registry"
        raise UserError(Problem("--register", reason, addresses, address))
    return registry()


def _message(text: str) -> None:
    print(f"dstune: {text}", file=sys.stderr)


def _refuse_other_options(arguments: Namespace, mode: str, allowed: Sequence[str] = ()) -> None:
    """Raise UserError for options of an export that `--mode` would ignore."""
    default = vars(_parser().parse_args(["RUN"]))
    problems = [
        Problem(
            f"--{name.replace('_', '-')}",
            f"nothing is exported with --{mode}",
            "leave it out, or run dstune export twice",
        )
        for name, value in vars(arguments).items()
        if value != default[name] and name not in ("run", mode, "json", *allowed)
    ]
    if problems:
        raise UserError(problems)


def _write_version(arguments: Namespace) -> int:
    """Write a version of a registry to --out. Raises UserError."""
    _refuse_other_options(arguments, "out", ("out", "force"))
    address = str(arguments.run)
    if arguments.out is None:
        raise UserError(Problem("--out", "a registered model has no folder of its own", f"--out {Path(address).name}"))
    check_free(arguments.out, arguments.force)
    pinned = pin(address, "MODEL")
    source = fetch(pinned, "MODEL", _message)
    with folder_for(arguments.out) as folder:
        if folder.exists() and arguments.force:
            shutil.rmtree(folder)
        shutil.copytree(source, folder)
    if arguments.json:
        print(json.dumps({"export": str(arguments.out), "model": pinned}))
    else:
        print(f"{pinned} -> {arguments.out}")
    return EXIT_DONE


def _roll_back(arguments: Namespace) -> int:
    address = str(arguments.run)
    done = _registry_of(address).roll_back(address)
    if arguments.json:
        print(json.dumps(asdict(done)))
    else:
        print(f"{done.alias} of {done.name} points to version {done.version} (before: {done.before})")
    return EXIT_DONE


def _reference(folder: Path, run_dir: Path) -> str:
    """Return why the export gets no reference; empty if it has one."""
    from dstune.inference.reference import add_reference

    note = add_reference(folder, run_dir)
    if note:
        print(f"dstune: {note}; `dstune serve` will call it unproven", file=sys.stderr)
    return note


def _parser() -> VerbParser:
    parser = VerbParser(prog="dstune export", description="A run's checkpoint as a Hugging Face folder.")
    parser.add_argument(
        "run", metavar="RUN|models:/NAME@ALIAS", type=Path, help="run directory, or a version to write to --out"
    )
    parser.add_argument("--checkpoint", default="last", help="a step, `best` or `last` (default)")
    parser.add_argument(
        "--out", type=Path, help="folder to write; RUN/export, RUN/export-merged, RUN/export-gguf, ... if not said"
    )
    parser.add_argument("--merge", action="store_true", help="merge an adapter into its base model")
    parser.add_argument(
        "--gguf", nargs="?", const="f16", choices=GGUF_TYPES, help="one file for llama.cpp, merged; f16 if not said"
    )
    parser.add_argument(
        "--quantize",
        metavar="fp8|awq|gguf:TYPE",
        help=f"a whole model in fewer bits, with its loss on held-out rows; TYPE is {', '.join(GGUF_TYPES)}",
    )
    parser.add_argument("--no-loss", action="store_true", help="with --quantize: do not measure the loss")
    parser.add_argument(
        "--max-shard-size", default=MAX_SHARD_SIZE, metavar="SIZE", help="of weight files (default 5GB)"
    )
    parser.add_argument(
        "--no-reference", action="store_true", help="keep no held-out rows to hold a server against (docs/serving.md)"
    )
    parser.add_argument(
        "--reference",
        action="store_true",
        help="export nothing, but accept what you edited in an export: make its reference anew",
    )
    parser.add_argument("--force", action="store_true", help="replace a former export")
    parser.add_argument(
        "--register", metavar="models:/NAME[@ALIAS]", help="register the export in MLflow's registry (docs/registry.md)"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the export to the Hugging Face hub; a new repository is private"
    )
    parser.add_argument("--public", action="store_true", help="with --push: everybody may read the repository")
    parser.add_argument(
        "--rollback", action="store_true", help="RUN is models:/NAME@ALIAS: point the alias to where it pointed before"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
