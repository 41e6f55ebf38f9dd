"""Collect rows that cannot be used, to list them together by file and line or only to count them."""

from __future__ import annotations

from dstune.config.data_schema import OnBadRow
from dstune.core.errors import Problem, UserError
from dstune.data.problems import NO_TOWER, unprinted_in

MAX_LISTED_BAD_ROWS = 10

FIRST_ROWS = 100
"""Number of rows that are searched for one with a format of the task; the first such row decides the format of all."""


def reason_for_row(error: UserError, place: str) -> str | None:
    """Return the reason of an error that is only about the row at `place`; None if it is about anything else too."""
    reasons = [problem.reason for problem in error.problems if problem.where == place]
    return reasons[0] if len(reasons) == len(error.problems) == 1 else None


class UnknownFormat(UserError):
    """No row has a format of the task: one error, which says more than a list of all rows."""


class BadRows:
    """Rows that cannot be used: collected to be listed together, or only counted (`data.on_bad_row=skip`).

    template: the value of `model.chat_template`, for messages.
    """

    def __init__(self, policy: OnBadRow, template: str = ""):
        self._policy, self._template = policy, template
        self._problems: list[Problem] = []
        self._faulty: list[Problem] = []
        """The first rows that are at fault themselves, not the template."""
        self._unprinted: dict[tuple[str, str], tuple[str, int]] = {}
        """By (fields that the template does not print, fix): the first row that has them, and the number of such rows."""
        self.count = 0

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if fields := unprinted_in(reason):
            first, count = self._unprinted.get(fields, (place, 0))
            self._unprinted[fields] = first, count + 1
        elif len(self._faulty) < MAX_LISTED_BAD_ROWS:
            self._faulty.append(Problem(where=place, reason=reason))
        if len(self._problems) < MAX_LISTED_BAD_ROWS:
            self._problems.append(Problem(where=place, reason=reason))

    def first(self, since: int = 0) -> list[dict[str, str]]:
        """Return place and reason of the first bad rows, without the first `since`; at most MAX_LISTED_BAD_ROWS are kept."""
        return [{"place": problem.where, "text": problem.reason} for problem in self._problems[since:]]

    def raise_if_any(self) -> None:
        """Raise UserError with the first bad rows and the number of the others, unless bad rows are to be skipped."""
        if not self.count or self._policy is OnBadRow.skip:
            return
        raise UserError([*self._problems_of_rows(), *self._problems_of_template()])

    def _problems_of_template(self) -> list[Problem]:
        """Return one problem for each field that the template does not print, instead of one for each row that has it."""
        return [
            Problem(
                "model.chat_template",
                f"this template does not print {fields}, which {count:,} row{'s have' if count > 1 else ' has'} (the "
                f"first is {place}): what is not printed is not trained",
                f"{fix}; data.on_bad_row=skip leaves these rows out",
                self._template,
            )
            for (fields, fix), (place, count) in self._unprinted.items()
        ]

    def _problems_of_rows(self) -> list[Problem]:
        if not self._faulty:
            return []
        *problems, last = self._faulty
        count = self.count - sum(count for _, count in self._unprinted.values())
        others = count - len(self._faulty)
        further = f" (and {others:,} more bad row{'s' if others > 1 else ''}, {count:,} in all)" if others else ""
        fix = "fix the file, or set data.on_bad_row=skip to drop and count such rows"
        if all(problem.reason.startswith("not UTF-8") for problem in self._faulty):
            fix = f"if the file comes from Windows: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW; otherwise {fix}"
        elif all(NO_TOWER in problem.reason for problem in self._faulty):
            fix = "set model.path to a model that sees (docs/images.md names some); data.on_bad_row=skip leaves such rows out"
        return [*problems, Problem(where=last.where, reason=last.reason + further, fix=fix)]
