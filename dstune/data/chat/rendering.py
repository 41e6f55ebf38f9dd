"""Renders conversations for the threads of a server, in a process of its own: `python -m dstune.data.chat.rendering`.

In a thread, no timer can end the work of a template: Python delivers signals to the main thread alone. A limit of memory would be
one of the whole process, whose other threads compute.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

from dstune.core.confinement.spawned import Pool, answer_requests
from dstune.core.confinement.table import TEMPLATE_PROCESS
from dstune.core.errors import first_line

RENDERED, REFUSED = b"r", b"e"
"""First byte of an answer. The text with its marks follows, as JSON, or the first line of the template's error."""

_pool = Pool("dstune.data.chat.rendering", TEMPLATE_PROCESS)


class TemplateError(Exception):
    """The template raised an error; the text is its first line."""


class Rendered(NamedTuple):
    text: str
    marks: list[tuple[int, int]]
    """The characters of `text` that the template marks with `{% generation %}`."""
    seconds: float
    """Processor time."""


def render(arguments: dict[str, Any], seconds: float) -> Rendered:
    """Return a rendered conversation.

    arguments: of `render_jinja_template`, JSON. seconds: of processor time.

    Raises:
        TypeError, ValueError: `arguments` are not JSON.
        TemplateError: the template raises an error.
        ProcessEnded: it takes more time or memory than it may, or prints more.
    """
    answer = bytes(_pool.ask(json.dumps(arguments).encode(), seconds))
    if answer[:1] == REFUSED:
        raise TemplateError(answer[1:].decode())
    text, marks, taken = json.loads(answer[1:])
    return Rendered(text, [(start, end) for start, end in marks], taken)


def answer(request: bytes) -> tuple[bytes, bytes]:
    """Return the parts of the answer. Raises MemoryError."""
    from transformers.utils.chat_template_utils import render_jinja_template

    arguments = json.loads(request)
    conversation = arguments.pop("messages")
    began = time.process_time()
    try:
        texts, marks = render_jinja_template(conversations=[conversation], **arguments)
        return RENDERED, json.dumps([texts[0], marks[0] if marks else [], time.process_time() - began]).encode()
    except MemoryError:
        raise
    except Exception as error:  # a template is a program by a stranger: it may raise anything
        return REFUSED, first_line(error).encode(errors="replace")


def main() -> None:
    import transformers.utils.chat_template_utils  # noqa: F401 (now, before the limits)

    answer_requests(answer, TEMPLATE_PROCESS)


if __name__ == "__main__":
    main()
