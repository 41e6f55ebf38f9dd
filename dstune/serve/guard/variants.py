"""A text as a reader would see it, and what its hidden parts say once they are decoded.

Attacks are written in base64, with look-alike letters or invisible characters so that a model reads them and a search does
not. What is found here is scored beside the text. What was encoded twice is decoded twice, no deeper.
"""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from urllib.parse import unquote

MOST_VARIANTS = 6
"""Of a text, itself included. What more there is stands together in the last one, so that decoys push nothing out."""
MOST_MARKS = 30
"""As in Unicode's stream-safe text format; no language comes near."""
DEPTH = 2
"""Base64 within base64 is decoded, no deeper."""


@dataclass(frozen=True)
class Variant:
    """A reading of a text."""

    name: str
    """`plain` for the normalised text, else the encoding."""
    text: str
    start: int = 0
    end: int = 0
    """The part of the original that it was decoded from."""


# -- normalising ------------------------------------------------------------------------------------------------------

_DROPPED = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\U000e0000\U000e0001\U000e007f\U000e0100-\U000e01ef\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)
"""Characters that nobody sees: zero width, direction, variation selectors, soft hyphens, fillers, controls."""

_SOURCES = (
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d"  # Cyrillic
    "\u0432\u043a\u043c\u043d\u0442\u04cf"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0406\u0408\u0405\u0500\u051a\u051c\u04ae\u04c0"
    "\u03b1\u03bf\u03c1\u03bd\u03b9\u03ba\u03c5\u03c7\u03b5\u03c4\u03c9\u03b3"  # Greek
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7"
    "\u0131\u0251\u0261\u0269\u026a\u1d00\u0299\u1d04\u1d05\u1d07\ua730\u0262\u029c\u1d0a"
    "\u1d0b\u029f\u1d0d\u0274\u1d0f\u1d18\u0280\ua731\u1d1b\u1d1c\u1d20\u1d21\u028f\u1d22"
)
_TARGETS = (
    "aeopcyxijshdqwbkmhtlABEKMHOPCTYXIJSGQWYIaopvikuxetwyABEZHIKMNOPTYXiagiiabcdefghjklmnoprstuvwyz"
)  # fmt: skip
LOOK_ALIKES = dict(zip(_SOURCES, _TARGETS, strict=True))
"""Cyrillic, Greek and small-capital letters that look like Latin ones."""
_FOREIGN = re.compile(f"[{''.join(LOOK_ALIKES)}]")
_WORD = re.compile(r"[^\W\d_]+")
_ASCII_LETTER = re.compile(r"[A-Za-z]")
_TO_LATIN = str.maketrans(LOOK_ALIKES)


@dataclass(frozen=True)
class Normal:
    """A normalised text that knows where its characters come from."""

    text: str
    _starts: Sequence[int] | None = None
    """Of the pieces that were changed one by one: their first character in `text`; None where nothing moved."""
    _origins: Sequence[tuple[int, int]] = ()
    """And their place in the original."""

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The part of the original that became `text[start:end]`."""
        if self._starts is None:
            return start, end
        return self._origin(start)[0], self._origin(max(end - 1, start))[1]

    def _origin(self, place: int) -> tuple[int, int]:
        """Of one character."""
        assert self._starts is not None
        number = bisect_right(self._starts, place) - 1
        first, last = self._origins[number]
        begin = self._starts[number]
        following = self._starts[number + 1] if number + 1 < len(self._starts) else len(self.text)
        if last - first == following - begin:  # as it was
            return first + place - begin, first + place - begin + 1
        return first, last


def normalised(text: str) -> Normal:
    """`text` without what nobody sees: tag characters as the letters that they stand for, compatibility forms (NFKC), marks
    over Latin letters that make no other letter of them, and Latin letters in the place of look-alikes in words that have no
    other letters. Strings in JSON are as they are read: `\\nIgnore` is no word."""
    escapes = "\\" in text and _JSON_STRING.search(text) is not None
    if not escapes and text.isascii() and not _DROPPED.search(text):
        return Normal(text)
    parts: list[str] = []
    starts: list[int] = []
    origins: list[tuple[int, int]] = []
    length = 0
    for start, end, piece in _pieces(text, escapes=escapes):
        if not piece:
            continue
        parts.append(piece)
        starts.append(length)
        origins.append((start, end))
        length += len(piece)
    joined = "".join(parts)
    return Normal(_latin(joined), starts, origins)


_JSON_STRING = re.compile(r'"\s*[:,\]}]')
"""The end of a text in JSON."""
_JSON_ESCAPE = re.compile(r"(?<!\\)(?:\\++u[dD][89abAB][0-9a-fA-F]{2})?\\++(?:u[0-9a-fA-F]{4}|[\"/bfnrt])")
"""JSON within JSON has more backslashes. Only the first of a run begins one, and none is given back: 16,000 took 2 s."""
_BACKSLASHES = re.compile(r"\\+")


def _pieces(text: str, *, escapes: bool) -> Iterator[tuple[int, int, str]]:
    """Parts of the text, as they are read, with their place."""
    place = 0
    for found in _JSON_ESCAPE.finditer(text) if escapes else ():
        yield from _written(text, place, found.start())
        read: str = json.loads('"' + _BACKSLASHES.sub(r"\\", found.group()) + '"')
        yield *found.span(), _composed(read.encode("utf-8", "replace").decode())
        place = found.end()
    yield from _written(text, place, len(text))


def _written(text: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    part = text[start:end]
    if part.isascii() and not _DROPPED.search(part):
        yield start, end, part
        return
    for first, last in _clusters(part):
        yield start + first, start + last, _composed(part[first:last])


_STANDS_FOR = {0xE0000 + code: code for code in range(0x20, 0x7F)}
_STANDS_FOR |= {start + code: 65 + code for start in (0x1F150, 0x1F170, 0x1F1E6) for code in range(26)}
"""Tag characters, and letters in circles, squares and flags, which have no compatibility form."""


def _composed(cluster: str) -> str:
    piece = unicodedata.normalize("NFKC", _DROPPED.sub("", cluster).translate(_STANDS_FOR))
    bare = piece[:1].isascii() or unicodedata.combining(piece[0])  # a mark alone is the rest of more than are read
    return "".join(one for one in piece if not unicodedata.combining(one)) if bare else piece


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Each character with the marks that combine with it, at most MOST_MARKS: putting many into order takes time by the
    square of their number."""
    start = 0
    for place in range(1, len(text) + 1):
        if place == len(text) or place - start > MOST_MARKS or not unicodedata.combining(text[place]):
            yield start, place
            start = place


def _latin(text: str) -> str:
    """As long as `text`."""
    if not _FOREIGN.search(text):
        return text
    # Where other letters of these scripts stand, a word of look-alikes alone is a word of the language.
    foreign = any("\u0370" <= one <= "\u052f" and one not in LOOK_ALIKES for one in set(text) if one.isalpha())

    def change(found: re.Match[str]) -> str:
        word = found.group()
        latin = word.translate(_TO_LATIN)
        return latin if latin.isascii() and not (foreign and not _ASCII_LETTER.search(word)) else word

    return _WORD.sub(change, text)


# -- decoding ---------------------------------------------------------------------------------------------------------

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
    """How many words of `text` are common ones."""
    return sum(word in _STOP_WORDS for word in _ANY_WORD.findall(text.lower()))


def _readable(raw: bytes) -> str | None:
    """The text in `raw`, in UTF-8 or, as PowerShell encodes it, in UTF-16; None where it is something else."""
    encoding = "utf-8"
    if raw.count(0) >= 0.4 * len(raw):
        encoding = "utf-16-be" if raw[:1] == b"\0" else "utf-16-le"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return None
    good = sum(character.isalnum() or character in " \n\t.,:;!?'\"-()/_" for character in text)
    letters = sum(character.isalpha() for character in text)
    return text if len(text) >= 6 and good >= 0.9 * len(text) and letters >= 0.5 * len(text) else None


_BASE64 = re.compile(r"(?<![A-Za-z0-9+/_-])(?:[A-Za-z0-9+/_-]{16,76}\r?\n){0,400}[A-Za-z0-9+/_-]{12,}={0,2}")
_IN_NAMES = re.compile(r"[/_+-]")
MOST_BREAKS = 8


def _base64(text: str) -> Iterator[Variant]:
    for found in _BASE64.finditer(text):
        # The end of a path or a name may stand before it: `files/SWdub3Jl`.
        breaks = [one.end() for one in islice(_IN_NAMES.finditer(found.group()), MOST_BREAKS)]
        for start in (0, *breaks):
            if (decoded := _of_base64(found.group()[start:])) is not None:
                yield Variant("base64", decoded, found.start() + start, found.end())
                break


def _of_base64(text: str) -> str | None:
    run = re.sub(r"[\r\n=]", "", text).replace("-", "+").replace("_", "/")
    if len(run) < 12 or (run.isalpha() and (run.islower() or run.isupper())):
        return None  # a long word
    try:
        raw = base64.b64decode(run[: len(run) - (len(run) % 4 == 1)] + "=" * (-len(run) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return _readable(raw)


_BASE32 = re.compile(r"(?<![A-Za-z0-9])(?:[A-Z2-7]{16,}|[a-z2-7]{16,})(?![A-Za-z0-9])")


def _base32(text: str) -> Iterator[Variant]:
    for found in _BASE32.finditer(text):
        run = found.group().upper()
        run = run[: len(run) - (len(run) % 8 in (1, 3, 6))]  # so many characters more are no whole byte
        try:
            raw = base64.b32decode(run + "=" * (-len(run) % 8))
        except binascii.Error:
            continue
        if (decoded := _readable(raw)) is not None:
            yield Variant("base32", decoded, *found.span())


_HEX = re.compile(r"(?<![0-9A-Za-z])(?:(?:0x|\\x)?[0-9A-Fa-f]{2}[ :,]?){8,}(?![0-9A-Za-z])")


def _hex(text: str) -> Iterator[Variant]:
    for found in _HEX.finditer(text):
        digits = re.sub(r"0x|\\x|[ :,]", "", found.group())
        if (decoded := _readable(bytes.fromhex(digits))) is not None:
            yield Variant("hex", decoded, *found.span())


_BINARY = re.compile(r"(?<![0-9])(?:[01]{8}[ ,]?){4,}(?![0-9])")


def _binary(text: str) -> Iterator[Variant]:
    for found in _BINARY.finditer(text):
        bits = re.sub(r"[ ,]", "", found.group())
        raw = bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))
        if (decoded := _readable(raw)) is not None:
            yield Variant("binary", decoded, *found.span())


_UNICODE_ESCAPE = re.compile(r"\\u([0-9A-Fa-f]{4})")


def _escaped(text: str) -> Iterator[Variant]:
    """Percent, HTML and `\\u` escapes."""
    if not ("%" in text or "&#" in text or "\\u" in text):
        return
    for found in _words_matching(text, _ESCAPE):
        run = text[found[0] : found[1]]
        decoded = html.unescape(unquote(run))
        decoded = _UNICODE_ESCAPE.sub(lambda code: chr(int(code[1], 16)), decoded)
        if decoded != run and "\ufffd" not in decoded and not any("\ud800" <= one <= "\udfff" for one in decoded):
            yield Variant("escaped", decoded, *found)


_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}|&#x?[0-9A-Fa-f]{1,6};|\\u[0-9A-Fa-f]{4}")


def _words_matching(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Neighbouring words of which each holds `pattern`, as one part of the text, if it stands there three times."""
    begin = end = count = 0
    for word in re.finditer(r"\S+", text):
        found = len(pattern.findall(word.group()))
        if found:
            begin = word.start() if not count else begin
            end, count = word.end(), count + found
            continue
        if count >= 3:
            yield begin, end
        count = 0
    if count >= 3:
        yield begin, end


_SPACED = re.compile(r"(?<!\w)(?:[^\W_](?: {1,3}|[.\-_*|,/]{1,2} ?)){4,}[^\W_](?!\w)")


def _spaced(text: str) -> Iterator[Variant]:
    """`i g n o r e   t h i s`: more than one separator stands between words."""
    for found in _SPACED.finditer(text):
        run = found.group()
        wide = re.split(r"\s{2,}|[/|] ?", run) if re.search(r"\s{2,}|[/|]", run) else [run]
        words = [re.sub(r"\W|_", "", word) for word in wide]
        if sum(word.isalpha() for word in words) >= 0.5 * len(words):
            yield Variant(
                "spaced", " ".join(_split_words(word) if len(word) > 12 else word for word in words), *found.span()
            )


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
    """Words that were run together, where common words fill the text; letters between them stay as they are."""
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


def _by_segment(name: str, text: str, change: Callable[[str], str]) -> Iterator[Variant]:
    """Parts of the text that hold more common words once they are changed."""
    for found in _SEGMENT.finditer(text):
        segment = found.group()
        if len(segment) < 8:
            continue
        changed = change(segment)
        if changed != segment and _common(changed) > _common(segment):
            yield Variant(name, changed, *found.span())


_LEET = str.maketrans("013457@$!|\u20ac", "oieastasile")
_LEET_WORD = re.compile(r"(?<!\S)[\"'(]?[\w@$!|\u20ac]{2,30}[\"').,;:?]{0,3}(?!\S)")
_LEET_SIGN = re.compile(r"[013457@$!|\u20ac](?=\w)|(?<=\w)[013457@$!|\u20ac]")


def _unleet(text: str) -> str:
    """Words that are letters and signs, at least one of these within; numbers and plain words stay."""

    def change(found: re.Match[str]) -> str:
        word = found.group()
        return word.translate(_LEET) if _LEET_SIGN.search(word) and _ANY_WORD.search(word) else word

    return _LEET_WORD.sub(change, text)


_DECODERS: tuple[Callable[[str], Iterator[Variant]], ...] = (
    _base64,
    _base32,
    _hex,
    _escaped,
    _binary,
    _spaced,
    lambda text: _by_segment("rot13", text, lambda part: part.translate(_ROT13)),
    lambda text: _by_segment("reversed", text, lambda part: part[::-1]),
    lambda text: _by_segment("leet", text, _unleet),
)
SEVERAL = "several"
"""The name of readings that stand together."""
DECODED = frozenset({"base64", "base32", "hex", "escaped", "binary", SEVERAL})
"""Encodings of any text: what they hide is searched for personal data and secrets too."""


def variants(text: str) -> list[Variant]:
    """The normalised text, then what its encoded parts say: at most MOST_VARIANTS."""
    return variants_of(text, normalised(text))


def variants_of(text: str, normal: Normal) -> list[Variant]:
    found = [Variant("plain", normal.text, 0, len(text))]
    for decoded in _decoded(normal.text, DEPTH):
        start, end = normal.span(decoded.start, decoded.end)
        found.append(Variant(decoded.name, decoded.text, start, end))
    if rest := found[MOST_VARIANTS:]:
        rest.insert(0, found[MOST_VARIANTS - 1])
        start, end = min(one.start for one in rest), max(one.end for one in rest)
        found[MOST_VARIANTS - 1 :] = [Variant(SEVERAL, "\n".join(one.text for one in rest), start, end)]
    return found


def _decoded(text: str, depth: int) -> Iterator[Variant]:
    for decode in _DECODERS:
        parts = list(decode(text))
        if not parts:
            continue
        # Parts in one encoding are one reading: an attack may be cut into several.
        joined = "\n".join(part.text for part in parts)
        start, end = parts[0].start, parts[-1].end
        yield Variant(parts[0].name, joined, start, end)
        if depth > 1 and parts[0].name in DECODED:
            for inner in _decoded(normalised(joined).text, depth - 1):
                yield Variant(inner.name, inner.text, start, end)
