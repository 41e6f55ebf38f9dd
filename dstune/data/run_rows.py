"""The rows that a run was trained and evaluated on, read again from its files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config.data_schema import OnBadRow
from dstune.config.run_file import read_run
from dstune.config.schema import RunConfig
from dstune.config.trust import Use
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json
from dstune.data.recorded_files import refuse_changed_files

if TYPE_CHECKING:
    from dstune.data.ingest import Table
    from dstune.data.labels import ChosenRows

PlacedRow = tuple[str, dict[str, Any]]
"""The place of a row (`FILE:LINE`) and its normalised columns."""


PARTS = ("train", "validation", "test")


def read_run_parts(
    run: Path, most: int | None = None, *, fix: str, names: Sequence[str] = PARTS
) -> tuple[RunConfig, dict[str, list[PlacedRow]]]:
    """Return the run's configuration and, by part, at most `most` rows, those with the lowest hashes.

    Rows that cleaning removed from training are among them. fix: what the user can do if the rows cannot be read again, or are not
    those that the run was trained on. names: of the parts to return.
    Raises UserError.
    """
    from dstune.config.forgetting import general_rows, measured_alone, mixes_in
    from dstune.data.labels import ChosenRows
    from dstune.data.parts import choose

    config = read_run(run / "run.yaml", use=Use.rows).config
    general = general_rows(config) if mixes_in(config) else None
    if general is not None:
        config = measured_alone(config)
    if config.data.streaming or config.data.mixture:
        key = "data.streaming" if config.data.streaming else "data.mixture"
        reason = "the training rows of a stream or a mixture cannot be read again"
        raise UserError(Problem(key, reason, fix, str(run)))
    # Training rows are needed for every part: others may be split from them.
    not_read = [f"data.{name}" for name in ("validation", "test", "guard", "ood") if name not in names]
    refuse_changed_files(run, config, fix, except_keys=not_read)
    with tempfile.TemporaryDirectory(prefix="dstune-rows-") as scratch:
        chosen = choose(_tables(config, Path(scratch)), config)
        parts = {part: _lowest(rows, most) for part, rows in chosen.items() if part in names}
        if general is not None:
            # `forgetting.replay`: general rows were trained on in addition to those of the task.
            folder = Path(scratch) / "general"
            folder.mkdir()
            table = _tables(general, folder)["train"]
            parts["train"] = sorted([*parts["train"], *_lowest(ChosenRows(table, table.rows), most)])[:most]
        return config, {part: [(place, parse_json(row)) for _, place, row in rows] for part, rows in parts.items()}


def _tables(config: RunConfig, folder: Path) -> dict[str, Table]:
    """Read the rows of a configuration into files in `folder`; returns them by part."""
    from dstune.data.bad_rows import BadRows
    from dstune.data.images.store import ImageWriter
    from dstune.data.ingest import ingest
    from dstune.data.row_sources import find_inputs

    bad, images = BadRows(OnBadRow.skip), ImageWriter(folder, config.data.image_folder)
    return {
        part: ingest(inputs[""].files, inputs[""].config, folder / f"{part}.arrow", bad, images=images)
        for part, inputs in find_inputs(config).items()
        if part in PARTS
    }


def _lowest(rows: ChosenRows, most: int | None) -> list[tuple[int, str, str]]:
    """Return the hash, place and JSON of at most `most` rows, those with the lowest hashes."""
    order = rows.hashes.argsort(kind="stable")[:most]
    numbers = zip(rows.hashes[order].tolist(), rows.indices[order].tolist(), strict=True)
    return [(row_hash, rows.table.place(number), rows.table.data[number]["row"]) for row_hash, number in numbers]
