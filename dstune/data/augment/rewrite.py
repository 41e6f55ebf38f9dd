"""Let models rewrite texts: translate them there and back with two models, or paraphrase them with one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstune import samples
from dstune.config.augment_schema import AugmentConfig
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.stored_implementations import without_stored_implementations
from dstune.core.tokenizers import open_tokenizer
from dstune.data.chat.template import ChatTemplate

log = logging.getLogger(__name__)

TEXTS_AT_ONCE = 16


def rewritten(texts: Sequence[str], settings: AugmentConfig) -> list[str]:
    """Rewrite each text with the models of `settings`, one after another. A text for which a model writes nothing is empty.

    Texts of a batch are padded to the longest, so the last bits of the arithmetic may depend on the other texts of the batch:
    the order of `texts` is part of the input. Raises UserError if a model is not on this machine.
    """
    rewrites = list(texts)
    for number, path in enumerate(settings.models):
        rewrites = _rewrite_by(rewrites, path, settings, seed=settings.seed * 1009 + number)
    return rewrites


def _rewrite_by(texts: list[str], path: str, settings: AugmentConfig, *, seed: int) -> list[str]:
    import torch

    from dstune.zero import accelerator

    tokenizer, model = _load(path)
    on_gpu = accelerator.present()
    device = torch.device(accelerator.kind(), int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    model = model.to(device).eval()
    answers: list[str] = []
    with torch.random.fork_rng(devices=[device] if on_gpu else []), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            log.info("rewriting by %s", path, extra={"done": start, "total": len(texts)})
            batch = texts[start : start + TEXTS_AT_ONCE]
            prompts = [settings.prompt.replace("{text}", text) for text in batch]
            inputs, begin = _inputs(tokenizer, model, prompts)
            sampling = (
                {"temperature": settings.temperature} if settings.temperature else {"temperature": None, "top_p": None}
            )
            tokens = model.generate(
                **inputs.to(device),
                max_new_tokens=settings.max_new_tokens,
                do_sample=settings.temperature > 0,
                num_beams=1,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
            generated = [tokenizer.decode(row[begin:], skip_special_tokens=True).strip() for row in tokens]
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


def _inputs(tokenizer: Any, model: Any, prompts: list[str]) -> tuple[Any, int]:
    """Return the padded prompts, and the index of the answer's first token in a generated row."""
    if model.config.is_encoder_decoder:
        return tokenizer(prompts, return_tensors="pt", padding=True, truncation=True), 1
    tokenizer.padding_side = "left"
    special = True
    if tokenizer.chat_template:
        template = ChatTemplate(tokenizer, None)
        prompts = [template.text([{"role": "user", "content": prompt}], prompt=True) for prompt in prompts]
        special = False
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=special)
    return inputs, inputs["input_ids"].shape[1]


def identity(path: str) -> list[Any]:
    """Return what identifies a model: the sizes and times of its files, or its commit in the hub's cache."""
    folder = samples.resolve(path, fetch=False) if samples.is_sample(path) else Path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached_file = try_to_load_from_cache(path, "config.json")
        return [path, Path(cached_file).parent.name if isinstance(cached_file, str) else None]
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors", ".jinja")]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
