"""Tokenizers from files that somebody else wrote. The patterns of a `tokenizer.json` are searched by a library that gives up after
ten million tries, with a panic: no Exception, so that whatever waited for the text would end without a message."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError, files_of_others
from dstune.core.limits import TooMuch, trial

FILE = "tokenizer.json"
TRIAL_SECONDS = 1.9
_RUNS = ("a", "A", "1", " ", "\n", ".", "é", "aA1 .")
"""Repeated, they are what patterns backtrack over."""
_RUN_CHARACTERS = 300
_EXAMPLE_CHARACTERS = 60


def open_tokenizer(pretrained_model_name_or_path: Any, *, where: str, **options: Any) -> Any:
    """`AutoTokenizer.from_pretrained`, whose tokenizer raises UserError for a text on which its patterns do not end.

    where: the key that chose it. Raises UserError: the files are missing or faulty, or the patterns do not end on made-up texts.
    """
    from transformers import AutoTokenizer

    name = str(pretrained_model_name_or_path)
    with files_of_others(where, name, "its tokenizer", "give a hub id or a folder with tokenizer files"):
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **options)
        if tokenizer.is_fast:
            name_panics()
        tokenizer("a")
    if tokenizer.is_fast:
        _try(tokenizer)
    return tokenizer


def name_panics() -> None:
    """In this process, for every tokenizer: an object of their own class is what transformers saves, and processes send."""
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


def _culprit(tokenizer: Any, given: Any) -> Any:
    """Of several texts the one on which the library gives up."""
    for text in given if isinstance(given, list) and all(isinstance(one, str) for one in given) else ():
        try:
            tokenizer.backend_tokenizer.encode(text)
        except BaseException as error:
            if not _is_panic(error):
                raise
            return text
    return given


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # which no package exports


def _try(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    patterns = f"{backend.normalizer!r} {backend.pre_tokenizer!r} {backend.decoder!r}"
    if "Regex(" not in patterns:
        return

    def encode() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in the fork
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the library writes its stack
        for run in _RUNS:
            try:
                text = run * (_RUN_CHARACTERS // len(run)) + "\0"
                tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            except UserError as error:
                raise TooMuch(str(error)) from None

    what = f"to find its patterns in {len(_RUNS)} texts of {_RUN_CHARACTERS} characters"
    if reason := trial(what, patterns, encode, TRIAL_SECONDS):
        raise UserError(_endless(tokenizer, reason))


def _endless(tokenizer: Any, reason: str) -> Problem:
    name = str(tokenizer.name_or_path)
    where = str(Path(name) / FILE) if Path(name).is_dir() else FILE
    return Problem(where, reason, "give a model whose patterns do not backtrack")
