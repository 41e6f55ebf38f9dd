"""The sides of a comparison: a recorded model, a model that a server has, or one on this machine; and how each is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.api_client import Address, ApiClient
from dstune.core.errors import Problem, UserError
from dstune.core.text import one_line
from dstune.recording.answers import Asking, Journal, ask_all, gone_key, record_of
from dstune.recording.folder import MANIFEST, Folder, read_lines, read_object
from dstune.recording.prompts import Prompt, text_of
from dstune.recording.trained import run_of

if TYPE_CHECKING:
    from dstune.api.models import Loaded

Record = Mapping[str, Any]
Records = dict[str, dict[str, Any]]
"""Recorded answers by the prompt's key."""

ASKED_TOGETHER = 64
"""Prompts that a model on this machine is asked before their answers are written down."""
READ_BY_SERVERS = ("tools", "functions", "response_format")
"""Options of a prompt that only a server reads: it parses calls of tools, and constrains the answer's form."""


@dataclass(frozen=True)
class RecordedModel:
    """A model that `dstune record` has asked."""

    folder: Path
    model: str
    redact: list[str]
    """What the recording masks."""
    asking: Mapping[str, Any] | None
    """The settings of its requests."""
    records: Records

    @classmethod
    def read(cls, flag: str, folder: Path, model: str | None) -> RecordedModel:
        """Read the answers of `model`, or of the only one. flag: OLD or NEW. Raises UserError."""
        manifest = read_object(folder / MANIFEST, folder)
        by_model: dict[str, Records] = {}
        for path in sorted((folder / "answers").glob("*.jsonl")):
            for record in read_lines(path):
                by_model.setdefault(str(record.get("model")), {})[str(record.get("key"))] = record
        if model is None and len(by_model) == 1:
            model = next(iter(by_model))
        if model is None or model not in by_model:
            reason = "which model?" if model is None else f"it has no answers of {model}"
            names = ", ".join(map(one_line, by_model))
            fix = f"--{flag.lower()}-model NAME, one of: {names}" if by_model else "dstune record --prompts"
            raise UserError(Problem(flag, reason, fix, str(folder)))
        asking = manifest.get("asking")
        redact = list(manifest.get("redact") or [])
        return cls(folder, model, redact, asking if isinstance(asking, dict) else None, by_model[model])


@dataclass(frozen=True)
class ServedModel:
    """A model of a server with OpenAI's API."""

    flag: str
    address: Address
    model: str | None
    at_once: int

    def ask(self, prompts: Mapping[str, Prompt], asking: Asking, folder: Folder, other: str) -> tuple[str, Records]:
        """Ask every prompt that `folder` has no answer to; return the model's name and all answers. other: the name of the model
        on the other side, which is asked for if the server has it. Raises DstuneError."""
        client = ApiClient(self.address)
        model = self.model or self._choose(client, other)
        folder.hold_settings(server=self.address.url, model=model)
        missing: dict[str, str] = {}
        ask_all(client, folder, asking, [model], prompts, at_once=self.at_once, budget_tokens=None, missing=missing)
        if (reason := missing.get(gone_key(model))) is not None:
            raise UserError(Problem(self.flag, reason, f"--{self.flag.lower()}-model NAME", self.address.url))
        return model, _recorded(folder, model)

    def _choose(self, client: ApiClient, other: str) -> str:
        """Return the name of the server's model. Raises UserError if it has several."""
        data = client.get("/models").get("data")
        entries = data if isinstance(data, list) else []
        names = [str(entry["id"]) for entry in entries if isinstance(entry, dict) and entry.get("id")]
        if other in names:
            return other
        if len(names) == 1:
            return names[0]
        listed = ", ".join(map(one_line, names[:20])) or "the server lists none"
        fix = f"--{self.flag.lower()}-model NAME, one of: {listed}"
        raise UserError(Problem(self.flag, "which model of the server?", fix, self.address.url))


@dataclass(frozen=True)
class LocalModel:
    """A run, a checkpoint, an export, a folder or a hub id, which is asked on this machine."""

    flag: str
    path: str
    batch_size: int

    def check(self, prompts: Mapping[str, Prompt]) -> None:
        """Raises UserError for prompts that only a server can ask."""
        options = {name for prompt in prompts.values() for name in prompt.options if name in READ_BY_SERVERS}
        if options:
            reason = f"prompts have {', '.join(sorted(options))}, which only a server reads"
            fix = f"dstune serve {self.path}, and its address instead"
            raise UserError(Problem(self.flag, reason, fix, self.path))

    def ask(self, prompts: Mapping[str, Prompt], asking: Asking, folder: Folder, other: str) -> tuple[str, Records]:
        """As `ServedModel.ask`; `other` is not read."""
        from dstune.api.models import Loaded

        folder.hold_settings(model=self.path, weights=_identity(self.path))
        journal = Journal(folder, self.path)
        open_prompts = [
            prompt
            for key, prompt in prompts.items()
            if key not in journal.keys and not folder.has_deleted(prompt.users)
        ]
        loaded = Loaded(self.path)
        answer = self._written if _generates(self.path) else self._predicted
        try:
            for start in range(0, len(open_prompts), ASKED_TOGETHER):
                some = open_prompts[start : start + ASKED_TOGETHER]
                answers = _answers_or_errors(lambda asked: answer(loaded, asked, asking), some)
                for prompt, answered in zip(some, answers, strict=True):
                    journal.add(record_of(folder, self.path, prompt, asking.body(self.path, prompt), answered))
        finally:
            loaded.forget()
            journal.close()
        return self.path, _recorded(folder, self.path)

    def _written(self, loaded: Loaded, prompts: Sequence[Prompt], asking: Asking) -> list[str]:
        """Return the texts that a language model writes."""
        texts: list[str] = loaded.generate(
            [_conversation(prompt) for prompt in prompts],
            checkpoint="last",
            batch_size=self.batch_size,
            max_new_tokens=asking.max_tokens,
            temperature=asking.temperature,
            seed=asking.seed,
        )
        return texts

    def _predicted(self, loaded: Loaded, prompts: Sequence[Prompt], asking: Asking) -> list[str]:
        """Return the labels that a classifier predicts for the last question of each prompt."""
        questions = [{"text": next(_questions(prompt))} for prompt in prompts]
        predicted = [
            row.get("predicted") for row in loaded.predict(questions, (), checkpoint="last", batch_size=self.batch_size)
        ]
        if not all(isinstance(label, str | list) for label in predicted):
            reason = "it answers with no text and no label"
            raise UserError(Problem(self.flag, reason, "a model that writes, or a classifier", self.path))
        return [label if isinstance(label, str) else json.dumps(label) for label in predicted]


Side = RecordedModel | ServedModel | LocalModel


def _conversation(prompt: Prompt) -> Any:
    """Return a prompt as `dstune.generate` takes it: a lone question as text, which models without a chat template read too."""
    if len(prompt.messages) == 1 and isinstance(prompt.messages[0].get("content"), str):
        return prompt.messages[0]["content"]
    return prompt.messages


def _questions(prompt: Prompt) -> Any:
    """Yield the user's texts, the last one first."""
    return (text_of(message) for message in reversed(prompt.messages) if message.get("role") == "user")


def _answers_or_errors(answer: Any, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Return each answer as a chat completion, or the error of a prompt that the model cannot be asked, such as one that is too
    long. Raises UserError if it can be asked none of them."""
    try:
        return [_completion(text) for text in answer(prompts)]
    except UserError as all_refused:
        if len(prompts) == 1:
            return [{"error": {"message": str(all_refused)}}]
        answered = [_answers_or_errors(answer, [prompt])[0] for prompt in prompts]
        if all("error" in each for each in answered):
            raise
        return answered


def _completion(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def _recorded(folder: Folder, model: str) -> Records:
    """Return the answers of `model` in a folder that was just written."""
    folder.save_manifest()
    paths = sorted((folder.path / "answers").glob("*.jsonl"))
    return {str(row.get("key")): row for path in paths for row in read_lines(path) if row.get("model") == model}


def _generates(model: str) -> bool:
    """Return whether the model at a path writes text; otherwise it predicts."""
    from dstune.checkpoint.record import read_record, task_of_head
    from dstune.config.run_file import read_run
    from dstune.config.trust import Use
    from dstune.protocols import TASKS

    if (run := run_of(model)) is not None:
        task: str | None = read_run(run / "run.yaml", use=Use.weights).config.task.name
    else:
        task = (read_record(Path(model)).get("task") or {}).get("name") or task_of_head(Path(model))
    kind = TASKS.classes().get(task or "")
    return kind is None or kind.generates


def _identity(model: str) -> list[Any]:
    """Return what changes with the weights at a path, as JSON."""
    from dstune.checkpoint import store

    path = Path(model)
    if not path.is_dir():
        return [model]
    newest = store.newest(path)
    folder = newest if newest is not None else path
    return [folder.name, max((file.stat().st_mtime_ns for file in folder.iterdir()), default=0)]
