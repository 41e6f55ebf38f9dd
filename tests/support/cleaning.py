"""Tables of rows for the tests of cleaning, and copies of texts with known edits."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dstune.config.data_schema import CleanConfig, DataConfig, OnBadRow
from dstune.data.clean.tables import Cleaning
from dstune.data.ingest import BadRows, Table, ingest
from dstune.data.sources import of_part
from dstune.protocols.task import TaskConfig
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from support.configs import run_config

LETTERS = "abcdefghijklmnopqrstuvwxyz ,."


def edited(text: str, share: float, random_source: random.Random) -> str:
    """Return `text` with random substitutions, insertions and deletions, one for each 1 / `share` characters."""
    characters = list(text)
    for _ in range(max(1, round(share * len(text)))):
        place = random_source.randrange(len(characters))
        match random_source.randrange(3):
            case 0:
                characters[place] = random_source.choice(LETTERS)
            case 1:
                characters.insert(place, random_source.choice(LETTERS))
            case _:
                del characters[place]
    return "".join(characters)


def edit_distance(first: str, second: str) -> int:
    """Compute Levenshtein's distance by the textbook's table, a row at a time: what the library is held against."""
    first_codes, second_codes = (np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) for text in (first, second))
    places = np.arange(len(second_codes) + 1)
    costs = places.copy()
    for row, character in enumerate(first_codes, start=1):
        reached = np.concatenate([[row], np.minimum(costs[1:] + 1, costs[:-1] + (second_codes != character))])
        # An insertion takes the cost of the place before and one more: a running minimum.
        costs = np.minimum.accumulate(reached - places) + places
    return int(costs[-1])


class Cleaned:
    """Rows after cleaning, through the same code as in a run."""

    def __init__(self, folder: Path, tokenizer: Any, task: TaskConfig, **clean: Any):
        self._folder = folder
        data = DataConfig(train="", clean=CleanConfig(**clean), on_bad_row=OnBadRow.skip)
        self._config = run_config(task=task, data=data)
        self.cleaning = Cleaning(self._config, tokenizer, folder)

    def rows(self, rows: Iterable[dict[str, Any]], part: str = "train") -> Table:
        path = self._folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = replace(self._config, data=replace(self._config.data, train=str(path)))
        files = of_part(config.data, "train", "data.train")
        bad = BadRows(OnBadRow.skip)
        return self.cleaning.rows(part, ingest(files, config, self._folder / f"{part}.arrow", bad))

    def report(self, part: str = "train") -> dict[str, Any]:
        return self.cleaning.reports[part].to_dict()

    def counts(self, part: str = "train") -> dict[str, dict[str, int]]:
        """Return what the steps found, without those that found nothing."""
        return {
            step: {kind: number for kind, number in counts.items() if number}
            for step, counts in self.report(part)["clean"].items()
            if any(counts.values())
        }


CHAT = ChatConfig(template_date="2025-03-09")
TEXT = CausalLmConfig()


def remaining_rows(table: Table) -> list[int]:
    """Return the numbers of the rows that cleaning left."""
    return table.rows.tolist()


def texts_of(table: Table) -> list[dict[str, Any]]:
    """Return the rows that are left."""
    return [json.loads(table.data[number]["row"]) for number in remaining_rows(table)]
