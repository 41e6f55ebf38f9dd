"""Real chat templates x dialogues: is what dstune trains what a server would make the model write?

    python benchmarks/templates.py [--folder FOLDER] [--markdown FILE] [--only NAME] [--show DIALOGUE] [--marked] [--reasoning MODE]
    python benchmarks/templates.py --families [--folder FOLDER]
    python benchmarks/templates.py --factors

Templates are read from installed packages (TRL ships those of 40 models), from dstune, with `--folder` from the `.jinja`
files of a folder, and with `--family-file` from a list of models (FAMILY_FILE); none of them but dstune's is part of this
repository. The source package of llama-cpp-python has 25 more (`vendor/llama.cpp/models/templates`):

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.16
    tar xzf llama_cpp_python-0.3.16.tar.gz --wildcards '*/models/templates/*.jinja'

The tokenizer is made up, with the template's own control tokens in it: what is compared is which tokens
are context and which are trained, not a vocabulary. A dialogue is read and stored as a row of a file; plain transformers
renders it as it stands here. Each cell is one of

- `=`   each trained turn is, token by token, what transformers' own rendering asks for and writes, each one once;
- `n=`  so in n samples, since the template rewrites the history;
- a number of a refusal, which is listed below the table;
- `WRONG` otherwise, and the program ends with 1.

With `--families` dstune's own templates are compared with those of the families that they are for, turn by turn: whether the
context and the answer are the same, token by token. A turn that one of the two does not print is counted apart.

With `--marked` the templates are those in which TRL marks what is to be trained (`{% generation %}`), and their marks are
compared with the rule (`task.turns=all`), rendered with the same arguments: `=`, or how many tokens only the marks and only
the rule train.

With `--factors` conversations of 3, 10 and 40 exchanges with reasoning in each are rendered with a template that drops it from
the history, and the tokens of all samples divided by those of the longest.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dstune.chat_templates import FOLDER
from dstune.config.architectures import mark_stops
from dstune.core.errors import UserError
from dstune.data.chat.call_ids import with_call_ids
from dstune.data.chat.proof import Server, difference
from dstune.data.chat.template import ChatTemplate, visible_messages
from dstune.data.collate import NO_TARGET
from dstune.data.messages import conversation_of, conversation_row
from dstune.data.problems import RowError
from dstune.data.render import ChatRenderer, RenderError
from dstune.data.rows import json_text
from dstune.data.stopping import stop_token_ids
from dstune.data.template_date import freeze_date
from dstune.data.tokenize import RowTokenizer
from dstune.tasks.chat.config import ChatConfig, Reasoning, Turns

DATE = "2026-01-15"

ENDS: dict[str, tuple[str, ...]] = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),  # noqa: RUF001
    "gemma4": ("<eos>", "<turn|>", "<|tool_response>"),
    "gemma": ("<eos>", "<end_of_turn>"),
    "diffusion_gemma": ("<eos>", "<turn|>", "<|tool_response>"),
    "glm": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|endoftext|>", "<|call|>"),
    "gpt_oss": ("<|return|>", "<|endoftext|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>",),
    "smolvlm": ("<end_of_utterance>",),
    "granite": ("<|end_of_text|>",),
    "llama3": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    "llava": ("<|im_end|>",),
    "mistral": ("</s>",),
    "rwkv": ("<s>",),
    "phi3": ("<|endoftext|>", "<|assistant|>", "<|end|>"),
    "phi4": ("<|endoftext|>", "<|im_end|>"),
}
"""End tokens of the generation settings of a family's models, the tokenizer's own first; of the others `<|im_end|>`."""

FAMILIES = {
    "command-r": "cohere",
    "deepseek": "deepseek",
    "gemma-2": "gemma",
    "gpt-oss": "gptoss",
    "granite": "granite",
    "llama-3": "llama3",
    "functionary": "llama3",
    "mistral": "mistral",
    "phi-3": "phi3",
    "rwkv": "rwkv",
}
"""Of a file in `--folder`: the family, by a part of its name. Hermes ends turns with `<|im_end|>` as most others do."""

FAMILY_FILE = "github.com/xorbitsai/inference, xinference/model/llm/llm_family.json, commit 7ecec16b, 2026-08-23"
"""Where models and their templates are listed that `--family-file` reads; none of the texts is part of this repository."""

DIGESTS = {
    "mistral-instruct-v0.3": "da883c18dcbef495",
    "QwQ-32B": "61433aea83935899",
    "deepseek-r1": "56a1447ad31926fd",
    "deepseek-r1-0528": "197ecb0f6315af91",
    "deepseek-r1-distill-qwen": "563b1ce7d61d50a9",
    "deepseek-v3": "013e5cdf3c2262d4",
    "gemma-3-1b-it": "7de1c58e208eda46",
    "glm4-0414": "854b703e44ca06bd",
    "llama-3-instruct": "b61f26f00f0da37e",
    "llama-3.2-vision-instruct": "0859dabef7a030ee",
    "minicpm5-1b": "7451a05cf1e28a79",
    "mistral-large-instruct": "979039119fc23c71",
    "phi-3-mini-128k-instruct": "93d7bfd74b1ee92c",
    "qwen2.5-instruct-1m": "44d5f08f3f72b837",
    "qwen3": "87a2728cb8dc9fe4",
    "Qwen3-Instruct": "40c21f34cf67d8c7",
    "Qwen3-Thinking": "3802169b2a02b81e",
    "Qwen3-Coder": "7e0648e7a298d820",
    "Ernie4.5": "471fb57197677031",
    "glm-4.5": "d20580d25443aebf",
    "gpt-oss": "f8d9255777615591",
    "Deepseek-V3.1": "497e31426df76e29",
    "seed-oss": "fbcca444c9d1fc19",
    "MiniMax-M2": "55beae30a60db5ce",
    "DeepSeek-V3.2": "b22a3f6dbd50fb13",
    "GLM-4.7": "a7e85db118575233",
    "Kimi-K2.5": "7c91e4b3578b518b",
    "qwen3.5": "a4aee8afcf2e0711",
    "qwen3.6": "e84f32a23fdda276",
    "qwen3.8": "c3cf9e34abf4f9e3",
    "MiniMax-M3": "11421244f6755349",
    "glm-5.2": "172dc74a35e1752d",
}
"""Of models in that file: the first 16 digits of the SHA-256 of the template that was measured."""

SPECIAL = re.compile(r"<[|｜][^<>{}'\"\s]{1,40}[|｜]>|<\|?/?[a-z_]+\|?>|\[/?[A-Z_]+\]|<bos>|</?s>")  # noqa: RUF001
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen cut texts into words."""
TEXT_TAGS = {
    "<think>",
    "</think>",
    "<tools>",
    "</tools>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
}


def tokenizer_for(name: str, template: str, ends: tuple[str, ...] = (), control_tokens: tuple[str, ...] = ()) -> Any:
    """Return a byte-level tokenizer with the control tokens that `template` prints.

    ends: those of the generation settings, where they are not told by the name; control_tokens: further ones of the vocabulary.
    """
    ends = ends or next((ends for family, ends in ENDS.items() if name.startswith(family)), ("<|im_end|>",))
    tokens = dict.fromkeys([*ends, *control_tokens, *SPECIAL.findall(template), "<s>"])
    special = [
        token
        for token in tokens
        if (token not in TEXT_TAGS and not re.fullmatch(r"</?[a-z_]{2,}>", token)) or token in (*ends, *control_tokens)
    ]
    if "<bos>" in tokens or name.startswith(("gemma", "diffusion")):
        special.append("<bos>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "ĊĊ", "ĠĠ"])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("Ġ", "Ġ")]))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    bos = "<bos>" if "<bos>" in special else "<|begin_of_text|>" if "<|begin_of_text|>" in special else "<s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        additional_special_tokens=list(dict.fromkeys(special)),
        bos_token=bos,
        eos_token=ends[0],
        pad_token=ends[0],
    )
    tokenizer.add_tokens(sorted(TEXT_TAGS & set(tokens)))
    tokenizer.chat_template = template
    mark_stops(tokenizer, tokenizer.convert_tokens_to_ids(list(ends)))
    return tokenizer


def family_of(name: str) -> str:
    """Return the name under which ENDS has the family of a template."""
    plain_name = name.removeprefix("dstune/").lower()
    if "hermes" in plain_name:
        return "hermes"
    return next((family for part, family in FAMILIES.items() if part in plain_name), plain_name)


def listed_templates(file: Path) -> dict[str, str]:
    """Return the templates that a list of models has (`FAMILY_FILE`), each text once, under the first model with it. A template
    that is not the one that was measured is reported."""
    template_by_model: dict[str, str] = {}
    for model in json.loads(file.read_text(encoding="utf-8")):
        name, text = model["model_name"].replace("/", "_"), model.get("chat_template")
        if not text or text in template_by_model.values():
            continue
        template_by_model[name] = text
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if DIGESTS.get(name, digest) != digest:
            print(f"{name}: another template than the one that was measured")
    return template_by_model


def templates(folder: Path | None = None, *, marked: bool = False) -> dict[str, str]:
    """Return templates by name: those in `folder`, else of TRL (without those that it changed for training, or these alone) and
    dstune's own."""
    if folder is not None:
        return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.jinja"))}
    template_by_name = {}
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None, "pip install trl"
    for file in sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja")):
        if file.stem.endswith("_training") == marked:
            template_by_name[file.stem] = file.read_text(encoding="utf-8")
    return (
        template_by_name
        if marked
        else template_by_name
        | {f"dstune/{file.stem}": file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
    )


def user(text: str = "What is the weather in Paris?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str | None = "It is sunny.", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def call(number: int = 1, city: str = "Paris") -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"days": 2, "city": city}}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(text: str = "sunny, 21 degrees", number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "get_weather", "content": text}


SYSTEM = {"role": "system", "content": "Answer in one sentence."}
PARAMETERS = {
    "type": "object",
    "properties": {
        "days": {"type": "integer", "description": "days"},
        "city": {"type": "string", "description": "a city", "default": None},
    },
    "required": ["city"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "The weather of a city", "parameters": PARAMETERS},
    }
]
THOUGHT = {"reasoning_content": "They ask about the sky."}

DIALOGUES: dict[str, dict[str, Any]] = {
    "one exchange": {"messages": [user(), says()]},
    "system": {"messages": [SYSTEM, user(), says()]},
    "three exchanges": {"messages": [user(), says(), user("And Rome?"), says("Rain."), user("Oslo?"), says("Snow.")]},
    "reasoning": {"messages": [user(), says(**THOUGHT)]},
    "reasoning twice": {
        "messages": [user(), says(**THOUGHT), user("And Rome?"), says("Rain.", reasoning_content="Rome now.")]
    },
    "inline reasoning": {"messages": [user(), says("<think>\nThe sky.\n</think>\n\nIt is sunny.")]},
    "call": {"messages": [user(), says(None, tool_calls=[call()])], "tools": TOOLS},
    "call, result, answer": {
        "messages": [SYSTEM, user(), says(None, tool_calls=[call()]), result(), says()],
        "tools": TOOLS,
    },
    "parallel calls": {
        "messages": [
            user("Paris and Rome?"),
            says(None, tool_calls=[call(), call(2, "Rome")]),
            result(),
            result("rain", 2),
            says("Sun and rain."),
            user("Thanks"),
            says("Welcome."),
        ],
        "tools": TOOLS,
    },
    "reasoning and call": {
        "messages": [
            user(),
            says(None, tool_calls=[call()], **THOUGHT),
            result(),
            says(reasoning_content="Sunny then."),
        ],
        "tools": TOOLS,
    },
    "text beside a call": {
        "messages": [user(), says("Let me look.", tool_calls=[call()]), result(), says()],
        "tools": TOOLS,
    },
    "empty answer": {"messages": [user(), says(""), user("Well?"), says()]},
    "emoji, line breaks": {"messages": [user("🙂\n\n"), says("\n\nÜber 21 °C 🌞\n"), user(" ok "), says(" 大きい ")]},
    "look-alike tokens": {
        "messages": [user("x <|im_end|> <|eot_id|> </s> y"), says("a <|im_end|>\n<|im_start|>user <|end|> b")]
    },
    "assistant first": {"messages": [says("Hello!"), user(), says()]},
    "weight 0": {"messages": [user(), says("It is wrong.", weight=0), user("And Rome?"), says("Rain.")]},
}


def prepared(dialogue: dict[str, Any]) -> dict[str, Any]:
    """Return a dialogue as it is stored when it is read as a row of a file; an answer that says nothing may be learned here. Raises
    RowError."""
    messages = conversation_of(dialogue["messages"], "messages")
    return dict(json.loads(json_text(conversation_row(messages, dialogue, needs_answer=True, silence=True))))


def cell(
    tokenizer: Any, dialogue: dict[str, Any], *, show: bool = False, reasoning: Reasoning = Reasoning.keep
) -> tuple[str, str]:
    """Return what the table shows, and a refusal's reason or what is wrong."""
    try:
        row = prepared(dialogue)
        marks = ["<think>", "</think>"] if reasoning is Reasoning.inline else []
        task = ChatConfig(template_date=DATE, reasoning=reasoning, reasoning_marks=marks)
        encode = RowTokenizer(tokenizer, task, "messages", max_length=100_000)
    except RowError as error:
        return "refused", str(error)
    except UserError as error:
        return "refused", "; ".join(str(problem) for problem in error.problems)
    samples = encode.samples([row], [0])
    if show:
        for sample in samples:
            print(sample.problem or repr(tokenizer.decode(sample.input_ids)))
            print("   trained:", repr(tokenizer.decode(sample.labels[sample.labels != NO_TARGET])))
    if problem := next((sample.problem for sample in samples if sample.problem), ""):
        return "refused", problem
    assert encode.renderer is not None
    stops = frozenset(stop_token_ids(tokenizer))
    server = Server(tokenizer, stops, DATE, {}, encode.renderer.facts)
    if encode.renderer.stops.plain:
        server = replace(server, ending=(encode.renderer.stops.plain, encode.renderer.stops.trailing))
    rows = [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]
    if "<|im_end|>" in str(dialogue["messages"]):  # transformers would make control tokens of what somebody wrote
        ids = [token for sample in rows for token in sample["input_ids"]]
        harmless = [{**message, "content": re.sub("<[^<>]*>", "", message["content"])} for message in row["messages"]]
        plain = encode.samples([{"messages": harmless}], [0])
        counts, expected = Counter(ids), Counter(token for sample in plain for token in sample.input_ids)
        special = tokenizer.all_special_ids
        is_same = all(counts[token] == expected[token] for token in special)
        return ("=", "") if is_same else ("WRONG", "a row wrote a control token")
    # As a client sends it, not as the row was read; a server gives calls the ids that the template takes.
    sent = with_call_ids(dialogue["messages"], encode.renderer.facts.call_ids)
    if reasoning is Reasoning.inline:
        sent = encode.renderer.prepare_messages(sent)
    turns = server.turns({**dialogue, "messages": sent})
    for turn in turns:
        if reason := difference(turn, rows, stops):
            return "WRONG", f"message {turn.number + 1}: {reason}"
    targets = sum(len(turn.target) + (not turn.by_text) for turn in turns)
    trained = sum(int(np.count_nonzero(sample["labels"] != NO_TARGET)) for sample in rows)
    if trained != targets:
        return "WRONG", f"{trained} tokens are trained, a server asks for {targets}"
    return ("=" if len(rows) == 1 else f"{len(rows)}="), ""


def marked_cell(tokenizer: Any, dialogue: dict[str, Any]) -> tuple[str, str]:
    """Return whether the template's own marks train what the rule does."""
    try:
        row = prepared(dialogue)
        task = ChatConfig(template_date=DATE, turns=Turns.all)
        encode = RowTokenizer(tokenizer, task, "messages", max_length=100_000)
    except (RowError, UserError) as error:
        return "refused", str(error)
    samples = encode.samples([row], [0])
    if problem := next((sample.problem for sample in samples if sample.problem), ""):
        return "refused", problem
    assert encode.renderer is not None
    last = next(message for message in reversed(row["messages"]) if message["role"] == "assistant")
    source = freeze_date(tokenizer.get_chat_template(tools=row.get("tools")), DATE)
    marked = tokenizer.apply_chat_template(
        [encode.renderer.facts.adapted(message) for message in visible_messages(row["messages"], source)],
        tools=row.get("tools"),
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **encode.renderer.arguments_for(last),
    )
    marked_tokens = {at for at, trained in enumerate(marked["assistant_masks"]) if trained}
    if len(samples) > 1:
        return f"{len(samples)} samples", "one with the marks: a rewritten history, or an answer inside a token"
    if samples[0].input_ids.tolist() != marked["input_ids"]:
        return "other tokens", "what looks like a control token is one with the marks"
    rule_tokens = set(np.flatnonzero(samples[0].labels != NO_TARGET).tolist())
    if rule_tokens == marked_tokens:
        return "=", ""
    ids = marked["input_ids"]
    excerpts = [
        repr(tokenizer.decode([ids[at] for at in sorted(only)]))
        for only in (marked_tokens - rule_tokens, rule_tokens - marked_tokens)
    ]
    return (
        f"+{len(marked_tokens - rule_tokens)} -{len(rule_tokens - marked_tokens)}",
        f"the marks alone train {excerpts[0]}, the rule alone {excerpts[1]}",
    )


DSTUNE_TEMPLATES = {
    "qwen3_instruct_2507": "chatml",
    "deepseek_r1_distill": "deepseek_r1",
    "gemma3": "gemma",
    "gemma4_v5": "gemma4",
    "gptoss": "gpt_oss",
    "llama3": "llama3",
    "llama3_1": "llama3",
    "mistral_v2v3": "mistral",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral_tekken",
    "phi3_5": "phi3",
    "phi_4": "phi4",
    "ibm-granite-granite-3.3-2B-Instruct": "granite",
}
"""By the file of a family's template, the name of dstune's template for that family."""


def compare_families(folder: Path | None) -> None:
    """Print a row for each family's template that is there."""
    template_by_name = templates() | (templates(folder) if folder else {})
    print("| template | family | turns | context and answer equal | context equal | different | not printed by one |")
    print("| --- " * 7 + "|")
    for family, name in DSTUNE_TEMPLATES.items():
        if family not in template_by_name:
            continue
        family_template = re.sub(r"{%-? *(end)?generation *-?%}", "", template_by_name[family])
        both = [template_by_name[f"dstune/{name}"], family_template]
        kinds: dict[str, list[str]] = {"equal": [], "context": [], "different": [], "dropped": []}
        for name_of_dialogue, dialogue in DIALOGUES.items():
            row = prepared(dialogue)
            last = len(row["messages"])
            for number in (at for at in range(1, last) if row["messages"][at]["role"] == "assistant"):
                pieces = [_turn_of(family_of(family), text, "".join(both), row, number) for text in both]
                kinds[_kind_of(pieces)].append(f"{name_of_dialogue} [{number + 1}]")
        counts = [len(kind_names) for kind_names in kinds.values()]
        print(f"| {name} | {family} | {sum(counts)} | {' | '.join(map(str, counts))} |")
        for kind in ("context", "different"):
            if kinds[kind]:
                print(f"    {kind}: {', '.join(kinds[kind])}")


def _turn_of(
    family: str, template: str, tokens: str, row: dict[str, Any], number: int
) -> tuple[str, str | None] | None:
    """Return context and answer of a turn: no answer where the conversation does not begin with the context, nothing where the
    template drops a part of them."""
    tokenizer = tokenizer_for(family, tokens)
    tokenizer.chat_template = template
    try:
        renderer = ChatRenderer(tokenizer, DATE)
        *context, answer = row["messages"][: number + 1]
        asked = [renderer.facts.adapted(message) for message in context]
        options = {"tools": row.get("tools"), "arguments": renderer.arguments_for(answer)}
        prompt = ChatTemplate(tokenizer, DATE).text(asked, prompt=True, **options)
        silent = [{**message, "weight": 0} for message in context]
        (passage,) = renderer.passages([*silent, {**answer, "weight": 1}], tools=row.get("tools"))
    except (RenderError, UserError) as error:
        return (prompt, None) if "than a server would prompt with" in str(error) else None
    return prompt, passage.text[passage.places[-1].start : passage.places[-1].end]


def _kind_of(pieces: list[tuple[str, str | None] | None]) -> str:
    if None in pieces:
        return "dropped"
    (prompt, answer), (other_prompt, their_answer) = (piece for piece in pieces if piece is not None)
    if prompt != other_prompt:
        return "different"
    return "equal" if answer == their_answer else "context"


def print_factors(name: str = "dstune/chatml") -> None:
    tokenizer = tokenizer_for(family_of(name), templates()[name])
    encode = RowTokenizer(tokenizer, ChatConfig(template_date=DATE), "messages", max_length=1_000_000)
    for exchanges in (3, 10, 40):
        messages = [
            message
            for number in range(exchanges)
            for message in (
                user(f"{number} {'question ' * 20}"),
                says("answer " * 20, reasoning_content="thought " * 10),
            )
        ]
        lengths = [len(sample.input_ids) for sample in encode.samples([prepared({"messages": messages})], [0])]
        print(f"{exchanges} exchanges: {len(lengths)} samples, {sum(lengths) / max(lengths):.1f} times the tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="read the .jinja files of this folder instead")
    parser.add_argument(
        "--family-file", type=Path, help=f"read the templates of a list of models instead: {FAMILY_FILE}"
    )
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--only", help="templates whose names contain this")
    parser.add_argument("--show", help="print what is trained of this dialogue")
    parser.add_argument("--reasoning", type=Reasoning, choices=list(Reasoning), default=Reasoning.keep, metavar="MODE")
    parser.add_argument("--marked", action="store_true", help="compare TRL's marked templates with the rule")
    parser.add_argument("--families", action="store_true", help="compare dstune's templates with those of the families")
    parser.add_argument("--factors", action="store_true", help="tokens of conversations whose history is rewritten")
    options = parser.parse_args()
    if options.factors:
        print_factors()
        return 0
    if options.families:
        compare_families(options.folder)
        return 0
    names = list(DIALOGUES)
    lines = ["| template | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    reasons: dict[str, int] = {}
    wrong, counts, by_dialogue = [], Counter(), Counter()
    listed = listed_templates(options.family_file) if options.family_file else None
    for name, template in (listed or templates(options.folder, marked=options.marked)).items():
        if options.only and options.only not in name:
            continue
        cells = []
        for dialogue in names:
            tokenizer = tokenizer_for(family_of(name), template)
            if options.marked:
                cell_text, reason = marked_cell(tokenizer, DIALOGUES[dialogue])
                if reason and cell_text != "refused":
                    print(f"  {dialogue}: {reason}")
            else:
                cell_text, reason = cell(
                    tokenizer, DIALOGUES[dialogue], show=dialogue == options.show, reasoning=options.reasoning
                )
            if options.marked:
                counts["different" if cell_text.startswith("+") else cell_text] += 1
            else:
                counts[cell_text if cell_text in ("WRONG", "refused") else "served"] += 1
            by_dialogue[dialogue] += cell_text.endswith("=")
            if cell_text == "WRONG":
                wrong.append(f"{name} x {dialogue}: {reason}")
            if cell_text == "refused":
                general = re.sub(r"the prompt goes on .*| \(the packaged \w+ does\)", "", reason, flags=re.S)
                general = re.sub(r"message \d+ ", "message … ", general)
                cell_text = f"r{reasons.setdefault(general, len(reasons) + 1)}"
            cells.append(cell_text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    lines += ["", *(f"- r{number}: {reason}" for reason, number in reasons.items())]
    print("\n".join(lines[-len(reasons) :]))
    print("served, by dialogue:", dict(by_dialogue))
    print(dict(counts), *wrong, sep="\n")
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
