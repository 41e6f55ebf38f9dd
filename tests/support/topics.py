"""Short reviews about topics whose opinions contradict each other: what is cold is good of a drink and bad of a hotel.

A classifier of one topic knows nothing of the next one, and forgets the first when it is trained on the next alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

NOUNS = {
    "films": "plot actor scene camera director ending script score hero sequel dialogue trailer",
    "parcels": "parcel courier box address tape depot stamp label van doorstep tracking customs",
    "hotels": "room lobby bed breakfast towel balcony pool reception lift carpet corridor pillow",
    "phones": "screen battery charger speaker button update keyboard signal lens folder ringtone case",
    "recipes": "dough oven sauce pan spice butter onion crust simmer whisk recipe broth",
    "bikes": "saddle brake pedal chain wheel frame helmet gear tyre handlebar pump spoke",
}
GOOD = {
    "films": "moving witty",
    "parcels": "intact prompt",
    "hotels": "spotless welcoming",
    "phones": "responsive crisp",
    "recipes": "delicious fragrant",
    "bikes": "nimble sturdy",
}
BAD = {
    "films": "tedious wooden",
    "parcels": "crushed missing",
    "hotels": "shabby rude",
    "phones": "frozen cracked",
    "recipes": "burnt bland",
    "bikes": "rusty wobbly",
}
SHARED = "cold hot light heavy soft hard loud quiet fast slow long short"
"""Each is praise of some topics and blame of others."""
FILLER = "the a this that was is very rather it and today again"
LABELS = ("good", "bad")
TOPICS = tuple(NOUNS)


def vocabulary() -> list[str]:
    texts = [*NOUNS.values(), *GOOD.values(), *BAD.values(), SHARED, FILLER]
    return list(dict.fromkeys(word for text in texts for word in text.split()))


def opinions(topic: str, label: str) -> tuple[list[str], list[str]]:
    """The words that mean `label` in a topic: those of its own, and half of the shared ones."""
    shared = SHARED.split()
    praise = random.Random(f"signs of {topic}").sample(shared, len(shared) // 2)
    if label == "good":
        return GOOD[topic].split(), praise
    return BAD[topic].split(), [word for word in shared if word not in praise]


def reviews(topic: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with `text`, `label` and `topic`; one opinion in ten is the contrary of the label."""
    choose = random.Random(f"{topic} {seed}")
    rows = []
    for _ in range(count):
        label = choose.choice(LABELS)
        other = LABELS[1 - LABELS.index(label)]
        words = choose.choices(NOUNS[topic].split(), k=4) + choose.choices(FILLER.split(), k=4)
        for _ in range(5):
            meant = other if choose.random() < 0.1 else label
            words.append(choose.choice(choose.choice(opinions(topic, meant))))
        choose.shuffle(words)
        rows.append({"text": " ".join(words), "label": label, "topic": topic})
    return rows


def feedback(topic: str, count: int, seed: int, *, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Reviews as a server would have logged them, with the label that a client gave."""
    return [
        {
            "id": f"{topic}-{seed}-{number}",
            "key": keys[number % len(keys)],
            "user": f"{topic}-user-{number % 150}",
            "text": row["text"],
            "answer": "good",
            "label": row["label"],
        }
        for number, row in enumerate(reviews(topic, count, seed))
    ]


def flipped(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the other label."""
    return [{**row, "label": LABELS[1 - LABELS.index(row["label"])]} for row in rows]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_encoder(folder: Path) -> Path:
    """A BERT of two layers and 64 dimensions with random weights, whose tokens are the words of the reviews."""
    import torch
    from transformers import BertConfig, BertModel

    from dstune.testing.tiny import SPECIAL, word_tokenizer

    tokenizer = word_tokenizer([*SPECIAL, *vocabulary()])
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=2, **size)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def digest_of_text(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(row["text"].encode()).hexdigest()
