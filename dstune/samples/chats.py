"""Turns raw chats between two people into conversations of a user and an assistant."""

from __future__ import annotations

from itertools import pairwise


def dialogue(groups: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Return the messages of one conversation, or an empty list if it does not have two senders who alternate.

    Args:
        groups: in order of time, groups of messages that one sender wrote in a row: `[{"text", "sender", ...}, ...]`.

    A group becomes one turn, with its texts joined by newlines. The conversation is cut before an assistant turn without text,
    which would teach a model to say nothing (ten chats have empty messages).
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
