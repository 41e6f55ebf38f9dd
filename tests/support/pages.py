"""An HTML page taken apart, for tests of what stands on it."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "line", "path", "img", "input"}


class Page(HTMLParser):
    """The page's elements, its text by element name, and whether its tags are balanced."""

    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.stack: list[str] = []
        self.feed(html)
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
            self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)

    def having(self, name: str) -> Iterator[dict[str, str | None]]:
        return (attributes for _, attributes in self.elements if name in attributes)

    def classed(self, name: str) -> list[dict[str, str | None]]:
        return [element for element in self.having("class") if name in str(element["class"]).split()]
