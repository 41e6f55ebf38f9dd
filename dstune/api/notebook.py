"""Progress in a notebook: rank 0's progress line is one output that is updated in place; everything else is printed."""

from __future__ import annotations

import sys
from typing import Any

from dstune.launch.console import SEGMENT, Console

COLUMNS = 100


def console(progress: bool = True) -> Console:
    """Return the console of this process: a notebook's, a terminal's or a plain one; without `progress`, one that prints
    nothing."""
    if not progress:
        return Silent()
    return Notebook() if in_notebook() else Console()


def in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel. It imports nothing: a kernel has loaded IPython already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class Notebook(Console):
    """A console in the output of a cell."""

    def __init__(self) -> None:
        super().__init__()
        self._line: Any = None

    @property
    def kind(self) -> str:
        return f"tty:{COLUMNS}"

    def forward(self, data: bytes) -> None:
        with self._lock:
            for segment in SEGMENT.findall(data):
                text = segment.decode(errors="replace")
                if segment.endswith(b"\r"):
                    self._draw(text.strip())
                else:
                    print(text, end="", flush=True)

    def message(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)  # standard error is shown in red, which suggests an error

    def _draw(self, text: str) -> None:
        from IPython.display import display

        if not text:
            return  # a terminal clears the line; here the last progress stays in the cell
        bundle = {"text/plain": text}
        if self._line is None:
            self._line = display(bundle, raw=True, display_id=True)
        else:
            self._line.update(bundle, raw=True)


class Silent(Console):
    """Prints nothing: everything is in the run directory."""

    @property
    def kind(self) -> str:
        return "plain"

    def forward(self, data: bytes) -> None:
        return

    def message(self, text: str) -> None:
        return
