"""Thirty regular expressions of attacks, without a model. Each takes time linear in the text: gaps are bounded, and nothing is
nested. They detect plain wordings only; docs/guard.md states their measured rate of false alarms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    name: str
    pattern: re.Pattern[str]
    tool_result_only: bool = False
    """For instructions that are legitimate from a user, but not in a document."""


def _rule(name: str, *parts: str, tool_result_only: bool = False) -> Rule:
    return Rule(name, re.compile("".join(parts), re.IGNORECASE), tool_result_only)


_GAP = r"[^.!?\n]{0,40}?"
_IGNORE = r"\b(?:ignore|disregard|forget|override|overlook|bypass|neglect|discard|do not (?:follow|obey))\b"
_EARLIER = (
    r"\b(?:previous|prior|above|earlier|preceding|foregoing|initial|original|existing|"
    r"system|all (?:of )?(?:your|the|my)|your)\b"
)
_ORDERS = (
    r"\b(?:instructions?|prompts?|rules|guidelines|directives?|commands?|directions|constraints|programming|training)\b"
)
_SHOW = r"\b(?:reveal|show|print|repeat|output|display|disclose|leak|expose|recite|dump|tell me|give me|write (?:out|down))\b"
_HIDDEN = r"\b(?:system|initial|hidden|original|secret|developer|internal|confidential|pre-?)\b"
_LIMITS = r"\b(?:restrictions?|rules|limits|limitations|filters?|guidelines|constraints|ethic\w*|moral\w*|censorship|boundaries)\b"
_READER = r"\b(?:ai|a\.i\.|assistant|language model|llm|chatbot|agent|bot|gpt|claude)s?\b"

RULES: tuple[Rule, ...] = (
    # direct
    _rule("ignore_instructions", _IGNORE, _GAP, _EARLIER, _GAP, _ORDERS),
    _rule(
        "ignore_everything",
        _IGNORE,
        r" (?:everything|all|anything)\b",
        _GAP,
        r"\b(?:above|before|previous(?:ly)?|so far|told)\b",
    ),
    _rule(
        "ignore_de",
        r"\b(?:ignorier\w*|vergiss|vergesst|missachte\w*)\b",
        _GAP,
        r"\b(?:anweisung|instruktion|regel|vorgabe|befehl)\w*",
    ),
    _rule(
        "ignore_fr",
        r"\b(?:ignore[zr]?|oublie[zr]?|ne tiens pas compte)\b",
        _GAP,
        r"\b(?:instructions|consignes|r[èe]gles|directives)\b",
    ),
    _rule(
        "ignore_es",
        r"\b(?:ignor[ae]|olvid[ae]|omit[ae]|haz caso omiso)\w*",
        _GAP,
        r"\b(?:instrucciones|reglas|[óo]rdenes|indicaciones)\b",
    ),
    _rule("ignore_it", r"\b(?:ignora|dimentica|trascura)\w*", _GAP, r"\b(?:istruzioni|regole|direttive)\b"),
    _rule("ignore_pt", r"\b(?:ignore|esque[çc]a|desconsidere)\b", _GAP, r"\b(?:instru[çc][õo]es|regras|ordens)\b"),
    _rule(
        "new_instructions",
        r"\b(?:your|the) (?:new|real|actual|updated|true) (?:system )?(?:instructions?|orders?|directives?) (?:is|are)\b",
    ),
    _rule(
        "obey",
        r"\byou (?:must|will|shall|have to) (?:now |only )?(?:obey|comply with|follow) (?:only )?(?:me|my (?:orders|commands))\b",
    ),
    # requests for hidden text
    _rule(
        "show_prompt",
        _SHOW,
        _GAP,
        r"\b(?:your|the|its|this)\b",
        _GAP,
        _HIDDEN,
        r" ?(?:prompts?|instructions?|messages?|rules|directives?|configuration|guidelines)\b",
    ),
    _rule(
        "what_prompt",
        r"\bwhat(?:'s| is| are| was| were) your\b",
        _GAP,
        _HIDDEN,
        r" ?(?:prompts?|instructions?|messages?|rules)\b",
    ),
    _rule(
        "show_own_prompt",
        _SHOW,
        _GAP,
        r"\byour (?:exact |full |complete |entire )?(?:prompt|instructions|directives|programming)\b",
    ),
    _rule(
        "repeat_above",
        r"\b(?:repeat|print|output|copy|recite|translate|summari[sz]e)\b",
        _GAP,
        r"\b(?:everything|all|text|words|sentences|content)\b",
        _GAP,
        r"\b(?:above|before this|preceding this|prior to this)\b",
    ),
    _rule("starting_with", r"\b(?:starting|beginning|begins?|starts?) with [\"'\u201c\u2018`]?(?:you are|system:)"),
    # jailbreaks
    _rule("dan", r"\bdo anything now\b|\bDAN (?:mode|prompt)\b|\b(?:act|answer|respond|reply) as DAN\b|\bstay a DAN\b"),
    _rule(
        "mode",
        r"\b(?:developer|god|debug|jailbreak|unrestricted|sudo|dan|evil|admin|maintenance) mode\b",
        _GAP,
        r"\b(?:enabled?|activated?|on|engaged|unlocked|entered)\b",
    ),
    _rule(
        "enter_mode",
        r"\b(?:enter|enable|activate|switch (?:in)?to|you are (?:now )?in)\b",
        _GAP,
        r"\b(?:developer|god|jailbreak|unrestricted|sudo|dan|evil|unfiltered|uncensored) mode\b",
    ),
    _rule(
        "without_limits",
        r"\b(?:you|ai|assistant|model|character|bot)\b",
        _GAP,
        r"\b(?:without|no|free (?:of|from)|has no|have no|unbound by|not bound by)\b",
        r"(?: any| all| the)?(?: ethical| moral| safety| content| legal)+ ",
        _LIMITS,
    ),
    _rule(
        "not_bound", r"\byou (?:are|'re) (?:now )?(?:no longer|not) (?:bound|restricted|limited|constrained|subject)\b"
    ),
    _rule(
        "no_refusal",
        r"\b(?:never|do not|don't|cannot|can't|must not) (?:ever )?(?:refuse|decline|deny|reject)\b",
        _GAP,
        r"\b(?:request|answer|question|order|command|anything|prompt)s?\b",
        r"[^.!?\n]{0,40}?\b(?:unethical|illegal|harmful|immoral|regardless|no matter)\b",
    ),
    _rule(
        "disable_safety",
        r"\b(?:disable|turn off|deactivate|remove|circumvent|bypass)\b",
        _GAP,
        r"\b(?:safety|content|ethic\w*|moderation|security) (?:filters?|protocols?|guard\w*|"
        r"checks?|features?|polic\w+|restrictions?)\b",
    ),
    _rule("unlocked_marker", "(?:\U0001f513|\\[)\\W{0,3}jail ?bro?e?a?ke?n?\\b|\\(\\W{0,2}\U0001f513\\W{0,2}\\)"),
    _rule(
        "pretend_unlimited",
        r"\b(?:pretend|imagine|act|role-?play|simulate|behave)\b",
        _GAP,
        r"\b(?:no|without|free of|unrestricted by)\b",
        r"(?: any| all)? ?(?:\w+ )?",
        r"\b(?:restrictions?|limits|limitations|filters?|constraints|ethic\w*|moral\w*|censorship|boundaries)\b",
    ),
    # in documents and results of tools
    _rule(
        "turn_marker",
        r"<\|(?:im_start|start_header_id|system|endoftext|im_end|eot_id)\|>|<<SYS>>|\[/?INST\]|<start_of_turn>",
    ),
    _rule(
        "fake_system",
        r"(?:^|\n)\s{0,8}(?:\[|<|#{1,4} ?|\*{2})?(?:system|developer)"
        r"(?: (?:message|prompt|note|override|instruction))(?:\]|>|\*{2})? ?:",
    ),
    _rule(
        "to_the_reader",
        _READER,
        r",? (?:reading|processing|summari[sz]ing|reviewing|parsing|analy[sz]ing|that (?:reads|processes)|who reads) this\b",
    ),
    _rule(
        "note_to_reader",
        r"\b(?:note|instructions?|message|attention|important)\b[^.!?\n]{0,12}? (?:to|for) (?:the |any |all )?",
        _READER,
        r"\s{0,2}:",
    ),
    _rule(
        "hide_from_user",
        r"\b(?:do not|don't|never|without) (?:tell(?:ing)?|mention(?:ing)?|inform(?:ing)?|"
        r"alert(?:ing)?|notify(?:ing)?|show(?:ing)?)\b",
        _GAP,
        r"\bthe user\b",
        tool_result_only=True,
    ),
    _rule(
        "image_exfiltration", r"!\[[^\]\n]{0,80}\]\(https?://[^)\s]{1,200}[?&][^)\s=]{1,40}=[^)\s]{0,80}(?:\{|%7b|<|\[)"
    ),
    _rule(
        "send_out",
        r"\b(?:send|forward|post|upload|exfiltrate|transmit|e-?mail)\b[^.!?\n]{0,40}?"
        r"\b(?:passwords?|secrets?|credentials?|api keys?|tokens?|conversation|history|files?|contents?|data|codes?)\b"
        r"[^.!?\n]{0,40}?(?:https?://|[\w.]{1,40}@[\w.]{2,40})",
        tool_result_only=True,
    ),
)


def matching(text: str, *, tool_result: bool) -> Iterator[Rule]:
    """Yield the rules that match `text`."""
    for rule in RULES:
        if (tool_result or not rule.tool_result_only) and rule.pattern.search(text):
            yield rule
