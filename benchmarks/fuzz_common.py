"""What several parsers of `fuzz.py` need: examples that are made once, and the forms of inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz_inputs import Make, as_json


@cache
def configuration(*overrides: str) -> Any:
    from dstune.config.compose import compose

    return compose(["data.train=rows.jsonl", *overrides]).config


def jsonl(rows: list[Any]) -> bytes:
    return "\n".join(map(as_json, rows)).encode("utf-8", "surrogatepass")


def later(make: Callable[[], Make]) -> Make:
    """Delay an example that takes long to make."""
    made = cache(make)
    return st.deferred(lambda: made())  # hypothesis takes a function alone


@cache
def tokenizer() -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from unit.data_helpers import byte_tokenizer

    return byte_tokenizer()


def decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
