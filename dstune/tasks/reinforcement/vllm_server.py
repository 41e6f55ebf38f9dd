"""A client for sampling from a vLLM server: it sends tokens and gets tokens with log-probabilities; the server loads adapters by
name, and complete weights from a folder.

Routes and fields are those of vLLM 0.32 (`vllm/entrypoints/openai`, `serve/lora`, `serve/dev`); nothing of vLLM is imported.
"""

from __future__ import annotations

import http.client
import math
import threading
import time
import urllib.error
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dstune.core.api_client import Address, ApiClient
from dstune.core.parsing import parse_json
from dstune.tasks.reinforcement.outages import is_busy, pauses

MOST_ANSWERED = 2**28
"""Bytes of one answer."""
LONGEST_REASON = 300
"""Characters of a server's error that are shown."""


class ServerDown(Exception):
    """The server did not answer in time, with all retries."""


class ServerRefused(Exception):
    """The server refused the request, or its answer is unusable."""

    def __init__(self, code: int, reason: str):
        super().__init__(f"the server answered {code}: {reason}" if code else reason)
        self.code, self.reason = code, reason


class _Failed(Exception):
    """A failure of the server after which the request is repeated."""


@dataclass(frozen=True)
class ServedModel:
    name: str
    max_length: int | None
    """Tokens of prompt and completion together."""


@dataclass(frozen=True)
class Sampled:
    """A completion from the server."""

    ids: list[int]
    """The end token included."""
    logps: list[float]
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How all completions of a run are sampled: from the whole distribution, at a temperature, until one of `ends`."""

    max_new_tokens: int
    temperature: float
    ends: Collection[int]
    vocabulary: int


class VllmServer:
    def __init__(self, address: str, key: str, seconds: float):
        """seconds: for an answer, including all retries."""
        self._client, self._seconds = ApiClient(Address(address.rstrip("/"), key, most_bytes=MOST_ANSWERED)), seconds
        self.recover: Callable[[], None] = lambda: None
        """Loads the weights into the server again: a server that failed may have been restarted."""
        self.failures = 0
        """Number of failures so far, also of requests that succeeded after a retry."""
        self._lock = threading.Lock()
        self._recovered_at = -math.inf

    def base_model(self) -> ServedModel:
        """Return the model that the server was started with. Raises ServerDown or ServerRefused."""
        answer = self._ask("/v1/models")
        try:
            base = next(model for model in answer["data"] if not model.get("parent"))
            length = base.get("max_model_len")
            return ServedModel(str(base["id"]), None if length is None else int(length))
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
            raise ServerRefused(0, "/v1/models lists no model") from None

    def load_adapter(self, name: str, folder: str) -> None:
        try:
            self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        except ServerRefused as error:
            if "already" not in error.reason:  # the name is a digest of the weights, which are then the same
                raise

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter; one that is not there is no error."""
        with suppress(ServerRefused):
            self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def load_weights(self, folder: str) -> None:
        """Let the server load all weights from `folder`, and clear its cache of prefixes."""
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self._ask("/reset_prefix_cache", {})

    def sleep(self) -> None:
        """Move the weights to the host's memory and give up the cache. Level 2 would drop the weights."""
        self._ask("/sleep?level=1", {})

    def wake_up(self) -> None:
        self._ask("/wake_up", {})

    def sample(self, model: str, prompt: Sequence[int], samples: int, sampling: Sampling, seed: int) -> list[Sampled]:
        """Return `samples` completions of `prompt` by the model or adapter that is called `model`.

        Raises:
            ServerDown, ServerRefused
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "n": samples,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            # Not what a model's generation_config.json says: tokens that are never sampled would have to be left out in training.
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "stop_token_ids": sorted(sampling.ends),
            "ignore_eos": True,  # one that is not among them
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
        }

        def read(answer: Any) -> list[Sampled]:
            return _read_choices(answer, list(prompt), samples, sampling, model)

        return self._ask("/v1/completions", body, read, recovers=True)

    def _ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        read: Callable[[Any], Any] = lambda answer: answer,
        *,
        recovers: bool = False,
    ) -> Any:
        deadline = time.monotonic() + self._seconds
        waits = pauses()
        while True:
            began = time.monotonic()
            try:
                return read(self._exchange(path, body, deadline - began, is_known=not recovers))
            except _Failed as failure:
                self.failures += 1
                pause = next(waits)
                if time.monotonic() + pause > deadline:
                    reason = f"{self._client.address.url}{path} did not answer within {self._seconds:g} s: {failure}"
                    raise ServerDown(reason) from None
            time.sleep(pause)
            if recovers:
                self._recover(began)

    def _recover(self, failed_since: float) -> None:
        with self._lock:
            if self._recovered_at < failed_since:
                self.recover()
                self._recovered_at = time.monotonic()

    def _exchange(self, path: str, body: Mapping[str, Any] | None, seconds: float, *, is_known: bool) -> Any:
        try:
            content = self._client.ask_once(path, body, max(0.1, seconds))
        except urllib.error.HTTPError as error:
            with error:
                reason, _ = self._client.detail_of(error)
            # An adapter that is gone, as after a restart, is loaded again.
            if is_busy(error.code) or (error.code == 404 and not is_known):
                raise _Failed(f"it answered {error.code}: {reason}") from None
            raise ServerRefused(error.code, reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(f"{type(error).__name__}: {error}"[:LONGEST_REASON]) from None
        except ValueError as error:
            raise ServerRefused(0, f"its answer is too long: {error}") from None
        try:
            return parse_json(content)
        except ValueError:
            return {}  # of routes that answer with a text or nothing


def _read_choices(answer: Any, prompt: list[int], samples: int, sampling: Sampling, model: str) -> list[Sampled]:
    """Read and check the completions in an answer to `/v1/completions`.

    Raises:
        _Failed: the server aborted a completion.
        ServerRefused: the answer does not fit the request.
    """
    try:
        if answer.get("model", model) != model:
            raise ServerRefused(0, f"it answered as {answer['model']!r} in place of {model!r}")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != samples:
            raise ServerRefused(0, f"it wrote {len(choices)} completions in place of {samples}")
        return [_read_choice(choice, prompt, sampling) for choice in choices]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ServerRefused(0, f"its answer lacks tokens and log-probabilities ({error!r})"[:LONGEST_REASON]) from None


def _read_choice(choice: Mapping[str, Any], prompt: list[int], sampling: Sampling) -> Sampled:
    finish = choice["finish_reason"]
    if finish not in ("stop", "length"):
        raise _Failed(f"it ended a completion with {finish!r}")
    if choice.get("token_ids") is None:
        raise ServerRefused(0, "its answer has no token_ids, which vLLM knows since 0.10.2")
    if choice.get("prompt_token_ids", prompt) not in (prompt, None):
        raise ServerRefused(0, "it read other tokens than those of the prompt")
    ids = [int(token) for token in choice["token_ids"]]
    logps = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    if not ids or len(ids) > sampling.max_new_tokens or len(logps) != len(ids):
        raise ServerRefused(0, f"it wrote {len(ids)} tokens with {len(logps)} log-probabilities")
    if not all(0 <= token < sampling.vocabulary for token in ids):
        raise ServerRefused(0, "it wrote tokens that the model does not have")
    if not all(-math.inf < value < 0.1 for value in logps):  # a little above 0 by rounding
        raise ServerRefused(0, "its log-probabilities are no log-probabilities")
    has_ended = ids[-1] in sampling.ends
    # Some versions check the length first, and report `length` for an end token at the limit.
    is_full = len(ids) == sampling.max_new_tokens
    if (has_ended != (finish == "stop") and not (has_ended and is_full)) or any(
        token in sampling.ends for token in ids[:-1]
    ):
        raise ServerRefused(0, "it ended a completion elsewhere than at an end token")
    return Sampled(ids, logps, has_ended)
