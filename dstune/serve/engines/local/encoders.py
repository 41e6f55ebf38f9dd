"""Classifiers, taggers, rerankers, embedders, readers of texts and reward models: dstune's own predictor behind HTTP."""

from __future__ import annotations

import asyncio
import base64
import logging
import queue
import re
import secrets
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dstune.data.problems import RowError
from dstune.inference.predictor import Answer, Predictor
from dstune.inference.rows import Query, Question
from dstune.protocols import task_of
from dstune.serve.engines.local.app import EngineApp
from dstune.serve.errors import ApiError

MOST_ROWS = 512
"""Rows of several requests that are computed together."""
MAX_WAITING = 256
"""Requests."""
BATCH_SIZE = 32

log = logging.getLogger("dstune.serve")


class Answered(NamedTuple):
    answer: Answer
    ids: list[int]
    """The tokens of its row that the model read."""


@dataclass
class _Job:
    rows: list[Query]
    future: Future[list[Answered]] = field(default_factory=Future)


class Batcher:
    """One thread that answers the rows of all requests that wait, together. It alone uses the tokenizer, which keeps how it
    cuts: two threads cannot use it at once."""

    def __init__(self, predictor: Predictor):
        self._predictor = predictor
        self._jobs: queue.Queue[_Job] = queue.Queue(MAX_WAITING)
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    async def answers(self, rows: list[Query]) -> list[Answered]:
        """Raises ApiError where as many requests wait as may."""
        job = _Job(rows)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise ApiError(503, "The engine is busy.", code="overloaded", headers={"retry-after": "1"}) from None
        return await asyncio.wrap_future(job.future)

    def _run(self) -> None:
        while True:
            jobs = [self._jobs.get()]
            while sum(len(job.rows) for job in jobs) < MOST_ROWS and not self._jobs.empty():
                jobs.append(self._jobs.get())
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if not self._answer(jobs):
                for job in jobs:  # what goes wrong with one ends it alone
                    self._answer([job], alone=True)

    def _answer(self, jobs: Sequence[_Job], *, alone: bool = False) -> bool:
        """Whether these are done with. alone: an error is the answer."""
        rows = [row for job in jobs for row in job.rows]
        try:
            answered = iter(self._answered(rows) if rows else [])
            answers = [[next(answered) for _ in job.rows] for job in jobs]
        except Exception as error:
            if alone:
                log.exception("rows could not be answered")
                jobs[0].future.set_exception(ApiError(500, f"The engine failed: {error}.", code="engine_error"))
            return alone
        for job, own in zip(jobs, answers, strict=True):
            job.future.set_result(own)
        return True

    def _answered(self, rows: list[Query]) -> list[Answered]:
        samples = self._predictor.samples(rows)
        ids: list[list[int]] = [[] for _ in rows]
        for sample in samples:
            ids[sample.row] += sample.input_ids.tolist()
        answers = self._predictor.answers_of(samples, rows, BATCH_SIZE, all_labels=True)
        return [Answered(*pair) for pair in zip(answers, ids, strict=True)]


class EncoderApp(EngineApp):
    """Routes that the model's task has an answer for (`Task.serves`)."""

    def __init__(self, name: str, predictor: Predictor):
        super().__init__()
        self.name, self.predictor = name, predictor
        self._batcher = Batcher(predictor)
        task = task_of(predictor.config.task)
        self._question: Question = task.question(predictor.labels, predictor.config.data)
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

    async def _answers(self, rows: Sequence[Mapping[str, Any]], param: str) -> tuple[list[Answer], dict[str, int]]:
        """The answers, and the tokens that they took."""
        found = await self._answered(rows, param)
        tokens = sum(len(one.ids) for one in found)
        return [one.answer for one in found], {"prompt_tokens": tokens, "total_tokens": tokens}

    async def _answered(self, rows: Sequence[Mapping[str, Any]], param: str) -> list[Answered]:
        """Raises ApiError for the first row without an answer."""
        queries = []
        for number, row in enumerate(rows):
            try:
                queries.append(self._question.of(row, f"{param}[{number}]"))
            except RowError as error:
                raise ApiError(400, f"Invalid {param}[{number}]: {error}.", param=param) from None
        found = await self._batcher.answers(queries)
        for number, one in enumerate(found):
            if "problem" in one.answer:
                raise ApiError(400, f"Invalid {param}[{number}]: {one.answer['problem']}.", param=param)
        return found

    def _texts(self, value: Any) -> list[dict[str, Any]]:
        column = self._question.text_column or "text"
        return [{column: text} for text in ([value] if isinstance(value, str) else value)]

    async def parity(self, body: dict[str, Any]) -> dict[str, Any]:
        """Tokens and answers of rows as in training."""
        queries = [self._question.of(row, str(number)) for number, row in enumerate(body["rows"])]
        found = await self._batcher.answers(queries)
        return {"ids": [one.ids for one in found], "answers": [one.answer for one in found]}

    async def embed(self, body: dict[str, Any]) -> dict[str, Any]:
        found, usage = await self._answers(self._texts(body["input"]), "input")
        vectors = [answer["vector"] for answer in found]
        if body.get("encoding_format") == "base64":
            data: list[Any] = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in vectors]
        else:
            data = vectors
        items = [{"object": "embedding", "index": number, "embedding": one} for number, one in enumerate(data)]
        return {"object": "list", "data": items, "model": self.name, "usage": usage}

    async def classify(self, body: dict[str, Any]) -> dict[str, Any]:
        found, usage = await self._answers(self._texts(body["input"]), "input")
        items = []
        for number, answer in enumerate(found):
            item = {"index": number, "label": answer["predicted"]}
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
        """The labels of a classifier as categories. Those that are predicted are flagged, except a neutral one."""
        found, usage = await self._answers(self._texts(body["input"]), "input")
        results = []
        for answer in found:
            if "probabilities" not in answer:
                raise ApiError(400, "A regression has no categories.", param="model")
            predicted = answer["predicted"] if isinstance(answer["predicted"], list) else [answer["predicted"]]
            flags = {
                label: label in predicted and label.casefold() not in NEUTRAL_LABELS
                for label in answer["probabilities"]
            }
            results.append(
                {"flagged": any(flags.values()), "categories": flags, "category_scores": answer["probabilities"]}
            )
        return {"id": f"modr-{secrets.token_hex(12)}", "model": self.name, "results": results, "usage": usage}

    async def tag(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["input"] if isinstance(body["input"], list) else [body["input"]]
        places = [_words(row) if isinstance(row, str) else [(word, None, None) for word in row] for row in given]
        column = self._question.text_column or "tokens"
        found, usage = await self._answers([{column: [word for word, _, _ in row]} for row in places], "input")
        items = []
        for number, (answer, words) in enumerate(zip(found, places, strict=True)):
            entities = []
            for one in answer.get("entities", []):
                start, end = words[one["start"]][1], words[one["end"] - 1][2]
                entities.append(one | ({} if start is None else {"start_character": start, "end_character": end}))
            tagged = [{"word": word, "tag": tag} for (word, _, _), tag in zip(words, answer["predicted"], strict=True)]
            items.append({"index": number, "words": tagged, "entities": entities})
        return {"object": "list", "model": self.name, "data": items, "usage": usage}

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Each answer as a part of its context; empty where a model that knows of questions without one finds none."""
        columns = [self._question.mapping.get(role, role) for role in ("question", "context")]
        pairs = zip(*_paired(body, "question", "context"), strict=True)
        found, usage = await self._answers([dict(zip(columns, pair, strict=True)) for pair in pairs], "question")
        items = [
            {"index": number, "answer": one["predicted"]} | {key: one[key] for key in ("no_answer",) if key in one}
            for number, one in enumerate(found)
        ]
        return {"object": "list", "model": self.name, "data": items, "usage": usage}

    async def reward(self, body: dict[str, Any]) -> dict[str, Any]:
        """How good the last turn of each conversation is."""
        given = body["messages"] if isinstance(body["messages"][0], list) else [body["messages"]]
        for number, messages in enumerate(given):
            if messages[-1]["role"] != "assistant":
                reason = (
                    f"Invalid messages[{number}]: a reward is of an answer, so the last turn must be the assistant's."
                )
                raise ApiError(400, reason, param="messages")
        column = self._question.mapping.get("messages", "messages")
        found, usage = await self._answers([{column: messages} for messages in given], "messages")
        items = [{"index": number, "score": one["score"]} for number, one in enumerate(found)]
        return {"object": "list", "model": self.name, "data": items, "usage": usage}

    async def score(self, body: dict[str, Any]) -> dict[str, Any]:
        scores, usage = await self._scores(*_paired(body, "text_1", "text_2"))
        items = [{"index": number, "object": "score", "score": score} for number, score in enumerate(scores)]
        return {
            "id": f"score-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": self.name,
            "data": items,
            "usage": usage,
        }

    async def rerank(self, body: dict[str, Any]) -> dict[str, Any]:
        """The shape of vLLM (`documents`), or of text-embeddings-inference (`texts`)."""
        if ("documents" in body) == ("texts" in body):
            raise ApiError(400, "Give documents, or texts.", param="documents")
        texts = body["documents"] if "documents" in body else body["texts"]
        texts = [texts] if isinstance(texts, str) else texts
        scores, usage = await self._scores([body["query"]] * len(texts), texts)
        order = sorted(range(len(texts)), key=lambda number: -scores[number])
        if "texts" in body:
            visible = [
                {"index": n, "score": scores[n]} | ({"text": texts[n]} if body.get("return_text") else {})
                for n in order
            ]
            return {"items": visible[: body.get("top_n")], "usage": usage}
        found = [
            {"index": number, "document": {"text": texts[number]}, "relevance_score": scores[number]}
            for number in order
        ]
        return {
            "id": f"rerank-{secrets.token_hex(12)}",
            "model": self.name,
            "usage": usage,
            "results": found[: body.get("top_n")],
        }

    async def _scores(self, first: Sequence[str], second: Sequence[str]) -> tuple[list[float], dict[str, int]]:
        """How well each pair goes together: cosine of vectors, the number of a regression, or the probability of the last of
        two labels. And the tokens that it took."""
        if self._embeds:
            texts = list(dict.fromkeys([*first, *second]))  # a query is computed once
            answers, usage = await self._answers(self._texts(texts), "text_1")
            vectors = {text: answer["vector"] for text, answer in zip(texts, answers, strict=True)}
            return [_cosine(vectors[one], vectors[other]) for one, other in zip(first, second, strict=True)], usage
        column = self._question.mapping.get("text_pair", "text_pair")
        text = self._question.text_column or "text"
        rows = [{text: one, column: other} for one, other in zip(first, second, strict=True)]
        answers, usage = await self._answers(rows, "text_1")
        if answers and "probabilities" in answers[0]:
            if len(self.predictor.labels) != 2 or isinstance(answers[0]["predicted"], list):
                raise ApiError(400, "This classifier has no score: it has more than two labels.", param="model")
            return [list(answer["probabilities"].values())[-1] for answer in answers], usage
        return [answer["predicted"] for answer in answers], usage


NEUTRAL_LABELS = frozenset({"ok", "neutral", "none", "safe", "benign", "not toxic", "non-toxic", "not_flagged"})


def _paired(body: Mapping[str, Any], one: str, other: str) -> tuple[list[str], list[str]]:
    """Two lists of texts of one length; a single text goes with all of the other list."""
    first, second = ([value] if isinstance(value, str) else value for value in (body[one], body[other]))
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise ApiError(400, f"{one} must be one text, or as many as {other}.", param=one)
    longest = max(len(first), len(second))
    return (first * longest if len(first) == 1 else first), (second * longest if len(second) == 1 else second)


def _words(text: str) -> list[tuple[str, int | None, int | None]]:
    """The words of a text with their first character and the one behind them."""
    return [(found.group(), found.start(), found.end()) for found in re.finditer(r"\S+", text)]


def _cosine(first: Sequence[float], second: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(first, second, strict=True))
    size = sum(a * a for a in first) * sum(b * b for b in second)
    return product / size**0.5 if size else 0.0
