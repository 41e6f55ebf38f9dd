"""Generates completions of several turns, in which the model calls the tools of an environment.

Sampled tokens are never decoded and tokenized again. After each turn come the tokens that the chat template prints for the results
of the tools; the model reads them, but does not train on them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.data.chat.template import ChatTemplate
from dstune.data.chat.tool_calls import ToolForm, ToolText, form_of
from dstune.data.messages import with_system
from dstune.data.render import ChatRenderer, RenderError
from dstune.generation.completions import Completion, Turn, continue_completions
from dstune.protocols import ENVIRONMENTS
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.outages import Failure
from dstune.tasks.reinforcement.records import Scored, place_of
from dstune.tasks.reinforcement.scoring import Scorer

Messages = list[dict[str, Any]]
LATE_SECONDS = 5.0
"""How much longer than the time limits of calls their process may take until it answers."""


@dataclass
class Episode:
    """A completion in its environment, so far."""

    completion: Completion
    history: Messages
    """The prompt's messages and all turns."""
    arguments: dict[str, Any]
    """Arguments of the chat template, from the row."""
    first: int
    """Number of messages in the prompt, and so the index of the model's first turn in `history`."""
    is_over: bool = False
    answers: int = 0
    calls: int = 0
    failed_calls: int = 0
    results: Messages = field(default_factory=list)
    failure: str = ""
    """Why its environment failed; empty if it did not. Such an episode is over, and no reward scores it."""


class Environments:
    """Lets the model act in the environments of a run's prompts."""

    def __init__(
        self, task: ReinforcementConfig, tokenizer: Any, scorer: Scorer, max_length: int, ends: Collection[int]
    ):
        """Prepare the chat template and the tools. Raises UserError if the chat template does not support tool calls."""
        assert task.environment is not None
        self._task, self._tokenizer, self._scorer, self._ends = task, tokenizer, scorer, ends
        self._max_length = max_length
        self.tools = tool_schemas(task.environment)
        if not tokenizer.chat_template:
            raise UserError(Problem("model.chat_template", "an environment needs a chat template", "a chat model"))
        self._renderer = ChatRenderer(tokenizer, task.template_date, task.chat_template_kwargs)
        self._template = ChatTemplate(tokenizer, task.template_date, task.chat_template_kwargs)
        form = form_of(self._template) if self.tools else None
        if self.tools and form is None:
            reason = "the chat template has no place for tools, or prints tool calls in a form that dstune cannot read"
            raise UserError(
                Problem("task.environment", reason, "a model that calls tools, such as Qwen 3", task.environment)
            )
        self._form: ToolForm | None = form

    def complete(
        self,
        module: nn.Module,
        prompts: Sequence[int],
        samples: int,
        keys: tuple[int, int],
        world: World,
        *,
        in_step: bool,
    ) -> list[Scored]:
        """Generate `samples` completions for each prompt of this rank. prompts: their numbers. in_step: whether ranks must call the
        module together.

        Raises:
            UserError: a prompt is too long, or an environment cannot be created. Raised on all ranks alike.
        """
        episodes, problem = self._begin(prompts, samples, keys)
        problems = [text for text in world.gather(problem) if text]
        if problems:
            raise UserError(
                Problem("task.environment", problems[0], "docs/environments.md", self._task.environment or "")
            )
        starts = self._scorer.process.starts
        goes_on: Callable[[bool], bool] = world.any if in_step else bool
        while True:
            active = [episode for episode in episodes if not episode.is_over]
            if not goes_on(bool(active)):
                break
            self._write(module, active, keys, goes_on)
            self._act(active, starts)
        return [self._scored(episode) for episode in episodes]

    def _begin(self, prompts: Sequence[int], samples: int, keys: tuple[int, int]) -> tuple[list[Episode], str]:
        """Return an episode for each completion, and an empty text; if a prompt cannot be rendered or is too long, no episodes and
        the reason. An episode whose environment cannot be reset is over."""
        completions = [Completion(prompt, sample) for prompt in prompts for sample in range(samples)]
        rows = [self._scorer.columns_of(completion.prompt) for completion in completions]
        requests = [
            {"key": place_of(completion), "seed": _seed(keys, completion), "columns": _keywords(row)}
            for completion, row in zip(completions, rows, strict=True)
        ]
        episodes = []
        for completion, row, observation in zip(completions, rows, self._reset(requests), strict=True):
            prompt, arguments = row["prompt"], row.get("chat_template_kwargs") or {}
            messages = (
                [{"role": "user", "content": prompt}]
                if isinstance(prompt, str)
                else [dict(message) for message in prompt]
            )
            messages = with_system(messages, row.get("system"))
            if isinstance(observation, str) and observation:
                messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}{observation}"}
            try:
                ids = self._renderer.prompt_ids(messages, tools=self.tools or None, arguments=arguments)
            except RenderError as error:
                return [], str(error)
            if len(ids) > self._max_length:
                reason = f"with the tools and the environment's observation, a prompt has {len(ids):,} tokens"
                return [], f"{reason}; data.max_length is {self._max_length:,}"
            completion.prompt_ids = ids
            episode = Episode(completion, messages, dict(arguments), len(messages))
            if isinstance(observation, Failure):
                episode.is_over, episode.failure = True, f"it could not be reset: {observation.reason}"
            episodes.append(episode)
        return episodes, ""

    def _reset(self, requests: Sequence[dict[str, Any]]) -> list[str | Failure]:
        """Create the environments; return the first observation of each, or why it could not be reset."""

        def ask(some: Sequence[dict[str, Any]]) -> list[str | Failure]:
            again = len(some) < len(requests)
            request = {"kind": "reset", "environment": self._task.environment, "rows": list(some), "again": again}
            answer = self._ask(request, self._task.environment_seconds)
            if "results" not in answer:
                return [Failure(str(answer["error"]), bool(answer.get("may_pass")))] * len(some)
            return [
                Failure(result["failure"], result["may_pass"]) if "failure" in result else result["text"]
                for result in answer["results"]
            ]

        return self._scorer.patience.ask(requests, ask)

    def _write(
        self, module: nn.Module, active: Sequence[Episode], keys: tuple[int, int], goes_on: Callable[[bool], bool]
    ) -> None:
        """Generate the next answer of each active episode."""
        turns, lengths_before = [], []
        for episode in active:
            completion = episode.completion
            assert completion.prompt_ids is not None
            tokens = [*completion.prompt_ids, *completion.ids]
            turns.append(Turn(completion, tokens, self._task.max_new_tokens - len(completion.ids)))
            lengths_before.append(len(completion.ids))
        ended = continue_completions(
            module,
            turns,
            temperature=self._task.temperature,
            ends=self._ends,
            padding=self._tokenizer.pad_token_id,
            keys=keys,
            goes_on=goes_on,
            device=next(module.parameters()).device,
        )
        for episode, start, has_ended in zip(active, lengths_before, ended, strict=True):
            episode.answers += 1
            text = self._tokenizer.decode(episode.completion.ids[start:], skip_special_tokens=False)
            text = _without_end(text, self._tokenizer, episode.completion.ids[-1:], self._ends)
            visible, calls = self._calls_in(text, episode)
            message: dict[str, Any] = {"role": "assistant", "content": visible}
            if calls:
                message["tool_calls"] = calls
            episode.history.append(message)
            episode.is_over = not has_ended or not calls or episode.answers >= self._task.turns
            episode.completion.ended = has_ended and not (calls and episode.answers >= self._task.turns)

    def _calls_in(self, text: str, episode: Episode) -> tuple[str, Messages]:
        if self._form is None:
            return text, []
        reader = ToolText(self._form)
        visible = reader.push(text)
        last_text, calls = reader.finish()
        for number, call in enumerate(calls):  # ids made up by the reader would differ in every launch
            call["id"] = f"call{len(episode.history):04d}{number % 10}"
        return visible + last_text, calls

    def _act(self, active: Sequence[Episode], starts: int) -> None:
        """Run the tool calls of each episode, and append the results to its tokens."""
        waiting = [episode for episode in active if not episode.is_over]
        calls, owners = [], []
        for episode in waiting:
            for call in episode.history[-1]["tool_calls"]:
                function = call["function"]
                key = place_of(episode.completion)
                calls.append({"key": key, "name": function["name"], "arguments": json.loads(function["arguments"])})
                owners.append((episode, call))
        if not calls:
            return
        answer = {}
        if self._scorer.process.starts == starts:
            request = {"kind": "call", "calls": calls, "seconds": self._task.environment_seconds}
            answer = self._ask(request, self._seconds_of(len(waiting)))
        if "results" not in answer:  # the process has ended, and all environments with it
            ended = {"lost": answer.get("error", "its environment has ended")}
        for (episode, call), result in zip(owners, answer.get("results") or [ended] * len(owners), strict=True):
            episode.calls += 1
            if "lost" in result:
                episode.is_over, episode.completion.ended = True, False
                episode.failure = episode.failure or f"{call['function']['name']}: {result['lost']}"
                continue
            episode.failed_calls += result["failed"]
            message = {"role": "tool", "name": call["function"]["name"], "content": result["text"]}
            episode.results.append({**message, "tool_call_id": call["id"]})
        for episode in waiting:
            if not episode.failure:
                self._append_results(episode)

    def _append_results(self, episode: Episode) -> None:
        completion = episode.completion
        ids = self.suffix(episode.history, episode.results, episode.arguments)
        if len(completion.ids) + len(ids) >= self._task.max_new_tokens:
            episode.is_over, completion.ended = True, False
        else:
            completion.read += range(len(completion.ids), len(completion.ids) + len(ids))
            completion.ids += ids
            completion.logps += [0.0] * len(ids)
            episode.history += episode.results
        episode.results = []

    def suffix(self, history: Messages, results: Messages, arguments: dict[str, Any]) -> list[int]:
        """Return the tokens after the end token of the last answer in `history` and before the next answer; they contain `results`.

        Raises:
            UserError: with results, the template prints earlier turns differently than without.
        """
        ids = self._renderer.prompt_ids([*history, *results], tools=self.tools or None, arguments=arguments)
        ends = sum(token in self._ends for token in self._plain_suffix(history, results, arguments))
        places = [place for place, token in enumerate(ids) if token in self._ends]
        return ids[places[-1 - ends] + 1 :] if len(places) > ends else ids

    def _plain_suffix(self, history: Messages, results: Messages, arguments: dict[str, Any]) -> list[int]:
        """Return the same tokens for harmless results, whose text cannot contain the end of a turn."""
        plain = [{**message, "content": "ok"} for message in results]
        options: dict[str, Any] = {"tools": self.tools or None, "arguments": arguments}
        text_before = self._template.text([*map(self._renderer.facts.adapted, history)], **options)
        after = self._template.text([*map(self._renderer.facts.adapted, [*history, *plain])], prompt=True, **options)
        marks = [self._tokenizer.decode([token]) for token in self._ends]
        end = max(
            (text_before.rfind(mark) + len(mark) for mark in marks if mark in text_before), default=len(text_before)
        )
        if not after.startswith(text_before[:end]):
            reason = "the chat template prints earlier turns differently once a tool has answered"
            raise UserError(Problem("model.chat_template", reason, "a template that only appends to earlier turns"))
        ids: list[int] = self._tokenizer(after[end:], add_special_tokens=False)["input_ids"]
        return ids

    def _seconds_of(self, episodes: int) -> float:
        """Return the time after which the process of the environments is ended. Where calls run side by side, it gives up late ones
        itself."""
        seconds, at_once = self._task.environment_seconds, ENVIRONMENTS[self._task.environment or ""].at_once
        return seconds if at_once < 2 else seconds * math.ceil(episodes / at_once) + LATE_SECONDS

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        answer = self._scorer.process.ask(request, seconds, "task.environment_seconds")
        if error := answer.get("error"):
            self._scorer.process.last_error = str(error)
        return answer

    def _scored(self, episode: Episode) -> Scored:
        text = self._tokenizer.decode(episode.completion.ids, skip_special_tokens=True)
        messages = episode.history[episode.first :]
        failures = dict.fromkeys(self._task.reward_names, f"its environment failed: {episode.failure}")
        return Scored(
            episode.completion,
            text,
            messages=messages,
            calls=episode.calls,
            failed_calls=episode.failed_calls,
            failures=failures if episode.failure else {},
        )


def tool_schemas(name: str) -> list[dict[str, Any]]:
    """Describe the tools of an environment as JSON schemas, from their signatures and docstrings.

    Raises:
        UserError: a docstring does not describe a tool.
    """
    from transformers.utils import get_json_schema

    environment = ENVIRONMENTS[name]
    schemas = []
    for tool in environment.tool_names():
        try:
            schemas.append(get_json_schema(_unbound(getattr(environment, tool))))
        except Exception as error:  # transformers raises several types
            fix = "describe the tool and each argument: a summary, then `Args:` with `name: what it is` lines"
            raise UserError(Problem("task.environment", f"{name}.{tool}: {error}", fix, name)) from None
    return schemas


def _unbound(method: Any) -> Any:
    """Return `method` without `self`, which is not an argument of the tool."""
    import functools
    import inspect

    signature = inspect.signature(method)
    parameters = list(signature.parameters.values())[1:]

    @functools.wraps(method)
    def tool(*arguments: Any, **keywords: Any) -> Any:
        return method(None, *arguments, **keywords)

    tool.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return tool


def _keywords(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that `reset` gets as keyword arguments: those whose names are identifiers."""
    return {name: value for name, value in row.items() if name.isidentifier()}


def _seed(keys: tuple[int, int], completion: Completion) -> int:
    text = f"{keys[0]}/{keys[1]}/{place_of(completion)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _without_end(text: str, tokenizer: Any, last: list[int], ends: Collection[int]) -> str:
    return text.removesuffix(tokenizer.decode(last)) if last and last[0] in ends else text
