"""A printed fix is code: the settings that a refusal names are applied to the refused command line, which is composed again."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dstune.config.compose import compose
from dstune.config.convert import example_value
from dstune.config.examples import complete
from dstune.config.ignored import _without_effect, ignored_settings
from dstune.config.names import all_keys
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
    "RUN": "folder",
    "METRIC": "loss",
    "IMAGE": "image.sif",
}
OTHER_COMMAND = re.compile(r"`dstune (?!train\b)[^`]*`")
"""What another verb than `train` is given."""
UNFILLED = re.compile(r"\b(VALUE|CHOICE|KEY|STEPS|ROWS)\b|\.\.\.|\.NAME\b")
"""What only the user can fill in."""
GRADER = {
    "type": "string_check",
    "name": "same",
    "input": "{{sample.output_text}}",
    "reference": "x",
    "operation": "eq",
}
PLUGIN = """
import dstune

@dstune.callback
class Noted(dstune.Callback):
    name = "n0"

@dstune.environment
class Empty:
    name = "n0"
    def reset(self): ...
    def look(self) -> str: "Look around."
"""
"""Registers what examples call NAME."""
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
        Path("grader.json").write_text(json.dumps(GRADER), encoding="utf-8")
        Path("plugin.py").write_text(PLUGIN, encoding="utf-8")
        Path("folder/rollouts").mkdir(parents=True)
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
    """Return the settings of each alternative that a fix names; [] as an alternative leaves out what was refused. Alternatives with
    a placeholder for a value that only the user knows are left out."""
    alternatives: list[list[str]] = []
    end = 0
    fix = OTHER_COMMAND.sub("", problem.fix)
    for match in SETTING.finditer(fix):
        setting = match["quoted"] or match["plain"].replace("'", "")
        between = fix[end : match.start()]
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
    than what is wrong with further values that the user chose."""
    other_words = {key_of(word) for word in words} - {key_of(setting) for setting in settings}

    def is_new(other: Problem) -> bool:
        if other.where == problem.where and other.value == problem.value:
            return other.reason == problem.reason
        is_of_user = all(key in other_words or key.partition(".")[0] in other_words for key in other.where.split(" + "))
        if is_of_user and "has no such key" not in other.reason:
            return False
        return other.where not in {listed.where for listed in before if listed.where != problem.where}

    return list(filter(is_new, golden.problems_of(applied(words, problem, settings))))


def refused_fixes(golden, every: int = 1) -> tuple[int, list[str]]:
    """Return the number of fixes of the golden messages, and those that are refused. every: try only one fix out of so many."""
    tried, refused = set(), []
    for words, problems in golden_problems(golden):
        for problem in problems:
            for settings in fixes_of(problem):
                case = (problem.where, problem.value, *settings)
                is_due = case not in tried and len(tried) % every == 0
                tried.add(case)
                if is_due and (still := still_wrong(golden, words, problem, settings, problems)):
                    applied_fix = shlex.join(settings) or "left out"
                    refused.append(f"{shlex.join(words)}\n  {problem}\n  -> {applied_fix}: {still[0]}")
    return len(tried), refused


def refused_examples(golden, every: int = 1) -> tuple[int, list[str]]:
    """Return the number of examples for keys, and those that are refused. every: as for `refused_fixes`."""
    tried, refused = 0, []
    for key in all_keys():
        problem = Problem(key, "expected KEY=VALUE", meaning(key) or "")
        for settings in fixes_of(problem):
            tried += 1
            if tried % every == 0 and (still := still_wrong(golden, ["data.train=rows.jsonl"], problem, settings, [])):
                refused.append(f"{problem}\n  -> {shlex.join(settings)}: {still[0]}")
    return tried, refused


def test_no_fix_of_a_sample_is_refused(golden):
    assert refused_fixes(golden, every=16)[1] == []
    assert refused_examples(golden, every=16)[1] == []


@pytest.mark.ci  # one minute: each fix is composed
@pytest.mark.timeout(1200)  # beside other work
def test_no_fix_of_the_golden_messages_is_refused(golden):
    tried, refused = refused_fixes(golden)
    assert not refused, f"{len(refused)} of {tried} fixes are refused:\n" + "\n".join(refused)
    assert tried > 200


@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_the_example_of_no_key_is_refused(golden):
    tried, refused = refused_examples(golden)
    assert not refused, f"{len(refused)} of {tried} examples are refused:\n" + "\n".join(refused)
    assert tried > 250


@pytest.mark.ci
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "base",
    [
        ["data.train=rows.jsonl", "zero=stage0"],
        ["data.train=rows.jsonl", "trainer.max_steps=10", "data.validation=rows.jsonl", "data.test=rows.jsonl"],
        ["data.train=rows.jsonl", "task=classification", "task.labels=[a,b]"],
    ],
)
def test_what_lets_an_ignored_setting_count_is_accepted(golden, base):
    refused = []
    for key, (reason, fix) in dict(_without_effect(compose(base).config)).items():
        if key.startswith("sweep.") or key not in all_keys():
            continue
        words = [*base, *shlex.split(complete(f"{key}={example_value(key)}"))]
        for settings in fixes_of(Problem(key, reason, fix)):
            fixed = applied(words, Problem(key, reason, fix), settings)
            if problems := golden.problems_of(fixed):
                refused.append(f"{key}: {fix}: {problems[0]}")
            elif settings and key in {problem.where for problem in ignored_settings(compose(fixed).config, fixed)}:
                refused.append(f"{key}: {fix}: still without effect")
    assert refused == []
