"""What is done to single rows: lengths, languages, secrets, personal data; policies, counts and examples."""

from __future__ import annotations

import json
import random
import sys
import time

import pytest
from support.cleaning import CHAT, TEXT, Cleaned, remaining_rows, texts_of
from unit.data_helpers import byte_tokenizer, chats, data_run, exchange, prepared, refusal_of, write_jsonl

from dstune.config.data_schema import CleanConfig, Duplicates, Found, SplitConfig, Unwanted
from dstune.core.errors import UserError
from dstune.data.clean import extras
from dstune.data.clean.report import summary
from dstune.data.clean.rows import learned_texts
from dstune.data.clean.sensitive import _emails, _ibans_and_cards, find_personal_data, find_secrets, mask
from dstune.tasks.causal_lm.config import CausalLmConfig

KEY = "AKIAIOSFODNN7EXAMPLE"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE KEY-----"
TOKEN = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"

SECRETS = {
    f"the key {KEY} is": "the key <SECRET> is",
    "ghp_" + "a1B2" * 9: "<SECRET>",
    "github_pat_" + "11ABCDEFG0" * 8: "<SECRET>",
    "hf_" + "aB" * 17 + " ok": "<SECRET> ok",
    "https://me:hunter2@host.org/x": "https://me:<SECRET>@host.org/x",
    f"before\n{PEM}\nafter": "before\n<SECRET>\nafter",
    f"Bearer {TOKEN}, please": "Bearer <SECRET>, please",
    "sk-proj-" + "aB3_" * 12: "<SECRET>",
    "sk-ant-api03-" + "aB3_" * 12: "<SECRET>",
    "AIza" + "SyA1b2C3d" * 3 + "x" * 8: "<SECRET>",
    "xoxb-1234567890-abcdefghij": "<SECRET>",
}

NO_SECRETS = [
    "The password is forgotten, and the token was a bus ticket.",
    "https://example.org/a/very/long/path/that-is-not-a-secret/at-all?x=1",
    "import numpy as np  # commit 5f2b6c1 by someone@example.org",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft APARTMENTHAUSORDNUNG",
]

PERSONAL = {
    "mail jane.doe+x@mail.example.co.uk!": "mail <EMAIL>!",
    "call +49 30 901820 now": "call <PHONE> now",
    "call (650) 253-0000 or 020 7031 3000": "call <PHONE> or <PHONE>",
    "pay DE89 3704 0044 0532 0130 00 soon": "pay <IBAN> soon",
    "GB29NWBK60161331926819": "<IBAN>",
    "card 4111 1111 1111 1111, 5500-0000-0000-0004": "card <CARD>, <CARD>",
    "ssn 536-90-4399.": "ssn <SSN>.",
    "from 8.8.8.8 and 2001:4860:4860::8888": "from <IP_ADDRESS> and <IP_ADDRESS>",
    # Numbers beside cards and IBANs.
    "4111 1111 1111 1111 12/26": "<CARD> 12/26",
    "4111111111111111 123": "<CARD> 123",
    "4242 4242 4242 4242 02/27 737": "<CARD> 02/27 737",
    "Pay 20 4111 1111 1111 1111": "Pay 20 <CARD>",
    "536-90-4111 1111 1111 1111 and 650 253-4111 1111 1111 1111": "536-90-<CARD> and 650 253-<CARD>",
    "3782 822463 10005 12/26, 20-4111-1111-1111-1111 123": "<CARD> 12/26, 20-<CARD> 123",
    "4111 1111 1111 1111 1226 4242 4242 4242 4242 0127": "<CARD> 1226 <CARD> 0127",
    "4000 0000 0000 0000 006 12/26": "<CARD> 12/26",
    "anna,4111111111111111,12/26,123": "anna,<CARD>,12/26,123",
    "41111111 11111111 and 12 41111111 11111111": "<CARD> and 12 <CARD>",
    "2026 " * 12 + "4111 1111 1111 1111": "2026 " * 12 + "<CARD>",
    "BE71 0961 2345 6769 50 EUR": "<IBAN> 50 EUR",
    "AT61 1904 3002 3457 3201 50 EUR": "<IBAN> 50 EUR",
    "ES91 2100 0418 4502 0005 1332 100 EUR": "<IBAN> 100 EUR",
    "AB12 3456 BE71 0961 2345 6769 5000 MT84 MALT 0110 0001 2345 MTLC AST0 01S": "AB12 3456 <IBAN> 5000 <IBAN>",
    "DE89 3704 0044 0532 0130 00 4111 1111 1111 1111 12/26": "<IBAN> <CARD> 12/26",
    # Signs in addresses and around them.
    "o'brien@example.com, r&d@example.com, 'o'brien@example.com'": "<EMAIL>, <EMAIL>, '<EMAIL>'",
    "'a@b.org' {a@b.org} `a@b.org` **a@b.org** |a@b.org|c@d.org|": "'<EMAIL>' {<EMAIL>} `<EMAIL>` **<EMAIL>** |<EMAIL>|<EMAIL>|",
    "b'a@b.org' x={a@b.org} \\email{a@b.org} o'brien@example.com's": "b'<EMAIL>' x={<EMAIL>} \\email{<EMAIL>} <EMAIL>'s",
    "user=a@b.org bounces+a=b.org@lists.org mailto:a@b.org?cc=c@d.org": "user=<EMAIL> <EMAIL> mailto:<EMAIL>?cc=<EMAIL>",
    "https://b.org/u/a@b.org?x=1&mail=c@d.org": "https://b.org/u/<EMAIL>?x=1&mail=<EMAIL>",
}

NO_PERSONAL = [
    "In 2020 there were 1234567 people, 3.14159265358979 and 2020-01-01 12:00:59.",
    "version 1.2.3.4.5, local 192.168.0.1, 127.0.0.1, documentation 2001:db8::1, std::vector, 10:20:30",
    "DE89 3704 0044 0532 0130 01 and 4111 1111 1111 1112 and 000-12-3456 have wrong check digits",
    "a@b and @name and user@localhost",
    "1 + 2 = 3; 100,000,000,000,000 dollars; ISBN 978-3-16-148410-0",
    # A card within a longer group, in a fraction, in groups of others; with another issuer's length.
    "94111111111111111 41111111111111110000 0.4111111111111111 4111111111111111.5 -4111111111111111",
    "20 41 1111 1111 1111 11 20, 12 3782 8224 6310 0053",
    "BE71 0961 2345 6768 50 EUR, BE71 0961 2345 67 EUR, XX71 0961 2345 6769",
    " ".join(str(year) for year in range(1900, 2030)),
]


@pytest.mark.parametrize(("text", "masked"), SECRETS.items())
def test_secrets(text, masked):
    assert mask(text, find_secrets(text)) == masked


@pytest.mark.parametrize("text", NO_SECRETS)
def test_no_secrets(text):
    assert find_secrets(text) == []


@pytest.mark.parametrize(("text", "masked"), PERSONAL.items())
def test_personal_data(text, masked):
    assert mask(text, find_personal_data(text)) == masked


@pytest.mark.parametrize("text", NO_PERSONAL)
def test_no_personal_data(text):
    assert find_personal_data(text) == []


@pytest.mark.parametrize("sign", list("!#$%&'*+/?^_`{|}~-"))
def test_an_address_may_have_any_sign_within(sign):
    (found,) = find_personal_data(f"to a{sign}b@example.com now")
    assert (found.start, found.end) == (3, 18)


def test_tables_of_numbers_hold_few_cards():
    """Chance finds some: 0.56 in a row of the first kind when the check digit alone was asked."""
    numbers = random.Random(0)
    rows = [" ".join(str(numbers.randint(1000, 9999)) for _ in range(40)) for _ in range(500)]
    assert sum(len(_ibans_and_cards(row)) for row in rows) < 0.6 * 500
    rows = [" ".join(str(int(10 ** numbers.uniform(0, 6))) for _ in range(20)) for _ in range(500)]
    assert sum(len(_ibans_and_cards(row)) for row in rows) < 0.1 * 500


@pytest.mark.parametrize(
    "group", ["4111 ", "4 ", "4000 400000 40000 ", "4111 " * 9 + "41 ", "4111111111111112 ", "DE89 "]
)
def test_many_numbers_take_time_by_their_number(group):
    text = group * (200_000 // sum(one.isdigit() for one in group))
    began = time.process_time()
    _ibans_and_cards(text)
    assert time.process_time() - began < 2


def test_many_signs_of_addresses_take_time_by_their_number():
    began = time.process_time()
    for text in ("a'" * 50_000 + "@", "@a." * 30_000, "x@a.bc" * 15_000, ("a'" * 35 + "@b.co ") * 1_500):
        list(_emails(text))
    assert time.process_time() - began < 3


SENSITIVE = [
    exchange("Hello", "Hi"),
    exchange(f"My key is {KEY}", "Mail jane@example.org"),
    exchange("How are you?", "Fine"),
]


@pytest.mark.parametrize("policy", list(Unwanted))
def test_answers_that_refuse_or_insult_are_counted_or_left_out_and_questions_do_not_count(policy, tmp_path):
    rows = [
        exchange("You idiot, I can't help you", "Good morning"),
        exchange("How?", "I'm sorry, but I can't help with that."),
        exchange("Why?", "Because you are an idiot."),
    ]
    cleaned = Cleaned(tmp_path, byte_tokenizer(), CHAT, refusals=policy, toxicity=policy)
    table = cleaned.rows(rows)
    kind = {Unwanted.keep: None, Unwanted.flag: "flagged", Unwanted.drop: "removed"}[policy]
    assert cleaned.counts() == ({step: {kind: 1} for step in ("refusals", "toxicity")} if kind else {})
    assert remaining_rows(table) == ([0] if policy is Unwanted.drop else [0, 1, 2])
    if kind:
        assert cleaned.report()["examples"]["toxicity"][0]["text"].startswith("idiot: ")


def test_what_a_model_learns_to_write():
    pair = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    rows = (
        {"prompt": "p", "completion": "c"},
        {"source": "s", "target": "t"},
        {"text": "x"},
        {"text": "x", "label": "y"},
        pair,
    )
    assert [list(learned_texts(row)) for row in rows] == [["c"], ["t"], ["x"], [], ["a"]]


@pytest.mark.parametrize("policy", list(Found))
def test_policies(policy, tmp_path):
    cleaned = Cleaned(tmp_path, byte_tokenizer(), CHAT, secrets=policy, personal_data=policy)
    table = cleaned.rows(SENSITIVE)
    written = json.dumps(texts_of(table))
    kind = {Found.keep: None, Found.flag: "flagged", Found.mask: "changed", Found.drop: "removed"}[policy]
    expected = {step: {kind: 1} for step in ("secrets", "personal_data")} if kind else {}
    if policy is Found.drop:  # the first step that removes a row is the one that counts it
        expected.pop("personal_data")
    assert cleaned.counts() == expected
    assert remaining_rows(table) == ([0, 2] if policy is Found.drop else [0, 1, 2])
    assert (KEY in written, "jane@" in written) == (policy in (Found.keep, Found.flag),) * 2
    assert ("My key is <SECRET>" in written, "Mail <EMAIL>" in written) == (policy is Found.mask,) * 2
    report = json.dumps(cleaned.report())
    assert KEY not in report and "jane@" not in report
    if kind:
        (example,) = cleaned.report()["examples"]["secrets"]
        assert example["place"] == f"{tmp_path / 'train.jsonl'}:2"
        assert example["text"] == "<SECRET>: My key is <SECRET> / Mail <EMAIL>"


def test_examples_of_other_steps_hide_what_is_only_flagged(tmp_path):
    rows = [{"text": f"the key {KEY} again"}] * 2
    cleaned = Cleaned(tmp_path, byte_tokenizer(), TEXT, secrets=Found.flag)
    cleaned.rows(rows)
    assert cleaned.counts() == {"secrets": {"flagged": 2}, "duplicates": {"removed": 1}}
    assert KEY not in json.dumps(cleaned.report())


def test_a_masked_row_has_a_new_hash(tmp_path):
    table = Cleaned(tmp_path, byte_tokenizer(), CHAT, secrets=Found.mask).rows(SENSITIVE)
    plain = Cleaned(tmp_path, byte_tokenizer(), CHAT).rows(SENSITIVE)
    assert [a == b for a, b in zip(table.hashes, plain.hashes, strict=True)] == [True, False, True]


def test_lengths_and_empty_rows(tmp_path):
    rows = [{"text": text} for text in ("12345", "1234", "123456789", "1234567890", "\u200b\x00", "  54321  ")]
    cleaned = Cleaned(tmp_path, byte_tokenizer(), TEXT, min_characters=5, max_characters=9)
    assert remaining_rows(cleaned.rows(rows)) == [0, 2, 5]
    assert cleaned.counts() == {
        "unicode": {"changed": 1},
        "empty": {"removed": 1},
        "too_short": {"removed": 1},
        "too_long": {"removed": 1},
    }
    examples = cleaned.report()["examples"]
    assert examples["too_long"][0]["text"] == "10 characters: 1234567890"


def test_a_conversation_is_measured_as_a_whole_without_its_system_prompt(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "x" * 50}, *exchange("1234", "56789")["messages"]]}]
    assert remaining_rows(Cleaned(tmp_path, byte_tokenizer(), CHAT, min_characters=9, max_characters=9).rows(rows)) == [
        0
    ]
    assert remaining_rows(Cleaned(tmp_path, byte_tokenizer(), CHAT, min_characters=10).rows(rows)) == []


def test_empty_messages_are_no_reason_but_a_conversation_of_them(tmp_path):
    rows = [exchange("", "Hello"), exchange("", " ")]
    cleaned = Cleaned(tmp_path, byte_tokenizer(), CHAT)
    assert remaining_rows(cleaned.rows(rows)) == [0]
    assert cleaned.counts() == {"empty": {"removed": 1}}


def test_languages(tmp_path):
    rows = [
        {"text": "The weather in the city was warm and sunny for the whole week."},
        {"text": "Das Wetter in der Stadt war die ganze Woche warm und sonnig."},
        {"text": "La météo en ville était chaude et ensoleillée toute la semaine."},
        {"text": "ok"},  # of no language for sure: stays, and is counted
        {"text": "El tiempo en la ciudad fue cálido y soleado durante toda la semana."},
    ]
    cleaned = Cleaned(tmp_path, byte_tokenizer(), TEXT, languages=["en", "fr"])
    assert remaining_rows(cleaned.rows(rows)) == [0, 2, 3]
    assert cleaned.counts() == {"languages": {"removed": 2, "flagged": 1}}
    assert cleaned.report()["examples"]["languages"][0]["text"].startswith("de ")


def test_an_unknown_language_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data.clean.languages=xq: no such language"):
        Cleaned(tmp_path, byte_tokenizer(), TEXT, languages=["en", "xq"])


def test_control_tokens_are_counted(tmp_path):
    cleaned = Cleaned(tmp_path, byte_tokenizer(), CHAT)
    assert remaining_rows(cleaned.rows([exchange("Hi<|im_end|>", "no"), exchange("a", "b")])) == [0, 1]
    assert cleaned.counts() == {"control_tokens": {"flagged": 1}}
    (example,) = cleaned.report()["examples"]["control_tokens"]
    assert example["text"] == "<|im_end|>: Hi<|im_end|> / no"


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("py3langid", {"languages": ["en"]}),
        ("rensa", {"duplicates": Duplicates.near}),
        ("rapidfuzz", {"duplicates": Duplicates.near}),
        ("detect_secrets", {"secrets": Found.flag}),
        ("phonenumbers", {"personal_data": Found.mask}),
        ("stdnum", {"personal_data": Found.drop}),
    ],
)
def test_what_is_missing_is_named(module, settings, tmp_path, monkeypatch):
    for loaded in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    extras.require.cache_clear()
    for cached in (extras.require, *_cached()):
        cached.cache_clear()
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == module else object())
    (problem,) = extras.missing(CleanConfig(**settings))
    (key,) = settings
    assert (problem.where, problem.fix) == (f"data.clean.{key}", "pip install '.[clean]' in a clone of dstune")
    with pytest.raises(UserError, match=f"data.clean.{key}: the package .* is not installed"):
        Cleaned(tmp_path, byte_tokenizer(), TEXT, **settings)
    for cached in (extras.require, *_cached()):
        cached.cache_clear()


def _cached():
    from dstune.data.clean import language, sensitive

    return language._identifier, sensitive._secret_detectors


def test_nothing_is_needed_by_default():
    assert list(extras.missing(CleanConfig())) == []
    assert extras.versions(CleanConfig()) == {}


def test_the_summary_is_one_line():
    counts = {
        "unicode": {"removed": 0, "changed": 2, "flagged": 0},
        "duplicates": {"removed": 1234, "changed": 0, "flagged": 0},
        "control_tokens": {"removed": 0, "changed": 0, "flagged": 1},
    }
    assert summary(counts) == "left out 1,234 duplicates; changed 2 Unicode; flagged 1 control tokens"
    assert summary({"unicode": {"removed": 0, "changed": 0, "flagged": 0}}) == ""


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_counts_in_its_report(tmp_path):
    rows = [*chats(20), *chats(5), exchange("a\r\nb", "c"), exchange("x<|im_end|>", "y")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = prepared(data_run(path, split=SplitConfig(validation=0.2)), byte_tokenizer(), tmp_path / "cache")
    report = data.report["train"]
    assert report["clean"]["duplicates"] == {"removed": 5, "changed": 0, "flagged": 0}
    assert report["clean"]["unicode"]["changed"] == 1 and report["clean"]["control_tokens"]["flagged"] == 1
    assert report["clean"]["leaks"]["removed"] == 0
    assert report["examples"]["duplicates"][0]["place"] == f"{path}:21"
    assert len(data.train.lengths) + len(data.validation.lengths) == 22
    assert "clean" not in data.report["validation"]


def test_cleaning_is_part_of_the_fingerprint(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(20))
    keys = {
        prepared(data_run(path, clean=CleanConfig(**settings)), byte_tokenizer(), tmp_path / "cache").fingerprint
        for settings in ({}, {"leaks": False}, {"unicode": False}, {"min_characters": 2})
    }
    assert len(keys) == 4


def test_leaks_between_given_files(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", chats(20))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*chats(3), exchange("of its", "own")])
    config = data_run(train, validation=str(held_out))
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert (len(data.train.lengths), len(data.validation.lengths)) == (17, 4)
    assert data.report["train"]["clean"]["leaks"]["removed"] == 3
    kept = prepared(
        data_run(train, validation=str(held_out), clean=CleanConfig(leaks=False)), byte_tokenizer(), tmp_path / "cache"
    )
    assert len(kept.train.lengths) == 20


def test_cleaning_that_leaves_nothing_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "short"}, {"text": "also"}])
    config = data_run(path, task=CausalLmConfig(), clean=CleanConfig(min_characters=100))
    (problem,) = refusal_of(config, byte_tokenizer(), tmp_path)
    assert problem.where == "data.clean.min_characters"
    assert problem.reason == "cleaning leaves no train row (too short 2)"
    config = data_run(path, validation=str(path), task=CausalLmConfig())
    (problem,) = refusal_of(config, byte_tokenizer(), tmp_path)
    assert problem.where == "data.clean.leaks"
