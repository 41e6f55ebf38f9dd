"""What is wrong with a row of a training file, and where."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowProblem:
    """One thing that is wrong with a file."""

    line: int
    """From 1; 0 for the file as a whole."""
    field: str
    """`messages[1].role`; empty for the row as a whole."""
    reason: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.field}: {self.reason}" if self.field else f"{where}{self.reason}"


class FieldError(ValueError):
    """A field of a row is not what it must be."""

    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        self.name = name
