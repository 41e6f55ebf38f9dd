"""Let models rewrite texts: translate them there and back with two models, or paraphrase them with one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dstune import samples
from dstune.config.augment_schema import AugmentConfig
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.stored_implementations import without_stored_implementations
from dstune.core.tokenizers import open_tokenizer
from dstune.data.chat.template import ChatTemplate

log = logging.getLogger(__name__)

TEXTS_AT_ONCE = 16


class TextWriter(Protocol):
    """Lets a model answer prompts."""

    def __call__(
        self, model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float
    ) -> list[str]:
        """Return what the model writes after each prompt (token ids), computed together. temperature: 0 takes the most probable
        tokens; otherwise torch's generator draws."""


def rewritten(texts: Sequence[str], settings: AugmentConfig, write: TextWriter) -> list[str]:
    """Rewrite each text with the models of `settings`, one after another. A text for which a model writes nothing is empty.

    Texts of a batch are padded to the longest, so the last bits of the arithmetic may depend on the other texts of the batch:
    the order of `texts` is part of the input. Raises UserError if a model is not on this machine.
    """
    rewrites = list(texts)
    for number, path in enumerate(settings.models):
        rewrites = _rewrite_by(rewrites, path, settings, write, seed=settings.seed * 1009 + number)
    return rewrites


def _rewrite_by(texts: list[str], path: str, settings: AugmentConfig, write: TextWriter, *, seed: int) -> list[str]:
    import torch

    from dstune.zero import accelerator

    tokenizer, model = _load(path)
    on_gpu = accelerator.present()
    device = torch.device(accelerator.kind(), int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    model = model.to(device).eval()
    answers: list[str] = []
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.manual_seed(seed)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            log.info("rewriting by %s", path, extra={"done": start, "total": len(texts)})
            batch = texts[start : start + TEXTS_AT_ONCE]
            prompts = _prompt_ids(tokenizer, model, [settings.prompt.replace("{text}", text) for text in batch])
            generated = write(model, tokenizer, prompts, settings.max_new_tokens, settings.temperature)
            # A text that became empty stays empty: the next model would invent one.
            answers += [answer if text else "" for answer, text in zip(generated, batch, strict=True)]
    del model
    if on_gpu:
        accelerator.module().empty_cache()
    return answers


def _load(path: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    local = str(samples.resolve(path, fetch=False)) if samples.is_sample(path) else path
    try:
        config = without_stored_implementations(AutoConfig.from_pretrained(local, local_files_only=True))
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(local, config=config, local_files_only=True)
        tokenizer = open_tokenizer(local, where="data.augment.models", local_files_only=True)
    except (OSError, ValueError) as error:
        reason = f"cannot be loaded: {first_line(error)}"
        raise UserError(
            Problem("data.augment.models", reason, "a folder, or a hub id that is in the cache", path)
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer, model


def _prompt_ids(tokenizer: Any, model: Any, prompts: list[str]) -> list[list[int]]:
    """Return the tokens of prompts, with the chat template of a decoder that has one."""
    options = {"truncation": True} if model.config.is_encoder_decoder else {"add_special_tokens": True}
    if tokenizer.chat_template and not model.config.is_encoder_decoder:
        template = ChatTemplate(tokenizer, None)
        prompts = [template.text([{"role": "user", "content": prompt}], prompt=True) for prompt in prompts]
        options = {"add_special_tokens": False}
    ids: list[list[int]] = tokenizer(prompts, **options)["input_ids"]
    return ids


def identity(path: str) -> list[Any]:
    """Return what identifies a model: the sizes and times of its files, or its commit in the hub's cache."""
    folder = samples.resolve(path, fetch=False) if samples.is_sample(path) else Path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached_file = try_to_load_from_cache(path, "config.json")
        return [path, Path(cached_file).parent.name if isinstance(cached_file, str) else None]
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors", ".jinja")]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
