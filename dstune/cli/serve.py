"""`dstune serve` and `dstune serve-keys`."""

from __future__ import annotations

from dstune.cli.verb import Verb, verb


@verb
class Serve(Verb):
    name = "serve"
    summary = "trained models behind an OpenAI-compatible API"
    action = "dstune.serve.command:main"
    other_names = ((("deploy", "server", "api"), "`dstune serve RUN`"),)


@verb
class ServeKeys(Verb):
    name = "serve-keys"
    summary = "keys of clients of `dstune serve`"
    action = "dstune.serve.keys_command:main"
    takes_files = False
    further_words = ("add", "list", "revoke")
    other_names = ((("keys", "key"), "`dstune serve-keys add NAME`"),)
