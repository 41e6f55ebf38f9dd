"""Read files with a word and its tags on each line and a blank line after each sentence (CoNLL 2003, CoNLL-U)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstune.data.files import DataFile, RawRow, opened
from dstune.data.read_text import MAX_ROW_BYTES, decoded, lines_of

CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
"""The columns of CoNLL-U (universaldependencies.org/format)."""


def read_tagged(file: DataFile) -> Iterator[RawRow]:
    """Yield each sentence as a row with the columns `tokens` (the first on a line), `tags` (the last), `column_1`, `column_2`, ...

    In a .conllu file, `tokens` are the forms and `tags` the universal parts of speech; the other columns have their own names.
    Columns are separated by tabs if the line has any, otherwise by white space. Lines with `-DOCSTART-` are skipped, and in a
    .conllu file comments, ranges and empty nodes too. A row's line is that of its first word.
    """
    comments = (b"-DOCSTART-", b"#") if file.ending == ".conllu" else (b"-DOCSTART-",)
    with opened(file) as stream:
        first = 0
        words: list[list[str]] = []
        size = 0
        fault: RawRow | None = None
        for number, raw in lines_of(file, stream, lambda line: line.startswith(comments)):
            text, error = decoded(raw)
            if error:
                fault = fault or RawRow(file, number, None, error)
                continue
            if not text.strip():
                yield from _sentence(file, first, words, fault)
                words, size, fault = [], 0, None
                continue
            if text.startswith("-DOCSTART-") or (file.ending == ".conllu" and _is_no_word(text)):
                continue
            cells = [cell.strip() for cell in text.split("\t")] if "\t" in text else text.split()
            if not words:
                first = number
            if (len(cells) < 2 or (words and len(cells) != len(words[0]))) and fault is None:
                expected = (
                    f"the sentence's first line has {len(words[0])}" if words else "a word and its tag are needed"
                )
                fault = RawRow(file, number, None, f"{len(cells)} column{'s' * (len(cells) != 1)}, {expected}")
            size += len(text)
            if size > MAX_ROW_BYTES:
                words, fault = (
                    [],
                    fault or RawRow(file, first, None, f"the row has more than {MAX_ROW_BYTES >> 20} MiB"),
                )
            elif fault is None:
                words.append(cells)
        yield from _sentence(file, first, words, fault)


def _is_no_word(text: str) -> bool:
    """Return whether a line of CoNLL-U is a comment, a range (`1-2`) or an empty node (`1.1`)."""
    return text.startswith("#") or re.match(r"\d+[-.]\d+\t", text) is not None


def _sentence(file: DataFile, first: int, words: list[list[str]], fault: RawRow | None) -> Iterator[RawRow]:
    if fault is not None:
        yield fault
    elif words and file.ending == ".conllu":
        value_by_column = {
            name: list(values) for name, values in zip(CONLLU_COLUMNS, zip(*words, strict=True), strict=False)
        }
        yield RawRow(
            file, first, value_by_column | {"tokens": value_by_column.get("form"), "tags": value_by_column.get("upos")}
        )
    elif words:
        columns = [list(values) for values in zip(*words, strict=True)]
        fields = {f"column_{number}": values for number, values in enumerate(columns, start=1)}
        yield RawRow(file, first, fields | {"tokens": columns[0], "tags": columns[-1]})
