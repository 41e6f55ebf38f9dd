"""Clean rows one by one, without comparing them; the processes of `datasets.map` run this on batches of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import datasets
import pyarrow as pa

from dstune.config.data_schema import CleanConfig, Duplicates, Found, Unwanted
from dstune.data.clean import language, near, sensitive
from dstune.data.clean.rows import Row, is_empty, learned_texts, map_texts, near_text, row_hashes, texts
from dstune.data.clean.unicode import clean_unicode
from dstune.data.control import ControlTokens
from dstune.data.rows import canonical_json, json_text, with_joined_parts
from dstune.data.split import content_hash
from dstune.grading.refusal import is_refusal
from dstune.grading.toxicity import toxic_wording

STEPS = (
    "unicode",
    "control_tokens",
    "secrets",
    "personal_data",
    "refusals",
    "toxicity",
    "empty",
    "too_short",
    "too_long",
    "languages",
    "duplicates",
    "near_duplicates",
    "leaks",
)
"""The cleaning steps in the order in which they run. Later steps do not see a row that an earlier one removed."""

EXCERPT_CHARACTERS = 80


@dataclass
class Cleaned:
    """The result of cleaning one row."""

    row: Row
    removed: str = ""
    """The step that leaves the row out; empty if none does."""
    changed: list[str] = field(default_factory=list)
    """Steps that changed the row's text."""
    flagged: list[str] = field(default_factory=list)
    """Steps that found something in the row and left it unchanged."""
    notes: dict[str, str] = field(default_factory=dict)
    """What a step found, for the examples of the report."""


class Cleaner:
    """Cleans rows; picklable.

    control: the control tokens of the run's tokenizer. seed: of `data.split`, for the hashes of changed rows.
    Raises UserError (at creation) if a setting needs a package that is missing, or names an unknown language.
    """

    def __init__(self, config: CleanConfig, control: ControlTokens, seed: int):
        self._config = config
        self._control = control
        self._seed = seed
        self._near = config.duplicates is Duplicates.near
        if config.languages:
            language.check_languages(config.languages)
        if self._near:
            near.signature("")
            near.similarity("", "", 1.0)
        if config.secrets is not Found.keep:
            sensitive.find_secrets("")
        if config.personal_data is not Found.keep:
            sensitive.check_personal_data()

    def __call__(self, batch: dict[str, list]) -> pa.Table:
        """Compute the columns of `features` for rows as JSON text (column `row`)."""
        results = [self.clean(json.loads(row)) for row in batch["row"]]
        rows = [
            result.row if result.changed and not result.removed else None
            for result in results  # None: as it was
        ]
        both_keys = [(0, 0) if result.removed else row_hashes(result.row) for result in results]
        columns = {
            "row": [None if row is None else json_text(row) for row in rows],
            "hash": [
                0 if row is None else content_hash(canonical_json(with_joined_parts(row)), self._seed) for row in rows
            ],
            "removed": [result.removed for result in results],
            "changed": [",".join(result.changed) for result in results],
            "flagged": [",".join(result.flagged) for result in results],
            "note": [json.dumps(result.notes) if result.notes else "" for result in results],
            "key": [of_row for of_row, _ in both_keys],
            "text_key": [of_text for _, of_text in both_keys],
            "signature": [near.signature(near_text(result.row)) if self._near else b"" for result in results],
        }
        schema = self.features.arrow_schema
        return pa.table({name: pa.array(column, schema.field(name).type) for name, column in columns.items()})

    @property
    def features(self) -> datasets.Features:
        """Types of the columns that a call returns. `row` is null and `hash` is 0 for rows that were removed or did not change."""
        text = ("removed", "changed", "flagged", "note")
        numbers = ("hash", "key", "text_key")
        return datasets.Features(
            {
                "row": datasets.Value("large_string"),
                **{name: datasets.Value("uint64") for name in numbers},
                **{name: datasets.Value("string") for name in text},
                "signature": datasets.Value("binary"),
            }
        )

    def clean(self, row: Row) -> Cleaned:
        """Take one normalised row through all steps that need no other row."""
        result = Cleaned(row)
        if self._config.unicode:
            self._change(result, "unicode", clean_unicode)
        if control_token := self._control.first(row):
            result.flagged.append("control_tokens")
            result.notes["control_tokens"] = control_token
        for step, policy, find in self._searches():
            self._search(result, step, policy, find)
            if result.removed:
                return result
        for step, unwanted, wording_of in self._judgements():
            if unwanted is not Unwanted.keep and (note := next(filter(None, map(wording_of, learned_texts(row))), "")):
                result.notes[step] = note
                if unwanted is Unwanted.drop:
                    result.removed = step
                    return result
                result.flagged.append(step)
        result.removed = self._left_out(result)
        return result

    def excerpt(self, row: Row) -> str:
        """Return the beginning of a row for the report, on one line, with secrets and personal data masked."""
        text = " / ".join(part for part in texts(row) if part.strip())
        text = text[: 20 * EXCERPT_CHARACTERS]  # searching a complete document for what to mask would take long
        for _, _, find in self._searches():
            text = sensitive.mask(text, find(text))
        text = " ".join(text.split())
        return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 3] + "..."

    def _searches(self) -> list[tuple[str, Found, Callable[[str], list[sensitive.Finding]]]]:
        searches = (
            ("secrets", self._config.secrets, sensitive.find_secrets),
            ("personal_data", self._config.personal_data, sensitive.find_personal_data),
        )
        return [search for search in searches if search[1] is not Found.keep]

    def _change(self, result: Cleaned, step: str, change: Callable[[str], str]) -> None:
        row = map_texts(result.row, change)
        if row != result.row:
            result.row = row
            result.changed.append(step)

    def _search(
        self, result: Cleaned, step: str, policy: Found, find: Callable[[str], list[sensitive.Finding]]
    ) -> None:
        kinds: list[str] = []

        def masked(text: str) -> str:
            findings = find(text)
            kinds.extend(finding.kind for finding in findings)
            return sensitive.mask(text, findings)

        row = map_texts(result.row, masked)
        if not kinds:
            return
        result.notes[step] = ", ".join(f"<{kind}>" for kind in dict.fromkeys(kinds))
        if policy is Found.mask:
            result.row = row
            result.changed.append(step)
        elif policy is Found.drop:
            result.removed = step
        else:
            result.flagged.append(step)

    def _judgements(self) -> tuple[tuple[str, Unwanted, Callable[[str], str]], ...]:
        return (
            ("refusals", self._config.refusals, lambda text: "refuses" if is_refusal(text) else ""),
            ("toxicity", self._config.toxicity, toxic_wording),
        )

    def _left_out(self, result: Cleaned) -> str:
        """Return the step that leaves this row out; empty if none does."""
        config, row = self._config, result.row
        if is_empty(row):
            return "empty"
        characters = sum(len(text) for text in texts(row))
        if characters < config.min_characters:
            result.notes["too_short"] = f"{characters} characters"
            return "too_short"
        if config.max_characters is not None and characters > config.max_characters:
            result.notes["too_long"] = f"{characters} characters"
            return "too_long"
        if config.languages:
            code, probability = language.language("\n".join(texts(row)))
            if code not in config.languages:
                result.notes["languages"] = f"{code} {probability:.0%}"
                if probability >= language.SURE:
                    return "languages"
                result.flagged.append("languages")
        return ""
