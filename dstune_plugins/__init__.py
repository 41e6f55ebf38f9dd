"""Where plugin files are imported from: `./ordinal.py` is `dstune_plugins.ordinal` in every process of a run.

A process that a rank starts (rows in several processes, blocks of a stream) finds the files by a variable that the rank has
set, so that it can unpickle what they define. Everything else is in `dstune.core.plugins`.
"""

import json
import os

__path__ = list(
    dict.fromkeys(os.path.dirname(one["path"]) for one in json.loads(os.environ.get("DSTUNE_PLUGINS", "[]")))
)
