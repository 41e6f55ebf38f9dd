"""Links of a page to files outside `docs/`: to the page of the site that includes the file, or to a copy to download.

On a repository's web page `../CONTRIBUTING.md` opens the file. The site has no such path, so the link is rewritten while the
page is read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

INCLUDED = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "RELEASING.md": "project/releasing.md",
    "SECURITY.md": "project/reporting.md",
    "AGENTS.md": "project/agents.md",
}
"""Files of the repository, and the pages of the site that include them."""

ANCHOR = re.compile(r'^<a id="([\w-]+)"></a>\s*', re.MULTILINE)
"""A place inside a page, as HTML writes it. Sphinx needs its own notation to link there."""

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]+)?\)")


def rewrite(text: str, page: Path, docs: Path) -> str:
    """`text` of the file `page` with links that the site can follow.

    page: the file that the links are relative to; it may lie outside `docs`.
    """

    def target_of(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match["target"]))
        if page.is_relative_to(docs) and target.is_relative_to(docs):
            return match[0]
        inside = os.path.relpath(target, docs.parent)
        if inside in INCLUDED:
            return f"[{match['text']}](/{INCLUDED[inside]}{match['anchor'] or ''})"
        if target.is_relative_to(docs):
            return f"[{match['text']}](/{target.relative_to(docs)}{match['anchor'] or ''})"
        if target.is_file():
            return f"{{download}}`{match['text'].replace('`', '')} </{os.path.relpath(target, docs)}>`"
        if target.is_dir():
            return f"{match['text']} (`{inside}` of the repository)"
        return match[0]  # reported as a link without a target

    return ANCHOR.sub(r"(\1)=\n\n", LINK.sub(target_of, text))


def on_source_read(app: Any, name: str, source: list[str]) -> None:
    """Replace the text of a page before it is parsed."""
    docs = Path(app.srcdir)
    page = docs / f"{name}.md"
    if name.startswith("project/"):
        file = next(file for file, included in INCLUDED.items() if included == f"{name}.md")
        page = docs.parent / file
        source[0] = page.read_text(encoding="utf-8")
    source[0] = rewrite(source[0], page, docs)


def setup(app: Any) -> dict[str, Any]:
    """Listen to pages that are read."""
    app.connect("source-read", on_source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
