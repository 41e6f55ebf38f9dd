"""`dstune import`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Import(Verb):
    name = "import"
    summary = "an experiment from a configuration of axolotl, LLaMA-Factory, ms-swift or TRL"
    action = "dstune.importing.command:main"
    needs_plugins = False
