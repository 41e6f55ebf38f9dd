"""Refuses requests with texts that an engine's tokenizer would turn into control tokens.

dstune trains such a text as plain text, even if it reads like the end of a turn (`data/control.py`), and the local engine renders
it so. Other engines parse it: a user's message could close its turn and speak as the system.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstune.checkpoint.answer_files import base_folder
from dstune.core.child_python import child_environment
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json
from dstune.serve.errors import ApiError
from dstune.serve.images import is_image
from dstune.serve.source import Source

TEXT_FIELDS = (
    *("messages", "tools", "prompt", "suffix", "input", "instructions", "chat_template_kwargs"),
    *("query", "documents", "texts", "text_1", "text_2", "question", "context"),
)


class SpecialTexts:
    def __init__(self, pattern: re.Pattern[str]):
        self._pattern = pattern

    @classmethod
    def from_source(cls, source: Source) -> SpecialTexts:
        """Return the special texts of the tokenizer that the engine uses for the model. Raises UserError if it cannot be read."""
        folder = tokenizer_folder(source)
        if folder is None:
            reason = f"the tokenizer of {source.load_from} is not on this machine, so control tokens in requests are not known"
            raise UserError(Problem("MODEL", reason, f"hf download {source.load_from}", source.path))
        request = {"folder": str(folder), "trust_remote_code": source.trust_remote_code}
        process = subprocess.run(
            [sys.executable, "-m", "dstune.serve.engines.control_strings"],
            input=json.dumps(request) + "\n", stdout=subprocess.PIPE, text=True, check=False,
            env=child_environment() | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        lines = process.stdout.strip().splitlines()
        answer = (
            json.loads(lines[-1]) if lines else {"error": f"the process that reads it ended with {process.returncode}"}
        )
        if "error" in answer:
            reason = f"its tokenizer cannot be read: {answer['error']}"
            raise UserError(Problem("MODEL", reason, "serve a folder that holds one", str(folder)))
        return cls(re.compile(answer["pattern"], re.IGNORECASE if answer["ignore_case"] else 0))

    def refuse(self, body: Mapping[str, Any]) -> None:
        """Raises ApiError for the first field that contains such a text."""
        for name in TEXT_FIELDS:
            for text in _texts(body.get(name)):
                if match := self._pattern.search(text):
                    reason = (
                        f"Invalid {name}: {match.group()!r} is a control token of this model and may not be written."
                    )
                    raise ApiError(400, reason, param=name, code="control_token")


def tokenizer_folder(source: Source) -> Path | None:
    """Return the folder of the tokenizer that the engine uses for the model; None if it is not on this machine."""
    folder = source.prompted_as or source.folder
    if folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return folder
    return hub_folder(source)


def hub_folder(source: Source) -> Path | None:
    """Return the folder of the model that the engine loads: its own, or its snapshot in the hub's cache."""
    return base_folder(source.load_from, source.load_revision)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "image_url" and is_image(value):  # base64 data, which no template prints
                continue
            yield key
            yield from _texts(item)
            if key == "arguments" and isinstance(item, str):  # of a call: templates get the parsed object
                with contextlib.suppress(ValueError):
                    yield from _texts(parse_json(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
        parts = [item["text"] for item in value if isinstance(item, dict) and isinstance(item.get("text"), str)]
        if len(parts) > 1:  # templates concatenate parts, so several may form a token that none contains
            yield "".join(parts)
            yield "".join(part.strip() for part in parts)
