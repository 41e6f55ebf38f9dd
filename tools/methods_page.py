"""The page about methods (docs/methods.md): what each is and when to use it from the schema, commands from conf/, measured rows
from benchmarks/methods.json."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from dstune.config.forgetting_schema import ForgettingConfig
from dstune.protocols import METHODS
from tools.method_matrix import matrix_table

HEAD = """\
# Methods

Made from the schema, `conf/method/` and `benchmarks/methods.json` by `python tools/guides.py`. A method decides
what is trained, and when; it goes with every task, model and ZeRO stage unless validation says why not. Keys and defaults:
[configuration.md](configuration.md).
"""

MATRIX = """\
## What goes with what

Each cell promises what `tests/distributed/test_matrix*.py` run on two ranks: training, frozen weights that keep every bit, a resume
to the bit, and an export that plain `transformers` or `peft` loads with equal outputs.
"""

FORGETTING = """\
## Against forgetting

Options beside a method that moves pretrained weights. A penalty's gradient is added once for each optimizer step, behind the
clipping, by the rank that updates the entry: it is the same on any number of ranks and at every ZeRO stage, and is logged as
`penalty`. New weights (a head) have none. General rows of `replay` are trained on and never held out.

```bash
dstune train method=full data.train=rows.jsonl forgetting.l2sp=0.01
dstune train method=full data.train=rows.jsonl forgetting.general=general.jsonl forgetting.ewc=1000
dstune train method=full data.train=rows.jsonl forgetting.general=general.jsonl forgetting.replay=0.1
```
"""


def methods_page(root: Path) -> str:
    """Return the text of docs/methods.md. root: of the repository."""
    measured = _measured(root / "benchmarks" / "methods.json")
    parts = [HEAD, *_table(measured), MATRIX, matrix_table()]
    for name, cls in METHODS.configs().items():
        parts += [
            f"## `method={name}`",
            "",
            *_paragraphs(cls),
            _command(root / "conf" / "method" / f"{name}.yaml", name),
            f"Where `optimizer.lr` is not given: {METHODS.classes()[name].learning_rate:g}.",
            "",
        ]
        if row := measured.get("rows", {}).get(name):
            parts += [_sentence(row), ""]
    parts += [FORGETTING.rstrip(), ""]
    parts += [f"- `forgetting.{key}`: {doc}" for key, doc in _docs(ForgettingConfig).items()]
    return "\n".join([*parts, ""])


def _paragraphs(cls: type) -> list[str]:
    """Return the docstring's paragraphs, each a line and a blank one: what the method is, then when to use it."""
    text = inspect.getdoc(cls) or ""
    return [line for part in text.split("\n\n") for line in (" ".join(part.split()), "")]


def _command(path: Path, name: str) -> str:
    """Return the command that the comment of the method's file gives, else the plainest one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    commands = [line.lstrip("# ") for line in lines if re.match(r"#\s+dstune train", line)]
    return f"```bash\n{commands[0] if commands else f'dstune train method={name} data.train=rows.jsonl'}\n```\n"


def _measured(path: Path) -> dict[str, Any]:
    measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return measured


def _table(measured: dict[str, Any]) -> list[str]:
    if not measured:
        return ["Accuracy, time and memory side by side: not measured yet (`python benchmarks/methods.py`).", ""]
    packages = ", ".join(f"{name} {number}" for name, number in measured["packages"].items())
    lines = [
        "## Side by side",
        "",
        "MiniLM, 4,000 film reviews, 2,000 held out; two ranks on a CPU. Made by `python benchmarks/methods.py`, on a machine",
        f"that did other work beside it ({measured['machine']}; {packages}); seconds are those of the whole command.",
        "",
        "| method | accuracy | trained | seconds | peak memory a rank |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in measured["rows"].items():
        lines.append(
            f"| `{name}` | {row['accuracy']:.4f} | {row['trained_share']:.2%} | {row['seconds']:.0f} "
            f"| {row['peak_memory_gib']:.2f} GiB |"
        )
    return [*lines, "", "Methods that are not in it: not measured.", ""]


def _sentence(row: dict[str, Any]) -> str:
    parts = [
        f"Measured: accuracy {row['accuracy']:.4f} with {row['trained_share']:.2%} of the weights in {row['seconds']:.0f} s"
    ]
    if "later_epoch_seconds" in row:
        parts.append(
            f"the first epoch takes {row['first_epoch_seconds']:.1f} s, a later one {row['later_epoch_seconds']:.2f} s"
        )
    classical = (key for key in ("logistic_regression", "random_forest") if key in row)
    parts += [f"{key.replace('_', ' ')} {row[key]:.4f}" for key in classical]
    return f"{'; '.join(parts)}. Command: `{row['command']}`."


def _docs(cls: type) -> dict[str, str]:
    from dstune.config.documentation import attribute_docs

    return attribute_docs(cls)
