"""How Sphinx builds the site: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

from pygments.lexers import JsonLexer  # noqa: E402
from sphinx.highlighting import lexers  # noqa: E402

from dstune import __version__  # noqa: E402

lexers["jsonl"] = JsonLexer()

project = "dstune"
author = "the dstune authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "command_line", "docstrings", "json_schema", "repository_links"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "extensions", "**/.ipynb_checkpoints"]
root_doc = "index"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# Every page starts with its own title; a subtitle may follow where a page quotes another.
suppress_warnings = ["myst.header"]

# Docstrings mark code with one backtick, as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_title = "dstune"
html_extra_path = ["llms.txt"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
}
html_sidebars = {"index": []}
copyright = "Apache-2.0"
