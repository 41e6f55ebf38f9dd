"""A conversation in the terminal: answers appear while they are being written; Ctrl-C ends an answer, not the program."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dstune.core.errors import UserError
from dstune.inference.prompts import Messages, Request
from dstune.inference.writer import Writer

COMMANDS = "/reset begins another conversation, /adapter NAME lets another one answer, /exit (or Ctrl-D) ends"


def converse(writer: Writer) -> None:
    """Answer typed prompts until the end of input. A chat model remembers the conversation, during which adapters can change."""
    import readline  # noqa: F401  (gives input() a history and editing)

    print(f"{COMMANDS}; Ctrl-C ends an answer")
    history: Messages = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D ends")
            continue
        if text == "/exit":
            return
        if not text or text == "/reset":
            history = []
        elif text.startswith("/adapter"):
            print(_switch(writer, text.removeprefix("/adapter").strip()))
        elif text.startswith("/"):
            print(COMMANDS)
        else:
            history = _turn(writer, history, text)


def _turn(writer: Writer, history: Messages, text: str) -> Messages:
    """Answer `text`, and return the conversation with question and answer."""
    history = [*history, {"role": "user", "content": text}]
    request = Request(text, "input", list(history) if writer.is_chat(writer.active) else None)
    try:
        with _interruptible() as interrupted:
            answer = writer.stream(request, lambda piece: print(piece, end="", flush=True), interrupted)
    except UserError as error:  # too long by now
        print(f"dstune: {error}; starting another conversation")
        return []
    print()
    return [*history, {"role": "assistant", "content": answer.text}]


def _switch(writer: Writer, name: str) -> str:
    if name in writer.names:
        writer.active = name
    listed = ", ".join(
        f"[{adapter_name}]" if adapter_name == writer.active else adapter_name for adapter_name in writer.names
    )
    return listed if not name or name in writer.names else f"there is no adapter {name}; there are {listed}"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Record the first Ctrl-C within the block instead of ending the program; a second one ends it."""
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    handler_before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, handler_before)
