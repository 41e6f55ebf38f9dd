"""Renders rows and figures as an HTML page in the style of the report."""

from __future__ import annotations

from datetime import UTC, datetime

from dstune import __version__
from dstune.core.secrets import redact
from dstune.report.data_section import part
from dstune.report.html import render
from dstune.show.facts import Preview


def page(preview: Preview) -> str:
    """Return the page as HTML. All text is escaped, secrets are removed, and nothing is loaded from elsewhere."""
    described = part(preview.split, preview.report, preview.data) if preview.report else None
    html = render(
        "show.html.j2",
        title=f"{preview.split} rows",
        preview=preview,
        parts=[described] if described else [],
        version=__version__,
        made=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
    )
    return redact(html)
