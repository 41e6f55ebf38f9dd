"""What is counted on the bytes of JSON is what a parser would find."""

from __future__ import annotations

import json
import random

import pytest

from dstune.serve.gateway import json_bounds
from dstune.serve.gateway.json_bounds import excess_of, members_in


def depth_of(value) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(depth_of, items), default=0)


def members_of(value) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + len(value) * isinstance(value, dict) + sum(map(members_of, items))


def made(choose: random.Random, depth: int):
    kind = choose.randrange(4) if depth else 3
    if kind == 0:
        return [made(choose, depth - 1) for _ in range(choose.randrange(4))]
    if kind == 1:
        return {f"{number}]{{": made(choose, depth - 1) for number in range(choose.randrange(4))}
    return choose.choice([1, True, None, "", 'a"[', "\\", '\\"{', '\\\\"]', "[[[[[[[[", "::::,,,,{}", "\u2028\n"])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 18])
@pytest.mark.parametrize("seed", range(60))
def test_depth_and_members_are_those_of_the_value(seed, size, monkeypatch):
    monkeypatch.setattr(json_bounds, "SLICE", size)
    choose = random.Random(seed)
    value = made(choose, 6)
    text = json.dumps(value, ensure_ascii=choose.random() < 0.5).encode()
    monkeypatch.setattr(json_bounds, "MOST_MEMBERS", members_of(value))
    assert members_in(text) == members_of(value)
    depth = depth_of(value)
    assert excess_of(text, depth) == ""
    if depth:
        assert "deep" in excess_of(text, depth - 1)
        monkeypatch.setattr(json_bounds, "MOST_MEMBERS", members_of(value) - 1)
        assert "members" in excess_of(text, depth)


@pytest.mark.parametrize("text", [b'"', b'"\\', b'["\\"', b"]" * 200, b"[" * 200, b'"' * 3_000_000, b"\xff[" * 100])
def test_what_is_no_json_is_refused_or_left_to_the_parser(text):
    assert isinstance(excess_of(text, 64), str)
    members_in(text)
