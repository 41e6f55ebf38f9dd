"""A printed fix is code: the settings that a refusal names are applied to the refused command line, which is composed again."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dstune.config.names import all_keys, sections
from dstune.config.schema import CHOICES
from dstune.config.words import meaning
from dstune.core.errors import Problem

ROOT = Path(__file__).parents[2]
SETTING = re.compile(
    r"""'(?P<quoted>[~\w./-]+=[^']*)'|(?<![\w='"(-])(?P<plain>[a-z~][\w./]*=(?:"[^"]*"|'[^']*'|\$\{\S+\}|\[\S*\]|[^\s,;:?`)]+(?::[^\s,;:?`)]+)*))"""
)
PLACEHOLDERS = {
    "ORG/MODEL": "org/model",
    "OWNER/NAME": "org/model",
    "org/name": "org/model",
    "FILE": "rows.jsonl",
    "FOLDER": "folder",
    "METRIC": "loss",
}
UNFILLED = re.compile(r"\b(VALUE|CHOICE|KEY|STEPS|ROWS)\b|\.\.\.|\.NAME\b")
"""What only the user can fill in."""
REFUSED_AS_WRITTEN = re.compile(
    r"is not offered|there is no such|has no such key|^expected |ha(ve|s) no keys|dstune (runs|launches)|name of the group's choice"
)
"""Reasons for which the word itself has to go, whatever else is set."""


@pytest.fixture(scope="module")
def golden():
    spec = importlib.util.spec_from_file_location("golden", ROOT / "tools" / "golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.empty_folder():
        Path("rows.jsonl").touch()
        Path("ds_config.json").write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
        yield module


def golden_problems(golden) -> Iterator[tuple[list[str], list[Problem]]]:
    """Yield the words of each command line of the golden file, and its problems as the file has them."""
    for entry in golden.GOLDEN.read_text(encoding="utf-8").split("$ dstune train ")[1:]:
        line, *rest = entry.splitlines()
        problems = []
        for text in re.split(r"^  (?! )", "\n".join(rest), flags=re.MULTILINE)[1:]:
            said, _, fix = text.partition("\n      fix: ")
            where, _, reason = said.partition(": ")
            problems.append(Problem(where.partition("=")[0], reason, fix.strip(), where.partition("=")[2]))
        yield shlex.split(line), problems


def fixes_of(problem: Problem) -> list[list[str]]:
    """Return the settings of each alternative that a fix names; [] as an alternative leaves out what was refused. Without those that
    have a placeholder for a value that only the user knows."""
    alternatives: list[list[str]] = []
    end = 0
    for match in SETTING.finditer(problem.fix):
        setting = match["quoted"] or match["plain"].replace("'", "")
        between = problem.fix[end : match.start()]
        together = between == " " or (between == " and " and key_of(setting) != key_of(alternatives[-1][-1]))
        if alternatives and together:
            alternatives[-1].append(setting)
        else:
            alternatives.append([setting])
        end = match.end()
    if re.search(r"\bleave (it|\S+\.\S+) out\b|\bleave out\b", problem.fix):
        alternatives.append([])
    return [
        chosen
        for settings in alternatives
        if not any(map(UNFILLED.search, settings))
        for chosen in map(list, itertools.product(*map(choices_in, map(filled, settings))))
    ]


def choices_in(setting: str) -> list[str]:
    """Return the settings that `method=full|lora` stands for."""
    key, _, value = setting.partition("=")
    return [f"{key}={choice}" for choice in value.split("|")] if key in CHOICES else [setting]


def filled(setting: str) -> str:
    for placeholder, example in PLACEHOLDERS.items():
        setting = re.sub(rf"\b{placeholder}\b", example, setting)
    names = itertools.count()
    return re.sub(r"\bNAME\b", lambda _: f"n{next(names)}", setting)


def key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+~").partition("@")[0]


def applied(words: Sequence[str], problem: Problem, settings: Sequence[str]) -> list[str]:
    """Return the command line with `settings` in place of what it has for their keys, and of the refused word if that has to go."""
    replaced = {key_of(setting) for setting in settings}
    has_to_go = REFUSED_AS_WRITTEN.search(problem.reason) or problem.value == "''"
    if not settings or (has_to_go and not problem.fix.startswith("it is a key of")):
        replaced |= {problem.where, problem.where.partition(".")[0] + "={"}
    return [
        *(
            word
            for word in words
            if key_of(word) not in replaced
            and not word.startswith(tuple(key for key in replaced if key.endswith("={")))
        ),
        *settings,
    ]


def still_wrong(
    golden, words: Sequence[str], problem: Problem, settings: Sequence[str], before: Sequence[Problem]
) -> list[Problem]:
    """Return what is wrong with the command line once a fix of `problem` is applied, other than its other problems of before, and
    than what else is wrong with the value that the user chose."""

    def is_new(other: Problem) -> bool:
        if other.where == problem.where and other.value == problem.value:
            return other.reason == problem.reason
        return other.where not in {listed.where for listed in before if listed.where != problem.where}

    return list(filter(is_new, golden.problems_of(applied(words, problem, settings))))


def test_no_fix_of_the_golden_messages_is_refused(golden):
    tried, false = set(), []
    for words, problems in golden_problems(golden):
        for problem in problems:
            for settings in fixes_of(problem):
                case = (problem.where, problem.value, *settings)
                if case not in tried and (still := still_wrong(golden, words, problem, settings, problems)):
                    false.append(
                        f"{shlex.join(words)}\n  {problem}\n  -> {shlex.join(settings) or 'left out'}: {still[0]}"
                    )
                tried.add(case)
    print(f"{len(tried)} fixes, {len(false)} refused")
    assert not false, f"{len(false)} of {len(tried)} fixes are refused:\n" + "\n".join(false)
    assert len(tried) > 100


def test_the_example_of_no_key_is_refused(golden):
    tried, false = 0, []
    for key in all_keys():
        problem = Problem(key, "expected KEY=VALUE", meaning(key) or "")
        for settings in fixes_of(problem):
            tried += 1
            if still := still_wrong(golden, ["data=chitchat"], problem, settings, []):
                false.append(f"{problem}\n  -> {shlex.join(settings)}: {still[0]}")
    print(f"{tried} examples, {len(false)} refused")
    assert not false, f"{len(false)} of {tried} examples are refused:\n" + "\n".join(false)
    assert tried > 250
