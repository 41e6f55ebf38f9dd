"""The guard finds the texts of every route of engines."""

from __future__ import annotations

from dstune.guard import bodies, policy
from dstune.serve.gateway.routes import INFERENCE
from tests.serve.test_gateway import EXAMPLES


def test_the_guard_reads_every_route():
    """And finds the texts of each, so that none goes past it."""
    assert EXAMPLES.keys() == INFERENCE.keys() <= set(policy.ROUTES)
    for route, body in EXAMPLES.items():
        assert bodies.of_request(route, {"model": "m", **body}), route
    talk = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "c"}],
    ]
    found = bodies.of_request("/rewards", {"messages": talk})
    assert [(one.place, one.text.text) for one in found] == [
        (("messages", 0, 0, "content"), "a"),
        (("messages", 0, 1, "content"), "b"),
        (("messages", 1, 0, "content"), "c"),
    ]


def test_items_of_responses_are_of_who_wrote_them():
    items = [
        {"role": "user", "content": "a"},
        {"type": "function_call", "name": "f", "arguments": "b"},
        {"type": "function_call_output", "call_id": "1", "output": "c"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "d"}]},
        {"type": "message", "content": "e"},
    ]
    found = {one.text.text: one.text.direction for one in bodies.of_request("/v1/responses", {"input": items})}
    assert found == {"a": "input", "f": "output", "b": "output", "c": "tool_result", "d": "output", "e": "input"}
