#!/usr/bin/env python3
"""Write docs/configuration.md, docs/methods.md and docs/presets.md from the schema and `conf/`, and the table of
docs/security.md from benchmarks/attacks.py.

usage: python tools/guides.py
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script it finds its own folder only

from benchmarks.attacks import table as attacks_table  # noqa: E402
from dstune.config.documentation import merged  # noqa: E402
from dstune.config.guidance import advice_of  # noqa: E402
from dstune.config.hydra_session import config_folders  # noqa: E402
from tools.methods_page import methods_page  # noqa: E402
from tools.presets_page import presets_page  # noqa: E402

ATTACKS_START = "<!-- attacks: made by `python tools/guides.py` -->"
ATTACKS_END = "<!-- /attacks -->"
CONFIGURATION_HEAD = """\
# Configuration

Every key of a run, with its type, default and meaning. `dstune train --help KEY` prints the same for one key.

```bash
dstune train experiment=chat_lora optimizer.lr=1e-4          # a group with its choice, and a key with its value
dstune train my.yaml optimizer.lr=5e-5                       # the same from a file, with one value changed
dstune train --cfg job experiment=chat_lora                  # check the configuration and print it
```

A list is `key=[a,b]`, no value is `key=null`. If a key is set in several places, the command line wins, then your file,
then the experiment, then the other groups.

## A file of your own

Write what you would otherwise type into a YAML file, and run `dstune train my.yaml`:

```yaml
model: qwen3_4b                # a group with its choice: model=qwen3_4b
method: {name: lora, rank: 8}  # a group with its choice, and keys of the section
optimizer: {lr: 1e-4}          # keys of a section: optimizer.lr=1e-4
trainer.epochs: 2              # a dotted key
data:
  train: rows.jsonl            # relative to the working directory
```

- Each top-level name is a group with its choice, a section, or a dotted key. A name that does not exist is refused with its line
  and the nearest name.
- Values after the file win: `dstune train my.yaml optimizer.lr=5e-5`.
- Every verb that takes `key=value` takes a file too: `dstune plan my.yaml`, `dstune data show my.yaml`,
  `dstune train -m my.yaml optimizer.lr=1e-4,2e-4`.
- `dstune init DATA` writes such a file for your rows and your machine.
- `run.yaml` records the content of the file as overrides; a run never reads the file again.
- An experiment (a file with `defaults:`) can be given in the same place, if its list chooses only groups.
- `plugins:` in a file counts as if you had typed it: its code runs without `dstune trust`. Read other people's files first.
- A file has at most 256 KiB and 2,000 values.
"""
GROUPS_HEAD = """\
## Groups and their choices

`GROUP=CHOICE` selects one of these, such as `method=lora`. If the choices of a group have different keys, only those
of the selected choice can be set.
"""
KEYS_HEAD = """\
## Keys

A name in parentheses after a key, such as (method=lora), is the choice that has this key. This page is generated from the code
by `python tools/guides.py`.
"""


SECTIONS = {
    "experiment": "a complete configuration for a purpose or a machine",
    "model": "the model, its weights and its chat template",
    "data": "sources of rows, columns, cleaning, splits, length, packing",
    "task": "what is trained on a row",
    "method": "which weights are trained",
    "forgetting": "options against forgetting what the model knew",
    "optimizer": "optimizer and learning rate",
    "schedule": "learning rate over time",
    "zero": "the ZeRO stage of DeepSpeed, offloading",
    "trainer": "length of training, batch sizes, precision, early stopping, callbacks",
    "checkpoint": "saving checkpoints",
    "evaluate": "evaluation during and after training",
    "launch": "processes, machines, schedulers, restarts",
    "tracking": "Weights & Biases, MLflow, TensorBoard, Trackio",
    "run": "run directory, resuming, export, time limit",
    "sweep": "searches over values",
    "parallel": "sharing a long row or a layer among GPUs",
    "plugins": "your own code",
}
"""What the keys of each section set."""


def keys_tables() -> str:
    """Return all keys as Markdown: a heading and a table for each section."""
    rows: dict[str, list[str]] = {}
    for setting in merged():
        only = f" ({setting.group})" if "=" in setting.group else ""
        text = advice_of(setting.key, setting.group)
        advice = f" *Advice:* {text}" if text else ""
        cells = [f"`{setting.key}`{only}", f"`{setting.default}`", setting.type, setting.doc + advice]
        row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        rows.setdefault(setting.key.partition(".")[0], []).append(row)
    head = "| key | default | values | meaning |\n| --- | --- | --- | --- |"
    tables = [f"### {section}: {SECTIONS[section]}\n\n{head}\n" + "\n".join(table) for section, table in rows.items()]
    return "\n\n".join(tables) + "\n"


def groups_table(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the groups that have choices, as a Markdown table."""
    lines = ["| group | sets | choices |", "| --- | --- | --- |"]
    for group, purpose in SECTIONS.items():
        names = [choice for choice in groups.get(group, ()) if choice != "default"]
        if not names:
            continue
        choices = ", ".join(f"`{name}`" for name in names)
        if len(names) > LISTED:
            choices = f"[{len(names)} presets](presets.md), for example `{names[0]}`, `{names[-1]}`"
        lines.append(f"| `{group}` | {purpose} | {choices} |")
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """Return the text of docs/configuration.md."""
    from dstune.config.hydra_session import group_options, session

    with session() as hydra:
        groups = groups_table(group_options(hydra))
    return f"{CONFIGURATION_HEAD}\n{GROUPS_HEAD}\n{groups}\n{KEYS_HEAD}\n{keys_tables()}"


LISTED = 20
"""A group with more choices than this is described on the page of presets."""


def _between(text: str, start: str, table: str, end: str) -> str:
    """Return `text` with `table` between the two marks."""
    text_before, _, text_behind = text.partition(start)
    return f"{text_before}{start}\n{table}{end}{text_behind.partition(end)[2]}"


def write_guides(root: Path) -> None:
    """Put the current tables into the pages of docs/ below `root`."""
    (root / "docs" / "configuration.md").write_text(configuration_page(), encoding="utf-8")
    (root / "docs" / "methods.md").write_text(methods_page(root), encoding="utf-8")
    security = root / "docs" / "security.md"
    page = _between(security.read_text(encoding="utf-8"), ATTACKS_START, attacks_table(), ATTACKS_END)
    security.write_text(page, encoding="utf-8")
    (root / "docs" / "presets.md").write_text(presets_page(config_folders()), encoding="utf-8")


if __name__ == "__main__":
    write_guides(ROOT)
