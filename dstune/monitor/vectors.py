"""One vector per conversation: from a sentence encoder, or from the words of the compared rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dstune.core.errors import Problem, UserError
from dstune.monitor.conversations import Conversation

WORDS = "words"
"""The value of `--embeddings` that needs no model."""
WORD_DIMENSIONS = 100
MOST_WORDS = 20_000
TOKEN = r"(?u)\w+|[^\w\s]"


def embed(conversations: Sequence[Conversation], model: str, batch_size: int = 64) -> np.ndarray:
    """Return float32 [conversations, dimensions], each row of length 1: the mean over a conversation's turns.

    model: `words`, or a model for task=embedding. Words are weighted and reduced over the rows of both sides together, so that rows
    can be exchanged between the sides. Raises UserError.
    """
    conversation_of_turn = np.array(
        [index for index, conversation in enumerate(conversations) for _ in conversation.texts]
    )
    texts = [text for conversation in conversations for text in conversation.texts]
    turns = _by_words(texts) if model == WORDS else _by_model(texts, model, batch_size)
    sums = np.zeros((len(conversations), turns.shape[1]), dtype=np.float64)
    np.add.at(sums, conversation_of_turn, turns)
    return np.asarray((sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).astype(np.float32))


def _by_words(texts: Sequence[str]) -> np.ndarray:
    """Compute latent semantic analysis: TF-IDF of words and word pairs, projected on its main axes."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    weights = TfidfVectorizer(
        token_pattern=TOKEN, ngram_range=(1, 2), sublinear_tf=True, max_features=MOST_WORDS, dtype=np.float32
    )
    try:
        table = weights.fit_transform(texts)
    except ValueError:  # no text contains a word
        return np.ones((len(texts), 1), dtype=np.float32)
    dimensions = min(WORD_DIMENSIONS, *(size - 1 for size in table.shape))
    if dimensions < 1:
        return np.ones((len(texts), 1), dtype=np.float32)
    return np.asarray(TruncatedSVD(dimensions, random_state=0).fit_transform(table))


def _by_model(texts: Sequence[str], model: str, batch_size: int) -> np.ndarray:
    from dstune.api.models import predict
    from dstune.checkpoint.record import read_record

    # Runs and exports record what they were trained for; other folders and hub ids do not.
    knows_task = (Path(model) / "run.yaml").is_file() or "task" in read_record(Path(model))
    answers = predict(model, list(texts), *([] if knows_task else ["task=embedding"]), batch_size=batch_size)
    if not answers or "vector" not in answers[0]:
        reason = "the model gives no vectors"
        fix = "give a model for task=embedding, for example sample://minilm, or `words`"
        raise UserError(Problem("--embeddings", reason, fix, model))
    size = len(answers[0]["vector"])
    return np.array([answer.get("vector", [0.0] * size) for answer in answers], dtype=np.float32)
