"""Small tokenizers and files for the tests of the data path."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.configs import run_config
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dstune.config.data_schema import DataConfig
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.core.rank_env import RankEnv
from dstune.data.build import prepare
from dstune.data.prepared import PreparedData
from dstune.generation.answers import write_texts
from dstune.protocols.task import TaskConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.testing.tiny import CHATML

SPECIAL = [
    "<|begin_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "[INST]",
    "[/INST]",
    "<s>",
    "</s>",
]

TRAINING_TEXT = [
    "user assistant system tool Hello how are you? I am fine, thanks. The answer is four. What is two and two?\n",
    "the weather in Paris is sunny and warm today, is it not? yes it is, and no it is not.\n",
] * 4


@cache
def _bpe(bos: str | None) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    if bos:
        pair = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    return tokenizer.to_str()


def byte_tokenizer(template: str | None = CHATML, *, eos: str = "<|im_end|>", bos: str | None = None) -> Any:
    """A byte-level BPE of 420 tokens that can write any text; `bos` is put in front by itself, as Llama does."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(bos)),
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,  # as many models have it: the end must not vanish with the padding
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def metaspace_tokenizer(template: str) -> Any:
    """As SentencePiece models have it: the space before a word is part of the word's token."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


def wordpiece() -> PreTrainedTokenizerFast:
    """Like BERT's: [CLS] and [SEP] around, every letter a sub-word, control characters dropped."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "!", *letters, *(f"##{letter}" for letter in letters)]
    index = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(index, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def exchange(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(count: int) -> list[dict[str, Any]]:
    """`count` different conversations of one exchange."""
    return [exchange(f"What is {number} and two?", f"The answer is {number + 2}.") for number in range(count)]


def data_run(train: Path | str, *, task: TaskConfig | None = None, **data: Any) -> RunConfig:
    """A configuration for these training rows, chat with a frozen date if no task is given."""
    return run_config(task=task or ChatConfig(template_date="2025-03-09"), data=DataConfig(train=str(train), **data))


def prepared(config: RunConfig, tokenizer: Any, cache_root: Path) -> PreparedData:
    return prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "environment"), cache_root, write=write_texts)


def refusal_of(config: RunConfig, tokenizer: Any, folder: Path) -> list[Problem]:
    """What is wrong with the rows."""
    with pytest.raises(UserError) as caught:
        prepared(config, tokenizer, folder / "cache")
    return caught.value.problems
