"""What a row format is: the columns that a row of it has, and how it is brought to the shape that tasks read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from dstune.protocols.task import Task

Check = Callable[[Any, str], Any]
"""Takes a value and the name of its column; returns the value as the row is to hold it, or raises RowError."""


class RowFormat:
    """Base of every row format. Subclasses register with `@dstune.row_format`.

    A row has values for roles; `data.columns` says which column of a file has which role.
    """

    name: ClassVar[str] = ""
    required: ClassVar[tuple[str, ...]] = ()
    """Roles that a row must have."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Roles that it may have."""
    other_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By role, columns that are taken for it where neither its own name nor `data.columns` gives one."""
    shape: ClassVar[str] = ""
    """The format of a built-in task whose rows `row` makes: tasks that read that one read this one too. For plugins."""
    answers: ClassVar[tuple[str, ...]] = ()
    """Roles that a row to be predicted does not have; `row` gets None for them. With a `shape`: without them `dstune predict`
    reads rows of that shape alone."""
    readable_as: ClassVar[tuple[str, ...]] = ()
    """Formats as which a row can be read too, since it has all that they need."""
    conversational: ClassVar[bool] = False
    """Its texts are what people say to a model: images, audio and video among them are refused by name."""
    keeps_columns: ClassVar[bool] = False
    """All columns of a row are read. Rows of other formats may look like it, so that its task is not proposed for them."""
    only_named: ClassVar[bool] = False
    """Read only where `data.format` names it: its columns do not tell all that has to be known."""
    further_keys: ClassVar[str] = ""
    """What has to be set beside the task, so that rows of it are read (`task.loss=kto`)."""
    checks: ClassVar[Mapping[str, Check]] = {}
    """By role; values of other roles are taken as they are."""

    input_apart: bool = False
    """Whether `input` is to stay apart from the instruction (`model.prompt_template=alpaca`)."""

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
