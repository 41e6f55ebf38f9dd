"""task=chat: conversations; the loss is on the assistant's tokens, the end of each turn included."""

from __future__ import annotations

from dstune.config.task_schema import ChatConfig
from dstune.protocols import Task, task


@task
class Chat(Task):
    Config = ChatConfig
    config: ChatConfig
