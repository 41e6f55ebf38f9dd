"""The typed configuration of `data`: where rows come from, what they hold, how they are cleaned, split and packed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from dstune.config.augment_schema import AugmentConfig
from dstune.config.fields import Automatic, MemberName, setting
from dstune.protocols import ROW_FORMATS, TASKS

AUTOMATIC = "auto"
"""`data.format`: the format that fits the columns."""

if TYPE_CHECKING:
    FormatName = str
    LanguageTaskName = str
else:

    class FormatName(MemberName):
        """A row format that some task reads."""

        @classmethod
        def options(cls) -> tuple[str, ...]:
            formats = [name for task in TASKS.classes().values() for name in task.formats]
            formats += [name for name, form in ROW_FORMATS.classes().items() if form.shape in formats]
            return tuple(dict.fromkeys([AUTOMATIC, *formats]))

    class LanguageTaskName(MemberName):
        """A task whose rows one language model can learn beside those of others."""

        @classmethod
        def options(cls) -> tuple[str, ...]:
            return tuple(name for name, task in TASKS.classes().items() if task.language)


class TextRows(Enum):
    line = "line"
    paragraph = "paragraph"
    document = "document"
    tagged = "tagged"


class Padding(Enum):
    checked = "checked"
    tolerated = "tolerated"
    never = "never"


class OnBadRow(Enum):
    error = "error"
    skip = "skip"


class OnSuspiciousLabels(Enum):
    list = "list"
    error = "error"


@dataclass(frozen=True)
class SplitConfig:
    validation: float | Automatic = setting(Automatic.auto, at_least=0.0, below=1.0)
    """Share of the training rows held out for validation when `data.validation` is not given. `auto` holds out 5%, at least 20
    rows, but never more than 20% of them; a run stores the share that was chosen."""
    test: float = setting(0.0, at_least=0.0, below=1.0)
    """Share of the training rows held out for the test when `data.test` is not given."""
    seed: int = 0
    """Another seed holds out other rows; the split depends on row content and this seed only."""

    @property
    def holds_out(self) -> bool:
        """Whether rows are held out for validation."""
        return self.validation is Automatic.auto or bool(self.validation)


class Duplicates(Enum):
    exact = "exact"
    near = "near"
    keep = "keep"


class Found(Enum):
    keep = "keep"
    flag = "flag"
    mask = "mask"
    drop = "drop"


class Unwanted(Enum):
    keep = "keep"
    flag = "flag"
    drop = "drop"


@dataclass(frozen=True)
class CleanConfig:
    unicode: bool = True
    """Bring text to NFC, line ends to LF, and remove control, stray zero-width and stray direction characters."""
    min_characters: int = setting(0, at_least=0)
    """Leave out rows with less text than this, all messages together."""
    max_characters: int | None = setting(None, at_least=1)
    """Leave out rows with more text than this, all messages together."""
    languages: list[str] = setting([], example="[en,de]")
    """Keep rows in these languages only (ISO 639 codes such as `en`); needs the extra `clean`."""
    duplicates: Duplicates = Duplicates.exact
    """Leave out training rows that equal an earlier one: `exact`, `near` (extra `clean`), or `keep` all."""
    near_threshold: float = setting(0.9, at_least=0.8, at_most=1.0)
    """Rows are near duplicates if at least this share of their characters is the same: 1 - edit distance / length."""
    leaks: bool = True
    """Leave out training rows whose text occurs in validation, test, guard or ood; near ones too with `duplicates: near`."""
    secrets: Found = Found.keep
    """API keys, tokens, passwords in URLs: `keep`, `flag` (count), `mask` (`<SECRET>`) or `drop`; extra `clean`."""
    personal_data: Found = Found.keep
    """E-mail, phone, IBAN, card, IP, SSN: `keep`, `flag`, `mask` (for example `<EMAIL>`) or `drop`; extra `clean`."""
    refusals: Unwanted = Unwanted.keep
    """Rows with an answer that refuses: `keep`, `flag` (count) or `drop`."""
    toxicity: Unwanted = Unwanted.keep
    """Rows with an answer that insults, threatens or swears, by a list of English wordings: `keep`, `flag` (count) or `drop`."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    path: str = ""
    """Its rows: whatever `data.train` takes."""
    weight: float = setting(1.0, above=0.0)
    """How often its rows come in an epoch: 1 once, 2 twice, 0.5 half of them and the other half in the next epoch."""
    max_rows: int | None = setting(None, at_least=1)
    """Use this many of its rows at most, chosen by a hash of their content."""
    format: FormatName = AUTOMATIC
    """Row format; `data.format` where it is `auto`."""
    columns: dict[str, str] = setting({})
    """Column names by role; they win over `data.columns`."""
    task: LanguageTaskName | None = None
    """Task of its rows, if it is not the run's: several tasks are trained at once, each with its own metrics."""
    prompt: str | None = None
    """Replaces `task.prompt` for these rows, so that the prompt can tell the tasks apart."""
    subset: str | None = None
    """Configuration of a data set on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the hub."""


@dataclass(frozen=True)
class DataConfig:
    train: str | None = None
    """Training rows: file, glob, folder, hub id (`org/name:split`), or a sample (`sample://chitchat`)."""
    mixture: dict[str, SourceConfig] = setting({})
    """Several sources by a name of yours, each with a weight; replaces `data.train`."""
    streaming: bool = setting(False, needs="trainer.max_steps=1000")
    """Read `data.train` in blocks while training, for more rows than the disk holds; needs `trainer.max_steps`."""
    stream_rows: int = setting(100_000, at_least=1)
    """Rows of a block with `data.streaming`: shuffled and packed together; the disk holds about three blocks."""
    validation: str | None = None
    """Validation rows; held out from `data.train` by `data.split` when not given."""
    test: str | None = None
    """Test rows, evaluated once at the end."""
    guard: str | None = None
    """Rows that show what the model must not forget, in the task's format: evaluated before and after training."""
    ood: str | None = None
    """Rows of another domain, in the format of the task: evaluated before and after training, beside the validation rows."""
    subset: str | None = None
    """Configuration of a data set on the hub; its default one when not given."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the hub; resolved to a commit before the ranks start."""
    format: FormatName = AUTOMATIC
    """Row format; `auto` recognises it by the columns."""
    columns: dict[str, str] = setting({})
    """Column names of the file by role, for example `{text: review, label: stars}`."""
    tokenizer: str | None = setting(None, example="ORG/MODEL", needs="task=causal_lm data.format=tokens")
    """The tokenizer that made the token ids of `format: tokens` (hub id, folder or sample): the model's, or one equal to it."""
    image_folder: str | None = None
    """Folder that image paths are relative to and must not leave; the folder of the rows' file when not given."""
    text_rows: TextRows = TextRows.line
    """What is a row of a plain text file (.txt, .md): a line, a paragraph, the whole document, or `tagged` words (CoNLL)."""
    max_length: int = setting(1024, at_least=8)
    """Longest row in tokens; longer ones are cut. The number of learned position embeddings of a model is a limit too."""
    order: str | None = setting(None, example="order.jsonl", needs="data.packing=false")
    """File with the rows of every optimizer step, in JSON lines (`{"epoch": 0, "rows": [17, 4]}`, rows from 0), instead of the
    order that follows from `trainer.seed`."""
    packing: bool = True
    """Put several samples into one row of `max_length` tokens without letting them attend to each other."""
    padding: Padding = Padding.checked
    """Without packing, rows are padded to the longest one beside them. `checked` refuses a model whose outputs for a row change
    with the padding behind it (FNet, ConvBERT); `never` puts only rows of one length into a micro-batch; `tolerated`, as in runs
    of earlier versions, trains such a model as it is."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    max_rows: int | None = setting(None, at_least=1)
    """Use this many training rows at most, chosen by the split's hash."""
    max_synthetic_share: float = setting(1.0, at_least=0.0, at_most=1.0)
    """Refuse training rows of which more than this share come from `dstune synthesize`, which marks them in the column
    `synthetic`; 1 allows all. Of a mixture it is the share of the rows of its files."""
    on_bad_row: OnBadRow = OnBadRow.error
    """`error` stops at the first bad rows with file and line, `skip` drops and counts them."""
    on_suspicious_labels: OnSuspiciousLabels = OnSuspiciousLabels.list
    """Labels that differ by case, white space or one character, and labels of one row: `list` them at the start, or `error`."""
    workers: int = setting(0, at_least=0)
    """Processes that tokenize; 0 is one per available core."""

    @property
    def pads_rows(self) -> bool:
        """Whether rows of a micro-batch that are not packed may have different lengths."""
        return self.padding is not Padding.never
