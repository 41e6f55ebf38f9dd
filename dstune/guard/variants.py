"""Decodes hidden parts of a text. Attacks are written in base64, with look-alike letters or invisible characters, so that a model
reads them and a search does not. Decoded texts are scored in addition to the text. Doubly encoded text is decoded twice, but not
more deeply."""

from __future__ import annotations

import base64
import binascii
import html
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from urllib.parse import unquote

from dstune.guard.normal import DROPPED, TO_LATIN, Normal, normalised

MOST_VARIANTS = 6
"""Readings per text, including itself. Further ones are joined in the last one, so that decoys cannot displace any."""
DEPTH = 2
"""Base64 inside base64 is decoded, but not more deeply."""


@dataclass(frozen=True)
class Variant:
    """A reading of a text."""

    name: str
    """`plain` for the normalised text, otherwise the encoding."""
    text: str
    start: int = 0
    end: int = 0
    """The part of the original that it was decoded from."""
    parts: tuple[Variant, ...] = ()
    """The parts it is joined from, if it covers several parts of the original."""


_STOP_TEXT = """
a all and any are as at be by do for from give have how i if in instructions is it me my no not of on or
password previous prompt reveal rules say secret show so system tell that the then this to what with you your
ignore forget disregard above below now act print output der die das und ist nicht alle ignoriere que los las
el es para todo la le les des et une pas il che per non di del
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())
_ANY_WORD = re.compile(r"[^\W\d_]+")
_SEGMENT = re.compile(r"[^\n\r:;\"\u201c\u201d`|]+")


def _common(text: str) -> int:
    """Count the common words in `text`."""
    return sum(word in _STOP_WORDS for word in _ANY_WORD.findall(text.lower()))


def _readable(raw: bytes) -> str | None:
    """Decode `raw` as text in UTF-8 or, as PowerShell encodes it, UTF-16; None if it is not text."""
    encoding = "utf-8"
    if raw.count(0) >= 0.4 * len(raw):
        encoding = "utf-16-be" if raw[:1] == b"\0" else "utf-16-le"
    text = DROPPED.sub("", raw.decode(encoding, "replace"))
    if len(text) < 6 or text.count("\ufffd") > 0.05 * len(text) + (len(text) >= LEAST_CERTAIN):
        return None
    if _NUMBERS.fullmatch(text):
        return text
    good = sum(character.isalnum() or character in " \n\t.,:;!?'\"-()/_" for character in text)
    letters = sum(character.isalpha() for character in text)
    clean, lettered = (0.75, 0.35) if len(text) >= LEAST_CERTAIN else (0.9, 0.5)
    return text.replace("\ufffd", "") if good >= clean * len(text) and letters >= lettered * len(text) else None


_NUMBERS = re.compile(r"[\d .,:+()/-]{8,}")
"""A card, account or telephone number."""
LEAST_CERTAIN = 16
"""A decoded text of at least this many characters may contain a non-letter and still be no accident."""


_BASE64 = re.compile(
    r"(?<![A-Za-z0-9+/_-])(?:(?:[A-Za-z0-9+/_-]{4,}[ \t]{0,3}\r?\n[ \t>]{0,8}){1,400}+(?:[A-Za-z0-9+/_-]{2,}={0,2})?+"
    r"|[A-Za-z0-9+/_-]{12,}={0,2})"
)
_IN_NAMES = re.compile(r"[/_+-]|\n[ \t>]*")
MOST_BREAKS = 8
_REGION = re.compile(r"[A-Za-z0-9+/_-](?:[\s>]{0,3}[A-Za-z0-9+/_-]){23,}+={0,2}")
_INSIDE = re.compile(r"[A-Z0-9+/]")
"""An upper case letter, digit or sign inside a word, where a language has lower case letters."""
_STRETCH = re.compile(rb"[\x20-\x7e\r\n\t]{16,}")


def _base64(text: str) -> Iterator[Variant]:
    covered: list[tuple[int, int]] = []
    for match in _BASE64.finditer(text):
        if len(match.group()) < 12:
            continue
        # The end of a path or name, or an unrelated line, may precede it: `files/SWdub3Jl`.
        breaks = [variant.end() for variant in islice(_IN_NAMES.finditer(match.group()), MOST_BREAKS)]
        for start in (0, *breaks):
            if (decoded := _of_base64(match.group()[start:])) is not None:
                yield Variant("base64", decoded, match.start() + start, match.end())
                covered.append((match.start() + start, match.end()))
                break
    for variant in _within_base64(text):
        at = bisect_right(covered, (variant.start + 8, len(text))) - 1
        if (
            at < 0 or covered[at][1] < variant.end - 8
        ):  # not a duplicate that starts with a letter of the preceding text
            yield variant


def _within_base64(text: str) -> Iterator[Variant]:
    """Yield text in one of base64's four alignments, if its beginning is unknown or it contains spaces."""
    for region in _REGION.finditer(text):
        words = region.group().split()
        if sum(bool(_INSIDE.search(word, 1)) for word in words) < 0.3 * len(words):
            continue  # words of a language
        places = [place for place in range(*region.span()) if text[place].isalnum() or text[place] in "+/_-"]
        run = "".join(text[place] for place in places).replace("-", "+").replace("_", "/")
        for skipped in range(4):
            part = run[skipped:]
            part = part[: len(part) - (len(part) % 4 == 1)]
            raw = base64.b64decode(part + "=" * (-len(part) % 4))
            for match in _STRETCH.finditer(raw):
                stretch = match.group().decode()
                if sum(character.isalpha() for character in stretch) >= 0.6 * len(stretch):
                    first, last = skipped + match.start() * 4 // 3, skipped + (match.end() * 4 - 1) // 3
                    yield Variant("base64", stretch, places[first], places[min(last, len(places) - 1)] + 1)


def _of_base64(text: str) -> str | None:
    run = re.sub(r"[\s>=]", "", text).replace("-", "+").replace("_", "/")
    if len(run) < 12 or (run.isalpha() and (run.islower() or run.isupper())):
        return None  # a long word
    try:
        raw = base64.b64decode(run[: len(run) - (len(run) % 4 == 1)] + "=" * (-len(run) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return _readable(raw)


_BASE32 = re.compile(r"(?<![A-Za-z0-9])(?:[A-Z2-7]{16,}|[a-z2-7]{16,})(?![A-Za-z0-9])")


def _base32(text: str) -> Iterator[Variant]:
    for match in _BASE32.finditer(text):
        run = match.group().upper()
        run = run[: len(run) - (len(run) % 8 in (1, 3, 6))]  # these remainders do not form a complete byte
        try:
            raw = base64.b32decode(run + "=" * (-len(run) % 8))
        except binascii.Error:
            continue
        if (decoded := _readable(raw)) is not None:
            yield Variant("base32", decoded, *match.span())


_HEX = re.compile(r"(?<![0-9A-Za-z])(?:(?:0x|\\x)?+[0-9A-Fa-f]{2}[\s:,;-]{0,2}+){8,}+")


def _hex(text: str) -> Iterator[Variant]:
    for match in _HEX.finditer(text):
        digits = re.sub(r"0x|\\x|[\s:,;-]", "", match.group())
        if (decoded := _readable(bytes.fromhex(digits))) is not None:
            yield Variant("hex", decoded, *match.span())


_BINARY = re.compile(r"(?<![0-9])(?:[01]{8}[\s,;:-]{0,2}+){4,}+(?![0-9])")


def _binary(text: str) -> Iterator[Variant]:
    for match in _BINARY.finditer(text):
        bits = re.sub(r"[\s,;:-]", "", match.group())
        raw = bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))
        if (decoded := _readable(raw)) is not None:
            yield Variant("binary", decoded, *match.span())


_UNICODE_ESCAPE = re.compile(r"\\u([0-9A-Fa-f]{4})")


def _escaped(text: str) -> Iterator[Variant]:
    """Yield percent, HTML and `\\u` escapes, decoded."""
    if not ("%" in text or "&#" in text or "\\u" in text):
        return
    for span in _words_matching(text, _ESCAPE):
        run = text[span[0] : span[1]]
        decoded = html.unescape(unquote(run))
        decoded = _UNICODE_ESCAPE.sub(lambda code: chr(int(code[1], 16)), decoded)
        if (
            decoded != run
            and "\ufffd" not in decoded
            and not any("\ud800" <= character <= "\udfff" for character in decoded)
        ):
            yield Variant("escaped", decoded, *span)


_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}|&#x?[0-9A-Fa-f]{1,6};|\\u[0-9A-Fa-f]{4}")


def _words_matching(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Yield runs of neighbouring words that each match `pattern`, if it matches at least three times."""
    begin = end = count = 0
    for word in re.finditer(r"\S+", text):
        matches = len(pattern.findall(word.group()))
        if matches:
            begin = word.start() if not count else begin
            end, count = word.end(), count + matches
            continue
        if count >= 3:
            yield begin, end
        count = 0
    if count >= 3:
        yield begin, end


_SPACED = re.compile(r"(?<!\w)(?:[^\W_](?: {1,3}+|[.\-_*|,/]{1,2}+ ?+)){4,}+(?:[^\W_](?![^\W_]))?+")
"""No backtracking: 12,000 characters of `a_ a_ a_ ...` took 2 s, during which all other texts waited."""
_SEPARATORS = " .-_*|,/"


def _spaced(text: str) -> Iterator[Variant]:
    """Yield spaced text such as `i g n o r e  t h i s`, whose words are separated by more than one separator."""
    for match in _SPACED.finditer(text):
        run = match.group().rstrip(_SEPARATORS)
        wide = re.split(r"\s{2,}|[/|] ?", run) if re.search(r"\s{2,}|[/|]", run) else [run]
        words = [re.sub(r"\W|_", "", word) for word in wide]
        if sum(map(len, words)) > 4 and sum(word.isalpha() for word in words) >= 0.5 * len(words):
            joined = " ".join(_split_words(word) if len(word) > 12 else word for word in words)
            yield Variant("spaced", joined, match.start(), match.start() + len(run))


_RUN_TOGETHER = re.compile(r"[^\W\d_]{16,}+")
_CAMEL = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])")
LONGEST_WORD = 2000


def _run_together(text: str) -> Iterator[Variant]:
    """Yield split text of `IgnoreAllPreviousInstructions` or `ignoreallpreviousinstructions`, which a tokenizer turns into unknown
    words."""
    for match in _RUN_TOGETHER.finditer(text):
        word = match.group()[:LONGEST_WORD]
        split = _CAMEL.sub(" ", word)
        if " " not in split:
            split = _split_words(word)
        common = [part for part in split.lower().split() if len(part) > 3 and part in _VOCABULARY]
        if len(common) >= 2 and sum(map(len, common)) >= 0.5 * len(word):  # "a", "it" and "in" occur in any long word
            yield Variant("joined", split, *match.span())


_MORE_TEXT = """
instruction message messages prior following hidden initial entire everything disclose override bypass repeat
write them their there these those will would can could should must keys key data access admin developer mode
new user users about into only next first last words word text conversation guidelines guideline safety filter
filters restrictions restriction limits policy policies without pretend jailbreak jailbroken unrestricted
anything code credentials token tokens email file files send delete execute command commands answer question
respond
"""
_VOCABULARY = _STOP_WORDS | frozenset(_MORE_TEXT.split())
_LONGEST = max(map(len, _VOCABULARY))


def _split_words(text: str) -> str:
    """Split words that were run together, if common words cover the text; letters between them stay as they are."""
    lower, count = text.lower(), len(text)
    cost = [0.0] * (count + 1)
    back = [0] * (count + 1)
    for end in range(1, count + 1):
        cost[end], back[end] = cost[end - 1] + 1.0, end - 1
        for start in range(max(0, end - _LONGEST), end):
            if lower[start:end] in _VOCABULARY and cost[start] + 0.9 / (end - start) < cost[end]:
                cost[end], back[end] = cost[start] + 0.9 / (end - start), start
    places, end = [count], count
    while end:
        end = back[end]
        places.append(end)
    words: list[str] = []
    loose = ""
    for start, stop in zip(reversed(places), list(reversed(places))[1:], strict=False):
        piece = text[start:stop]
        if stop - start == 1 and piece.lower() not in ("a", "i"):
            loose += piece
            continue
        if loose:
            words.append(loose)
            loose = ""
        words.append(piece)
    return " ".join([*words, loose] if loose else words)


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TURNED = _LETTERS[13:] + _LETTERS[:13]
_ROT13 = str.maketrans(_LETTERS + _LETTERS.upper(), _TURNED + _TURNED.upper())


def _by_words(name: str, text: str, change: Callable[[str], str]) -> Iterator[Variant]:
    """Yield runs of neighbouring words that only become common words once they are changed, even among plain words."""
    for match in _SEGMENT.finditer(text):
        segment = match.group()
        if len(segment) < 8:
            continue
        words = list(_ANY_WORD.finditer(segment))
        changed = [change(word.group()).lower() in _VOCABULARY for word in words]
        plain = [word.group().lower() in _VOCABULARY for word in words]
        gains = [changed_count - plain_count for changed_count, plain_count in zip(changed, plain, strict=True)]
        least = 1 if min(gains, default=0) == 0 else 2  # a single word counts only if nothing else is readable
        for first, last in _gaining(gains, least):
            start, end = words[first].start(), words[last].end()
            yield Variant(name, change(segment[start:end]), match.start() + start, match.start() + end)


def _gaining(gains: Sequence[int], least: int) -> Iterator[tuple[int, int]]:
    """Yield runs whose sum is at least `least`, including neighbours that change nothing, as first and last index."""
    first = total = highest = last = 0
    for place, gain in enumerate([*gains, -len(gains) - 1]):
        total += gain
        if total < 0:
            if highest >= least:
                yield first, last
            first, total, highest, last = place + 1, 0, 0, place + 1
        elif total >= highest:
            highest, last = total, place


def _by_segment(name: str, text: str, least: int, change: Callable[[str], str]) -> Iterator[Variant]:
    """Yield parts of the text that contain at least `least` more common words once they are changed."""
    for match in _SEGMENT.finditer(text):
        segment = match.group()
        if len(segment) < 8:
            continue
        changed = change(segment)
        if changed != segment and _common(changed) >= _common(segment) + least:
            yield Variant(name, changed, *match.span())


_LEET = str.maketrans("013457@$!|\u20ac", "oieastasile")
_LEET_WORD = re.compile(r"(?<!\S)[\"'(]?[\w@$!|\u20ac]{2,30}[\"').,;:?]{0,3}(?!\S)")
_LEET_SIGN = re.compile(r"[013457@$!|\u20ac](?=\w)|(?<=\w)[013457@$!|\u20ac]")


def _unleet(text: str) -> str:
    """Return the text with leetspeak words (letters and signs, with a sign inside) decoded; numbers and plain words stay."""

    def change(match: re.Match[str]) -> str:
        word = match.group()
        return word.translate(_LEET) if _LEET_SIGN.search(word) and _ANY_WORD.search(word) else word

    return _LEET_WORD.sub(change, text)


_DECODERS: tuple[Callable[[str], Iterator[Variant]], ...] = (
    _base64,
    _base32,
    _hex,
    _escaped,
    _binary,
    _spaced,
    _run_together,
    lambda text: _by_words("rot13", text, lambda part: part.translate(_ROT13)),
    lambda text: _by_words("reversed", text, lambda part: part[::-1]),
    lambda text: _by_segment("leet", text, 1, _unleet),
    lambda text: _by_segment("look-alikes", text, 3, lambda part: part.translate(TO_LATIN)),
)
SEVERAL = "several"
"""The name of several readings joined."""
DECODED = frozenset({"base64", "base32", "hex", "escaped", "binary", SEVERAL})
"""Encodings of arbitrary text, which is also searched for personal data and secrets."""


def variants(text: str) -> list[Variant]:
    """Return the normalised text, then its decoded parts: at most MOST_VARIANTS in all."""
    return variants_of(text, normalised(text))


def variants_of(text: str, normal: Normal) -> list[Variant]:
    variants = [
        Variant("plain", normal.text, 0, len(text)),
        *(_placed(variant, normal) for variant in _decoded(normal.text, DEPTH)),
    ]
    if others := variants[MOST_VARIANTS:]:
        variants[MOST_VARIANTS - 1 :] = [_joined(SEVERAL, [variants[MOST_VARIANTS - 1], *others])]
    return variants


def _placed(variant: Variant, normal: Normal) -> Variant:
    """Return the variant with its place in the original."""
    start, end = normal.span(variant.start, variant.end)
    return Variant(variant.name, variant.text, start, end, tuple(_placed(part, normal) for part in variant.parts))


def _joined(name: str, parts: Sequence[Variant]) -> Variant:
    single = tuple(inner for variant in parts for inner in variant.parts or (variant,))
    text = "\n".join(variant.text for variant in parts)
    return Variant(name, text, min(variant.start for variant in parts), max(variant.end for variant in parts), single)


def _decoded(text: str, depth: int) -> Iterator[Variant]:
    for decode in _DECODERS:
        parts = [
            Variant(variant.name, normalised(variant.text).text, variant.start, variant.end) for variant in decode(text)
        ]
        if not parts:
            continue
        # Parts in one encoding form one reading: an attack may be split into several.
        joined = _joined(parts[0].name, parts)
        yield joined
        if depth > 1 and joined.name in DECODED:
            for inner in _decoded(joined.text, depth - 1):
                yield Variant(inner.name, inner.text, joined.start, joined.end)
