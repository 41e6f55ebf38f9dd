"""A row format: reviews with a title, a body and stars, as many shops export them.

dstune train plugins=[examples/plugins/star_rating.py] task=classification data.train=reviews.jsonl data.format=star_rating ...
with rows such as {"title": "Good", "body": "It works.", "stars": 4}
"""

from __future__ import annotations

from typing import Any, ClassVar

import dstune
from dstune.data.problems import RowError
from dstune.data.values import text


def stars(value: Any, column: str) -> str:
    """A whole number of stars as the label; raises RowError."""
    if isinstance(value, bool) or value not in (1, 2, 3, 4, 5):
        raise RowError(f"column {column!r} holds {value!r}, not a number of stars from 1 to 5")
    return str(int(value))


@dstune.row_format
class StarRating(dstune.RowFormat):
    name = "star_rating"
    required: ClassVar = ("body", "stars")
    optional: ClassVar = ("title",)
    answers: ClassVar = ("stars",)
    other_names: ClassVar = {"stars": ("rating", "score")}
    shape = "text_label"
    checks: ClassVar = {"title": text, "body": text, "stars": stars}

    def row(self, found: dict[str, Any], task: dstune.Task | None) -> dict[str, Any]:
        title = found.get("title")
        return {"text": f"{title}\n{found['body']}" if title else found["body"], "label": found["stars"]}
