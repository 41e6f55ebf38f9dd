"""A problem of a training file, and its place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowProblem:
    """A problem of a training file."""

    line: int
    """Starting at 1; 0 for the complete file."""
    field: str
    """Such as `messages[1].role`; empty for the complete row."""
    reason: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.field}: {self.reason}" if self.field else f"{where}{self.reason}"


class FieldError(ValueError):
    """A field of a row is invalid."""

    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        self.name = name
