"""The page about prepared models and experiments (docs/presets.md), read from the files of these groups."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import yaml

from dstune.config.presets import description

PRESETS_HEAD = """\
# Presets: models and experiments

A model preset (`model=NAME`) sets the path of a model and the settings that it needs. An experiment (`experiment=NAME`) is a
complete run: task, model, method, batch sizes and ZeRO stage, often for given hardware. Values that you add on the command line
take precedence:

```bash
dstune train model=qwen3_4b method=lora data.train=chats.jsonl
dstune train experiment=llama3_8b_lora_24gb data.train=chats.jsonl trainer.epochs=2
```

A model without a preset works too: set `model.path` to a hub id or a folder. [Which model](models.md) helps you to choose;
`dstune plan experiment=NAME` prints memory and time on your hardware. Models with experts are explained in
[mixtures of experts](experts.md).

A base model has no chat template of its own. Its preset sets the template of its family (`chat_template=`), so that `task=chat`
works. Sizes and licences of models marked *unverified* were not checked against the model's page. The comment in the file of an
experiment, `conf/experiment/NAME.yaml`, has the arithmetic of its memory.

This page is generated from the files in `conf/` by `python tools/guides.py`.
"""


GROUPS = ("model", "experiment")
by_name = attrgetter("stem")


def what_it_is(path: Path) -> str:
    """Return the part of an experiment's comment in front of its arithmetic, without the sentence that announces a command."""
    text = description(path).split(" Memory", 1)[0]
    sentences = text.replace("e.g. ", "e.g.").split(". ")
    return ". ".join(sentence for sentence in sentences if not sentence.endswith(":")).rstrip(".") + "."


def presets_page(folders: Sequence[Path]) -> str:
    """Return the text of docs/presets.md for the folders with dstune's own choices (`config_folders()`)."""
    files = {group: [path for folder in folders for path in folder.glob(f"{group}/*.yaml")] for group in GROUPS}
    models = ["| `model=` | path | settings | description |", "| --- | --- | --- | --- |"]
    for path in sorted(files["model"], key=by_name):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        others = " ".join(f"`{key}={value}`" for key, value in values.items() if key != "path")
        models.append(f"| `{path.stem}` | `{values['path']}` | {others} | {description(path)} |")
    experiments = ["| `experiment=` | description |", "| --- | --- |"]
    experiments += [f"| `{path.stem}` | {what_it_is(path)} |" for path in sorted(files["experiment"], key=by_name)]
    return "\n".join([PRESETS_HEAD, "## Models", "", *models, "", "## Experiments", "", *experiments, ""])
