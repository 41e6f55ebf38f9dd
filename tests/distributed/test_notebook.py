"""`docs/notebook.ipynb` in a kernel of Jupyter: every cell runs, and what it shows is what its text says."""

from __future__ import annotations

import os

import nbformat
import pytest
from nbclient import NotebookClient
from support.command import ROOT, clean_environment


@pytest.mark.timeout(1200)
def test_every_cell_of_the_notebook(tmp_path, monkeypatch):
    for name, value in clean_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in set(os.environ) - set(clean_environment(tmp_path)):
        monkeypatch.delenv(name)
    book = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    client = NotebookClient(book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output_text(cell) for cell in book.cells if cell.cell_type == "code"]
    _, trained, table, answers, resumed, exported, mistakes, printed = outputs
    assert "36/36" in trained
    assert "completed, 36 steps" in trained  # the run's own table
    assert "eval/accuracy" in table
    assert answers.count("probabilities") == 2
    assert "(48, 1.0)" in resumed, "it has learned what the rows say"
    assert "'model.safetensors'" in exported
    assert "trainer.epoch" in mistakes
    assert "optimizer.lr=fast" in mistakes
    assert "step 2: " in printed and "step 4: " in printed, "the callback of the cell has reached the ranks"
    assert "<iframe" in printed
    assert not [cell.outputs for cell in book.cells if cell.cell_type == "code" and "Traceback" in output_text(cell)]


def output_text(cell) -> str:
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        parts += map(str, output.get("data", {}).values())
    return "\n".join(parts)
