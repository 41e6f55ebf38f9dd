"""Conversations of the packaged dialogues."""

from __future__ import annotations

from itertools import pairwise


def dialogue(groups: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Return messages of one conversation, or an empty list when its two senders do not alternate.

    Args:
        groups: what one sender wrote in a row, as `[{"text", "sender", ...}, ...]`, in order of time.

    A group is one turn: its texts are joined by newlines. The conversation is cut before an assistant turn without any
    text (ten chats have empty messages), which would teach a model to say nothing.
    """
    senders = [{message["sender"] for message in group} for group in groups]
    alternating = all(len(group) == 1 for group in senders) and all(a != b for a, b in pairwise(senders))
    if not alternating or len(frozenset[str]().union(*senders)) != 2:
        return []
    turns: list[dict[str, str]] = []
    for number, group in enumerate(groups):
        role = ("user", "assistant")[number % 2]
        texts = [text for message in group if (text := message["text"].strip())]
        if role == "assistant" and not texts:
            break
        turns.append({"role": role, "content": "\n".join(texts)})
    return turns if len(turns) > 1 else []
