"""What is told of an error, and several of them at once."""

from __future__ import annotations

import pytest

from dstune.core.errors import first_line, with_class


@pytest.mark.parametrize("text", ["", "\n", " \n\n"])
def test_an_error_without_text_is_named_by_its_class(text: str) -> None:
    assert first_line(ValueError(text)) == with_class(ValueError(text)) == "ValueError"


def test_the_first_line_of_an_error() -> None:
    error = RuntimeError("\nsizes differ:\n  2 and 3")
    assert first_line(error) == "sizes differ:"
    assert with_class(error) == "RuntimeError: sizes differ:"
