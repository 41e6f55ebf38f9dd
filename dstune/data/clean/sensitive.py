"""Find secrets and personal data in a text, and replace them with tags.

All of this works offline: no service is asked whether a secret is valid, and no model looks for names. If a kind has a check
beyond its pattern, it is applied: check digits of cards and IBANs (python-stdnum), numbering plans of phones (libphonenumber),
ranges of IP addresses and social security numbers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from dstune.data.clean.extras import require


@dataclass(frozen=True)
class Finding:
    """Something sensitive in a text."""

    start: int
    end: int
    kind: str
    """The name of the tag that masks it, without the angle brackets: EMAIL."""


def mask(
    text: str, findings: list[Finding], tag: Callable[[Finding], str] = lambda finding: f"<{finding.kind}>"
) -> str:
    """Return `text` with a tag such as `<EMAIL>` in place of each finding. findings: sorted and disjoint, as `find_...` return."""
    parts, end = [], 0
    for finding in findings:
        parts += [text[end : finding.start], tag(finding)]
        end = finding.end
    return "".join([*parts, text[end:]])


def _disjoint(findings: Iterator[Finding]) -> list[Finding]:
    """Return the findings in order. Of overlapping ones the first to start is kept; of those with the same start, the longest."""
    chosen: list[Finding] = []
    for finding in sorted(findings, key=lambda finding: (finding.start, -finding.end)):
        if not chosen or finding.start >= chosen[-1].end:
            chosen.append(finding)
    return chosen


# -- secrets ----------------------------------------------------------------------------------------------------------

SECRET = "SECRET"

NO_SECRETS = ("IPPublicDetector", "KeywordDetector", "ArtifactoryDetector")
"""Detectors that are made for source code and misfire in prose: an address is not a secret, and they match
`password: forgotten` and capitalised words that begin with AP. Detectors that judge by entropy alone match long words, so they
are left out too."""

_MORE_SECRETS = {
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*-----|\Z)", re.S),
    "Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{34}\b"),
    "Google": re.compile(r"\bAIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])"),
    "Anthropic": re.compile(r"\bsk-ant-[a-z0-9]+-[A-Za-z0-9_-]{32,}"),
    "OpenAI project": re.compile(r"\bsk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,}"),
    "GitHub fine-grained": re.compile(r"\bgithub_pat_[A-Za-z0-9_]{50,}"),
}
"""Secrets that detect-secrets 1.5 does not know, and private keys, of which it finds only the first line."""

_LONG_WORD = re.compile(r"[A-Za-z0-9_\-+/=]{16}")
_SHORT_SECRET = re.compile(r"://[^\s/]+@|PRIVATE KEY")
"""Any text with a secret matches one of these two; searching with all patterns takes 1.5 ms for 3,000 characters."""

_REST = re.compile(r"[A-Za-z0-9_\-]*")


@cache
def _secret_detectors() -> list[Any]:
    kinds = require("detect_secrets.core.plugins.util", "data.clean.secrets").get_mapping_from_secret_type_to_class()
    by_pattern = require("detect_secrets.plugins.base", "data.clean.secrets").RegexBasedDetector
    classes = sorted(kinds.values(), key=lambda detector: detector.__name__)
    return [
        detector() for detector in classes if issubclass(detector, by_pattern) and detector.__name__ not in NO_SECRETS
    ]


def find_secrets(text: str) -> list[Finding]:
    """Return the credentials in `text`, found by the patterns of detect-secrets and a few more."""
    return _disjoint(_secrets(text))


def _secrets(text: str) -> Iterator[Finding]:
    detectors = _secret_detectors()
    if not _LONG_WORD.search(text) and not _SHORT_SECRET.search(text):
        return
    for pattern in _MORE_SECRETS.values():
        for match in pattern.finditer(text):
            yield Finding(*match.span(), SECRET)
    for detector in detectors:
        for pattern in detector.denylist:
            for match in pattern.finditer(text):
                group = match.lastindex or 0
                if match.start(group) == match.start():
                    group = 0  # the group is only the prefix that names the kind (ghp)
                if getattr(detector, "is_formally_valid", _always)(match.group()):
                    # Some patterns (JSON web tokens) end before the secret does.
                    end_match = _REST.match(text, match.end(group))
                    assert end_match is not None, "an empty rest matches too"
                    yield Finding(match.start(group), end_match.end(), SECRET)


def _always(_: str) -> bool:
    return True


# -- personal data ----------------------------------------------------------------------------------------------------

_AT = re.compile(r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b")
_LOCAL = re.compile(r"(?<![\w.+-])[\w.+-]+(?:[!#$%&'*/=?^`{|}~][\w.+-]+)*\Z")
"""The part before the @. RFC 5322 allows signs that also quote and separate. Each of them counts only alone and between word
characters: `'`, `{` or `**` before the first one surround the address and are not part of it."""
_LONGEST_LOCAL = 64
_IN_URLS = "/?&#="
_KEY = re.compile(r"[A-Za-z_]\w*=")
_SSN = re.compile(r"(?<![\d-])\d{3}([- ])\d{2}\1\d{4}(?![\d-])")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:|:){2,7}(?:[0-9A-Fa-f]{1,4}|:)?(?![\w:])")
_DIGITS = re.compile(r"\d(?:[\s().\-/+]{0,3}\d){6}")
"""Seven digits that may be a phone number. Texts without them skip the search for phones, which takes a thousand times longer."""

PHONE_REGIONS = ("US", "GB")
"""Numbering plans for numbers without a country code; numbers with one are found for every country."""


def find_personal_data(text: str) -> list[Finding]:
    """Return e-mail addresses, phone numbers, IBANs, cards, IP addresses and US social security numbers in `text`."""
    return _disjoint(_personal_data(text))


def _personal_data(text: str) -> Iterator[Finding]:
    if "@" in text:
        yield from _emails(text)
    if ":" in text:
        for match in _IPV6.finditer(text):
            if _is_person_address(match.group()):
                yield Finding(*match.span(), "IP_ADDRESS")
    if not _DIGITS.search(text) and not _IPV4.search(text):
        return
    for match in _IPV4.finditer(text):
        if _is_person_address(match.group()):
            yield Finding(*match.span(), "IP_ADDRESS")
    numbers = _ibans_and_cards(text)
    yield from numbers
    # Digits before a card number, joined with its first digits, could pass for a phone number.
    remaining_text = _without(text, numbers)
    for match in _SSN.finditer(remaining_text):
        if _checks("stdnum.us.ssn").is_valid(match.group()):
            yield Finding(*match.span(), "SSN")
    yield from _phones(remaining_text)


def _checks(module: str) -> Any:
    return require(module, "data.clean.personal_data")


def _without(text: str, findings: list[Finding]) -> str:
    """Return `text` with each finding replaced by as many line breaks, so that no later match spans it. findings: sorted and
    disjoint."""
    return mask(text, findings, lambda finding: "\n" * (finding.end - finding.start))


def _emails(text: str) -> Iterator[Finding]:
    end = 0
    for match in _AT.finditer(text):
        local = _LOCAL.search(text, max(end, match.start() - _LONGEST_LOCAL), match.start())
        if local is not None:
            end = match.end()
            yield Finding(_begin_of_local(text, local.start(), match.start(), end), end, "EMAIL")


def _begin_of_local(text: str, start: int, at: int, end: int) -> int:
    """Return where the address that ends at `end` begins, after any quote (`b'`), path or key (`mail=`) before it."""
    character_before, closing = text[max(start - 1, 0) : start], text[end : end + 1]
    opening = "{" if closing == "}" else closing
    if opening and character_before != opening and not text[end + 1 : end + 2].isalnum():
        start = max(start, text.rfind(opening, start, at) + 1)
    if character_before and character_before in _IN_URLS:
        return max(start, *(text.rfind(sign, start, at) + 1 for sign in _IN_URLS))
    key = _KEY.match(text, start, at)
    return key.end() if key else start


def _is_person_address(text: str) -> bool:
    """Return whether `text` is the address of a host on the internet: private, local and documentation ranges belong to nobody."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _phones(text: str) -> Iterator[Finding]:
    phonenumbers = require("phonenumbers", "data.clean.personal_data")
    for region in PHONE_REGIONS:
        matches = phonenumbers.PhoneNumberMatcher(text, region, phonenumbers.Leniency.STRICT_GROUPING)
        for match in matches:
            yield Finding(match.start, match.end, "PHONE")


# -- IBANs and cards --------------------------------------------------------------------------------------------------

_IBAN = re.compile(r"\b([A-Z]{2})[0-9]{2}(?=[ ]?[A-Z0-9]{4})")
"""The beginning of an IBAN. Its length depends on the country, and other numbers may follow."""
_GROUPED_CARD = re.compile(
    r"(?<![\d.])(?<!(?<!\d)-)"
    r"(?:[2-6][0-9]{3}([ -])(?:[0-9]{4}\1[0-9]{4}\1(?:[0-9]{4}(\1[0-9]{1,3})?|[0-9]{2,3})|[0-9]{6}\1[0-9]{4,5})|[2-6][0-9]{12,18})"
    r"(?!\d|\.\d)"
)
"""A card in its printed form: groups of four (the last of up to three), 4-6-5, 4-6-4, or one group. Numbers may be beside it."""
_CARD = re.compile(r"(?<![\d.,-])[2-6](?:[ -]?[0-9]){12,18}(?!\d|[.,-]\d)")
"""A card number in any grouping."""
_BESIDE = re.compile(r"\d | \d")
_ISSUED = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})"  # Visa
    r"|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"  # Mastercard
    r"|220[0-4][0-9]{12,15}|35(?:2[89]|[3-8][0-9])[0-9]{12,15}"  # Mir, JCB
    r"|3[47][0-9]{13}|3(?:0[0-59]|[689][0-9])[0-9]{11}"  # American Express, Diners
    # Discover, UnionPay, RuPay, Maestro, Elo
    r"|(?:50[0-9]{2}|5893|6(?:[025][0-9]{2}|304|36[0-9]|4[4-9][0-9]|7[56][0-9]))[0-9]{9,15}"
)
"""First digits and length by issuer (ISO/IEC 7812). The check digit alone would accept one in ten arbitrary numbers."""
_TABLE = re.compile(r"(?:[0-9]{4}[ -]){9}[0-9]{4}(?!\d)")
"""More four-digit numbers than two cards and one number before them. If every four in a row were tried, many tables would
contain a card by chance."""
_NO_SEPARATORS = str.maketrans("", "", " -")
_VALUES = bytes.maketrans(b"0123456789", bytes(range(10)))
_TWICE = bytes.maketrans(bytes(range(10)), bytes([0, 2, 4, 6, 8, 1, 3, 5, 7, 9]))


def _ibans_and_cards(text: str) -> list[Finding]:
    """Return IBANs and cards, in order and disjoint. The most reliable kinds are searched first, and later searches skip their
    findings."""
    findings: list[Finding] = []
    for kind, search in (("IBAN", _ibans), ("CARD", _grouped_cards), ("CARD", _lone_cards)):
        findings += [Finding(*span, kind) for span in search(_without(text, findings))]
        findings = _disjoint(iter(findings))
    return findings


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for begin in _IBAN.finditer(text):
        pattern = _iban_of(begin[1])
        match = pattern.match(text, begin.start()) if pattern else None
        if match is not None and _checks("stdnum.iban").is_valid(match.group()):
            yield match.span()


@cache
def _iban_of(country: str) -> re.Pattern[str] | None:
    """Return the pattern of a country's IBANs, at that country's length and in groups of four or in one; None if the country has no
    IBANs."""
    structure = _checks("stdnum.numdb").get("iban").info(country)[0][1].get("bban", "")
    signs = {"n": "[0-9]", "a": "[A-Z]", "c": "[A-Z0-9]"}
    each = [signs[kind] for length, kind in re.findall(r"(\d+)!([nac])", structure) for _ in range(int(length))]
    groups = ["[ ]?" + "".join(each[place : place + 4]) for place in range(0, len(each), 4)]
    return re.compile(rf"{country}[0-9]{{2}}{''.join(groups)}(?!\w)") if groups else None


def _grouped_cards(text: str) -> Iterator[tuple[int, int]]:
    """Yield cards recognised by their grouping, even among other groups of digits; of several with the same start, the longest."""
    place = 0
    while (match := _GROUPED_CARD.search(text, place)) is not None:
        start, end = match.span()
        ends = (end, match.start(2)) if match[2] else (end,)
        end = next((candidate for candidate in ends if _is_issued(text[start:candidate])), 0)
        if end:
            yield start, end
            place = end
        else:
            place = match.end() if _TABLE.match(text, start) else start + 1


def _lone_cards(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of card numbers: digits in any grouping with a valid check digit; next to another number, also with the
    prefix of an issuer."""
    for match in _CARD.finditer(text):
        start, end = match.span()
        alone = not _BESIDE.fullmatch(text[max(start - 2, 0) : start]) and not _BESIDE.fullmatch(text[end : end + 2])
        if _luhn(match.group().translate(_NO_SEPARATORS)) if alone else _is_issued(match.group()):
            yield start, end


def _is_issued(card: str) -> bool:
    digits = card.translate(_NO_SEPARATORS)
    return _ISSUED.fullmatch(digits) is not None and _luhn(digits)


def _luhn(digits: str) -> bool:
    """Return whether the check digit is valid (ISO/IEC 7812-1, annex B). python-stdnum takes ten times longer, which matters for
    tables of numbers."""
    values = digits.encode("ascii").translate(_VALUES)
    return (sum(values[-1::-2]) + sum(values[-2::-2].translate(_TWICE))) % 10 == 0


def check_personal_data() -> None:
    """Check that the packages for finding personal data are installed. Raises UserError for a missing one."""
    for module in ("phonenumbers", "stdnum.iban", "stdnum.numdb", "stdnum.us.ssn"):
        _checks(module)
