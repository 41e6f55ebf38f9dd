"""HTTP server of dstune's own predictor: classifiers, taggers, rerankers, embedders, extractive readers and reward models."""

from __future__ import annotations

import base64
import re
import secrets
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dstune.core.errors import Problem, UserError
from dstune.data.problems import RowError
from dstune.inference.predictor import Predictor
from dstune.inference.rows import Question
from dstune.protocols import task_of
from dstune.serve.engines.local.app import EngineApp
from dstune.serve.engines.local.encoder_batches import Batcher, RowAnswer
from dstune.serve.errors import ApiError


class EncoderApp(EngineApp):
    """Serves the routes that the model's task supports (`Task.serves`)."""

    def __init__(self, name: str, predictor: Predictor, neutral_labels: Sequence[str] = ()):
        """neutral_labels: labels that `/v1/moderations` does not flag; by default, well-known names. Raises UserError for a label
        that the model does not have."""
        super().__init__()
        self.name, self.predictor = name, predictor
        self._neutral = choose_neutral_labels(name, predictor.labels, neutral_labels)
        self._batcher = Batcher(predictor)
        task = task_of(predictor.config.task)
        self._row_reader: Question = task.question(predictor.labels, predictor.config.data)
        self.routes |= {("GET", "/v1/models"): self.models, ("POST", "/parity"): self.parity}
        for kind in task.serves:
            self.routes |= {
                "embed": {
                    ("POST", "/v1/embeddings"): self.embed,
                    ("POST", "/rerank"): self.rerank,
                    ("POST", "/score"): self.score,
                },
                "classify": {("POST", "/classify"): self.classify, ("POST", "/v1/moderations"): self.moderate},
                "rank": {("POST", "/rerank"): self.rerank, ("POST", "/score"): self.score},
                "tag": {("POST", "/tags"): self.tag},
                "answer": {("POST", "/answers"): self.answer},
                "reward": {("POST", "/rewards"): self.reward},
            }[kind]
        self._embeds = "embed" in task.serves

    async def health(self, body: dict[str, Any]) -> dict[str, Any]:
        dtype = str(next(self.predictor.model.parameters()).dtype).removeprefix("torch.")
        return {"dtype": dtype, "context": self.predictor.longest}

    async def models(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.name, "object": "model"}]}

    async def _answers(
        self, rows: Sequence[Mapping[str, Any]], param: str, *, refuse_truncation: bool = False
    ) -> tuple[list[RowAnswer], dict[str, int]]:
        """Return the answers and the token usage. Raises ApiError for the first row without an answer.

        param: the request's field that holds the rows. refuse_truncation: refuse rows longer than the model's limit.
        """
        queries = []
        for number, row in enumerate(rows):
            try:
                queries.append(self._row_reader.query(row, f"{param}[{number}]"))
            except RowError as error:
                raise ApiError(400, f"Invalid {param}[{number}]: {error}.", param=param) from None
        answered = await self._batcher.answers(queries)
        for number, answer in enumerate(answered):
            if "problem" in answer.answer:
                raise ApiError(400, f"Invalid {param}[{number}]: {answer.answer['problem']}.", param=param)
            if refuse_truncation and answer.truncation:
                reason = (
                    f"it has {answer.length} tokens, this model reads at most {self.predictor.longest}, as in training"
                )
                raise ApiError(
                    400, f"Invalid {param}[{number}]: {reason}.", param=param, code="context_length_exceeded"
                )
        tokens = sum(len(answer.ids) for answer in answered)
        return answered, {"prompt_tokens": tokens, "total_tokens": tokens}

    def _texts(self, value: Any) -> list[dict[str, Any]]:
        column = self._row_reader.text_column or "text"
        return [{column: text} for text in ([value] if isinstance(value, str) else value)]

    async def parity(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the tokens of rows and the answers to them, computed as in training."""
        queries = [self._row_reader.query(row, str(number)) for number, row in enumerate(body["rows"])]
        answered = await self._batcher.answers(queries)
        return {"ids": [answer.ids for answer in answered], "answers": [answer.answer for answer in answered]}

    async def embed(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return one vector per text. A text that is too long is refused, as in OpenAI's API."""
        answered, usage = await self._answers(self._texts(body["input"]), "input", refuse_truncation=True)
        vectors = [row_answer.answer["vector"] for row_answer in answered]
        if body.get("encoding_format") == "base64":
            data: list[Any] = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in vectors]
        else:
            data = vectors
        items = [{"object": "embedding", "index": number, "embedding": item} for number, item in enumerate(data)]
        return {"object": "list", "data": items, "model": self.name, "usage": usage}

    async def classify(self, body: dict[str, Any]) -> dict[str, Any]:
        """Classify texts. Of a text that is too long, the model reads the beginning, as in training, and the answer says so."""
        answered, usage = await self._answers(self._texts(body["input"]), "input")
        items = []
        for number, row_answer in enumerate(answered):
            answer = row_answer.answer
            item = {"index": number, "label": answer["predicted"], **row_answer.truncation}
            if "probabilities" in answer:
                item |= {"probs": list(answer["probabilities"].values()), "num_classes": len(self.predictor.labels)}
                item["labels"] = list(answer["probabilities"])
            items.append(item)
        return {
            "id": f"classify-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": self.name,
            "data": items,
            "usage": usage | {"completion_tokens": 0},
        }

    async def moderate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a classifier's labels as categories. Predicted labels are flagged, except neutral ones."""
        is_multi_label = bool(getattr(self.predictor.config.task, "multi_label", False))
        if not self._neutral and not is_multi_label and self.predictor.labels:  # one label is always predicted
            listed = ", ".join(self.predictor.labels[:10])
            reason = (
                f"none of its labels ({listed}) is known to be neutral; name one when the server starts: "
                f"--neutral-label {self.name}=LABEL"
            )
            raise ApiError(400, f"This model does not moderate: {reason}.", param="model", code="neutral_label_unknown")
        answered, usage = await self._answers(self._texts(body["input"]), "input", refuse_truncation=True)
        results = []
        for answer in (row_answer.answer for row_answer in answered):
            if "probabilities" not in answer:
                raise ApiError(400, "A regression has no categories.", param="model")
            predicted = answer["predicted"] if isinstance(answer["predicted"], list) else [answer["predicted"]]
            flags = {label: label in predicted and label not in self._neutral for label in answer["probabilities"]}
            results.append(
                {"flagged": any(flags.values()), "categories": flags, "category_scores": answer["probabilities"]}
            )
        return {"id": f"modr-{secrets.token_hex(12)}", "model": self.name, "results": results, "usage": usage}

    async def tag(self, body: dict[str, Any]) -> dict[str, Any]:
        rows = body["input"] if isinstance(body["input"], list) else [body["input"]]
        places = [_words(row) if isinstance(row, str) else [(word, None, None) for word in row] for row in rows]
        column = self._row_reader.text_column or "tokens"
        answered, usage = await self._answers([{column: [word for word, _, _ in row]} for row in places], "input")
        items = []
        for number, (row_answer, words) in enumerate(zip(answered, places, strict=True)):
            answer = row_answer.answer
            entities = []
            for entity in answer.get("entities", []):
                start, end = words[entity["start"]][1], words[entity["end"] - 1][2]
                entities.append(entity | ({} if start is None else {"start_character": start, "end_character": end}))
            tagged = [{"word": word, "tag": tag} for (word, _, _), tag in zip(words, answer["predicted"], strict=True)]
            items.append({"index": number, "words": tagged, "entities": entities})
        return {"object": "list", "model": self.name, "data": items, "usage": usage}

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return each answer as a span of its context; empty if a model trained on unanswerable questions finds none."""
        columns = [self._row_reader.mapping.get(role, role) for role in ("question", "context")]
        pairs = zip(*_paired(body, "question", "context"), strict=True)
        answered, usage = await self._answers([dict(zip(columns, pair, strict=True)) for pair in pairs], "question")
        items = [
            {"index": number, "answer": answer["predicted"]}
            | {key: answer[key] for key in ("no_answer",) if key in answer}
            for number, answer in enumerate(row_answer.answer for row_answer in answered)
        ]
        return {"object": "list", "model": self.name, "data": items, "usage": usage}

    async def reward(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a score for the last turn of each conversation."""
        conversations = body["messages"] if isinstance(body["messages"][0], list) else [body["messages"]]
        for number, messages in enumerate(conversations):
            if messages[-1]["role"] != "assistant":
                reason = f"Invalid messages[{number}]: a reward model scores an answer, so the last turn must be the assistant's."
                raise ApiError(400, reason, param="messages")
        column = self._row_reader.mapping.get("messages", "messages")
        answered, usage = await self._answers([{column: messages} for messages in conversations], "messages")
        items = [
            {"index": number, "score": row_answer.answer["score"], **row_answer.truncation}
            for number, row_answer in enumerate(answered)
        ]
        return {"object": "list", "model": self.name, "data": items, "usage": usage}

    async def score(self, body: dict[str, Any]) -> dict[str, Any]:
        scores, usage = await self._scores(*_paired(body, "text_1", "text_2"))
        items = [
            {"index": number, "object": "score", "score": score.value, **score.truncation}
            for number, score in enumerate(scores)
        ]
        return {
            "id": f"score-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": self.name,
            "data": items,
            "usage": usage,
        }

    async def rerank(self, body: dict[str, Any]) -> dict[str, Any]:
        """Rank documents, in vLLM's request shape (`documents`) or that of text-embeddings-inference (`texts`)."""
        if ("documents" in body) == ("texts" in body):
            raise ApiError(400, "Give either documents or texts.", param="documents")
        texts = body["documents"] if "documents" in body else body["texts"]
        texts = [texts] if isinstance(texts, str) else texts
        scores, usage = await self._scores([body["query"]] * len(texts), texts)
        order = sorted(range(len(texts)), key=lambda number: -scores[number].value)
        if "texts" in body:
            visible = [
                {"index": n, "score": scores[n].value, **scores[n].truncation}
                | ({"text": texts[n]} if body.get("return_text") else {})
                for n in order
            ]
            return {"items": visible[: body.get("top_n")], "usage": usage}
        ranked = [
            {"index": number, "document": {"text": texts[number]}, "relevance_score": scores[number].value}
            | scores[number].truncation
            for number in order
        ]
        return {
            "id": f"rerank-{secrets.token_hex(12)}",
            "model": self.name,
            "usage": usage,
            "results": ranked[: body.get("top_n")],
        }

    async def _scores(self, first: Sequence[str], second: Sequence[str]) -> tuple[list[Score], dict[str, int]]:
        """Return a score for each pair of texts, and the token usage.

        The score is the cosine of an embedder's vectors, a regression's value, or the probability of the last of two labels.
        """
        if self._embeds:
            texts = list(dict.fromkeys([*first, *second]))  # a query is computed once
            answered, usage = await self._answers(self._texts(texts), "text_1", refuse_truncation=True)
            vectors = {text: row.answer["vector"] for text, row in zip(texts, answered, strict=True)}
            return [
                Score(_cosine(vectors[text_1], vectors[text_2]), {})
                for text_1, text_2 in zip(first, second, strict=True)
            ], usage
        column = self._row_reader.mapping.get("text_pair", "text_pair")
        text = self._row_reader.text_column or "text"
        rows = [{text: text_1, column: text_2} for text_1, text_2 in zip(first, second, strict=True)]
        answered, usage = await self._answers(rows, "text_1")
        if answered and "probabilities" in answered[0].answer:
            if len(self.predictor.labels) != 2 or isinstance(answered[0].answer["predicted"], list):
                raise ApiError(400, "This classifier has no score: it has more than two labels.", param="model")
            return [
                Score(list(row_answer.answer["probabilities"].values())[-1], row_answer.truncation)
                for row_answer in answered
            ], usage
        return [Score(row.answer["predicted"], row.truncation) for row in answered], usage


class Score(NamedTuple):
    """The score of a pair of texts."""

    value: float
    truncation: dict[str, Any]
    """As `RowAnswer.truncation`."""


NEUTRAL_LABELS = frozenset(
    {"ok", "neutral", "none", "safe", "benign", "normal", "clean", "harmless", "ham", "not flagged", "unflagged"}
    | {"not toxic", "non toxic", "not spam", "not hate", "non hate", "no hate", "not offensive", "non offensive"}
)
"""Well-known names of labels that must not be flagged, in lower case, with a space for `_` and `-`."""


def choose_neutral_labels(name: str, labels: Sequence[str], declared: Sequence[str]) -> frozenset[str]:
    """Return the labels of the model `name` that moderations do not flag. Raises UserError for a declared label that it lacks."""
    if absent := [label for label in declared if label not in labels]:
        reason = "the model has no such label" if labels else "the model has no labels"
        fix = f"one of {', '.join(labels)}" if labels else "leave it out"
        raise UserError(Problem("--neutral-label", reason, fix, f"{name}={label}") for label in absent)
    if declared:
        return frozenset(declared)
    return frozenset(label for label in labels if re.sub("[_-]", " ", label.casefold()) in NEUTRAL_LABELS)


def _paired(body: Mapping[str, Any], first_key: str, second_key: str) -> tuple[list[str], list[str]]:
    """Return two lists of texts of equal length; a single text is paired with every text of the other list."""
    first, second = ([value] if isinstance(value, str) else value for value in (body[first_key], body[second_key]))
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise ApiError(400, f"{first_key} must be one text, or as many as {second_key}.", param=first_key)
    longest = max(len(first), len(second))
    return (first * longest if len(first) == 1 else first), (second * longest if len(second) == 1 else second)


def _words(text: str) -> list[tuple[str, int | None, int | None]]:
    """Return the words of a text, each with the offsets of its first character and of the character after its last."""
    return [(match.group(), match.start(), match.end()) for match in re.finditer(r"\S+", text)]


def _cosine(first: Sequence[float], second: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(first, second, strict=True))
    size = sum(a * a for a in first) * sum(b * b for b in second)
    return product / size**0.5 if size else 0.0
