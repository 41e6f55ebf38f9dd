"""The bundle and the notebook of examples/databricks: their form, and that what they ask of dstune exists."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dstune.config.compose import compose
from dstune.config.validate import validate
from dstune.inference import export_command
from dstune.lakehouse.address import parse
from dstune.lakehouse.register import parse as parse_registry

FOLDER = Path(__file__).parents[2] / "examples" / "databricks"

BUNDLE = {
    "bundle": {"name": str},
    "variables": {"*": {"description": str, "default": str}},
    "resources": {
        "jobs": {
            "*": {
                "name": str,
                "max_concurrent_runs": int,
                "tasks": [
                    {
                        "task_key": str,
                        "max_retries": int,
                        "new_cluster": {
                            "spark_version": str,
                            "node_type_id": str,
                            "num_workers": int,
                            "data_security_mode": str,
                            "spark_conf": {"*": str},
                            "custom_tags": {"*": str},
                            "spark_env_vars": {"*": str},
                        },
                        "libraries": [{"pypi": {"package": str}}],
                        "notebook_task": {"notebook_path": str, "base_parameters": {"*": str}},
                    }
                ],
            }
        }
    },
    "targets": {"*": {"mode": str, "default": bool}},
}
"""The fields of the documentation that the bundle uses, with their types."""


def check(value: object, schema: object, where: str = "") -> None:
    if isinstance(schema, type):
        assert type(value) is schema, f"{where} is {value!r}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for number, item in enumerate(value):
            check(item, schema[0], f"{where}[{number}]")
    else:
        assert isinstance(value, dict) and isinstance(schema, dict), where
        for name, item in value.items():
            assert name in schema or "*" in schema, f"{where}.{name} is no field"
            check(item, schema.get(name, schema.get("*")), f"{where}.{name}")


def test_the_bundle():
    text = (FOLDER / "databricks.yml").read_text()
    bundle = yaml.safe_load(text)
    check(bundle, BUNDLE)
    assert set(re.findall(r"\$\{var\.(\w+)\}", text)) == set(bundle["variables"])
    (task,) = bundle["resources"]["jobs"]["train"]["tasks"]
    assert (FOLDER / task["notebook_task"]["notebook_path"]).is_file()
    widgets = set(re.findall(r"widgets\.text\(\\?\"(\w+)", (FOLDER / "train.ipynb").read_text()))
    assert set(task["notebook_task"]["base_parameters"]) == widgets


def test_the_notebook(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat")
    notebook = json.loads((FOLDER / "train.ipynb").read_text())
    nbformat.validate(notebook)
    cells = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"}
    call = next(
        node
        for node in ast.walk(ast.parse(cells["train"]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "dstune.train"
    )
    names = {
        "table": "main.reviews.films",
        "run_dir": "/Volumes/main/reviews/runs/films",
        "model": "main.reviews.films",
    }
    words = [eval(compile(ast.Expression(one), "cell", "eval"), names) for one in call.args]
    config = compose(words).config
    validate(config)
    assert parse(str(config.data.train), "data.train").location == names["table"]
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words) if check else None)
    exec(cells["register"], dict(names))
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "dstune", "export"]  # a cluster's libraries are not on the PATH
    assert export_command._parser().parse_args(command[4:]).force
    assert parse_registry(command[command.index("--register") + 1]) == (names["model"], "champion")
