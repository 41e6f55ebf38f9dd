"""Defines a row format: the columns of its rows, and how a row is brought into the shape that tasks read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from dstune.protocols.task import Task

Check = Callable[[Any, str], Any]
"""Maps a value and the name of its column to the value for the row, or raises RowError."""


class RowFormat:
    """Base of every row format. Subclasses register with `@dstune.row_format`.

    A row has values for roles; `data.columns` says which column of a file has which role.
    """

    name: ClassVar[str] = ""
    required: ClassVar[tuple[str, ...]] = ()
    """Roles that a row must have."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Roles that a row may have."""
    other_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By role, the columns that are used if there is no column of the role's name and `data.columns` names none."""
    shape: ClassVar[str] = ""
    """The format of a built-in task whose rows `row` makes: tasks that read that one read this one too. For plugins."""
    answers: ClassVar[tuple[str, ...]] = ()
    """Roles that a row to be predicted does not have; `row` gets None for them. With a `shape`: without them `dstune predict`
    reads rows of that shape alone."""
    readable_as: ClassVar[tuple[str, ...]] = ()
    """Formats as which a row can be read too, since it has all that they need."""
    conversational: ClassVar[bool] = False
    """Its texts are messages to a model: images, audio and video in them are refused by name."""
    keeps_columns: ClassVar[bool] = False
    """All columns of a row are read. Rows of other formats may match it by accident, so its task is never proposed for them."""
    only_named: ClassVar[bool] = False
    """Only read if `data.format` names it, since its columns alone do not determine the meaning of a row."""
    further_keys: ClassVar[str] = ""
    """The override that is needed in addition to the task to read its rows (`task.loss=kto`)."""
    checks: ClassVar[Mapping[str, Check]] = {}
    """Checks by role; values of other roles are used unchanged."""

    input_apart: bool = False
    """Whether `input` stays separate from the instruction (`model.prompt_template=alpaca`)."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if unknown := [role for role in cls.answers if role not in (*cls.required, *cls.optional)]:
            raise ValueError(f"answers names {unknown[0]!r}, which is neither in required nor in optional")

    def expand(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the columns of a row, with those beside them that a column holds inside."""
        return fields

    def check_of(self, role: str, task: Task | None) -> Check | None:
        """Return the function that checks the value of `role` for a task."""
        return self.checks.get(role)

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        """Return the row in the shape that encoders read, from its checked values by role. Raises RowError."""
        return values

    def of_another_task(self, fields: Mapping[str, Any], mapping: Mapping[str, str], *, named: bool) -> str:
        """Return the fix where the columns beside those of this format say that the rows are of another task, which this one
        would train wrongly; empty where they are not. mapping: `data.columns`; named: whether `data.format` names this format."""
        return ""

    def candidates(self, columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
        """Return columns that a message may suggest for roles that are missing, in their order; none where that would be a
        guess."""
        return []
