"""task=embedding: a vector for a text, learnt from texts that belong together; all others of a step are what does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.protocols import Task, task
from dstune.tasks.embedding import rows as rows
from dstune.tasks.embedding import rules
from dstune.tasks.embedding.config import EmbeddingConfig

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel

    from dstune.checkpoint.card import Export
    from dstune.config.schema import RunConfig
    from dstune.data.prepared import Split
    from dstune.data.sampler import MicroBatch
    from dstune.data.tokenize.sample import Encoder
    from dstune.inference.predictor import Predictor
    from dstune.models.heads import Head, Rows
    from dstune.trainer.measure import Evaluation, Row, Totals


@task
class Embedding(Task):
    Config = EmbeddingConfig
    config: EmbeddingConfig

    row_loss = False
    has_predictions = False
    comparable_loss = False
    unpackable = "every text has a vector of its own"
    texts_per_row = 2
    output = "body"
    peft_type = "FEATURE_EXTRACTION"
    pipeline = "sentence-similarity"
    serves = ("embed",)
    formats = ("contrastive", "bge")
    metrics = ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr")
    ranked_by = (("mrr", False), ("accuracy", False), ("loss", True))

    @property
    def whole_batch_loss(self) -> bool:
        return True

    def model_class(self, architecture: PretrainedConfig) -> Any:
        from transformers import AutoModel

        return AutoModel

    def after_load(self, model: PreTrainedModel, new: list[str]) -> list[str]:
        from dstune.tasks.embedding.head import without_pooler

        return without_pooler(model, new)

    @classmethod
    def overrides_from(cls, folder: Path) -> list[str]:
        from dstune.tasks.embedding.sentence_transformers import embedding_overrides

        return embedding_overrides(folder)

    def write_export(self, run: RunConfig, architecture: PretrainedConfig, folder: Path) -> None:
        from dstune.tasks.embedding.sentence_transformers import write_modules

        write_modules(folder, self.config, architecture.get_text_config().hidden_size, run.data.max_length)

    def usage(self, export: Export) -> list[str]:
        return [
            "from sentence_transformers import SentenceTransformer",
            "",
            'model = SentenceTransformer("PATH")  # this folder, or the id under which it was published',
            'vectors = model.encode(["A text.", "Another text."])',
            "print(model.similarity(vectors, vectors))",
        ]

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.embedding.head import EmbeddingHead

        return EmbeddingHead(self.config)

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        from dstune.tasks.embedding.metrics import embedding_metrics
        from dstune.trainer.measure import Evaluation

        return Evaluation(embedding_metrics(outputs, self.config.temperature))

    def check(self, run: RunConfig) -> Iterator[Problem]:
        return rules.check(run)

    def row_key(self) -> dict[str, Any]:
        return {"name": self.name}  # what the loss makes of their vectors does not change the samples

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.embedding.encode import ContrastiveEncoder

        return ContrastiveEncoder(tokenizer, max_length)

    def collate(
        self, run: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool
    ) -> dict[str, np.ndarray]:
        import numpy as np

        from dstune.tasks.embedding.encode import contrastive_batch

        index = {"index": np.array(micro_batch.samples, dtype=np.int64)} if with_index else {}
        return contrastive_batch(split, micro_batch, pad_token_id) | index

    def predictor(self) -> type[Predictor]:
        from dstune.tasks.embedding.predict import EmbeddingPredictor

        return EmbeddingPredictor
