"""The verbs `dstune serve` and `dstune serve-keys`."""

from __future__ import annotations

from contextlib import nullcontext

from dstune.core.verb import SERVE, Verb, verb


@verb
class Serve(Verb):
    name = "serve"
    summary = "serve trained models behind an OpenAI-compatible API"
    group = SERVE
    action = "dstune.serve.command:main"
    other_names = ((("deploy", "server", "api"), "`dstune serve RUN`"),)

    def run(self, arguments: list[str]) -> int:
        from dstune.config.plugins import activate_requested
        from dstune.config.project import optional_plugins

        # Plugins may add engines and routes, and with them options.
        with optional_plugins() if {"--help", "-h"} & {*arguments} else nullcontext():
            activate_requested([])
        return super().run(arguments)


@verb
class ServeKeys(Verb):
    name = "serve-keys"
    summary = "make, list and revoke the keys of clients of `dstune serve`"
    group = SERVE
    action = "dstune.serve.keys_command:main"
    takes_files = False
    further_words = ("add", "list", "revoke")
    other_names = ((("keys", "key"), "`dstune serve-keys add NAME`"),)
