"""Tiny random models with a real tokenizer and chat template, and small data, all made from seeds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from dstune.testing.tiny import SPECIAL, word_tokenizer

WORDS = [f"w{number}" for number in range(96)]


def save_tokenizer(folder: Path) -> None:
    """Save a word-level tokenizer of about 100 tokens with ChatML as its chat template."""
    word_tokenizer(SPECIAL + WORDS).save_pretrained(folder)


def _save_model(folder: Path, seed: int, model_class: Any, config: Any) -> Path:
    """Save a model of random weights and the tokenizer in `folder`; returns the folder."""
    import torch

    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_decoder(folder: Path, *, tied: bool = False, seed: int = 0, **changes: object) -> Path:
    """Write a two-layer Llama of about 30,000 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 2,
        "initializer_range": 0.2,  # large enough that attention and dropout matter to the loss
    }
    return _save_model(folder, seed, LlamaForCausalLM, LlamaConfig(**(settings | changes)))


def save_encoder(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Write a two-layer BERT body (no classification head) of about 30,000 parameters."""
    from transformers import BertConfig, BertModel

    settings = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    return _save_model(folder, seed, BertModel, BertConfig(**(settings | changes)))


def save_xlnet(folder: Path) -> Path:
    """Write a two-layer XLNet, which writes no text: each position reads all others, and its config.json does not say so."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    settings = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.2, "pad_token_id": 2}
    config = XLNetConfig(vocab_size=len(SPECIAL) + len(WORDS), bos_token_id=1, eos_token_id=4, **settings)
    return _save_model(folder, 0, XLNetLMHeadModel, config)


def save_classifier(folder: Path) -> Path:
    """Write the same with a head of random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    save_encoder(folder)
    names = dict(enumerate(("benign", "attack")))
    config = BertConfig.from_pretrained(folder, id2label=names, label2id={name: index for index, name in names.items()})
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


SEQ2SEQ_TOKENS = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 4, "decoder_start_token_id": 2}


def save_t5(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Write a T5 of two layers on each side and about 45,000 parameters, its vocabulary shared three times."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {"vocab_size": len(SPECIAL) + len(WORDS), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    settings |= {"num_heads": 4, "dropout_rate": 0.0, "initializer_factor": 1.0, **SEQ2SEQ_TOKENS}
    return _save_model(folder, seed, T5ForConditionalGeneration, T5Config(**(settings | changes)))


def save_bart(folder: Path, **changes: object) -> Path:
    """Write a BART of two layers on each side and about 60,000 parameters."""
    from transformers import BartConfig, BartForConditionalGeneration

    settings = {"vocab_size": len(SPECIAL) + len(WORDS), "d_model": 32, "max_position_embeddings": 128}
    for side in ("encoder", "decoder"):
        settings |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    settings |= {"dropout": 0.0, "init_std": 0.2, "forced_eos_token_id": None, **SEQ2SEQ_TOKENS}
    return _save_model(folder, 0, BartForConditionalGeneration, BartConfig(**(settings | changes)))


def save_joined_encoders(folder: Path, encoder: Path) -> Path:
    """Write an `EncoderDecoderModel` of twice the same encoder, with new cross attention."""
    import torch
    from transformers import EncoderDecoderModel

    torch.manual_seed(0)
    EncoderDecoderModel.from_encoder_decoder_pretrained(str(encoder), str(encoder)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_pairs(path: Path, rows: int) -> Path:
    """Write sources of words; a target is, for some of the first words, the word that follows it: w5 w7 w9 gives w6 w8."""
    choose = random.Random(0)
    with path.open("w") as stream:
        for _ in range(rows):
            numbers = choose.choices(range(len(WORDS) - 1), k=choose.randint(2, 12))
            source_numbers = numbers[: choose.choice([1, 1, 2, 5, 12])]
            row = {
                "source": " ".join(WORDS[n] for n in numbers),
                "target": " ".join(WORDS[n + 1] for n in source_numbers),
            }
            stream.write(json.dumps(row) + "\n")
    return path


def write_dialogues(path: Path, rows: int, *, seed: int = 0, turns: tuple[int, int] = (1, 3)) -> Path:
    """Write dialogues whose answers differ much in length, so that targets are spread unevenly over micro-batches."""
    choose = random.Random(seed)
    with path.open("w") as stream:
        for _ in range(rows):
            messages = []
            for _ in range(choose.randint(*turns)):
                messages.append({"role": "user", "content": " ".join(choose.choices(WORDS, k=choose.randint(1, 12)))})
                answer = choose.choices(WORDS, k=choose.choice([1, 1, 2, 5, 20]))
                messages.append({"role": "assistant", "content": " ".join(answer)})
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_labelled(path: Path, rows: int, *, seed: int = 0) -> Path:
    """Write texts of two classes that differ in which half of the words they prefer."""
    choose = random.Random(seed)
    half = len(WORDS) // 2
    with path.open("w") as stream:
        for _ in range(rows):
            label = choose.choice(["left", "right"])
            preferred, others = (WORDS[:half], WORDS[half:]) if label == "left" else (WORDS[half:], WORDS[:half])
            words = [
                choose.choice(preferred if choose.random() < 0.8 else others) for _ in range(choose.randint(3, 20))
            ]
            stream.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


def write_preferences(path: Path, rows: int, *, seed: int = 0) -> Path:
    """Write prompts with two answers of very different lengths; the better one prefers the first half of the words."""
    choose = random.Random(seed)
    half = len(WORDS) // 2

    def answer(good: bool) -> list[dict]:
        preferred, others = (WORDS[:half], WORDS[half:]) if good else (WORDS[half:], WORDS[:half])
        words = [
            choose.choice(preferred if choose.random() < 0.8 else others) for _ in range(choose.choice([1, 2, 5, 20]))
        ]
        return [{"role": "assistant", "content": " ".join(words)}]

    with path.open("w") as stream:
        for _ in range(rows):
            question = " ".join(choose.choices(WORDS, k=choose.randint(1, 12)))
            prompt = [{"role": "user", "content": question}]
            stream.write(json.dumps({"prompt": prompt, "chosen": answer(True), "rejected": answer(False)}) + "\n")
    return path


def write_contrastive(path: Path, rows: int) -> Path:
    """Write texts that share words with their positive; every third row has a negative that does not. One anchor comes twice."""
    choose = random.Random(0)

    def text(words: list[str], count: int) -> str:
        return " ".join(choose.choices(words, k=count))

    first = ""
    with path.open("w") as stream:
        for number in range(rows):
            topic = choose.sample(WORDS, 6)
            row = {"anchor": text(topic, choose.randint(2, 12)), "positive": text(topic, choose.randint(2, 12))}
            if number % 3 == 0:
                row["negative"] = text(choose.sample(WORDS, 6), choose.randint(2, 12))
            if number == 1:
                row["anchor"] = first
            first = first or row["anchor"]
            stream.write(json.dumps(row) + "\n")
    return path


def write_tagged(path: Path, rows: int, *, seed: int = 0) -> Path:
    """Write sentences in which some words begin an entity that the next few continue."""
    choose = random.Random(seed)
    with path.open("w") as stream:
        for _ in range(rows):
            tokens, tags = [], []
            while len(tokens) < 2 or choose.random() < 0.85:
                kind = choose.choice(["O", "O", "X", "Y"])
                first = {"O": 0, "X": 32, "Y": 64}[kind]
                tokens.append(choose.choice(WORDS[first : first + 16]))
                tags.append(kind if kind == "O" else f"B-{kind}")
                for _ in range(0 if kind == "O" else choose.randrange(3)):
                    tokens.append(choose.choice(WORDS[first + 16 : first + 32]))
                    tags.append(f"I-{kind}")
            stream.write(json.dumps({"tokens": tokens, "tags": tags}) + "\n")
    return path


def write_questions(path: Path, rows: int, *, seed: int = 0, unanswered: float = 0.0) -> Path:
    """Write texts in which the words of the last sixth of the vocabulary are the answer; with `unanswered`, a share that has
    none."""
    choose = random.Random(seed)
    words, answers = WORDS[:80], WORDS[80:]
    with path.open("w") as stream:
        for _ in range(rows):
            words_before, answer, words_after = (
                choose.choices(vocabulary, k=choose.randint(1, most))
                for vocabulary, most in ((words, 12), (answers, 3), (words, 12))
            )
            answer_list = [{"text": " ".join(answer), "answer_start": len(" ".join(words_before)) + 1}]
            if choose.random() < unanswered:
                answer, answer_list = [], []
            text = " ".join([*words_before, *answer, *words_after])
            row = {
                "question": choose.choice(words),
                "context": text,
                "answers": answer_list,
                "source": choose.choice("ab"),
            }
            stream.write(json.dumps(row) + "\n")
    return path


def write_scored(path: Path, rows: int, *, seed: int = 0) -> Path:
    """Write texts whose label is the share of words of the second half of the vocabulary."""
    choose = random.Random(seed)
    with path.open("w") as stream:
        for _ in range(rows):
            words = choose.choices(WORDS, k=choose.randint(3, 20))
            label = sum(WORDS.index(word) >= len(WORDS) // 2 for word in words) / len(words)
            stream.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path
