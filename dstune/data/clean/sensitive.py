"""Secrets and personal data in a text: where they are, and the text with tags in their place.

Offline: no service is asked whether a secret is valid, and no model looks for names. Each kind has a check beyond its
pattern where one exists: check digits of cards and IBANs (python-stdnum), numbering plans of phones (libphonenumber),
ranges of IP addresses and social security numbers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
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
    """What stands in its place when it is masked, without the angle brackets: EMAIL."""


def mask(text: str, findings: list[Finding]) -> str:
    """`text` with a tag such as `<EMAIL>` in place of each finding (sorted and disjoint, as `find_...` give them)."""
    parts, end = [], 0
    for found in findings:
        parts += [text[end : found.start], f"<{found.kind}>"]
        end = found.end
    return "".join([*parts, text[end:]])


def _disjoint(findings: Iterator[Finding]) -> list[Finding]:
    """The findings in order; of those that overlap the one that starts first, of these the longest."""
    chosen: list[Finding] = []
    for found in sorted(findings, key=lambda found: (found.start, -found.end)):
        if not chosen or found.start >= chosen[-1].end:
            chosen.append(found)
    return chosen


# -- secrets ----------------------------------------------------------------------------------------------------------

SECRET = "SECRET"

NO_SECRETS = ("IPPublicDetector", "KeywordDetector", "ArtifactoryDetector")
"""Detectors that are made for source code: an address is no secret, and in prose `password: forgotten` and words in
capitals that begin with AP are found. Those that judge by entropy alone find long words and are left out as well."""

_MORE_SECRETS = {
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*-----|\Z)", re.S),
    "Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{34}\b"),
    "Google": re.compile(r"\bAIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])"),
    "Anthropic": re.compile(r"\bsk-ant-[a-z0-9]+-[A-Za-z0-9_-]{32,}"),
    "OpenAI project": re.compile(r"\bsk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,}"),
    "GitHub fine-grained": re.compile(r"\bgithub_pat_[A-Za-z0-9_]{50,}"),
}
"""What detect-secrets 1.5 does not know, or of which (a private key) it finds the first line only."""

_LONG_WORD = re.compile(r"[A-Za-z0-9_\-+/=]{16}")
_SHORT_SECRET = re.compile(r"://[^\s/]+@|PRIVATE KEY")
"""One of the two is in any text with a secret; the search with all patterns takes 1.5 ms for 3,000 characters."""

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
    """Credentials in `text`, by the patterns of detect-secrets and a few more."""
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
                    group = 0  # the group is the prefix that tells the kind (ghp), not the secret
                if getattr(detector, "is_formally_valid", _always)(match.group()):
                    # Some patterns (JSON web tokens) end before the secret does.
                    rest = _REST.match(text, match.end(group))
                    assert rest is not None, "an empty rest matches too"
                    yield Finding(match.start(group), rest.end(), SECRET)


def _always(_: str) -> bool:
    return True


# -- personal data ----------------------------------------------------------------------------------------------------

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{4}){2,7}(?:[ ]?[A-Z0-9]{1,4})?\b")
_CARD = re.compile(r"(?<![\d.,-])(?:\d[ -]?){12,18}\d(?!\d|[.,-]\d)")
_SSN = re.compile(r"(?<![\d-])\d{3}([- ])\d{2}\1\d{4}(?![\d-])")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:|:){2,7}(?:[0-9A-Fa-f]{1,4}|:)?(?![\w:])")
_DIGITS = re.compile(r"\d(?:[\s().\-/+]{0,3}\d){6}")
"""Seven digits that may be a phone number: the search for those takes a thousand times longer."""

PHONE_REGIONS = ("US", "GB")
"""Numbering plans in which a number without a country code is looked for; with one any country's is found."""


def find_personal_data(text: str) -> list[Finding]:
    """E-mail addresses, phone numbers, IBANs, cards, IP addresses and US social security numbers in `text`."""
    return _disjoint(_personal_data(text))


def _personal_data(text: str) -> Iterator[Finding]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Finding(*match.span(), "EMAIL")
    if ":" in text:
        for match in _IPV6.finditer(text):
            if _is_person_address(match.group()):
                yield Finding(*match.span(), "IP_ADDRESS")
    if not _DIGITS.search(text) and not _IPV4.search(text):
        return
    for match in _IPV4.finditer(text):
        if _is_person_address(match.group()):
            yield Finding(*match.span(), "IP_ADDRESS")
    for match in _IBAN.finditer(text):
        if _checks("stdnum.iban").is_valid(match.group()):
            yield Finding(*match.span(), "IBAN")
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if digits[0] in "23456" and _checks("stdnum.luhn").is_valid(digits):
            yield Finding(*match.span(), "CARD")
    for match in _SSN.finditer(text):
        if _checks("stdnum.us.ssn").is_valid(match.group()):
            yield Finding(*match.span(), "SSN")
    yield from _phones(text)


def _checks(module: str) -> Any:
    return require(module, "data.clean.personal_data")


def _is_person_address(text: str) -> bool:
    """Whether it is an address of a host on the internet: private, local and documentation ranges are nobody's."""
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


def check_personal_data() -> None:
    """Raises UserError if a package that the search for personal data needs is missing."""
    for module in ("phonenumbers", "stdnum.iban", "stdnum.luhn", "stdnum.us.ssn"):
        _checks(module)
