"""Resolves the models that the command line names into the files that an engine loads.

It only reads files: nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstune.checkpoint.export import current_export
from dstune.checkpoint.record import read_record, task_of_head
from dstune.config.plugins import activate_requested
from dstune.config.registered import local_path, registry_of
from dstune.config.run_file import read_run
from dstune.config.schema import ModelConfig
from dstune.config.trust import Use
from dstune.core.errors import Problem, UserError
from dstune.core.model_names import refuse_ambiguous_folder
from dstune.core.parsing import object_in
from dstune.core.paths import REFERENCE_FILE
from dstune.data.named_templates import DEFAULT, joined
from dstune.inference.resolve_model import base_of
from dstune.launch import rundir
from dstune.protocols import TASKS
from dstune.protocols.task_options import ExportsFiles

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,255}")
"""Pattern of a model's name. Names are never used as part of a path."""


@dataclass(frozen=True)
class Source:
    """A model to serve: an export, a folder or a hub id."""

    name: str
    folder: Path | None
    """The export's folder; None for a model of the hub."""
    path: str
    """The path or hub id as the user wrote it."""
    task: str
    generates: bool
    serves: tuple[str, ...]
    adapter: bool
    base: str
    """For an adapter, its base model; otherwise `path`."""
    base_revision: str | None = None
    trust_remote_code: bool = False
    template_date: str | None = None
    prompted_as: Path | None = None
    """For a base: the folder of the adapter whose tokenizer and template are used, on engines that support only one."""
    plugins: tuple[str, ...] = ()
    """Plugins of its run, as in the key `plugins`: its task may come from one."""
    reference: Path | None = None
    """The folder of a reference that was made for this server; None if the reference is in `folder`."""
    neutral_labels: tuple[str, ...] = ()
    """For a classifier, the labels that `/v1/moderations` does not flag, as the user declared them."""

    @property
    def load_from(self) -> str:
        """What the engine loads first: an adapter's base, otherwise the model."""
        if self.adapter and self.generates:
            return self.base
        return str(self.folder or self.path)

    @property
    def load_revision(self) -> str | None:
        return self.base_revision if self.adapter or self.folder is None else None

    @property
    def version(self) -> str:
        """A version that changes with the weights."""
        if self.folder is None:
            return f"{self.path}@{self.base_revision or 'main'}"
        parts = [
            f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
            for file in sorted(self.folder.glob("*"))
            if file.suffix in (".safetensors", ".gguf", ".json", ".jinja")
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def digest(self, file: str) -> str:
        """Return the digest of a file next to the tokenizer; empty if there is no such file."""
        folder = self.prompted_as or self.folder
        if folder is None or not (folder / file).is_file():
            return ""
        return hashlib.sha256((folder / file).read_bytes()).hexdigest()

    @property
    def template(self) -> str | None:
        """The text of the chat template, which selects among several if there are several; None if there is none."""
        folder = self.prompted_as or self.folder
        templates = {} if folder is None else chat_templates(folder)
        return joined(templates) if templates else None


def chat_templates(folder: Path) -> dict[str, str]:
    """Return templates by name, in either form that transformers has written: files, or an entry of `tokenizer_config.json` in
    older folders."""
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (template_file := folder / "chat_template.jinja").is_file():
        files[DEFAULT] = template_file
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    template = object_in(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, str):
        return {DEFAULT: template}
    templates = [entry for entry in template if isinstance(entry, dict)] if isinstance(template, list) else []
    return {str(entry.get("name")): str(entry.get("template")) for entry in templates}


def parse_models(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the name and path of each `PATH` or `NAME=PATH`. Raises UserError with every problem."""
    problems, pairs = [], []
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or "/" in name:
            name, path = "", word
        if not path:
            problems.append(Problem("MODEL", "there is no path behind the name", "NAME=RUN", word))
        elif name and not NAME.fullmatch(name):
            problems.append(Problem("MODEL", "is no name for a model", "letters, digits, and . _ : - within", name))
        pairs.append((name, path))
    if problems:
        raise UserError(problems)
    return pairs


def parse_aliases(words: Sequence[str]) -> dict[str, str]:
    """Return the model that each alias stands for. words: `ALIAS=MODEL`. Raises UserError with every problem."""
    problems, aliases = [], {}
    for word in words:
        alias, _, name = word.partition("=")
        if not (NAME.fullmatch(alias) and NAME.fullmatch(name)):
            problems.append(Problem("--alias", "is no ALIAS=MODEL of two names", "--alias old=new", word))
        elif alias in aliases:
            problems.append(Problem("--alias", "stands for two models", "leave one of them out", alias))
        aliases[alias] = name
    if problems:
        raise UserError(problems)
    return aliases


def check_aliases(aliases: Mapping[str, str], names: Sequence[str], *, open_ended: bool) -> None:
    """Raise UserError for aliases that hide a model, stand for another alias or for no model. names: of the served models.
    open_ended: whether models may be added while the server runs."""
    problems = []
    for alias, name in aliases.items():
        if alias in names:
            problems.append(Problem("--alias", "a model is served under this name", "another alias", alias))
        if name in aliases or (name not in names and not open_ended):
            fix = f"one of {', '.join(names)}"
            problems.append(Problem("--alias", "is no model that is served", fix, name))
    if problems:
        raise UserError(problems)


def with_neutral_labels(sources: Sequence[Source], words: Sequence[str]) -> list[Source]:
    """Return `sources` with the labels that `--neutral-label NAME=LABEL` declares. Raises UserError."""
    labels: dict[str, list[str]] = {source.name: [] for source in sources if "classify" in source.serves}
    problems = []
    for word in words:
        name = max((label for label in labels if word.startswith(f"{label}=")), key=len, default="")
        if name and word != f"{name}=":
            labels[name].append(word[len(name) + 1 :])
            continue
        fix = f"NAME of {', '.join(labels)}" if labels else "leave it out: no classifier is served"
        problems.append(Problem("--neutral-label", "is no NAME=LABEL of a classifier that is served", fix, word))
    if problems:
        raise UserError(problems)
    return [replace(source, neutral_labels=tuple(labels.get(source.name, ()))) for source in sources]


def is_run(path: str) -> bool:
    return (Path(path) / "run.yaml").is_file()


def needs_preparation(path: str) -> bool:
    """Return whether a run lacks an export of its newest checkpoint, or its export lacks a reference."""
    if not is_run(path):
        return False
    export = current_export(Path(path))
    return export is None or not (export / REFERENCE_FILE).is_file()


def resolve(name: str, path: str, folder: Path | None = None, *, trust_remote_code: bool = False) -> Source:
    """Resolve a model to serve. folder: the export of a run, if it is not in the run's folder. Raises UserError if the model cannot
    be served."""
    record: dict[str, Any] = {}
    plugins: tuple[str, ...] = ()
    if registry_of(path) is not None:
        name = name or path.partition(":/")[2].partition("@")[0].partition("/")[0].rpartition(".")[2]
        path = local_path(path, "MODEL")
    if is_run(path):
        run = read_run(Path(path) / "run.yaml", use=Use.weights)
        config = run.config
        plugins = tuple(
            str(Path(path).resolve() / plugin.copy) if plugin.is_file else plugin.name for plugin in run.plugins
        )
        folder = folder or current_export(Path(path))
        assert folder is not None, "a run is exported before it is served"
        name = name or config.run.name
        trust_remote_code = trust_remote_code or config.model.trust_remote_code
    elif Path(path).is_dir():
        refuse_ambiguous_folder(path, "MODEL", trusts_code=trust_remote_code)
        folder = Path(path)
        name = name or folder.resolve().name
    elif Path(path).is_absolute() or path.startswith((".", "~")):
        raise UserError(Problem("MODEL", "there is no such folder", "give a run, an export or a hub id", path))
    else:
        rundir.refuse_missing(Path(path))
        name = name or path.removeprefix("sample://")
    if not NAME.fullmatch(name):
        usable_name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"
        reason = "is no name for a model: letters, digits, and . _ : / @ - within"
        raise UserError(Problem("MODEL", reason, f"dstune serve {usable_name}={shlex.quote(path)}", name))
    if folder is None:
        return Source(name, None, path, "chat", True, (), adapter=False, base=path, trust_remote_code=trust_remote_code)
    if not plugins:
        activate_requested([])
    record = read_record(folder)
    task = str((record.get("task") or {}).get("name") or task_of_head(folder) or _embeds(folder) or "chat")
    kind = TASKS.classes().get(task)
    if kind is None:
        reason, fix = f"was trained for task={task}, which is not known here", "plugins: [FILE.py] in dstune.yaml"
        raise UserError(Problem("MODEL", reason, fix, path))
    if not kind.generates and not kind.serves:
        reason = f"is a model for task={task}, which has no route"
        raise UserError(Problem("MODEL", reason, "dstune predict answers files of rows", path))
    adapter = (folder / "adapter_config.json").is_file()
    date = (record.get("task") or {}).get("template_date")
    exported = Source(
        name, folder.resolve(), path, task, kind.generates, kind.serves, adapter, base=str(folder.resolve()),
        trust_remote_code=trust_remote_code, template_date=date, plugins=plugins,
    )  # fmt: skip
    if adapter:
        base = base_of(folder, ModelConfig())
        exported = replace(exported, base=local_path(base.path, "MODEL"), base_revision=base.revision)
    return exported


def base_source(source: Source, name: str, *, one_template: bool) -> Source:
    """Return the base of an adapter as a separate model. one_template: use the adapter's tokenizer and template."""
    folder = Path(source.base)
    return replace(
        source,
        name=name,
        folder=folder.resolve() if folder.is_dir() else None,
        path=source.base,
        adapter=False,
        template_date=source.template_date if one_template else None,
        prompted_as=source.folder if one_template else None,
    )


def _embeds(folder: Path) -> str:
    """Return the task of a folder that has no record but has files of sentence-transformers."""
    kinds = ((name, kind) for name, kind in TASKS.classes().items() if issubclass(kind, ExportsFiles))
    return next((name for name, kind in kinds if kind.overrides_from(folder)), "")
