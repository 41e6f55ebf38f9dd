"""Writes the model card of an export: `README.md` with the front matter that the hub reads, and sections for people.

All facts come from the run's files. The card has nothing of `tracking` and `launch`, and only the last part of local paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from dstune import samples
from dstune.checkpoint.record import public_name
from dstune.config.schema import RunConfig
from dstune.core.errors import UserError
from dstune.core.parsing import is_encoder_decoder, object_in
from dstune.protocols import method_of, task_of
from dstune.protocols.method_options import ReplacesHead, StartsFromAdapters

DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|md)(\.(gz|bz2|xz|zst))?$|\.(gz|bz2|xz|zst|zip)$")
WHERE = 'path = "PATH"  # this folder, or the id under which it was published'
LISTED_PACKAGES = ("dstune", "torch", "transformers", "deepspeed", "peft", "datasets", "tokenizers")


def write_card(folder: Path, run_dir: Path, config: RunConfig, state: Mapping[str, Any], *, adapter: bool) -> None:
    """Write `README.md` to `folder`, the export of the checkpoint whose `state.json` is `state`."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    export = Export(folder, config, state, adapter=adapter)
    task = task_of(config.task)
    pipeline = "text2text-generation" if export.encoder_decoder else task.pipeline
    metrics = state.get("metrics") or {}
    origin = _hub_name(config.model.path)
    data = ModelCardData(
        base_model=origin,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=pipeline,
        tags=["dstune", config.task.name, config.method.name],
        license=_licence(config.model.path),
        datasets=_datasets(config) or None,
        metrics=[name for name in metrics if name in ("accuracy", "perplexity")] or None,
        model_name=config.run.name if metrics else None,
        eval_results=[
            EvalResult(
                task_type=pipeline,
                dataset_type="held-out",
                dataset_name=f"held-out rows of {_data_name(config)}",
                metric_type=name,
                metric_value=value,
            )
            for name, value in metrics.items()
            if name != "targets"
        ]
        or None,
    )
    body = "\n\n".join(_sections(run_dir, export))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(folder / "README.md")


@dataclass(frozen=True)
class Export:
    """An export as its model card describes and loads it."""

    folder: Path
    config: RunConfig
    state: Mapping[str, Any]
    adapter: bool
    """Whether it is an adapter of peft, not a complete model."""

    @property
    def encoder_decoder(self) -> bool:
        return is_encoder_decoder(self.folder)

    @property
    def chat_template(self) -> bool:
        inside = object_in(self.folder / "tokenizer_config.json").get("chat_template")
        return (self.folder / "chat_template.jinja").is_file() or bool(inside)

    @property
    def labels(self) -> str:
        return ", ".join(self.state["labels"])

    def loading(self, kind: str, outputs: int | None = None) -> list[str]:
        """Return lines that load `model` and `tokenizer`. kind: as in `AutoModelForKIND`. outputs: of an adapter's new head."""
        if kind == "CausalLM" and (name := self._whole_class()):
            return self._loading_whole(name)
        library, loader = (
            ("peft", f"AutoPeftModelFor{kind}") if self.adapter else ("transformers", f"AutoModelFor{kind}")
        )
        imports = [f"from {library} import {loader}, AutoTokenizer"]
        if self.adapter:
            imports = [f"from peft import {loader}", "from transformers import AutoTokenizer"]
        count = f", num_labels={outputs}" if self.adapter and outputs else ""
        method = method_of(self.config.method)
        own_head = isinstance(method, ReplacesHead) and method.own_head is not None
        code = ", trust_remote_code=True" if own_head else ""  # modeling_dstune.py, beside the weights
        return [
            *imports,
            "",
            WHERE,
            f"model = {loader}.from_pretrained(path{count}{code})",
            "tokenizer = AutoTokenizer.from_pretrained(path)",
        ]

    def _whole_class(self) -> str:
        """Return the auto class of a model that has more parts than its language model; empty where `AutoModelForCausalLM` is
        right."""
        from transformers import AutoModelForCausalLM

        from dstune.models.load import load_config
        from dstune.models.unreached import whole_class

        try:
            model_class = whole_class(AutoModelForCausalLM, load_config(self.config.model))
        except UserError:  # a base that is gone
            return ""
        return "" if model_class is AutoModelForCausalLM else str(model_class.__name__)

    def _loading_whole(self, loader: str) -> list[str]:
        tokenizer = "tokenizer = AutoTokenizer.from_pretrained(path)"
        if not self.adapter:
            model = f"model = {loader}.from_pretrained(path)"
            return [f"from transformers import {loader}, AutoTokenizer", "", WHERE, model, tokenizer]
        base = object_in(self.folder / "adapter_config.json").get("base_model_name_or_path")
        quoted_base = json.dumps(_hub_name(str(base)) or public_name(str(base)))
        return [
            "from peft import PeftModel",
            f"from transformers import {loader}, AutoTokenizer",
            "",
            WHERE,
            f"base = {loader}.from_pretrained({quoted_base})",
            "model = PeftModel.from_pretrained(base, path)",
            tokenizer,
        ]


def _sections(run_dir: Path, export: Export) -> Iterator[str]:
    config, state = export.config, export.state
    opening = "A fine-tuned version of"
    if export.adapter:
        kind = method_of(config.method).adapter_name or config.method.name
        opening = f"{'An' if kind[0] in 'aeiouAEIOU' else 'A'} {kind} adapter of"
    base = _hub_name(config.model.path) or public_name(config.model.path)
    revision = f" at revision `{config.model.revision}`" if config.model.revision else ""
    yield f"# {config.run.name}\n\n{opening} `{base}`{revision}, trained with dstune ({config.task.name}, {config.method.name})."
    usage = "\n".join(task_of(config.task).usage(export))
    yield f"## Use\n\n```python\n{usage}\n```"
    yield f"## Data\n\nTraining rows: {_data_name(config)}.\n\n{_counts(object_in(run_dir / 'data_report.json'))}".rstrip()
    yield f"## Evaluation\n\n{_evaluation(run_dir, state)}"
    yield f"## Training\n\n{_settings(config, state)}"
    environment = object_in(run_dir / "environment.json")
    packages = environment.get("packages") or {}
    versions = [f"{name} {packages[name]}" for name in LISTED_PACKAGES if packages.get(name)]
    if versions:
        yield f"## Versions\n\nPython {environment.get('python')}, {', '.join(versions)}."


def _counts(report: Mapping[str, Any]) -> str:
    columns = ("rows", "samples", "tokens", "targets", "truncated", "bad_rows")
    parts = [(name, counts) for name, counts in report.items() if isinstance(counts, dict) and "samples" in counts]
    if not parts:
        return ""
    rows = [
        [name, *(f"{counts[key]:,}" if isinstance(counts.get(key), int) else "" for key in columns)]
        for name, counts in parts
    ]
    return _table(["part", *(name.replace("_", " ") for name in columns)], rows)


def _evaluation(run_dir: Path, state: Mapping[str, Any]) -> str:
    metrics_before = (state.get("train") or {}).get("eval_initial") or {}
    after = state.get("metrics") or {}
    result = object_in(run_dir / "result.json")
    test = (result.get("test") or {}) if result.get("steps") == state.get("step") else {}
    names = [name for name in after or test if name != "targets"]
    if not names:
        return "No rows were held out."
    heads = [
        "metric",
        *(["before training"] if metrics_before else []),
        f"step {state['step']}",
        *(["test"] if test else []),
    ]
    columns = [*([metrics_before] if metrics_before else []), after, *([test] if test else [])]
    return _table(heads, [[name, *(_number(column.get(name)) for column in columns)] for name in names])


def _settings(config: RunConfig, state: Mapping[str, Any]) -> str:
    trainer, train = config.trainer, state.get("train") or {}
    values: dict[str, Any] = {
        "steps": state["step"],
        "tokens": train.get("tokens"),
        "rows per step": trainer.global_batch_size,
        "longest row (tokens)": config.data.max_length,
        "packing": config.data.packing,
        "precision": state.get("precision"),
        "gradient clipping": trainer.grad_clip,
        "seed": trainer.seed,
        "ranks": state.get("world_size"),
        "ZeRO stage": state.get("zero_stage"),
    }
    sections: dict[str, Any] = {"optimizer": config.optimizer, "schedule": config.schedule}
    method = method_of(config.method)
    if method.adapter:
        sections["method"] = (
            method.without_paths(public_name) if isinstance(method, StartsFromAdapters) else config.method
        )
    for name, section in sections.items():
        values[name] = section.name
        values |= {f"{name}.{key}": value for key, value in asdict(section).items() if key != "name"}
    rows = [
        [key, f"{value:,}" if type(value) is int else _text(value)]
        for key, value in values.items()
        if value is not None and value not in ({}, [])
    ]
    return _table(["setting", "value"], rows)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _hub_name(path: str) -> str | None:
    """Return the model's id on the hub; None for a folder of the user's own."""
    if samples.is_sample(path):
        sample = samples.catalogue().get(path.removeprefix(samples.SCHEME))
        return sample.origin if sample else None
    return path if public_name(path) == path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else None


def _licence(path: str) -> str | None:
    """Return the licence of the base model from its card or the catalogue of samples; None if neither is on this machine."""
    from huggingface_hub import ModelCard

    if samples.is_sample(path):
        sample = samples.catalogue().get(path.removeprefix(samples.SCHEME))
        identifiers = {"Apache-2.0": "apache-2.0", "MIT": "mit", "Gemma terms: tests only": "gemma"}
        return identifiers.get(sample.licence) if sample else None
    card = Path(path) / "README.md"
    if not card.is_file():
        return None
    try:
        licence = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict().get("license")
    except ValueError:
        return None
    return licence if isinstance(licence, str) else None


def _sources(config: RunConfig) -> list[str]:
    mixed = [source.path for source in config.data.mixture.values()]
    return mixed or ([config.data.train] if config.data.train else [])


def _datasets(config: RunConfig) -> list[str]:
    """Return the ids of the run's data sets on the hub."""
    names = [path.partition(":")[0] for path in _sources(config) if not samples.is_sample(path)]
    return [
        name
        for name in names
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not DATA_FILE.search(name) and not Path(name).exists()
    ]


def _data_name(config: RunConfig) -> str:
    """Return public names of the rows: complete names of samples and hub ids, the last part of files and addresses."""
    hub = _datasets(config)
    names = []
    for path in _sources(config):
        plain = path.partition("?")[0]
        name = (
            path if samples.is_sample(path) or path.partition(":")[0] in hub else plain.rstrip("/").rpartition("/")[2]
        )
        names.append(f"`{name}`")
    return ", ".join(names)
