"""Tasks and messages for the tests of rows that other tools have written."""

from __future__ import annotations

from typing import Any

from dstune.config.data_schema import SplitConfig
from dstune.data.formats import check_task, recognise
from dstune.data.rows import normalise
from dstune.protocols.task import TaskConfig
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss

CHAT, TEXT = ChatConfig(template_date="2025-03-09"), CausalLmConfig()
PAIRS = PreferenceConfig(template_date="2025-03-09")
JUDGED = PreferenceConfig(loss=PreferenceLoss.kto, template_date="2025-03-09")
NOTHING_HELD_OUT = SplitConfig(validation=0.0)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


S, U, A = turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Yes")
U2, A2 = turn("user", "And now?"), turn("assistant", "Still yes")
SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(row: dict[str, Any], task: TaskConfig) -> tuple[str, dict[str, Any]]:
    fmt = recognise(row, {}, "auto", task, "rows.jsonl:1")
    check_task(fmt, row, {}, "auto", task, "rows.jsonl:1")
    return fmt, normalise(row, fmt, {}, task)
