"""Which forms of conversation the most used chat models train, each with its own chat template.

    python benchmarks/chat_models.py --repositories FOLDER [--page] [--only NAME] [--show DIALOGUE]
    python benchmarks/chat_models.py --packaged

`chat_models.json` lists the models: the public repository that stores the template, its path, commit and date, and the SHA-256 of
the text. No text is part of this project. FOLDER holds clones of these repositories under `OWNER/NAME`:

    git clone https://github.com/ikawrakow/ik_llama.cpp FOLDER/ikawrakow/ik_llama.cpp

With `--packaged` the templates are dstune's own, which need no clone. With `--page` the tables of docs/chat-models.md are
written anew.

Each model is tried with ten dialogues. A cell is one of

- `yes`       trained with the model's own template;
- `setting`   trained with it and the setting that the refusal names, for example task.reasoning=inline;
- `packaged`  trained with the packaged template that the refusal names;
- `-`         refused. The reason, and what servers do with such a conversation, stand below the table;
- `WRONG`     the trained tokens are not those that a server asks for, and the program ends with 1.

The reference (`Reference`) shares no code with dstune. It renders the dialogue with plain transformers in each way in which a
client may send it, and looks for one that explains the samples token by token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from templates import DATE, TOOLS, prepared, result, says, tokenizer_for, user

from dstune.chat_templates import FOLDER, NAMES
from dstune.core.errors import UserError
from dstune.data.problems import RowError
from dstune.data.template_date import freeze_date
from dstune.data.tokenize import RowTokenizer
from dstune.tasks.chat.config import ChatConfig, Reasoning

LIST = Path(__file__).with_suffix(".json")
NO_TARGET = -100

PARIS, ROME = "call_9gT2xQwErTyUiOpAsDfGhJk1", "call_Zx8LmNbVcXzAsDfGhJkLqWe2"
"""Ids of calls as OpenAI's API gives them."""


def call(number: str = PARIS, city: str = "Paris, FR") -> dict[str, Any]:
    return {
        "id": number,
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"days": 2, "city": city}},
    }


def answered(text: str = "sunny, 21 degrees", number: str = PARIS) -> dict[str, Any]:
    return {**result(text), "tool_call_id": number}


ASKS, SYSTEM = user(), {"role": "system", "content": "Answer in one sentence."}
SKY = {"reasoning_content": "They ask about the sky."}

DIALOGUES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [ASKS, says(), user("And Rome?"), says("Rain.")]},
    "system": {"messages": [SYSTEM, ASKS, says()]},
    "call": {"messages": [ASKS, says(None, tool_calls=[call()])], "tools": TOOLS},
    "call, result, answer": {"messages": [ASKS, says(None, tool_calls=[call()]), answered(), says()], "tools": TOOLS},
    "several steps": {
        "messages": [
            user("Compare Paris and Rome."),
            says(None, tool_calls=[call()]),
            answered(),
            says(None, tool_calls=[call(ROME, "Rome, IT")]),
            answered("rain", ROME),
            says("Paris is sunnier."),
        ],
        "tools": TOOLS,
    },
    "parallel calls": {
        "messages": [
            user("Compare Paris and Rome."),
            says(None, tool_calls=[call(), call(ROME, "Rome, IT")]),
            answered(),
            answered("rain", ROME),
            says("Paris is sunnier."),
        ],
        "tools": TOOLS,
    },
    "text beside a call": {
        "messages": [ASKS, says("Let me look.", tool_calls=[call()]), answered(), says()],
        "tools": TOOLS,
    },
    "reasoning": {"messages": [ASKS, says(**SKY)]},
    "reasoning and tools": {
        "messages": [ASKS, says(None, tool_calls=[call()], **SKY), answered(), says(reasoning_content="Sunny then.")],
        "tools": TOOLS,
    },
    "history with reasoning": {
        "messages": [ASKS, says(**SKY), user("And Rome?"), says("Rain.", reasoning_content="Rome now.")]
    },
}


# -- the models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model, and where its template is stored."""

    name: str
    template: str
    ends: tuple[str, ...]
    """The end tokens of its generation settings, the tokenizer's own first."""
    tokens: tuple[str, ...] = ()
    """Further control tokens of its vocabulary."""
    of_forty: bool = True
    """Whether it counts: the forty most used ones, without those that came later."""
    without_tools: str = ""
    """The template for conversations without tools, where it has one of its own."""

    def tokenizer(self, template: str | None = None) -> Any:
        """Return a tokenizer with the model's vocabulary, and with another template where one is given."""
        tokenizer = tokenizer_for(self.name, self.template, self.ends, self.tokens)
        both = {"default": self.without_tools, "tool_use": self.template} if self.without_tools else self.template
        tokenizer.chat_template = template or both
        return tokenizer


def models(repositories: Path) -> Iterator[Model]:
    """Yield those of the list whose repository is there. A text with another digest ends the program."""
    for entry in json.loads(LIST.read_text(encoding="utf-8")):
        if not (repositories / entry["repository"]).exists():
            print(f"{entry['model']}: no clone of {entry['repository']}", file=sys.stderr)
            continue
        text = stored_text(repositories, entry)
        without_tools = stored_text(repositories, entry["without_tools"]) if "without_tools" in entry else ""
        ends, tokens = tuple(entry["ends"]), tuple(entry["tokens"])
        yield Model(entry["model"], text, ends, tokens, entry["of_forty"], without_tools)


def stored_text(repositories: Path, entry: dict[str, Any]) -> str:
    shown = subprocess.run(
        ["git", "-C", str(repositories / entry["repository"]), "show", f"{entry['commit']}:{entry['path']}"],
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    text = shown.stdout
    if name := entry.get("entry"):
        text = next(listed["chat_template"] for listed in json.loads(text) if listed["model_name"] == name)
    if hashlib.sha256(text.encode()).hexdigest() != entry["sha256"]:
        sys.exit(f"{entry['path']}: another text than the one that was measured")
    return str(text)


PACKAGED_ENDS = {
    "chatml": ("<|im_end|>",),
    "deepseek_r1": ("<｜end▁of▁sentence｜>",),  # noqa: RUF001
    "gemma": ("<eos>", "<end_of_turn>"),
    "gemma4": ("<eos>", "<turn|>", "<|tool_response>"),
    "gpt_oss": ("<|return|>", "<|call|>"),
    "granite": ("<|end_of_text|>",),
    "llama3": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    "mistral": ("</s>",),
    "mistral_tekken": ("</s>",),
    "phi3": ("<|endoftext|>", "<|end|>"),
    "phi4": ("<|endoftext|>", "<|im_end|>"),
}


def packaged_models() -> Iterator[Model]:
    for name in NAMES:
        yield Model(f"dstune/{name}", packaged_text(name), PACKAGED_ENDS[name])


def packaged_text(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


# -- the reference ---------------------------------------------------------------------------------------------------------

THOUGHTS = re.compile(
    r"<think>\s*</think>|\[THINK\]\s*\[/THINK\]|<\|channel>thought\s*<channel\|>|<\|START_THINKING\|>\s*<\|END_THINKING\|>|</think>"
)
"""Thoughts that are closed without a word."""
OPENINGS = {"<think>": "</think>", "[THINK]": "[/THINK]", "<|START_THINKING|>": "<|END_THINKING|>"}


def bare(text: str) -> str:
    """Return `text` without white space and empty thoughts."""
    return re.sub(r"\s", "", THOUGHTS.sub("", text))


@dataclass
class Reference:
    """What servers ask a model for, by plain transformers alone."""

    tokenizer: Any
    ends: tuple[str, ...]
    marks: tuple[str, str] | None = None
    """Reasoning is sent in the content, between these."""
    arguments: dict[str, Any] = field(default_factory=dict)

    def render(
        self, messages: list[dict[str, Any]], tools: Any, variables: dict[str, Any], *, prompt: bool
    ) -> str | None:
        try:
            source = freeze_date(self.tokenizer.get_chat_template(tools=tools), DATE)
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=source,
                add_generation_prompt=prompt,
                tokenize=False,
                **{**variables, **self.arguments},
            )
        except Exception:
            return None
        return str(text)

    def ways(self, messages: list[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """Yield the messages as clients send them, and the arguments with which they may ask for the template."""
        switches: list[dict[str, Any]] = [{}]
        switches += [{name: value} for name in ("enable_thinking", "thinking") for value in (True, False)]
        has_calls = any("tool_calls" in message for message in messages)
        has_reasoning = any("reasoning_content" in message for message in messages)
        ids = ("own", "nine", "functions") if has_calls else ("own",)
        forms = product(
            ids,
            (False, True) if has_calls else (False,),
            ("absent", "null", "empty") if has_calls else ("absent",),
            (("content", "beside calls") if self.marks else ("fields", "part", "think"))
            if has_reasoning
            else ("none",),
            switches,
        )
        for form, as_text, content, reasoning, switch in forms:
            numbers: dict[str, str] = {}
            yield [self._sent(message, form, as_text, content, reasoning, numbers) for message in messages], switch

    def _sent(
        self, message: dict[str, Any], form: str, as_text: bool, content: str, reasoning: str, numbers: dict[str, str]
    ) -> dict[str, Any]:
        sent = {key: value for key, value in message.items() if key != "reasoning_content"}
        for call in message.get("tool_calls", []):
            changed = {
                "own": call["id"],
                "nine": call["id"][-9:],
                "functions": f"functions.{call['function']['name']}:{len(numbers)}",
            }
            numbers[call["id"]] = changed[form]
        if "tool_calls" in message:
            sent["tool_calls"] = [
                {
                    **call,
                    "id": numbers[call["id"]],
                    "function": {
                        **call["function"],
                        "arguments": json.dumps(call["function"]["arguments"])
                        if as_text
                        else call["function"]["arguments"],
                    },
                }
                for call in message["tool_calls"]
            ]
            if not message["content"]:
                del sent["content"]
                if content != "absent":
                    sent["content"] = None if content == "null" else ""
        if "tool_call_id" in message:
            sent["tool_call_id"] = numbers.get(message["tool_call_id"], message["tool_call_id"])
        if thought := message.get("reasoning_content"):
            text = message["content"] or ""
            if reasoning == "fields" or (reasoning == "beside calls" and "tool_calls" in message):
                sent |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), thought)
            elif reasoning == "part":
                sent["content"] = [{"type": "thinking", "thinking": thought}]
                sent["content"] += [{"type": "text", "text": text}] if text else []
            else:
                opening, closing = self.marks or ("<think>", "</think>")
                lines = opening.startswith("<") and opening[1:-1].isalpha()
                sent["content"] = (
                    f"{opening}\n{thought}\n{closing}\n" + (f"\n{text}" if text else "")
                    if lines
                    else f"{opening}{thought}{closing}{text}"
                )
        return sent

    def judge(self, dialogue: dict[str, Any], samples: list[Any]) -> tuple[str, int]:
        """Return (what is wrong, turns that are not trained since no way of asking shows their reasoning)."""
        messages, tools = dialogue["messages"], dialogue.get("tools")
        untrained, expected = 0, 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            length = next(
                filter(None, (self._trained(way, messages, tools, number, samples) for way in self.ways(messages))), 0
            )
            if not length and self._shows_reasoning(messages, tools, number):
                return f"message {number + 1} is not trained as any way of asking shows it", untrained
            untrained += not length
            expected += length
        trained = sum(int((sample.labels != NO_TARGET).sum()) for sample in samples)
        return (f"{trained} tokens are trained, servers ask for {expected}" if trained != expected else ""), untrained

    def _shows_reasoning(self, messages: list[dict[str, Any]], tools: Any, number: int) -> bool:
        thought = messages[number].get("reasoning_content")
        if thought is None:
            return True
        without_tags = {key: value for key, value in messages[number].items() if key != "reasoning_content"}
        for sent, variables in self.ways(messages):
            # A server shows what stands in a content, but nobody has to send reasoning there who was not told to.
            if (
                self.marks is None
                and str(sent[number].get("content")).startswith("<think>")
                and "<think>" not in str(without_tags)
            ):
                continue
            text = self.render(sent[: number + 1], tools, variables, prompt=False)
            if text and thought in text and "'thinking'" not in text:  # a list of parts as Python writes it
                return True
        return False

    def _trained(
        self,
        way: tuple[list[dict[str, Any]], dict[str, Any]],
        messages: list[dict[str, Any]],
        tools: Any,
        number: int,
        samples: list[Any],
    ) -> int:
        """Return how many tokens a sample trains as this way of asking has them written, if one does."""
        sent, variables = way
        prompt = self.render(sent[:number], tools, variables, prompt=True)
        answered = self.render(sent[: number + 1], tools, variables, prompt=False)
        if prompt is None or answered is None:
            return 0
        asked = self._ids(prompt)
        for sample in samples:
            ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
            if ids[: len(asked)] != asked or len(ids) == len(asked) or labels[len(asked)] == NO_TARGET:
                continue
            if asked and labels[len(asked) - 1] != NO_TARGET:
                continue
            length = next(
                (at for at, label in enumerate(labels[len(asked) :]) if label == NO_TARGET), len(ids) - len(asked)
            )
            *body, stop = labels[len(asked) : len(asked) + length]
            if ids[len(asked) : len(asked) + length - 1] != body or self._text([stop]) not in self.ends:
                continue
            if self._reads(self._text(body), prompt, answered, messages, number):
                return length
        return 0

    def _reads(self, body: str, prompt: str, answered: str, messages: list[dict[str, Any]], number: int) -> bool:
        """Return whether `body` is what the conversation shows behind the prompt, and says all that the message says."""
        message = messages[number]
        says_first = [message.get("reasoning_content") or "", message["content"] or ""]
        calls = [
            text
            for call in message.get("tool_calls", [])
            for text in (call["function"]["name"], call["function"]["arguments"]["city"])
        ]
        others = [
            other["content"]
            for at, other in enumerate(messages)
            if at != number and other["content"] and other["content"] not in says_first
        ]
        at = 0
        for text in filter(None, says_first):
            at = body.find(text, at)
            if at < 0:
                return False
        if not all(text in body for text in calls) or any(text in body for text in others):
            return False
        if any(prompt.rstrip().endswith(opening) and closing not in body for opening, closing in OPENINGS.items()):
            return False
        last = messages[number - 1]["content"] or ""
        if number and (last not in prompt or last not in answered):
            return False
        # Behind the last message both read alike, apart from white space and thoughts without a word.
        asked, shown = bare(prompt[prompt.rindex(last) :] + body), bare(answered[answered.rindex(last) :])
        behind = shown.removeprefix(asked)
        return shown.startswith(asked) and (not behind or behind.startswith(tuple(map(bare, self.ends))))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# -- the cells -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What became of a dialogue."""

    state: str
    """yes, setting, packaged, -, WRONG"""
    detail: str = ""
    """The setting, the reason of a refusal, or what is wrong."""
    samples: int = 1
    left: int = 0
    """Turns that are not trained, since their reasoning is not shown."""

    @property
    def served(self) -> bool:
        return self.state in ("yes", "setting", "packaged")


@dataclass(frozen=True)
class Attempt:
    """Settings with which a dialogue is tried."""

    packaged: str = ""
    marks: tuple[str, str] | None = None
    inline: bool = False
    arguments: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        settings = [f"model.chat_template={self.packaged}"] if self.packaged else []
        settings += ["task.reasoning=inline"] if self.inline else []
        settings += [f"task.reasoning_marks={list(self.marks)}"] if self.marks else []
        settings += [f"task.chat_template_kwargs={dict(self.arguments)}"] if self.arguments else []
        return " ".join(settings)


def remedies(reason: str, tried: Attempt) -> Iterator[Attempt]:
    """Yield what a refusal proposes and keeps all of the row, its own template first."""
    if "task.reasoning=inline" in reason and not tried.inline:
        marks_match = re.search(r"task\.reasoning_marks='?\[([^],]+),([^],]+)\]", reason)
        yield Attempt(tried.packaged, (marks_match[1], marks_match[2]) if marks_match else None, True, tried.arguments)
    for match in re.finditer(r"task\.chat_template_kwargs=\{(\w+): (\w+)\}", reason):
        yield Attempt(tried.packaged, tried.marks, tried.inline, ((match[1], match[2] == "true"),))
    for match in re.finditer(r"model\.chat_template=(\w+)|the packaged (\w+) does", reason):
        name = match[1] or match[2]
        if name in NAMES and not tried.packaged:
            yield Attempt(name)


def attempt(model: Model, dialogue: dict[str, Any], tried: Attempt, *, show: bool = False) -> Cell:
    tokenizer = model.tokenizer(packaged_text(tried.packaged) if tried.packaged else None)
    state = "packaged" if tried.packaged else "setting" if tried != Attempt() else "yes"
    task = ChatConfig(
        template_date=DATE,
        reasoning=Reasoning.inline if tried.inline else Reasoning.keep,
        reasoning_marks=list(tried.marks or ()),
        chat_template_kwargs=dict(tried.arguments),
    )
    try:
        encode = RowTokenizer(tokenizer, task, "messages", max_length=100_000)
        samples = encode.samples([prepared(dialogue)], [0])
    except (RowError, UserError) as error:
        return Cell("-", str(error))
    if problem := next((sample.problem for sample in samples if sample.problem), ""):
        return Cell("-", problem)
    if show:
        for sample in samples:
            print(repr(tokenizer.decode(sample.input_ids)))
            print("   trained:", repr(tokenizer.decode(sample.labels[sample.labels != NO_TARGET])))
    assert encode.renderer is not None
    marks = encode.renderer.inline_reasoning.marks if tried.inline else None
    wrong, untrained = Reference(tokenizer, model.ends, marks, dict(tried.arguments)).judge(dialogue, samples)
    return Cell("WRONG", f"{tried} {wrong}") if wrong else Cell(state, str(tried), len(samples), untrained)


def cell(model: Model, dialogue: dict[str, Any], *, show: bool = False) -> Cell:
    """Try the model's own template, else what its refusal names, and what the refusal of that names."""
    first = attempt(model, dialogue, Attempt(), show=show)
    if first.state != "-":
        return first
    waiting = list(remedies(first.detail, Attempt()))
    seen = set(waiting)
    best = first
    while waiting:
        tried = waiting.pop(0)
        result = attempt(model, dialogue, tried, show=show)
        if result.state in ("setting", "WRONG"):
            return result
        if result.state == "packaged" and not best.served:
            best = result
        if result.state == "-":
            new = [further for further in remedies(result.detail, tried) if further not in seen]
            waiting += new
            seen.update(new)
    return best


def of_servers(model: Model, dialogue: dict[str, Any]) -> str:
    """Return what servers make of a conversation that is refused: those that render the model's template as transformers does."""
    reference = Reference(model.tokenizer(), model.ends)
    messages, tools = dialogue["messages"], dialogue.get("tools")
    ways = [
        way for way in reference.ways(messages) if not any("<think>" in str(entry.get("content")) for entry in way[0])
    ]
    texts = [text for sent, variables in ways if (text := reference.render(sent, tools, variables, prompt=False))]
    texts = [text for text in texts if "'thinking'" not in text]
    if not texts:
        return "every server refuses it: the template raises an error"
    parts = {
        "the tools": [entry["function"]["description"] for entry in tools or []],
        "calls": [
            entry["function"]["arguments"]["city"] for message in messages for entry in message.get("tool_calls", [])
        ],
        "results": [message["content"] for message in messages if message["role"] == "tool"],
        "the text beside a call": [
            message["content"] for message in messages if message.get("tool_calls") and message["content"]
        ],
        "reasoning": [message["reasoning_content"] for message in messages if "reasoning_content" in message],
    }
    absent = [
        name for name, passages in parts.items() if not any(all(entry in text for entry in passages) for text in texts)
    ]
    if absent:
        return f"every server silently drops {' and '.join(filter(None, [', '.join(absent[:-1]), absent[-1]]))}"
    return "every server asks the model to think first"


def table(chosen: list[Model], show: str | None = None) -> tuple[list[str], list[str], dict[str, Counter[str]]]:
    """Return lines of Markdown, what is wrong, and by dialogue how many of the forty are in each state."""
    lines = ["| model | " + " | ".join(DIALOGUES) + " |", "| --- " * (len(DIALOGUES) + 1) + "|"]
    notes: dict[str, int] = {}
    wrong: list[str] = []
    counts: dict[str, Counter[str]] = {dialogue: Counter() for dialogue in DIALOGUES}
    for model in chosen:
        row = []
        for name, dialogue in DIALOGUES.items():
            result = cell(model, dialogue, show=name == show)
            counts[name][result.state] += model.of_forty
            text = {"setting": "inline" if "inline" in result.detail else "argument"}.get(result.state, result.state)
            if result.state == "packaged":
                match = re.search(r"model\.chat_template=(\w+)", result.detail)
                assert match is not None
                text = f"`{match[1]}`"
            if result.state == "-":
                reason = re.sub(
                    r"^message \d+ \(\w+\): |: the prompt goes on .*?(?=; |$)", "", result.detail, flags=re.S
                )
                note = f"{reason.rstrip('.!')}. Servers: {of_servers(model, dialogue)}."
                text = f"r{notes.setdefault(note, len(notes) + 1)}"
            if result.state == "WRONG":
                wrong.append(f"{model.name} x {name}: {result.detail}")
            if result.left:
                text += " *"
            row.append(text)
        lines.append(f"| {model.name} | " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    return [*lines, "", *(f"- r{number}: {note}" for note, number in notes.items())], wrong, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repositories", type=Path, help="the folder of clones")
    parser.add_argument("--packaged", action="store_true", help="dstune's own templates instead")
    parser.add_argument("--page", action="store_true", help="write the tables into docs/chat-models.md")
    parser.add_argument("--only", default="", help="models whose names contain this")
    parser.add_argument("--show", help="print what is trained of this dialogue")
    options = parser.parse_args()
    if not options.packaged and options.repositories is None:
        parser.error("--repositories FOLDER or --packaged")
    chosen_models = packaged_models() if options.packaged else models(options.repositories)
    lines, wrong, counts = table([model for model in chosen_models if options.only in model.name], options.show)
    print("\n".join(line for line in lines if line.startswith("- r")))
    for name, state_counts in counts.items():
        with_own_template = state_counts["yes"] + state_counts["setting"]
        print(
            f"{name}: {state_counts['yes']} as it is, {with_own_template} with a setting, "
            f"{with_own_template + state_counts['packaged']} with a packaged template; {dict(state_counts)}"
        )
    print(f"{len(wrong)} wrong", *wrong, sep="\n")
    if options.page and not options.only:
        blocks = {"packaged" if options.packaged else "models": lines}
        if not options.packaged:
            blocks |= {"counts": counts_table(counts), "sources": sources_table()}
        page = PAGE.read_text(encoding="utf-8")
        for name, block in blocks.items():
            page = with_block(page, name, block)
        PAGE.write_text(page, encoding="utf-8")
    return 1 if wrong else 0


PAGE = Path(__file__).parents[1] / "docs" / "chat-models.md"


def block_of(page: str, name: str) -> list[str]:
    """Return the lines between the marks of a table."""
    return page.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0].splitlines()


def with_block(page: str, name: str, lines: list[str]) -> str:
    text_before, mark, text_behind = page.partition(f"<!-- {name} -->\n")
    assert mark, f"{PAGE} has no place for {name}"
    return text_before + mark + "\n".join(lines) + "\n" + text_behind[text_behind.index(f"<!-- /{name} -->") :]


def counts_table(counts: dict[str, Counter[str]]) -> list[str]:
    lines = [
        "| form of conversation | own template | own template, with a setting if needed | also with a packaged template |",
        "| --- " * 4 + "|",
    ]
    for name, state_counts in counts.items():
        with_own_template = state_counts["yes"] + state_counts["setting"]
        lines.append(
            f"| {name} | {state_counts['yes']} | {with_own_template} | {with_own_template + state_counts['packaged']} |"
        )
    return lines


def sources_table() -> list[str]:
    lines = ["| model | template | date | commit | SHA-256 |", "| --- " * 5 + "|"]
    for entry in json.loads(LIST.read_text(encoding="utf-8")):
        for source, which in ((entry, ""), (entry.get("without_tools"), ", without tools")):
            if source is not None:
                place = f"{source['repository']}: {source['path']}" + (
                    f" ({source['entry']})" if "entry" in source else ""
                )
                digests = f"{source['commit'][:10]} | {source['sha256'][:16]}"
                lines.append(f"| {entry['model']}{which} | {place} | {source['date']} | {digests} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
