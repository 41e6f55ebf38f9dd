"""Headless Chromium for pages on disk, with a profile of its own for each call."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def browser() -> str:
    """Return the browser's program; the test that asks is skipped where there is none."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    return program


def run(page: Path, profile: Path, *flags: str, width: int = 1280, height: int = 900, dark: bool = False) -> str:
    """Return what the browser prints for `page` with `flags`."""
    command = [browser(), *QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}", *flags]
    if dark:
        command.append("--blink-settings=preferredColorScheme=0")
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def probe(
    page: Path, script: str, folder: Path, *, width: int = 1280, height: int = 900, dark: bool = False
) -> dict[str, Any]:
    """Return what `script` (JavaScript that fills the object `found`) sees on a copy of `page` after it has loaded.

    width, height: of the window in CSS pixels. The page is shown in a frame of that size: the window itself is never
    narrower than 500 pixels.

    `errors` holds every error of the page's own script, and every resource that its policy or the network refused.
    """
    watch = """<script>
        const found = {errors: []};
        addEventListener("error", (event) => found.errors.push(String(event.message || event.target.outerHTML)), true);
        addEventListener("securitypolicyviolation", (event) => found.errors.push(event.blockedURI));
    </script>"""
    ask = f"""<script>addEventListener("load", () => {{
        try {{ {script} }} catch (error) {{ found.errors.push(String(error)); }}
        const told = document.createElement("pre");
        told.id = "told";
        told.textContent = JSON.stringify(found);
        parent.document.body.append(told);
    }});</script>"""
    html = page.read_text(encoding="utf-8")
    probed = html.replace("<style>", f"{watch}<style>", 1).replace("</body>", f"{ask}</body>")
    frame = f'<iframe srcdoc="{escape(probed)}" style="width: {width}px; height: {height}px; border: 0"></iframe>'
    framed = folder / "framed.html"
    framed.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}</body>', encoding="utf-8")
    printed = run(framed, folder / "profile", "--dump-dom", width=max(width, 500), height=height, dark=dark)
    result_match = re.search(r'<pre id="told">(.*?)</pre>', printed, re.DOTALL)
    assert result_match, printed[-2000:]
    return json.loads(unescape(result_match[1]))
