"""A case for each message about a row or a file that cannot be used."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pyarrow as pa
from unit.data_helpers import CHATML, exchange

from dstune.data.read_text import MAX_ROW_BYTES
from dstune.data.tags import TagScheme
from dstune.protocols.task import TaskConfig
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.embedding.config import EmbeddingConfig
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss
from dstune.tasks.question_answering.config import QuestionAnsweringConfig
from dstune.tasks.token_classification.config import TokenClassificationConfig

CHAT, TEXT = ChatConfig(template_date="2025-03-09"), CausalLmConfig()
CLASSES, SEVERAL = ClassificationConfig(), ClassificationConfig(multi_label=True)
GOOD = exchange("Hi", "Yes")
LABELLED = {"text": "a", "label": "x"}
PAIRS = PreferenceConfig(template_date="2025-03-09")
JUDGED = PreferenceConfig(loss=PreferenceLoss.kto, template_date="2025-03-09")
TAGS, BIO_TAGS = TokenClassificationConfig(), TokenClassificationConfig(scheme=TagScheme.bio)
NAMED_TAGS = TokenClassificationConfig(labels=["O", "B-X", "I-X"])
QUESTIONS = QuestionAnsweringConfig()


def message(role: str, content: Any = "Yes", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def chat(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def called(**call: Any) -> dict[str, Any]:
    return chat(message("user"), {"role": "assistant", "tool_calls": [call]})


def question(answers: Any) -> dict[str, Any]:
    return {"question": "q", "context": "a b", "answers": answers}


def part(role: str, **content: Any) -> dict[str, Any]:
    return {"role": role, "parts": [content]}


def contents(*parts: Any) -> dict[str, Any]:
    return {"contents": list(parts)}


GEMINI = contents(part("user", text="Hi"), part("model", text="Yes"))
XLAM = {"query": "Hi", "tools": "[]", "answers": '[{"name": "f", "arguments": {}}]'}
USER, ANSWER, OTHER = message("user"), message("assistant"), message("user", "No")
OPENAI = {
    "input": {"messages": [USER]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [message("assistant", "No")],
}
CALL = {"function": {"name": "f", "arguments": {}}}
REFUSING = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('it is bad') }}{% endif %}"
# Long answers of the history are shortened.
SHORT = "(message['content'] if message['content']|length < 10 or loop.last else '(long)')"
REWRITING = CHATML.replace("message['content']", SHORT)
LAST_IS_LOUD = CHATML.replace(
    "message['content']", "(message['content'] + ('!' if loop.last and message['role'] == 'assistant' else ''))"
)
NOTHING_MARKED = CHATML + "{% generation %}{% endgeneration %}"

# The message of the guide, then what has it: a row, or the whole content of a file by its name, the bad row in line 2.
Case = tuple[str, TaskConfig, Any]
ROWS: list[Case] = [
    ("broken JSON: … at column …", CHAT, '{"messages": [}'),
    ("broken JSON: nested more than … deep", CHAT, '{"messages": ' + "[" * 200_000 + "]" * 200_000 + "}"),
    ("broken JSON: a number with more than … digits", CHAT, '{"messages": ' + "1" * 5_000 + "}"),
    ("broken JSON: the key … stands twice in an object", CHAT, '{"messages": [], "a": {"b": 1, "c": 2, "b": 3}}'),
    ("the row has more than … MiB", CHAT, {"rows.jsonl": json.dumps(GOOD) + "\n" + "x" * (MAX_ROW_BYTES + 1)}),
    ("the line has more than … MiB", TEXT, {"rows.txt": "good\n" + "x" * (MAX_ROW_BYTES + 1)}),
    ("a value cannot be read: …", TEXT, pa.table({"text": ["a", "b"], "at": pa.array([2**60, 0], pa.timestamp("ms"))})),
    (
        "broken JSON: … at column …; the rest of the file, to line …, is lost",
        CHAT,
        {"rows.json": f'[{json.dumps(GOOD)},\n{{"messages": }}\n]'},
    ),
    (
        "broken JSON: no comma between rows; the rest of the file, to line …, is lost",
        CHAT,
        {"rows.json": f"[{json.dumps(GOOD)}\n{json.dumps(GOOD)}]"},
    ),
    ("broken JSON: the array is not closed", CHAT, {"rows.json": f"[{json.dumps(GOOD)},\n{json.dumps(GOOD)}"}),
    (
        "broken JSON: there is more after the end of the array; the rest of the file, to line …, is lost",
        CHAT,
        {"rows.json": f"{json.dumps([GOOD])}\n{json.dumps([GOOD])}"},
    ),
    ("a row is a JSON object, this is …", CHAT, "[1, 2]"),
    ("not UTF-8: byte … of the line is …", CHAT, {"rows.jsonl": json.dumps(GOOD).encode() + b'\n{"messages": "\xff"}'}),
    ("not UTF-8: byte … after …", CLASSES, {"rows.csv": b"text,label\nok\xe9,x\nfine,y\n"}),
    ("… fields where the header has …", CLASSES, {"rows.csv": "text,label\na,b,c\nfine,y\n"}),
    ("broken CSV: …; lines … to … are lost", CLASSES, {"rows.csv": 'text,label\n"a\nb"c,x\nfine,y\n'}),
    (
        "broken CSV: a quote that opens here is never closed; lines … to …, the end of the file, are lost",
        CLASSES,
        {"rows.csv": 'text,label\n"a,x\nb,y\nc,z\n'},
    ),
    ("missing column …, the columns here are …", CHAT, {"message": []}),
    ("column … must be text, it is …", TEXT, {"text": 7}),
    ("column … is empty", TEXT, {"text": " "}),
    (
        "column … must be text or a list of messages, it is …",
        CHAT,
        [{"prompt": "a", "completion": "b"}, {"prompt": 1, "completion": "b"}],
    ),
    ("text holds half of a surrogate pair (…), which is no character", TEXT, '{"text": "\\ud83d"}'),
    ("a value is not JSON: …", CHAT, pa.Table.from_pylist([chat(message("user", at=b"1"), ANSWER)] * 2)),
    ("column … is text but not JSON: … at character …", CHAT, {"messages": "[{"}),
    ("column … must be a list of messages that is not empty", CHAT, {"messages": []}),
    (
        "column … has lists of different lengths: …",
        CHAT,
        {"messages": {"role": ["user", "assistant"], "content": ["Hi"]}},
    ),
    ("message … must be an object with role and content", CHAT, chat("Hi")),
    ("message … has the unknown role …; roles are …", CHAT, chat(USER, message("robot"))),
    ("chat_template_kwargs must be an object, it is …", CHAT, chat(USER, ANSWER, chat_template_kwargs=[1])),
    (
        "chat_template_kwargs is text but not JSON: … at character …",
        CHAT,
        chat(USER, ANSWER, chat_template_kwargs="{x"),
    ),
    ("message … has the role … after …, where … is expected", CHAT, chat(USER, message("tool"))),
    (
        "a block of type 'tool_result' follows one of another type, where results come first",
        CHAT,
        chat(message("user", [{"type": "text", "text": "Hi"}, {"type": "tool_result", "content": "a"}]), ANSWER),
    ),
    (
        "the content of a block of type 'tool_result' must be text, it is …",
        CHAT,
        chat(message("user", [{"type": "tool_result", "content": 7}]), ANSWER),
    ),
    ("column … must be a list of contents that is not empty", CHAT, [GEMINI, {"contents": []}]),
    ("content … must be an object with role and parts", CHAT, [GEMINI, {"contents": ["Hi"]}]),
    ("content … has the unknown role …; roles are …", CHAT, [GEMINI, contents(part("bot", text="Hi"))]),
    (
        "content … has a functionResponse behind a part of another kind, where results come first",
        CHAT,
        [GEMINI, contents({"role": "user", "parts": [{"text": "Hi"}, {"functionResponse": {"name": "f"}}]})],
    ),
    (
        "content … (…) holds an image, audio or video, which dstune does not read from Gemini's parts",
        CHAT,
        [GEMINI, contents(part("user", inlineData={"mimeType": "image/png", "data": ""}))],
    ),
    (
        "content … (…) has a part with …; text, functionCall and functionResponse are read",
        CHAT,
        [GEMINI, contents(part("model", executableCode={"code": "1"}))],
    ),
    (
        "column … must be text or a content with parts of text, it is …",
        CHAT,
        [GEMINI, {**GEMINI, "systemInstruction": {"parts": [{"inlineData": {}}]}}],
    ),
    (
        "tools hold …, which is no list of functionDeclarations",
        CHAT,
        [GEMINI, {**GEMINI, "tools": [{"functionDeclarations": [], "googleSearch": {"a": 1}}]}],
    ),
    ("answers are not JSON: … at character …", CHAT, [XLAM, {**XLAM, "answers": "sunny"}]),
    ("answers must be a list of calls, they are …", CHAT, [XLAM, {**XLAM, "answers": {"name": "f"}}]),
    (
        "message … has the role … after …, and the chat template does not print all messages of such a conversation; …",
        CHAT,
        chat(USER, USER, ANSWER),
    ),
    ("message … has the role … at the start, where … is expected", CHAT, chat(message("tool"), ANSWER)),
    ("message … (…): content must be text, it is …", CHAT, chat(message("user", 3), ANSWER)),
    (
        "message … (…) has a part of type …; only text is trained on",
        CHAT,
        chat(message("user", [{"type": "file", "file": {"file_id": "x"}}]), ANSWER),
    ),
    (
        "message … (…) holds …; no task reads audio or video",
        CHAT,
        chat(message("user", [{"type": "audio_url", "audio_url": {"url": "x"}}]), ANSWER),
    ),
    (
        "message … (…) holds an image; models see images and write none",
        CHAT,
        chat(USER, message("assistant", [{"type": "image_url", "image_url": {"url": "x"}}])),
    ),
    (
        "message … (…) has a part of type …, which only the assistant has",
        CHAT,
        chat(message("user", [{"type": "reasoning", "value": "Hm."}]), ANSWER),
    ),
    (
        "message … (…): templates write reasoning, then text, then calls, and its parts come in another order",
        CHAT,
        chat(USER, message("assistant", [{"type": "text", "value": "Yes"}, {"type": "reasoning", "value": "Hm."}])),
    ),
    (
        "the parts of a content put together write the control token …",
        CHAT,
        chat(message("user", [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]), ANSWER),
    ),
    (
        "message … (…) has reasoning in its content and as …",
        CHAT,
        chat(USER, message("assistant", [{"type": "reasoning", "value": "Hm."}], reasoning="Well.")),
    ),
    (
        "message … (…) has calls in its content and as tool_calls",
        CHAT,
        chat(USER, message("assistant", [{"type": "tool_call", "value": '{"name": "f"}'}], tool_calls=[CALL])),
    ),
    (
        "message … (…) has a content and a value that say different things",
        CHAT,
        chat(USER, message("assistant", "Yes", value="No")),
    ),
    ("message … (…) has a content and a refusal", CHAT, chat(USER, message("assistant", "Yes", refusal="No"))),
    ("… holds …; no task reads audio or video", CHAT, chat(USER, ANSWER, audios=["a.mp3"])),
    (
        "the marker … stands for media in …; the row has no images",
        CHAT,
        chat(message("user", "<image>Who is it?"), ANSWER),
    ),
    ("message … (…): weight must be 0 or 1, it is …", CHAT, chat(USER, message("assistant", weight=0.5))),
    ("message … (…) has different weights: …", CHAT, chat(USER, message("assistant", weight=0, loss_weight=1))),
    (
        "message … calls a tool in the turn of the message before it, and has another …",
        CHAT,
        chat(USER, message("assistant", weight=0), {"role": "tool_call", "content": '{"name": "f"}'}),
    ),
    (
        (
            "message … (…) has …: 1; only what the assistant says is trained; "
            "task.train_on_prompt=true trains the whole conversation"
        ),
        CHAT,
        chat(message("user", loss_weight=1.0), ANSWER),
    ),
    (
        "message … (assistant) has a … and a … that say different things",
        CHAT,
        chat(USER, message("assistant", "Yes", reasoning="a", reasoning_content="b")),
    ),
    (
        "continue_final_message: an answer that is begun is not trained; give the message as a whole",
        CHAT,
        chat(USER, ANSWER, continue_final_message=True),
    ),
    (
        "chat_template_kwargs has …, which is no argument of a template",
        CHAT,
        chat(USER, ANSWER, chat_template_kwargs={"add_generation_prompt": True}),
    ),
    (
        "message … has the key …; what is not to be trained is marked with weight: 0",
        CHAT,
        chat(USER, message("assistant", train=False)),
    ),
    (
        "message … (…) is a prefix that the answer continues (continue_final_message); give the message as a whole",
        CHAT,
        chat(USER, message("assistant", prefix=True)),
    ),
    ("no trainable token: the conversation has no assistant message", CHAT, chat(USER)),
    ("no trainable token: every assistant message has the weight 0", CHAT, chat(USER, message("assistant", weight=0))),
    (
        "message … (…) is empty; weight: 0 keeps it in the conversation, untrained",
        CHAT,
        chat(USER, ANSWER, USER, message("assistant", " ")),
    ),
    ("message … (…): … must be text, it is …", CHAT, chat(USER, message("assistant", reasoning_content=["Hm."]))),
    (
        "message … (…) calls a tool, which only the assistant does",
        CHAT,
        chat(message("user", tool_calls=[CALL]), ANSWER),
    ),
    (
        "message … (…) has tool_calls and function_call; give its calls as tool_calls",
        CHAT,
        chat(USER, {"role": "assistant", "tool_calls": [CALL], "function_call": CALL["function"]}),
    ),
    ("message …: tool_calls must be a list, it is …", CHAT, chat(USER, {"role": "assistant", "tool_calls": {"a": 1}})),
    ("message …: tool_calls are not JSON: … at character …", CHAT, chat(USER, message("assistant", tool_calls="[{"))),
    ("message …: a tool call needs the name of a function, it is …", CHAT, called(function={"arguments": {}})),
    (
        "message …: arguments of … are not JSON: … at character …",
        CHAT,
        called(function={"name": "f", "arguments": "{a}"}),
    ),
    ("message …: arguments of … must be an object, it is …", CHAT, called(function={"name": "f", "arguments": "[1]"})),
    (
        "message … (function_call) is not JSON: … at character …",
        CHAT,
        [
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]},
        ],
    ),
    (
        "message … calls … tools, and parallel_tool_calls is false",
        CHAT,
        chat(USER, {"role": "assistant", "tool_calls": [CALL, CALL]}, parallel_tool_calls=False),
    ),
    ("parallel_tool_calls must be true or false, it is …", CHAT, chat(USER, ANSWER, parallel_tool_calls="no")),
    ("tools are not JSON: … at character …", CHAT, chat(USER, ANSWER, tools="f(x)")),
    ("tools must be a list of JSON schemas", CHAT, chat(USER, ANSWER, tools={"name": "f"})),
    (
        "the function of tool … must be an object, it is …",
        CHAT,
        chat(USER, ANSWER, tools=[{"type": "function", "function": "f"}]),
    ),
    (
        "a system text stands in the column 'system' and in the first message",
        CHAT,
        [
            {"conversations": GOOD["messages"], "system": "s"},
            {"conversations": [message("system"), USER, ANSWER], "system": "s"},
        ],
    ),
    (
        (
            "the prompt ends inside a message of the assistant, which a server is asked to continue by "
            "continue_final_message alone; give the prompt without it, and the message as a whole as the answer"
        ),
        CHAT,
        [{"prompt": [USER], "completion": [ANSWER]}, {"prompt": [USER, ANSWER], "completion": [ANSWER]}],
    ),
    (
        "column 'history' must be a list, it is …",
        CHAT,
        [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "history": 5}],
    ),
    (
        "history … must be a question and an answer, it is …",
        CHAT,
        [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "history": [["a"]]}],
    ),
    (
        "the column … stands beside a prompt that is a conversation, which has no place for it",
        PAIRS,
        {"prompt": [USER], "chosen": "b", "rejected": "c", "input": "i"},
    ),
    ("column … must be a label (text or an integer), it is …", CLASSES, {"text": "a", "label": 0.5}),
    (
        "column … has … labels (…); task.multi_label=true trains on any number of them",
        CLASSES,
        {"text": "a", "label": ["x", "y"]},
    ),
    ("column … must be a list of labels, it is …", SEVERAL, {"text": "a", "label": None}),
    ("column … starts as a list but is not JSON: …", SEVERAL, {"text": "a", "label": "[x, y]"}),
    ("label … is not among task.labels (…)", ClassificationConfig(labels=["x", "y"]), {"text": "a", "label": "z"}),
    ("label … does not occur in the training rows (…)", CLASSES, {"held-out.jsonl": '{"text": "c", "label": "q"}'}),
    (
        "no column 'prompt', without which chosen and rejected must be whole conversations",
        PAIRS,
        {"chosen": "b", "rejected": "c"},
    ),
    ("chosen and rejected are the same", PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}),
    (
        "chosen and rejected begin with different messages, so they answer no common prompt",
        PAIRS,
        {"chosen": [USER, ANSWER], "rejected": [OTHER, ANSWER]},
    ),
    (
        "one of chosen and rejected is a whole conversation, the other an answer",
        PAIRS,
        {"prompt": "a", "chosen": [USER, ANSWER], "rejected": "No"},
    ),
    ("… ends where the other one goes on", PAIRS, {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, ANSWER]}),
    (
        "the column 'prompt' says what chosen and rejected, which are whole conversations, do not",
        PAIRS,
        {"prompt": "Another question", "chosen": [USER, ANSWER], "rejected": [USER, message("assistant", "No")]},
    ),
    (
        "the last message is judged, so it has to be the assistant's answer to an earlier message",
        JUDGED,
        [chat(USER, ANSWER, label=True), chat(USER, label=True)],
    ),
    (
        "chosen and rejected differ before the assistant answers: message … of … has the role …",
        PAIRS,
        {"chosen": [USER, ANSWER, USER], "rejected": [USER, ANSWER, OTHER]},
    ),
    (
        "column 'margin' must be a number, it is …",
        PAIRS,
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"},
    ),
    (
        "column … must be true (a good answer) or false (a bad one), it is …",
        JUDGED,
        {"prompt": "a", "completion": "b", "label": "great"},
    ),
    ("column 'input' must be an object with messages, it is …", PAIRS, [OPENAI, {**OPENAI, "input": "null"}]),
    (
        "column 'input' has the key …, which is not read",
        PAIRS,
        [OPENAI, {**OPENAI, "input": {"messages": [USER], "n": 2}}],
    ),
    ("there is no positive", EmbeddingConfig(), {"anchor": "a", "positive": []}),
    ("positive and negative are the same", EmbeddingConfig(), {"anchor": "a", "positive": "b", "negative": "b"}),
    ("column … must be a list of token ids, it is …", TEXT, {"input_ids": []}),
    ("column … must hold whole numbers of 64 bits, one is …", TEXT, {"input_ids": [1, "2"]}),
    (
        "attention_mask must be 1 for every token: rows are padded, and kept apart, when they are packed",
        TEXT,
        {"input_ids": [1, 2], "attention_mask": [0, 1]},
    ),
    ("… input_ids have … labels", TEXT, {"input_ids": [1, 2], "labels": [1]}),
    ("the label at token … is …, which is neither its token (…) nor …", TEXT, {"input_ids": [1, 2], "labels": [1, 3]}),
    ("token id … is not one of the … of the model's tokenizer", TEXT, {"input_ids": [1, 100_000]}),
    ("… tokens have … tags", TAGS, {"tokens": ["a", "b"], "tags": ["O"]}),
    ("word … of column … must be text, it is …", TAGS, {"tokens": ["a", 1], "tags": ["O", "O"]}),
    ("column … must be a list, it is …", TAGS, {"tokens": 7, "tags": ["O"]}),
    (
        "column … is a list that is not JSON: …; json.dumps writes it",
        TAGS,
        {"tokens": "['EU', 'rejects']", "tags": "['B-ORG', 'O']"},
    ),
    ("a tag must be text or a number, it is …", TAGS, {"tokens": ["a"], "tags": [[]]}),
    ("tag … is a number; task.labels=[NAME,NAME] names the tags in their order", TAGS, {"tokens": ["a"], "tags": [1]}),
    ("tag … is not the number of one of the … task.labels", NAMED_TAGS, {"tokens": ["a"], "tags": [7]}),
    ("tag … of word … (…) is neither O nor begins with B- or I-", BIO_TAGS, {"tokens": ["a"], "tags": ["NOUN"]}),
    (
        "tag … of word … (…) continues no entity: it …; task.repair=true lets it begin one",
        TAGS,
        {"tokens": ["a"], "tags": ["I-X"]},
    ),
    ("… column…, …", TAGS, {"rows.conll": "\nalone\n"}),
    ("answers must be an object or a list, they are …", QUESTIONS, question(7)),
    ("answers need as many answer_start as text", QUESTIONS, question({"text": ["a"], "answer_start": []})),
    ("an answer must have a text, it is …", QUESTIONS, question([{"text": "", "answer_start": 0}])),
    ("answer_start of answer … must be a number, it is …", QUESTIONS, question([{"text": "a", "answer_start": "0"}])),
    ("answer … is not at character … of its context (…)", QUESTIONS, question([{"text": "a", "answer_start": 1}])),
    ("there is no answer; task.no_answer=true trains on questions without one", QUESTIONS, question([])),
    ("the chat template refuses this conversation: …", CHAT, chat(message("user", "bad"), ANSWER)),
    (
        (
            "message … (assistant): the chat template writes another text for this turn than a server would prompt with: "
            "the prompt goes on …, the conversation …"
        ),
        CHAT,
        [GOOD],
    ),
    (
        "message … (assistant): the chat template does not print its …, so it would not be trained…",
        CHAT,
        chat(USER, message("assistant", "No, and no again")),
    ),
    (
        "the chat template does not print …, which this row has; set model.chat_template to one that does…",
        CHAT,
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
    ),
    (
        (
            "the chat template does not print reasoning (…), which this row has; task.reasoning=inline writes it into the content "
            "(…), task.reasoning=drop trains without it, or …"
        ),
        CHAT,
        chat(USER, {**ANSWER, "reasoning_content": "Hm."}),
    ),
    (
        "the chat template rewrites turns of weight 0, so task.train_on_prompt cannot leave them out",
        ChatConfig(template_date="2025-03-09", train_on_prompt=True),
        chat(USER, {**message("assistant", "No, and no again"), "weight": 0}, USER, ANSWER),
    ),
    (
        "the chat template rewrites earlier turns of the answer, which cannot be compared then",
        PAIRS,
        {"prompt": [USER], "chosen": [ANSWER, USER, ANSWER], "rejected": [message("assistant", "No")]},
    ),
    ("no trainable token", CHAT, [GOOD]),
]


# -- whole files ------------------------------------------------------------------------------------------------------

FILES: list[tuple[str, Any]] = [
    ("no such file", "absent.jsonl"),
    ("no file matches", "absent-*.jsonl"),
    ("the file is empty (named by …)", {"empty.jsonl": b""}),
    ("… unknown ending …", {"rows.xlsx": b"x"}),
    ("this folder holds no file of rows", {"folder/notes.doc": b"x", "": "folder"}),
    ("there is no split …; the splits are …", {"folder/train.jsonl": b"{}\n", "": "folder:trian"}),
    ("the archive holds no file of rows (named by …)", {"rows.zip": {"README": "x"}}),
    ("damaged or incomplete … file: …", {"rows.jsonl.gz": gzip.compress(json.dumps(GOOD).encode() * 99)[:-9]}),
    ("no readable … file: …", {"rows.arrow": b"ARROW1 is not enough"}),
    ("not UTF-8: byte … in line …", {"rows.json": b'[\n{"messages": "\xff"}]'}),
    ("more than one column is named …", {"rows.csv": b"prompt,prompt\na,b\n"}),
    ("holds no rows", {"rows.json": b"[]"}),
    ("only files of this machine, data sets of the hub and … are read", "s3://bucket/rows.jsonl"),
    ("there is no such file or folder, and the cache of datasets has no such data set …", "nobody/nothing"),
    ("missing column: task=… needs …, the columns here are …", {"rows.csv": b"question,reply\na,b\n"}),
    ("… has no such column, the columns there are …", {"rows.csv": b"question,reply\na,b\n"}),
]
