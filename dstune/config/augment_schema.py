"""The typed configuration of `data.augment`: changed copies of training rows."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting


@dataclass(frozen=True)
class AugmentConfig:
    copies: int = setting(0, at_least=0, example="1", needs="task=classification data.augment.delete=0.1")
    """Changed copies of each training row (task=classification); held-out rows are never changed. 0 is off."""
    balance: bool = False
    """Copy rows of rarer classes until each has as many as the largest one: changed by the keys below, or as they are."""
    delete: float = setting(0.0, at_least=0.0, below=1.0)
    """Probability that a word of a copy is deleted (arXiv:1901.11196)."""
    swap: float = setting(0.0, at_least=0.0, at_most=1.0)
    """Number of swaps of two words in a copy, as a share of its words (arXiv:1901.11196)."""
    synonyms: str | None = setting(None, example="synonyms.csv", needs="task=classification data.augment.copies=1")
    """File with the columns `word` and `synonym`, from which words of a copy are replaced."""
    synonym_share: float = setting(0.2, above=0.0, at_most=1.0)
    """Words that are replaced, as a share of a copy's words."""
    models: list[str] = setting([], example="[ORG/MODEL]", needs="task=classification data.augment.copies=1")
    """Models that rewrite a copy one after another: `[EN_DE,DE_EN]` translates there and back, `[MODEL]` paraphrases."""
    prompt: str = "{text}"
    """Prompt of a rewriting model; `{text}` is the row's text. A decoder gets the prompt in its chat template."""
    temperature: float = setting(0.8, at_least=0.0)
    """Sampling temperature of the rewriting models; 0 takes the most probable token."""
    max_new_tokens: int = setting(128, at_least=1)
    """Longest text that a rewriting model writes, in tokens."""
    seed: int = setting(0, at_least=0)
    """Another seed makes other copies."""

    @property
    def changes(self) -> bool:
        """Whether a copy differs from its row."""
        return bool(self.delete or self.swap or self.synonyms or self.models)

    @property
    def on(self) -> bool:
        return bool(self.copies or self.balance)
