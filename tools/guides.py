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
from dstune.config.guidance import GUIDANCE  # noqa: E402
from dstune.config.hydra_session import config_folders  # noqa: E402
from tools.methods_page import methods_page  # noqa: E402
from tools.presets_page import presets_page  # noqa: E402

ATTACKS_START = "<!-- attacks: made by `python tools/guides.py` -->"
ATTACKS_END = "<!-- /attacks -->"
CONFIGURATION_HEAD = """\
# Configuration

Made from the schema by `python tools/guides.py`. A name in parentheses behind a key is the choice that has it.
Values of the command line win over those of a configuration file, which win over those of an experiment, which win over those of
the other groups. A list is `key=[a,b]`, nothing is `key=null`.

## A file of your own

`dstune train my.yaml` reads what you would otherwise type:

```yaml
model: qwen3_4b                # a group with its choice: model=qwen3_4b
method: {name: lora, rank: 8}  # a group with its choice, and keys of the section
optimizer: {lr: 1e-4}          # keys of a section: optimizer.lr=1e-4
trainer.epochs: 2              # a dotted key
data:
  train: rows.jsonl            # relative to the working directory
```

Each top-level name is a group with its choice, a section, or a dotted key. Values behind the file win:
`dstune train my.yaml optimizer.lr=5e-5`. Every verb that takes `key=value` takes a file too: `dstune plan my.yaml`,
`dstune data show my.yaml`, `dstune train -m my.yaml optimizer.lr=1e-4,2e-4`. A name that does not exist is refused with its line
and the nearest name. `run.yaml` records the content of the file as overrides; a run never reads the file again. `dstune init DATA`
writes such a file for your rows and your machine.

An experiment (a file with `defaults:`) can be given in the same place, if its list chooses groups only. `plugins:` in a file counts
as if you had typed it, so read the files of others first. A file has at most 256 KiB and 2,000 values.
"""


def markdown_table() -> str:
    """Return all keys as a Markdown table."""
    lines = ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    for setting in merged():
        only = f" ({setting.group})" if "=" in setting.group else ""
        advice = f" *Advice:* {GUIDANCE[setting.key]}" if setting.key in GUIDANCE else ""
        cells = [f"`{setting.key}`{only}", f"`{setting.default}`", setting.type, setting.doc + advice]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def groups_table(groups: Mapping[str, Sequence[str]]) -> str:
    """Write groups with their choices and keys as a Markdown table."""
    keys: dict[str, list[str]] = {}
    for setting in merged():
        section, _, key = setting.key.partition(".")
        if not key:
            continue  # of no group (`plugins`)
        if ".NAME." not in setting.key and key not in keys.setdefault(section, []):
            keys[section].append(key)
    lines = ["| group | choices | keys |", "| --- | --- | --- |"]
    for group in ["experiment", *keys]:
        names = [choice for choice in groups.get(group, ()) if choice != "default"]
        choices = ", ".join(f"`{name}`" for name in names)
        if len(names) > LISTED:
            choices = f"[{len(names)} presets](presets.md), for example `{names[0]}`, `{names[-1]}`"
        lines.append(f"| `{group}` | {choices} | {' '.join(f'`{key}`' for key in keys.get(group, ()))} |")
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """Return the text of docs/configuration.md."""
    from dstune.config.hydra_session import group_options, session

    with session() as hydra:
        groups = groups_table(group_options(hydra))
    return f"{CONFIGURATION_HEAD}\n## Groups\n\n{groups}\n## Keys\n\n{markdown_table()}"


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
