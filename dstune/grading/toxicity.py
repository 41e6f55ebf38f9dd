"""Finds insults, threats, profanity and contempt for groups in an English text, by a list of patterns."""

from __future__ import annotations

import re

_WORDS = (
    "arsehole|asshole|assholes|bastard|bastards|bitch|bitches|bullshit|crap|cretin|cunt|dickhead|dipshit|douchebag|dumbass|"
    "fuck|fucked|fucker|fuckers|fucking|goddamn|idiot|idiots|imbecile|jackass|jerk|loser|losers|lowlife|moron|morons|"
    "motherfucker|parasite|parasites|piss|pissed|prick|retard|retarded|savages|scum|scumbag|shit|shits|shitty|slut|sluts|"
    "subhuman|subhumans|swine|thugs|twat|vermin|wanker|weakling|whore|whores"
)
_PATTERNS = (
    rf"\b(?:{_WORDS})\b",
    (
        r"\b(?:worthless|pathetic|disgusting|filthy|stupid|dumb|useless|ugly) (?:\w+ )?(?:creature|piece|pig|pigs|liar|liars|"
        r"coward|cowards|fool|fools|animal|animals|people|person|man|woman|men|women|old|little)\b"
    ),
    (
        r"\b(?:are|is|am|'re|'s|were|was) (?:all |just |so |too |such |really |a |an |nothing but ){0,3}"
        r"(?:worthless|pathetic|disgusting|filthy|stupid|dumb|inferior|lazy|dirty|criminals|cockroaches|rats|pigs|animals|"
        r"fool|fools|liars|thieves|coward|cowards)\b"
    ),
    r"\b(?:kill|hurt|beat|strangle|stab|shoot|destroy|crush|hang|burn) (?:you|her|him|them|all of)\b",
    r"\b(?:deserve|deserves|deserved) to (?:die|suffer|be (?:killed|shot|hanged|beaten))\b",
    r"\b(?:hope|wish) (?:you|they|he|she) (?:\w+ )?(?:die|dies|died|suffer|rot|dead)\b",
    r"\b(?:shut up|go to hell|drop dead)\b",
    r"\b(?:should|must) (?:all )?be (?:killed|shot|hanged|exterminated|wiped out|eliminated|gassed)\b",
    r"\b(?:hate|despise|loathe) (?:you|them|those|these|all)\b",
)
_TOXIC = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS), re.IGNORECASE)


def toxic_wording(text: str) -> str:
    """Return the first wording of `text` that insults, threatens or swears; empty if there is none."""
    match = _TOXIC.search(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return match[0] if match else ""
