"""Whether texts of a page lie over each other, at any width, light or dark: measured in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.browser import probe

WIDTHS = (360, 400, 1000, 1600)
WIDE_FONT = '<style>* { font-family: "DejaVu Sans", Verdana, sans-serif !important; }</style>'
"""What a machine without the fonts that the page asks for may show in their place: every word is wider."""

OVERLAPS = """
    for (const closed of document.querySelectorAll("details")) closed.open = true;
    const boxes = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const clipped = (box, element) => {
        let {left, right, top, bottom} = box;
        for (let at = element; at && at !== document.body; at = at.parentElement) {
            const style = getComputedStyle(at);
            if (style.visibility === "hidden" || style.display === "none") return null;
            if (style.overflowX !== "visible" || style.overflowY !== "visible") {
                const own = at.getBoundingClientRect();
                left = Math.max(left, own.left); right = Math.min(right, own.right);
                top = Math.max(top, own.top); bottom = Math.min(bottom, own.bottom);
            }
        }
        return {left, right, top, bottom};
    };
    for (let node; (node = walker.nextNode());) {
        if (!node.textContent.trim() || ["SCRIPT", "STYLE"].includes(node.parentElement.tagName)) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        for (const rect of range.getClientRects()) {
            const box = clipped(rect, node.parentElement);
            if (!box) continue;
            const inset = (box.bottom - box.top) * 0.2;  // what a font leaves above and below its letters
            const text = node.textContent.trim().slice(0, 40);
            boxes.push({...box, top: box.top + inset, bottom: box.bottom - inset, text, node});
        }
    }
    found.boxes = boxes.length;
    found.overlaps = [];
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
        const a = boxes[i], b = boxes[j];
        if (a.node === b.node) continue;
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1.5 && down > 1.5) found.overlaps.push(`${a.text} / ${b.text}`);
    }
    found.wide = document.documentElement.scrollWidth;
"""
SHOWN = ("light", "dark", "wide font")


def overlaps(page: Path, folder: Path, shown: str, least_boxes: int = 50) -> dict[int, Any]:
    """By width of the window, how wide the page is and which texts lie over each other; empty where none do.

    shown: one of SHOWN. least_boxes: texts that the page has at least.
    """
    page = in_wide_font(page) if shown == "wide font" else page
    faults = {}
    for width in WIDTHS:
        profile = folder / str(width)
        profile.mkdir()
        found = probe(page, OVERLAPS, profile, width=width, height=2000, dark=shown == "dark")
        assert found["errors"] == []
        assert found["boxes"] > least_boxes
        if found["overlaps"] or found["wide"] > width:
            faults[width] = (found["wide"], found["overlaps"][:12])
    return faults


def in_wide_font(page: Path) -> Path:
    """A copy of `page` whose fonts are missing."""
    html = page.read_text(encoding="utf-8")
    copy = page.with_name("wide.html")
    copy.write_text(html.replace("</head>", f"{WIDE_FONT}</head>", 1), encoding="utf-8")
    assert WIDE_FONT in copy.read_text(encoding="utf-8")
    return copy
