"""Tell whether a chat template reads a content as parts or as one text; training and every server use the same rule.

OpenAI's API and many files give a content as a list of parts. A template that loops over the parts of a content gets the list;
any other template gets their texts joined by line breaks. This is the rule of vLLM's `--chat-template-content-format auto` (its
function `_detect_content_format`), which looks at the syntax tree and renders nothing. The texts of a tool's result are joined for
every template, as in vLLM: many templates loop over the parts of a user's content and print a result as it is, which would be the
Python form of the list. Imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeGuard

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dstune.data.message import joined

_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""Tags of transformers that mark what is trained; Jinja does not know them."""
_LONGEST_CHAIN = 100
"""Limit of nested filters, slices and tests around a name."""


@lru_cache(maxsize=64)
def reads_parts(source: str) -> bool:
    """Return whether the template (Jinja text) loops over the content of a message; False for text that does not parse."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_GENERATION.sub("", source))
        loops = list(tree.find_all(nodes.For))
        lists = _names_of(tree, "messages")
        messages = {loop.target.name for loop in loops if _is_name(loop.target) and _stands_for(loop.iter, lists)}
        return any(
            _stands_for(loop.iter, messages, "content") or (_is_name(loop.iter) and loop.iter.name == "content")
            for loop in loops
        )
    except Exception:  # RecursionError too: a stranger's template; rendering refuses it with a message
        return False


@lru_cache(maxsize=64)
def reads_only_parts(source: str) -> bool:
    """Return whether the template loops over the content of a message and never tests whether it is text (LLaVA, Idefics 3)."""
    if not reads_parts(source):
        return False
    tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
    tests = (test for test in tree.find_all(nodes.Test) if test.name in _TYPE_TESTS)
    return not any(_is_content(test.node) for test in tests)


def as_template_reads(messages: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Return `messages` with their contents in the form that the template `source` reads: parts as a list or joined, and a text as
    one part if the template reads only parts."""
    messages = with_joined_results(messages)
    contents = [message.get("content") for message in messages]
    if any(isinstance(content, list) for content in contents) and not reads_parts(source):
        return [joined(message) for message in messages]
    if any(isinstance(content, str) for content in contents) and reads_only_parts(source):
        return [_in_parts(message) for message in messages]
    return messages


def with_joined_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `messages` with each tool's result as one text if it consists of texts; a result with an image keeps its parts."""
    if not any(map(_is_result_in_texts, messages)):
        return messages
    return [joined(message) if _is_result_in_texts(message) else message for message in messages]


def _is_result_in_texts(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return (
        message.get("role") == "tool"
        and isinstance(content, list)
        and all(isinstance(part, dict) and "text" in part for part in content)
    )


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


_TYPE_TESTS = ("string", "mapping", "iterable", "sequence")
"""Jinja tests that tell a text from a list of parts."""


def _is_content(node: Any) -> bool:
    """Return whether an expression is `content`, `….content` or `…["content"]`."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return _is_name(node) and node.name == "content"


def _names_of(tree: nodes.Template, name: str) -> set[str]:
    """Return `name` and the variables to which the template assigns its value or a part of it."""
    names = {name}
    assignments = list(tree.find_all(nodes.Assign))
    while True:
        further = {
            assignment.target.name
            for assignment in assignments
            if _is_name(assignment.target) and _stands_for(assignment.node, names)
        }
        if further <= names:
            return names
        names |= further


def _stands_for(node: Any, names: set[str], key: str | None = None) -> bool:
    """Return whether an expression is one of the variables `names`, or with `key` that attribute of one; sliced, filtered or
    tested too."""
    for _ in range(_LONGEST_CHAIN):
        is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        if not (is_slice or isinstance(node, nodes.Filter | nodes.Test)):
            break
        node = node.node
    if key is not None:
        if isinstance(node, nodes.Getitem):
            is_attribute = isinstance(node.arg, nodes.Const) and node.arg.value == key
        else:
            is_attribute = isinstance(node, nodes.Getattr) and node.attr == key
        if not is_attribute:
            return False
        node = node.node
    return _is_name(node) and node.name in names


def _is_name(node: Any) -> TypeGuard[nodes.Name]:
    return isinstance(node, nodes.Name)
