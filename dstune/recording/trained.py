"""Which prompts a model was trained on, as far as its recording or its run says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.core.errors import UserError
from dstune.recording.folder import file_name, read_lines, read_object
from dstune.recording.prompts import Prompt, prompt_of, read_prompts

FLAG = "--trained-on FILE"


@dataclass
class TrainedPrompts:
    """The prompts of training rows. A prompt is the same one if the user asks the same, turn by turn: the system message, tools,
    case and white space do not matter."""

    notes: list[str] = field(default_factory=list)
    """What is not known about the training."""
    _turns: set[tuple[str, ...]] = field(default_factory=set)

    def __contains__(self, prompt: Prompt) -> bool:
        return prompt.turns in self._turns

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Add prompts with all their beginnings, since every answer of a conversation may be trained."""
        for prompt in prompts:
            turns = prompt.turns
            self._turns.update(turns[:end] for end in range(1, len(turns) + 1))

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.add(prompt for row in rows if (prompt := prompt_of(row, "")) is not None)

    def add_files(self, specs: Iterable[str]) -> None:
        """Add the rows of `--trained-on`. Raises UserError."""
        self.add(read_prompts(specs, (), "--trained-on"))

    def add_recording(self, folder: Path) -> bool:
        """Add the training files of the jobs of a recording; return whether it has any job. Raises UserError."""
        contents, has_jobs = _recorded_files(folder), False
        for path in sorted((folder / "jobs").glob("*.json")):
            job = read_object(path, folder).get("job")
            identifier = job.get("training_file") if isinstance(job, dict) else None
            if not identifier:
                continue
            has_jobs = True
            if (content := contents.get(str(identifier))) is None:
                self.notes.append(
                    f"{identifier}, a training file, is not in the recording: its prompts are not left out ({FLAG})"
                )
            else:
                self.add_rows(read_lines(content))
        return has_jobs

    def add_run(self, run: Path, *, are_named: bool) -> None:
        """Add the training rows of a run, and those of the run that made its base model.

        are_named: whether `--trained-on` names rows, so that rows that cannot be read again are no error. Raises UserError.
        """
        from dstune.data.run_rows import read_run_parts

        for each in lineage(run):
            try:
                _, parts = read_run_parts(each, fix=FLAG, names=("train",))
                self.add_rows(row for _, row in parts["train"])
            except UserError as error:
                if not are_named:
                    raise
                self.notes.append(f"the training rows of {each} were not read: {error.problems[0].reason}")


def _recorded_files(folder: Path) -> dict[str, Path]:
    """Return the contents of the recorded files by the server's id."""
    contents = {}
    for path in (folder / "files").glob("*.json"):
        record = read_object(path, folder)
        described = record.get("file")
        content = path.with_name(Path(str(record.get("content"))).name)
        if isinstance(described, dict) and path.stem == file_name(str(described.get("id"))) and content.is_file():
            contents[str(described["id"])] = content
    return contents


def run_of(model: str) -> Path | None:
    """Return the run that made the model at a path: a run, its checkpoint or its export; None if it is of no run."""
    path = Path(model)
    folders = [path]
    if path.is_dir() and path.name.startswith("export"):
        folders.append(path.parent)
    if path.parent.name == "checkpoints":
        folders.append(path.parent.parent)
    return next((folder for folder in folders if (folder / "run.yaml").is_file()), None)


def lineage(run: Path) -> list[Path]:
    """Return the run, and before it in training the runs that made its base model, newest first. Raises UserError."""
    from dstune.config.run_file import read_run
    from dstune.config.trust import Use

    runs: list[Path] = []
    at: Path | None = run
    while at is not None and at.resolve() not in runs:
        runs.append(at.resolve())
        at = run_of(read_run(at / "run.yaml", use=Use.rows).config.model.path)
    return runs
