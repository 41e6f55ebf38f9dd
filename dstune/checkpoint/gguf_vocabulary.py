"""Converts a tokenizer to GGUF metadata: tokens, their kinds, merges, and how text is split before merging."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dstune.core.errors import Problem, UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, as llama.cpp numbers them."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    (_QWEN35, False): "qwen35",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
    (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), False): "qwen2",
}
"""Regular expressions that split text, and whether a part that is a token is taken as it is, without merging (`ignore_merges`);
llama.cpp's name for both."""


@dataclass(frozen=True)
class Vocabulary:
    kind: str
    """`gpt2`: byte-level BPE with merges; `llama`: SentencePiece, whose merges follow from the scores; `gemma4`: SentencePiece
    with merges."""
    pre: str
    """llama.cpp's name for how text is split before merging; empty if that follows from the kind."""
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool = False
    """Whether the tokenizer prepends a space to a text (SentencePiece only): Llama 2's and Mistral's do, Gemma's does not."""


def read_vocabulary(tokenizer: Any, size: int, kind: str = "") -> Vocabulary:
    """Return the vocabulary of a fast tokenizer, padded to `size`, the number of rows in the model's embedding.

    kind: llama.cpp's name for a vocabulary of SentencePiece that it merges by the list of merges, as Gemma 4's.

    Raises UserError if the tokenizer works in a way that GGUF cannot describe.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unknown(f"a vocabulary of the type {model['type']}")
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    is_sentencepiece = bool(model["byte_fallback"])
    kinds = []
    for index in range(size):
        token = by_id.get(index)
        if token is None:
            kinds.append(UNUSED)
        elif index in added:
            unknown = is_sentencepiece and token == model["unk_token"]
            kinds.append(UNKNOWN if unknown else CONTROL if added[index]["special"] else USER_DEFINED)
        else:
            kinds.append(BYTE if is_sentencepiece and token.startswith("<0x") and len(token) == 6 else NORMAL)
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    if is_sentencepiece:
        # Scores express the order of the merges, which is the order of the vocabulary.
        scores = [-float(index) for index in range(size)]
        if kind:
            return Vocabulary(kind, "", tokens, kinds, _merges(model), scores, _space_prefix(state))
        return Vocabulary("llama", "default", tokens, kinds, [], scores, _space_prefix(state))
    return Vocabulary("gpt2", _split_name(state), tokens, kinds, _merges(model), [])


def _merges(model: dict[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


_TO_PIECES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPENDED = {"type": "Prepend", "prepend": "▁"}


def _space_prefix(state: dict[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer prepends a space to a text.

    Spaces become ▁ either in the normalizer, which prepends a ▁ (Llama 2) or does not (Gemma), or in the pre-tokenizer Metaspace,
    which has a setting for it. Its values `first` and `always` differ only after a control token, where llama.cpp always prepends.
    """
    normalizer, pre_tokenizer = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    # A split at spaces does nothing, since the normalizer has replaced all of them.
    splits = pre_tokenizer and not (pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "})
    if steps in ([_TO_PIECES], [_PREPENDED, _TO_PIECES]) and not splits:
        return len(steps) == 2
    if (
        not steps
        and pre_tokenizer.get("type") == "Metaspace"
        and pre_tokenizer["replacement"] == "▁"
        and not pre_tokenizer["split"]
    ):
        return bool(pre_tokenizer["prepend_scheme"] != "never")
    names = [part["type"] for part in (*steps, *pre_tokenizer.get("pretokenizers", [pre_tokenizer])) if part]
    raise _unknown(f"a SentencePiece tokenizer that prepares text by {', '.join(names) or 'nothing'}")


def _split_name(state: dict[str, Any]) -> str:
    pre_tokenizer = state["pre_tokenizer"] or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    names = [step["type"] for step in steps]
    ignores_merges = bool(state["model"].get("ignore_merges"))
    if names == ["Split", "ByteLevel"]:
        if name := _SPLITS.get((steps[0]["pattern"].get("Regex", ""), ignores_merges)):
            return name
    elif not ignores_merges:
        if names == ["ByteLevel"] and steps[0]["use_regex"] and not state["normalizer"]:
            return "gpt-2"
        if names == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
    raise _unknown(f"a tokenizer that splits text by {', '.join(names) or 'nothing'}")


def _unknown(feature: str) -> UserError:
    fix = "export without --gguf, and convert the folder with llama.cpp's own converter"
    return UserError(Problem("--gguf", f"the model has {feature}, which dstune cannot write as GGUF", fix))
