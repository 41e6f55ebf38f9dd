"""The row format of prompts, with any columns that the rewards read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dstune.data.messages import conversation_row, with_system
from dstune.data.problems import RowError
from dstune.data.values import text_or_messages
from dstune.protocols import REWARDS, RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task


@row_format
class Prompt(RowFormat):
    """A prompt, as text or as messages up to where the model is to speak; all other columns go to the rewards."""

    name = "prompt"
    conversational = True
    keeps_columns = True
    required = ("prompt",)
    optional = ("system", "tools", "chat_template_kwargs", "columns")
    other_names: ClassVar = {
        "prompt": ("messages", "question", "problem", "query", "instruction"),
        "tools": ("functions",),
    }
    checks: ClassVar[dict[str, Check]] = {"prompt": text_or_messages}

    def expand(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields with all of them in `columns` too."""
        columns = {name: value for name, value in fields.items() if value is not None}
        return {**fields, "columns": columns}

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        prompt = values["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        row = conversation_row(with_system(messages, values.get("system")), values, needs_answer=False)
        if row["messages"][-1]["role"] == "assistant":
            raise RowError("the prompt ends with an answer of the assistant, so there is nothing left to answer")
        # Rewards get the prompt as `prompt`, whatever its column is called in the data.
        columns = {**values["columns"], "prompt": prompt}
        for name in getattr(task.config, "rewards", ()) if task is not None else ():
            if problem := REWARDS[name].row_problem(columns):
                raise RowError(f"the reward {name} cannot score it: {problem}")
        return {**row, "plain": isinstance(prompt, str) and len(row["messages"]) == 1, "columns": columns}
