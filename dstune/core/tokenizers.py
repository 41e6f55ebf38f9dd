"""Opens tokenizers from files that somebody else wrote.

The library that searches the patterns of a `tokenizer.json` gives up after ten million tries with a panic. A panic is no
Exception, so whatever waited for the text would end without a message.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dstune.core.confinement.here import TooMuch, trial
from dstune.core.confinement.table import TOKENIZER_TRIAL
from dstune.core.errors import Problem, UserError, files_of_others

FILE = "tokenizer.json"
_RUNS = ("a", "A", "1", " ", "\n", ".", "é", "aA1 .")
"""Texts that are repeated to find patterns that backtrack."""
_RUN_CHARACTERS = 300
_EXAMPLE_CHARACTERS = 60


def open_tokenizer(pretrained_model_name_or_path: Any, *, where: str, **options: Any) -> Any:
    """Call `AutoTokenizer.from_pretrained`. The returned tokenizer raises UserError for a text on which its patterns backtrack
    endlessly.

    where: the key that chose it. Raises UserError: the files are missing or faulty, or the patterns take too long on test texts.
    """
    from transformers import AutoTokenizer

    name = str(pretrained_model_name_or_path)
    with files_of_others(where, name, "its tokenizer", "give a hub id or a folder with tokenizer files"):
        _refuse_growing_file(Path(name) / FILE)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **options)
        if tokenizer.is_fast:
            name_panics()
            _refuse_growing(tokenizer)
        tokenizer("a")
    if tokenizer.is_fast:
        _try(tokenizer)
    return tokenizer


# ---- Tokenizers that turn a word into gigabytes ----

MAX_GROWTH = 64
"""Most characters that a tokenizer may make of one; Unicode normalization makes up to 18."""
ENDLESS = 10**9
"""Growth above which the exact number is not computed."""
MAX_ADDED = 1000
"""Most tokens that a tokenizer may put around a text."""
_PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
_SECTION = re.compile(r'"(?:normalizer|pre_tokenizer|decoder|post_processor)"\s*:\s*(?=[\[{])')


def _refuse_growing_file(file: Path) -> None:
    """Raises UserError for a tokenizer that makes texts too long. It reads the file before the library does: opening it already
    expands the listed tokens."""
    if not file.is_file():
        return  # from the hub, or in an older format
    text, end = file.read_text(encoding="utf-8", errors="replace"), 0
    decoder = json.JSONDecoder()
    for section in _SECTION.finditer(text):
        if section.start() < end:  # inside the previous section
            continue
        try:
            step, end = decoder.raw_decode(text, section.end())
            _check_growth(step, file)
        except (ValueError, RecursionError):  # the file is no JSON, or too deep: the library refuses it too
            return


def _refuse_growing(tokenizer: Any) -> None:
    for part in _PARTS:
        step = getattr(tokenizer.backend_tokenizer, part)
        try:
            step = json.loads(step.__getstate__()) if step is not None else None
        except Exception:  # from the model's own code, which the user trusts
            continue
        _check_growth(step, _file_of(tokenizer))


def _check_growth(step: Any, file: Path | str) -> None:
    fix = "give a model whose tokenizer leaves texts about as long as they are"
    if (growth := _growth(step)) > MAX_GROWTH:
        reason = f"its tokenizer may make {min(growth, ENDLESS):,} characters of one, more than {MAX_GROWTH}"
        raise UserError(Problem(str(file), reason, fix))
    if (added := _added(step)) > MAX_ADDED:
        reason = f"its tokenizer puts {added:,} tokens around each text, more than {MAX_ADDED:,}"
        raise UserError(Problem(str(file), reason, fix))


def _growth(step: Any) -> int:
    """Return the most characters that a part of a tokenizer makes of one. step: the part's JSON."""
    if isinstance(step, list):
        return _product(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    step_growth = 1
    match step.get("type"):
        case "Replace":
            step_growth = len(str(step.get("content")))
        case "Prepend":
            step_growth = 1 + len(str(step.get("prepend")))
        case "ByteLevel":
            step_growth = 2
        case "Precompiled":
            step_growth = max(map(len, _texts_of(step.get("precompiled_charsmap"))))
    return max(step_growth, 1) * _product(map(_growth, step.values()))


def _product(factors: Iterable[int]) -> int:
    """Multiply until the product exceeds `ENDLESS`: that of a million steps would have millions of digits."""
    product = 1
    for factor in factors:
        product *= factor
        if product > ENDLESS:
            break
    return product


def _texts_of(characters: Any) -> list[str]:
    """Return the replacements in a character map of sentencepiece. They come after its trie, each ended by a zero."""
    try:
        raw = base64.b64decode(characters)
        return raw[4 + int.from_bytes(raw[:4], "little") :].decode("utf-8", "replace").split("\0")
    except (TypeError, ValueError):
        return [""]


def _added(step: Any) -> int:
    """Return how many tokens a post-processor puts around a text. step: its JSON."""
    if isinstance(step, list):
        return sum(map(_added, step))
    if not isinstance(step, dict):
        return 0
    if step.get("type") != "TemplateProcessing":
        return sum(map(_added, step.values()))
    tokens = step.get("special_tokens")
    ids = {name: len(token.get("ids", ())) for name, token in tokens.items()} if isinstance(tokens, dict) else {}
    token_names = [
        piece.get("SpecialToken", {}).get("id") for kind in ("single", "pair") for piece in step.get(kind, ())
    ]
    return sum(ids.get(name, 0) for name in token_names)


# ---- Patterns that backtrack endlessly ----


def name_panics() -> None:
    """Let every fast tokenizer of this process raise UserError instead of panicking. It patches the class, so that
    tokenizers keep the class that transformers saves and processes exchange."""
    from transformers import PreTrainedTokenizerFast

    for name in ("_encode_plus", "_decode"):
        method = getattr(PreTrainedTokenizerFast, name)
        if method.__module__ != __name__:
            setattr(PreTrainedTokenizerFast, name, _named(method))


def _named(method: Callable[..., Any]) -> Callable[..., Any]:
    def named(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except BaseException as error:
            if not _is_panic(error):
                raise
            example = repr(_culprit(self, [*arguments, *options.values()][0]))
            if len(example) > _EXAMPLE_CHARACTERS:
                example = f"{example[:_EXAMPLE_CHARACTERS]}..."
            raise UserError(_endless(self, f"to find its patterns in {example} fails: {error}")) from None

    return named


def _culprit(tokenizer: Any, texts: Any) -> Any:
    """Return the one of several texts on which the library gives up."""
    for text in texts if isinstance(texts, list) and all(isinstance(item, str) for item in texts) else ():
        try:
            tokenizer.backend_tokenizer.encode(text)
        except BaseException as error:
            if not _is_panic(error):
                raise
            return text
    return texts


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # no package exports the class


def _try(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    patterns = f"{backend.normalizer!r} {backend.pre_tokenizer!r} {backend.decoder!r}"
    if "Regex(" not in patterns:
        return

    def encode() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not exist in the fork
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library prints its stack trace there
        for run in _RUNS:
            try:
                text = run * (_RUN_CHARACTERS // len(run)) + "\0"
                tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            except UserError as error:
                raise TooMuch(str(error)) from None

    what = f"to find its patterns in {len(_RUNS)} texts of {_RUN_CHARACTERS} characters"
    if reason := trial(what, patterns, encode, TOKENIZER_TRIAL):
        raise UserError(_endless(tokenizer, reason))


def _endless(tokenizer: Any, reason: str) -> Problem:
    return Problem(_file_of(tokenizer), reason, "give a model whose patterns do not backtrack")


def _file_of(tokenizer: Any) -> str:
    name = str(tokenizer.name_or_path)
    return str(Path(name) / FILE) if Path(name).is_dir() else FILE
