"""Characters that nobody meant to write go; invisible ones that a script needs stay."""

# ruff: noqa: RUF001
from __future__ import annotations

import random
import unicodedata

import pytest

from dstune.data.clean.unicode import clean_unicode

STAY = {
    "plain": "How are you?\n\tFine, thanks.",
    "accents": "Ça va, señor? Größe",
    "family emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 and ❤️\u200d\U0001f525",
    "skin tone and profession": "\U0001f469\U0001f3fd\u200d\U0001f680",
    "flag of Scotland": "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f!",
    "flag of a country": "\U0001f1e9\U0001f1ea",
    "Persian with non-joiner": "می\u200cخواهم کتاب\u200cها را",
    "Hindi with joiner": "क्\u200dष और क्\u200cष",
    "Sinhala": "ශ්\u200dරී ලංකා",
    "Hebrew with a mark": "שלום C++\u200e עולם",
    "Arabic": "مرحبا \u200f(HTML)\u200f",
    "isolates": "نص \u2066English\u2069 نص",
    "Khmer with zero-width spaces": "ខ្ញុំ\u200bស្រលាញ់\u200bភាសា",
    "Thai": "สวัสดี\u200bครับ",
    "Hangul": "안녕하세요",
    "Japanese with variation": "葛\U000e0100城 カタカナ",
    "private use": " \U000f1234",
    "mathematics": "x ≤ 2·10⁻³ ∀ε>0",
    "no-break space": "10\u00a0km",
}

CHANGE = {
    "carriage returns": ("a\r\nb\rc\n", "a\nb\nc\n"),
    "next line": ("a\x85b", "a\nb"),
    "controls": ("a\x00b\x07c\x1b[31m\x7f\x9f", "abc[31m"),
    "vertical tab and form feed": ("a\x0bb\x0cc", "abc"),
    "byte order marks": ("\ufeffone\ufeff two", "one two"),
    "zero-width in Latin": ("pass\u200bword w\u200co\u200dr\u2060d", "password word"),
    "joiner at an edge": ("\u200dhello\u200c", "hello"),
    "two joiners": ("\U0001f468\u200d\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    "directions in Latin": ("a\u202etxt.exe\u202c b\u200e", "atxt.exe b"),
    "hidden tags": ("hi\U000e0068\U000e0069\U000e007f there", "hi there"),
    "no characters": ("a\ufffeb\ufdd0c", "abc"),
    "decomposed": ("Cafe\u0301 A\u030a \u1100\u1161\u11a8", "Caf\u00e9 \u00c5 \uac01"),
}


@pytest.mark.parametrize("text", STAY.values(), ids=STAY.keys())
def test_stays(text):
    assert clean_unicode(text) == text


@pytest.mark.parametrize(("text", "clean"), CHANGE.values(), ids=CHANGE.keys())
def test_changes(text, clean):
    assert clean_unicode(text) == clean


@pytest.mark.parametrize("seed", range(5))
def test_cleaning_twice_is_cleaning_once(seed):
    choose = random.Random(seed)
    alphabet = [
        *"aZ \n\r\t\x00\x85eé\u0301\u00e9",
        *"\u200b\u200c\u200d\u2060\ufeff\u200e\u202e\u2066",
        *"مقی",
        "क",
        "्",
        "ก",
        "\U0001f468",
        "\U0001f3f4",
        "\U000e0067",
        "\U000e007f",
    ]
    for _ in range(2000):
        text = "".join(choose.choices(alphabet, k=12))
        once = clean_unicode(text)
        assert clean_unicode(once) == once
        assert unicodedata.is_normalized("NFC", once)
