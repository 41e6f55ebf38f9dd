"""Answers that are held back: however they are cut into pieces, a reader gets what the whole text would have become."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace

import pytest

from dstune.guard.bodies import of_answer
from dstune.guard.check import Checker, GuardDown, Span, Verdict, item_of
from dstune.guard.policy import Policy, Watch
from dstune.guard.scanner import Scanner
from dstune.guard.streams import CONTEXT, HEAD, HELD, KEPT, LONGEST_FINDING, LONGEST_WORD, Channel, HeldBack, Stopped
from dstune.serve.asgi import event

CARD, KEY, EMAIL = "4111 1111 1111 1111", "sk-ant-api03-" + "Ab1_" * 20, "maria.gonzalez@mail.example.org"
TEXT = (
    "Thank you for your order. Your card is 4111 1111 1111 1111, and the address is "
    f"{EMAIL}! The key {KEY} is yours 😀. Version 1.2.3 of 10.10.2024 costs 3.50 or so; "
    "a longer sentence follows that has nothing to hide and goes on and on until it has more than two hundred letters, which "
    "takes some words of no importance, one after the other, and then it ends. Bye"
)
MASKED = TEXT.replace(CARD, "<CREDIT_CARD>").replace(EMAIL, "<EMAIL>").replace(KEY, "<SECRETS>")


def policy(action: str, *detectors: str) -> Policy:
    return Policy("own", directions={"output": tuple(Watch(one, action) for one in detectors)})


def chunks_of(text: str, sizes: random.Random, most: int) -> list[str]:
    pieces = []
    while text:
        size = sizes.randint(1, most)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def chat_event(content: str | None = None, finish: str | None = None, index: int = 0, **delta) -> dict:
    given = delta if content is None else {"content": content, **delta}
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "choices": [{"index": index, "delta": given, "finish_reason": finish}],
    }


def passed(events: list, own: Policy, *, sizes: int = 0, scan=None, choices: int = 1) -> list:
    """The events that come out; bytes are cut into pieces of `sizes`."""
    scanner = Scanner({})

    async def in_process(items):
        return [scanner.scan(item) for item in items]

    checker = Checker(scan or in_process)

    async def check(context, text, windows):
        item = replace(item_of(own, text, "output"), context=context, windows_before=windows)
        return await checker.piece(own, item)

    async def source():
        raw = b"".join(one if isinstance(one, bytes) else event(one) for one in events) + b"data: [DONE]\n\n"
        step = sizes or len(raw)
        for place in range(0, len(raw), step):
            yield raw[place : place + step]

    async def run():
        found, stopped = [], None
        try:
            async for out in HeldBack(check, choices).stream(source()):
                found.append(out)  # noqa: PERF401 - what came before a stop counts
        except Stopped as error:
            stopped = error
        return found, stopped

    out, stopped = asyncio.run(run())
    assert out[-1] == b"data: [DONE]\n\n"
    return [*(json.loads(one.removeprefix(b"data: ")) for one in out[:-1]), stopped]


def written(events: list, index: int = 0, key: str = "content") -> str:
    choices = [choice for one in events[:-1] for choice in one["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(key) or "" for choice in choices)


@pytest.mark.parametrize("seed", range(8))
def test_values_that_are_cut_into_pieces_are_masked_whole(seed):
    pieces = chunks_of(TEXT, random.Random(seed), (1, 3, 8, 40)[seed % 4])
    events = [chat_event(None, role="assistant"), *(chat_event(one) for one in pieces), chat_event("", "stop")]
    out = passed(events, policy("mask", "pii/email", "pii/credit_card", "secrets"), sizes=seed * 7)
    assert written(out) == MASKED
    assert out[-2]["choices"][0]["finish_reason"] == "stop" and out[-1] is None


BESIDE_NUMBERS = [
    "4242 4242 4242 4242 02/27 737",
    "4111111111111111 123",
    "BE71 0961 2345 6769 50 EUR",
    "o'brien@example.org",
]


@pytest.mark.parametrize("value", [CARD, KEY, EMAIL, "DE89 3704 0044 0532 0130 00", "+1 415-555-2671", *BESIDE_NUMBERS])
def test_nothing_of_a_value_that_stops_the_answer_goes_out(value):
    detectors = ("pii/email", "pii/credit_card", "pii/iban_code", "pii/phone_number", "secrets")
    for before in ("It is ", "One sentence. Then ", "x" * 150 + " and then ", "y" * (HELD - 10) + " "):
        for size in (2, 5):
            text = f"{before}{value} and that is all there is to say."
            pieces = [text[place : place + size] for place in range(0, len(text), size)]
            out = passed([*(chat_event(one) for one in pieces), chat_event("", "stop")], policy("block", *detectors))
            assert before.startswith(written(out).rstrip()[: len(before)])
            assert len(written(out)) <= len(before), written(out)
            assert out[-2]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "content_filter"}
            assert out[-1].detectors


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17])
def test_cards_and_ibans_beside_numbers_are_masked_in_a_stream(size):
    text = (
        "Pay 20 4242 4242 4242 4242 02/27 737. Or 4111111111111111 123 of o'brien@example.org, or BE71 0961 2345 6769 50 EUR.\n"
        "It costs 100 4111 1111 1111 1111 12/26 and goes on for long enough that some of it goes out before the end is there."
    )
    pieces = [text[place : place + size] for place in range(0, len(text), size)]
    own = policy("mask", "pii/credit_card", "pii/iban_code", "pii/email")
    out = passed([*(chat_event(one) for one in pieces), chat_event("", "stop")], own)
    assert written(out) == (
        "Pay 20 <CREDIT_CARD> 02/27 737. Or <CREDIT_CARD> 123 of <EMAIL>, or <IBAN_CODE> 50 EUR.\n"
        "It costs 100 <CREDIT_CARD> 12/26 and goes on for long enough that some of it goes out before the end is there."
    )


def test_text_goes_out_sentence_by_sentence_as_the_engine_wrote_it():
    sentence = "This is a sentence without anything in it. "
    seen: list[int] = []

    async def scan(items):
        seen.append(len(items[0].text))
        return [Scanner({}).scan(item) for item in items]

    events = [
        {"choices": [{"index": 0, "delta": {"content": f"{word} "}, "logprobs": {"x": [word]}}]}
        | {"choices": [{"index": 0, "delta": {"content": f"{word} "}, "logprobs": {"x": [word]}}]}
        for word in (sentence * 6).split()
    ]
    out = passed([*events, chat_event("", "stop")], policy("block", "secrets"), scan=scan)
    assert [one["choices"][0].get("logprobs") for one in out[:-2]] == [{"x": [word]} for word in (sentence * 6).split()]
    assert len(seen) >= 6 and max(seen) <= HELD + KEPT + 64
    assert out[:-2] == [json.loads(json.dumps(one)) for one in events]


def test_masked_pieces_lose_what_reveals_their_text():
    events = [
        {"choices": [{"index": 0, "delta": {"content": piece}, "logprobs": {"content": [piece]}, "token_ids": [1]}]}
        for piece in ("mail ", "a@exam", "ple.org ", "now")
    ]
    out = passed([*events, chat_event("", "stop")], policy("mask", "pii/email"))
    assert written(out) == "mail <EMAIL> now"
    assert ["logprobs" in one["choices"][0] for one in out[:-2]] == [True, False, False, True]
    assert "exam" not in json.dumps(out[:-1])


def test_what_tells_an_answer_beside_its_text_is_no_way_around():
    """The tokens of the whole at its end, and those of a tool call that the engine keeps back until it is complete."""
    end = chat_event("", "stop")
    end["choices"][0]["token_ids"] = [1, 2]
    own = policy("mask", "pii/email")
    assert "token_ids" not in passed([chat_event("a@exam"), chat_event("ple.org"), end], own)[-2]["choices"][0]
    assert passed([chat_event("harmless"), end], own)[-2]["choices"][0]["token_ids"] == [1, 2]
    told = [{**chat_event(""), "choices": [{"index": 0, "delta": {"content": ""}, "logprobs": {"content": [piece]}}]}
            for piece in ("a@exam", "ple.org")]  # fmt: skip
    call = chat_event(
        None, tool_calls=[{"index": 0, "function": {"name": "send", "arguments": '{"to": "a@example.org"}'}}]
    )
    for action in ("mask", "block"):
        out = passed([*told, call, chat_event(None, "tool_calls")], policy(action, "pii/email"))
        assert "exam" not in json.dumps(out[:-1]), out


WRITTEN = [
    {"function_call": {"name": "send", "arguments": EMAIL}}, {"thinking": EMAIL}, {"audio": {"transcript": EMAIL}},
    {"reasoning_details": [{"type": "reasoning.text", "text": EMAIL}]}, {"content": [{"type": "text", "text": EMAIL}]},
    {"tool_calls": [{"index": 0, "function": {"name": EMAIL, "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "custom": {"name": "send", "input": EMAIL}}]},
]  # fmt: skip


@pytest.mark.parametrize("delta", WRITTEN)
def test_a_text_is_checked_wherever_an_engine_writes_it(delta):
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}, chat_event("", "stop")]
    out = passed(events, policy("block", "pii/email"))
    assert out[-1] is not None and EMAIL not in json.dumps(out[:-1])
    (places,) = of_answer({"choices": [{"message": delta, "finish_reason": "stop"}]}).values()
    assert EMAIL in [one.text.text for one in places]


def test_values_of_texts_that_are_written_in_turns_are_whole():
    def call(number, arguments):
        return chat_event(None, tool_calls=[{"index": number, "function": {"arguments": arguments}}])

    parts = [("card ", "card "), ("4111 11", "4111 11"), ("11 1111 ", "11 1111 "), ("1111 ok", "1111 ok")]
    both = [chat_event(None, reasoning=one, reasoning_content=other) for one, other in parts]
    calls = [call(number, part[0]) for part in parts for number in (0, 1)]
    for events in (both, calls):
        out = passed([*events, chat_event(None, "stop")], policy("mask", "pii/credit_card"))
        assert json.dumps(out[:-1]).count("<CREDIT_CARD>") == 2 and "41" not in json.dumps(out[:-1])
        out = passed([*events, chat_event(None, "stop")], policy("block", "pii/credit_card"))
        assert out[-1] is not None and "41" not in json.dumps(out[:-1])


def test_an_answers_reasoning_is_looked_at_under_both_of_its_names():
    for name in ("reasoning_content", "reasoning"):  # vLLM has renamed it
        answer = {"choices": [{"message": {"role": "assistant", "content": "x", name: "anna@example.org"}}]}
        assert [one.text.text for one in of_answer(answer)[0]] == ["x", "anna@example.org"]


def test_choices_reasoning_and_arguments_are_each_checked():
    def call(arguments):
        return chat_event(None, tool_calls=[{"index": 0, "function": {"arguments": arguments}}])

    events = [
        chat_event(None, reasoning_content="I know a@exam"), chat_event(None, reasoning_content="ple.org well"),
        chat_event("Other", index=1), chat_event("Hello"), call('{"to": "b@exam'), call('ple.org"}'),
        chat_event("", "stop", index=1), chat_event(None, "tool_calls"),
    ]  # fmt: skip
    usage = {"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}}
    out = passed([*events, usage], policy("mask", "pii/email"))
    assert written(out, key="reasoning_content") == "I know <EMAIL> well"
    assert (written(out), written(out, 1)) == ("Hello", "Other")
    calls = [call for one in out[:-1] for choice in one["choices"] for call in choice["delta"].get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"to": "<EMAIL>"}'
    assert out[-2] == usage
    stopped = passed([*events, usage], policy("block", "pii/email"))
    assert (
        stopped[-1] is not None and "usage" not in json.dumps(stopped[:-1]) and "exam" not in json.dumps(stopped[:-1])
    )


@pytest.mark.parametrize("size", [3, 200])
def test_arguments_in_json_stay_json(size):
    given = {"note": f'say "hi" to {EMAIL}', "card": 4111111111111111, "more": [4111111111111111, "x"]}
    text = json.dumps(given)
    pieces = [text[place : place + size] for place in range(0, len(text), size)]
    calls = [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in pieces]
    events = [*(chat_event(**call) for call in calls), chat_event(None, "tool_calls")]
    out = passed(events, policy("mask", "pii/email", "pii/credit_card"))
    found = [call for one in out[:-1] for call in one["choices"][0]["delta"].get("tool_calls", [])]
    card = "<CREDIT_CARD>"
    assert json.loads("".join(call["function"]["arguments"] for call in found)) == {
        "note": 'say "hi" to <EMAIL>', "card": card, "more": [card, "x"]
    }  # fmt: skip


def test_a_choice_that_is_stopped_leaves_the_others_going():
    others = ["This is fine. ", "So is this, ", "and that."]
    events = [chat_event(EMAIL + ". ", index=1)]
    for text in others:
        events += [chat_event(text), chat_event("More of what nobody gets. ", index=1)]
    events += [chat_event("", "stop"), chat_event("", "stop", index=1)]
    out = passed(events, policy("block", "pii/email"), choices=2)
    assert (written(out), written(out, 1)) == ("".join(others), "")
    ends = [(one["choices"][0]["index"], one["choices"][0].get("finish_reason")) for one in out[:-1]]
    assert [one for one in ends if one[1]] == [(1, "content_filter"), (0, "stop")] and out[-1] is None
    both = passed([*events[:1], chat_event(KEY), *events[1:]], policy("block", "pii/email", "secrets"), choices=2)
    assert both[-1] is not None and written(both) == written(both, 1) == ""


PROSE = "Some words of no importance, one after the other, and then it ends. "
LONG = {
    "key without an end": ("-----BEGIN PRIVATE KEY----- ", PROSE * 220, ""),
    "long key": ("-----BEGIN PRIVATE KEY-----\n", ("MIIEvQ" * 10 + "\n") * 400, "-----END PRIVATE KEY-----"),
    "long word": ("sk-ant-api03-", "Ab1_" * 3000, ""),
}


@pytest.mark.parametrize("size", [80, 300])
@pytest.mark.parametrize("kind", LONG)
def test_a_long_finding_is_redacted_in_a_stream(kind, size):
    """It was held to the end of the answer, and searched from its beginning with each piece: 2.3 million characters for 30,000."""
    searched = []

    async def scan(items):
        searched.append(len(items[0].context) + len(items[0].text))
        return [Scanner({}).scan(item) for item in items]

    head, middle, end = LONG[kind]
    after = "" if kind == "key without an end" else " That was it. " + PROSE * 3
    text = f"Here it is. {head}{middle}{end}{after}"
    events = [chat_event(text[place : place + size]) for place in range(0, len(text), size)]
    out = passed([*events, chat_event("", "stop")], policy("mask", "secrets"), scan=scan)
    assert written(out) == f"Here it is. <SECRETS>{after}"
    assert max(searched) < LONGEST_FINDING + CONTEXT + HEAD + HELD + size
    assert max(searched[len(searched) * 3 // 4 :]) < CONTEXT + HEAD + 3 * HELD + size  # none goes back to its beginning


def test_a_find_without_an_end_goes_out_before_the_answer_ends():
    channel, gone = Channel(), []

    async def check(context, text, windows):
        item = replace(item_of(own, text, "output"), context=context, windows_before=windows)
        return await checker.piece(own, item)

    async def scan(items):
        return [Scanner({}).scan(item) for item in items]

    async def run():
        for _ in range(220):
            channel.text += PROSE
            await channel.advance(check, final=False)
            gone.append(len(channel.text) - channel.released)

    own, checker = policy("mask", "secrets"), Checker(scan)
    channel.text = "-----BEGIN PRIVATE KEY----- "
    asyncio.run(run())
    assert max(gone) <= LONGEST_FINDING and gone[-1] < 2 * HELD
    assert channel.visible(0, channel.released) == "<SECRETS>" and len(channel.masks) == 1


def test_what_goes_on_as_a_word_belongs_to_a_find_that_is_not_known_again():
    async def check(context, text, windows):
        spans = [] if context else [Span(0, 4, len(text), "secrets", masked=True)]
        return Verdict(policy("mask", "secrets"), spans=spans)

    channel = Channel("see " + "x" * LONGEST_FINDING)
    asyncio.run(channel.advance(check, final=False))
    assert channel.released > LONGEST_FINDING - LONGEST_WORD - KEPT
    for text in ("y" * HELD, "z" * HELD + " and more"):
        channel.text += text
        asyncio.run(channel.advance(check, final=False))
    asyncio.run(channel.advance(check, final=True))
    assert channel.visible(0, len(channel.text)) == "see <SECRETS> and more"


def test_completions_and_line_ends_of_other_servers():
    events = [
        b'data: {"object": "text_completion", "choices": [{"index": 0, "text": "a@exam"}]}\r\n\r\n', b": ping\n\n",
        b'data: {"object": "text_completion", "choices": [{"index": 0, "text": "ple.org", "finish_reason": "stop"}]}\n\n',
    ]  # fmt: skip
    out = passed(events, policy("mask", "pii/email"))
    assert "".join(one["choices"][0]["text"] for one in out[:-1]) == "<EMAIL>"
    stopped = passed(events, policy("block", "pii/email"))
    assert stopped[0]["choices"] == [{"index": 0, "text": "", "finish_reason": "content_filter"}]


def test_a_guard_that_ends_releases_nothing_more():
    calls = []

    async def scan(items):
        calls.append(items)
        if len(calls) > 1:
            raise GuardDown("gone")
        return [Scanner({}).scan(item) for item in items]

    events = [chat_event(f"This is sentence number {number} of many. ") for number in "abcdef"]
    with pytest.raises(GuardDown):
        passed(events, policy("block", "secrets"), scan=scan)
