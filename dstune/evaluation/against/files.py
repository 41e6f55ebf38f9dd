"""Differences of tokenizer, chat template, generation settings and architecture, which need no answer of the models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dstune.evaluation.against.difference import Difference, listed
from dstune.evaluation.against.sides import Side

WITHOUT_EFFECT = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "attn_implementation", "model_type", "quantization_config"),
        *("transformers_version", "tokenizer_class", "torch_dtype", "dtype", "use_cache", "pretraining_tp"),
        *("unsloth_version", "unsloth_fixed", "finetuning_task", "task_specific_params", "problem_type", "return_dict"),
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "hidden_dropout", "resid_pdrop", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "is_decoder"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "reorder_and_upcast_attn"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        *("vocab_size", "tie_word_embeddings", "num_hidden_layers", "n_layer", "layer_types"),
        *("max_position_embeddings", "max_window_layers"),
    )
)
"""Keys of an architecture that change no answer, or whose effect shows in the weights, the tokenizer or the generation
settings."""
ROTARY = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"})
IN_GGUF = frozenset(
    {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "head_dim"}
) | frozenset({"rope_parameters"})
"""Keys that transformers reads from a GGUF file; it fills the others with its defaults."""
LLAMAS = {"llama", "mistral"}
"""Families that one architecture of GGUF stands for."""
WITHOUT_EFFECT_ON_ANSWERS = frozenset(
    {
        "transformers_version",
        "_from_model_config",
        "output_attentions",
        "output_hidden_states",
        "use_cache",
        "pad_token_id",
    }
    | {"cache_implementation", "return_dict_in_generate", "max_length"}
)
SPECIAL = ("bos_token", "eos_token", "unk_token")


def compare_files(model: Side, expected: Side) -> Iterator[Difference]:
    """Yield what differs in the files that decide answers beside the weights."""
    yield from _vocabulary(model, expected)
    yield from _special_tokens(model, expected)
    beginnings = list(_beginning(model, expected))
    yield from beginnings
    if model.template != expected.template and not (beginnings and _differ_in_beginning(model, expected)):
        yield _template(model, expected)
    yield from _architecture(model, expected)
    if model.gguf is None and expected.gguf is None:  # a GGUF file has no generation settings
        yield from _generation(model, expected)


def _vocabulary(model: Side, expected: Side) -> Iterator[Difference]:
    ids, expected_ids = model.tokenizer.get_vocab(), expected.tokenizer.get_vocab()
    if ids == expected_ids:
        return
    shared = [token for token in expected_ids if token in ids]
    moves = {ids[token] - expected_ids[token] for token in shared}
    moved = [token for token in shared if ids[token] != expected_ids[token]]
    if moved:
        by = f"all by {next(iter(moves))}" if len(moves) == 1 else f"{len(moved):,} of {len(shared):,}"
        detail = f"tokens have other numbers than in {expected.name} ({by}): {listed(map(repr, moved))}"
        yield Difference("vocabulary_shifted", detail, f"copy the tokenizer files of {expected.name}")
    if lost := [token for token in expected_ids if token not in ids]:
        added = set(expected.tokenizer.get_added_vocab())
        kind = "special_tokens_missing" if set(lost) <= added else "vocabulary"
        detail = f"{len(lost):,} tokens of {expected.name} are missing: {listed(map(repr, lost))}"
        yield Difference(kind, detail, f"copy the tokenizer files of {expected.name}")
    if extra := [token for token in ids if token not in expected_ids]:
        detail = f"{len(extra):,} tokens are not in {expected.name}: {listed(map(repr, extra))}"
        yield Difference("vocabulary", detail, f"copy the tokenizer files of {expected.name}")


def _special_tokens(model: Side, expected: Side) -> Iterator[Difference]:
    for name in SPECIAL:
        token, expected_token = getattr(model.tokenizer, name, None), getattr(expected.tokenizer, name, None)
        if token != expected_token:
            kind = "end_token" if name == "eos_token" else "special_tokens"
            detail = f"its tokenizer has {name} {token!r}, {expected.name} has {expected_token!r}"
            yield Difference(kind, detail, f"write {name} {expected_token!r} into its tokenizer_config.json")


def _beginning(model: Side, expected: Side) -> Iterator[Difference]:
    """Compare how often a rendered conversation begins with BOS for a program that tokenizes it as any other text."""
    count, expected_count = _beginnings(model.tokenizer), _beginnings(expected.tokenizer)
    if count == expected_count:
        return
    detail = (
        f"a rendered conversation that is tokenized as text begins with {count} BOS tokens, with {expected_count} in "
        f"{expected.name}: its tokenizer or its template adds one"
    )
    kind = "bos_twice" if count > max(expected_count, 1) else "bos"
    yield Difference(kind, detail, f"take add_bos_token, the post-processor and the template from {expected.name}")


def _beginnings(tokenizer: Any) -> int:
    if not tokenizer.chat_template or tokenizer.bos_token_id is None:
        return 0 if tokenizer.bos_token_id is None else int(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    text = _render(tokenizer, "a")
    ids = [] if text is None else tokenizer(text)["input_ids"]
    return next((at for at, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))


def _render(tokenizer: Any, question: str) -> str | None:
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template of others may raise anything
        return None
    return text


def _differ_in_beginning(model: Side, expected: Side) -> bool:
    """Return whether the templates render a question alike but for BOS."""
    bos = model.tokenizer.bos_token or ""
    texts = [_render(side.tokenizer, "a") for side in (model, expected)]
    return (
        bool(bos) and None not in texts and len({str(text).removeprefix(bos).removeprefix(bos) for text in texts}) == 1
    )


def _template(model: Side, expected: Side) -> Difference:
    text, expected_text = _render(model.tokenizer, "a"), _render(expected.tokenizer, "a")
    if not model.template:
        detail = f"has no chat template, {expected.name} has one"
    elif not expected.template:
        detail = f"has a chat template, {expected.name} has none"
    elif text == expected_text:
        detail = f"its chat template is not that of {expected.name}; it renders a question alike, other conversations may differ"
    else:
        detail = f"its chat template renders a question as {text!r}, that of {expected.name} as {expected_text!r}"
    return Difference("template", detail, f"copy chat_template.jinja of {expected.name}")


def _architecture(model: Side, expected: Side) -> Iterator[Difference]:
    values, expected_values = (side.module.config.get_text_config().to_dict() for side in (model, expected))
    families = {str(side.get("model_type")) for side in (values, expected_values)}
    if len(families) > 1 and not ((model.gguf or expected.gguf) and families <= LLAMAS):
        detail = f"is a model of the family {values.get('model_type')}, {expected.name} of {expected_values.get('model_type')}"
        yield Difference("architecture", detail, "compare it with the model that it was made of")
        return
    for key in sorted({*values, *expected_values} - WITHOUT_EFFECT):
        if (model.gguf or expected.gguf) and key not in IN_GGUF:
            continue
        value, expected_value = values.get(key), expected_values.get(key)
        if key == "rope_parameters":
            value, expected_value = _rotary(value), _rotary(expected_value)
        if value == expected_value or ((model.gguf or expected.gguf) and _close(value, expected_value)):
            continue
        shown = (
            f"{key} is {json.dumps(value, default=str)}, in {expected.name} {json.dumps(expected_value, default=str)}"
        )
        kind = "rope" if key in ROTARY else "architecture"
        yield Difference(kind, shown, f"copy config.json of {expected.name}")


def _rotary(value: Any) -> Any:
    """Return the settings of rotary positions without those that repeat a default."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def _close(value: Any, expected: Any) -> bool:
    """Return whether a number of a GGUF file, which stores 32 bits, is that of a configuration."""
    if isinstance(value, dict) and isinstance(expected, dict):
        return all(_close(value.get(key), expected.get(key)) for key in value.keys() & expected.keys())
    if isinstance(value, float) and isinstance(expected, int | float):
        return abs(value - expected) <= 1e-6 * abs(expected)
    return bool(value == expected or value is None or expected is None)


def _generation(model: Side, expected: Side) -> Iterator[Difference]:
    settings, expected_settings = (side.module.generation_config.to_diff_dict() for side in (model, expected))
    for key in sorted({*settings, *expected_settings} - WITHOUT_EFFECT_ON_ANSWERS):
        value, expected_value = settings.get(key), expected_settings.get(key)
        if _as_list(value) != _as_list(expected_value):
            kind = "stop_tokens" if key == "eos_token_id" else "generation"
            detail = f"generation settings: {key} is {value}, in {expected.name} {expected_value}"
            yield Difference(kind, detail, f"copy generation_config.json of {expected.name}")


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]
