"""Training on a Delta table and answers into one, from the command line."""

from __future__ import annotations

import json
import shutil

import pytest
from support.command import Commands, exact
from support.tiny import save_encoder, write_labelled

deltalake = pytest.importorskip("deltalake", reason="pip install '.[delta]' in a clone of dstune")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Commands:
    """A model, and a table whose versions 0 and 1 have 40 and 80 rows in partitions."""
    import pyarrow as pa

    folder = tmp_path_factory.mktemp("tables")
    save_encoder(folder / "encoder")
    lines = write_labelled(folder / "rows.jsonl", 80).read_text().splitlines()
    rows = [{**json.loads(line), "lang": ("de", "en")[number % 2]} for number, line in enumerate(lines)]
    for half in (rows[:40], rows[40:]):
        deltalake.write_deltalake(folder / "table", pa.Table.from_pylist(half), mode="append", partition_by=["lang"])
    return Commands(folder)


def overrides(table: str, name: str) -> list[str]:
    words = [
        "model.path=encoder",
        "task=classification",
        f"data.train={table}",
        "data.max_length=32",
        f"run.dir={name}",
    ]
    words += ["trainer.max_steps=6", "trainer.micro_batch_size=2", "trainer.global_batch_size=8", "launch.processes=2"]
    return [*words, "optimizer.lr=1e-3", "evaluate.every=3", "run.export=none"]


def test_a_run_on_a_table_and_its_answers_in_another(place):
    table = place.folder / "table"
    done = place.run("train", *overrides("delta://table", "first"), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    opened = deltalake.DeltaTable(table)
    identity = opened.metadata().id
    assert f"delta://{table}@1#{identity}" in (place.folder / "first" / "run.yaml").read_text()
    described = json.loads((place.folder / "first" / "data_report.json").read_text())["tables"]["data.train"]
    assert (described["version"], described["id"], described["rows"]) == (1, identity, 80)

    # Other files, the same rows: the same curve, bit for bit.
    opened.optimize.compact()
    again = place.run("train", *overrides("delta://table", "compacted"), timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"@{opened.version()}#" in (place.folder / "compacted" / "run.yaml").read_text()
    assert opened.version() > 1
    assert exact(place.folder / "compacted") == exact(place.folder / "first")

    words = ["predict", "first", "--input", "delta://table@0", "--output", "delta://answers"]
    predicted = place.run(*words, timeout=600)
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    assert predicted.stdout.strip() == "delta://answers@0"
    answers = deltalake.DeltaTable(place.folder / "answers")
    assert (answers.version(), answers.count()) == (0, 40)
    assert {"row", "text", "predicted", "probability"} <= {field.name for field in answers.schema().fields}
    repeated = place.run(*words, timeout=600)
    assert "got these rows already" in repeated.stdout
    assert deltalake.DeltaTable(place.folder / "answers").version() == 0


def test_a_table_that_is_not_as_it_was_is_refused_before_any_rank_starts(place):
    shortened, again = place.folder / "shortened", place.folder / "again"
    shutil.copytree(place.folder / "table", shortened)
    deltalake.DeltaTable(shortened).create_checkpoint()
    (shortened / "_delta_log" / f"{0:020}.json").unlink()
    shutil.copytree(shortened, again)
    former = deltalake.DeltaTable(again).metadata().id
    rows = deltalake.DeltaTable(again).to_pyarrow_table()
    shutil.rmtree(again)
    deltalake.write_deltalake(again, rows)
    opened = deltalake.DeltaTable(place.folder / "table")
    opened.optimize.compact()
    opened.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    for address, reason in (
        ("table@0", "is gone"),
        ("table@99", "the newest version is"),
        ("shortened@0", "the log does not reach back to it"),
        (f"again@0#{former}", "was made again"),
    ):
        # With columns of its own: what was read before is in the cache, and is enough.
        refused = place.run("train", *overrides(f'"delta://{address}?columns=text,label"', "refused"), timeout=600)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert reason in refused.stderr
        assert "starting" not in refused.stdout + refused.stderr
        assert not (place.folder / "refused").exists()
