"""Reads untrusted JSON, YAML and files within limits of depth, size and digits.

For any bad input, `parse_json` raises ValueError and `parse_yaml` YAMLError; neither raises RecursionError or runs without end.
Results are at most `MAX_DEPTH` levels deep, so that code may traverse them recursively.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

MAX_DEPTH = 100
MAX_NODES = 1_000_000
"""Most values of a YAML document, counting an alias as often as it is used: nine lines can make a billion."""
MAX_BYTES = 2**26
"""Most bytes of a file that is read at once: configurations and records usually have some kB."""

METRICS_BYTES = 2**30
"""Most bytes of a `metrics.jsonl` that is held in memory: a million steps have some 500 MB."""

_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)


class RepeatedKey(ValueError):
    """An object of JSON has a key twice."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build the object of JSON with these keys and values. Raises RepeatedKey."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RepeatedKey(f"the key {repeated!r:.60} stands twice in an object")
    return mapping


def whole_characters(text: str) -> str:
    """Return `text` with a question mark for each half of a surrogate pair: JSON has them (`"\\ud83d"`), but no tokenizer and no
    file in UTF-8 takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: broken, not UTF-8, deeper than `MAX_DEPTH`, with a number of more digits than Python converts, or with an
            object that has a key twice, of which Python would keep the last one.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise too_deep() from None
    except (json.JSONDecodeError, RepeatedKey):
        raise
    except ValueError:  # of `int`, which names a switch of Python
        raise too_many_digits() from None
    check_depth(text)
    return value


def too_deep() -> ValueError:
    return ValueError(f"nested more than {MAX_DEPTH} deep")


def too_many_digits() -> ValueError:
    return ValueError(f"a number with more than {sys.get_int_max_str_digits():,} digits")


def check_depth(text: str, start: int = 0, end: int | None = None) -> None:
    """Raise ValueError if the JSON between `start` and `end` of `text` is nested too deeply. It must be valid JSON."""
    end = len(text) if end is None else end
    # Nearly every text has fewer brackets than levels are allowed, and counting them costs nothing.
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKET.finditer(text, start, end):
        mark = bracket[0]
        if mark in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise too_deep()
        elif mark in "]}":
            depth -= 1


def end_of_json(text: str, start: int) -> int | None:
    """Return the end of the object or array that begins at `start`, at any depth; None if it does not end."""
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket[0], 0)
        if depth == 0:
            return bracket.end()
    return None


class _LimitedLoader(yaml.SafeLoader):
    """A SafeLoader that limits the depth, and the number of values, including those of aliases."""

    def __init__(self, stream: str, max_nodes: int = MAX_NODES):
        super().__init__(stream)
        self._max_nodes = max_nodes
        self._depth = 0
        self._sizes: dict[int, int] = {}
        """Values in a node, by its `id`; absent while it is being read."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        self._depth += 1
        try:
            if self._depth > MAX_DEPTH:
                raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
            node = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        if id(node) not in self._sizes:
            if self._is_open(node):
                raise yaml.MarkedYAMLError(problem="an alias inside of what it stands for", problem_mark=mark)
            self._sizes[id(node)] = self._size(node, mark)
        return node

    def compose_sequence_node(self, anchor: Any) -> Any:
        return self._closed(super().compose_sequence_node(anchor))

    def compose_mapping_node(self, anchor: Any) -> Any:
        return self._closed(super().compose_mapping_node(anchor))

    @staticmethod
    def _closed(node: Any) -> Any:
        node.dstune_closed = True
        return node

    @staticmethod
    def _is_open(node: Any) -> bool:
        return not isinstance(node, yaml.ScalarNode) and not hasattr(node, "dstune_closed")

    def _size(self, node: Any, mark: Any) -> int:
        children: Iterator[Any] = iter(())
        if isinstance(node, yaml.SequenceNode):
            children = iter(node.value)
        elif isinstance(node, yaml.MappingNode):
            children = (part for pair in node.value for part in pair)
        size = 1 + sum(self._sizes[id(child)] for child in children)
        if size > self._max_nodes:
            problem = f"it has more than {self._max_nodes:,} values, aliases counted wherever they stand"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return size

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            ArithmeticError,
            AttributeError,
            TypeError,
            LookupError,
        ) as error:  # 2024-13-45, !!timestamp x
            problem = f"{str(node.value)[:40]!r} is no value of its kind: {str(error)[:80]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


def parse_yaml(text: str) -> Any:
    """Parse a YAML text, with a SafeLoader.

    Raises:
        yaml.YAMLError: broken, deeper than `MAX_DEPTH`, or more than `MAX_NODES` values with its aliases.
    """
    try:
        return yaml.load(text, _LimitedLoader)
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep") from None


def parse_yaml_lines(text: str, max_nodes: int) -> tuple[Any, dict[tuple[str, ...], int]]:
    """Parse a YAML text; return its value, and the line of each key by its path.

    Raises:
        yaml.YAMLError: as `parse_yaml`, more than `max_nodes` values, or a key that stands twice in a mapping.
    """
    loader = _LimitedLoader(text, max_nodes)
    try:
        node = loader.get_single_node()
        lines: dict[tuple[str, ...], int] = {}
        _collect_lines(node, (), lines)
        return (None if node is None else loader.construct_document(node)), lines
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep") from None
    finally:
        loader.dispose()


def _collect_lines(node: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        inside = (*path, str(key.value))
        if inside in lines:
            problem = f"the key {key.value!r:.60} stands twice, first in line {lines[inside]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        lines[inside] = key.start_mark.line + 1
        _collect_lines(value, inside, lines)


def read_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a plain file.

    Raises:
        OSError: as `open` does; also for a pipe or a device, which might never end, and for more than `limit` bytes.
    """
    with open_file(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit:,} bytes", str(path))
    return content


def open_file(path: Path) -> BinaryIO:
    """Open a plain file for reading. Raises OSError as `open` does, and for a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def lines_within(stream: Any, limit: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield each line of a binary stream with its line end, and its number of bytes. A line of more than `limit` bytes is never
    held in memory: None is yielded in its place."""
    while line := stream.readline(limit + 1):
        size = len(line)
        if size <= limit:
            yield line, size
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(limit + 1)
            size += len(line)
        yield None, size


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if it cannot be read."""
    try:
        value = parse_json(read_file(path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def object_in(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if it cannot be read."""
    return read_object(path) or {}


def is_encoder_decoder(folder: Path) -> bool:
    """Return whether an export, an adapter or a complete model, is of an encoder-decoder such as T5."""
    kind = object_in(folder / "adapter_config.json").get("task_type")
    return kind == "SEQ_2_SEQ_LM" or bool(object_in(folder / "config.json").get("is_encoder_decoder"))
