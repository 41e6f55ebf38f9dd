"""Graders: group 12 of the demands on the API, as far as the server runs them."""

from __future__ import annotations

import asyncio
import json
import math
import time

import openai
import pytest

from dstune.finetuning.graders.grader import check_grader, run_grader
from dstune.grading.formula import Formula, FormulaError
from dstune.grading.grader import Sample
from dstune.grading.similarity import METRICS
from dstune.serve.errors import ApiError
from tests.support.finetuning import cloud

SAMPLE = Sample("The Cat sat.", {"answer": "cat", "list": [{"x": 3}], "none": None, "${oc.env:HOME}": "x"})
CHECK = {"type": "string_check", "name": "check", "input": "{{ sample.output_text }}", "reference": "{{item.answer}}"}


def graded(grader, sample=SAMPLE):
    check_grader(grader)
    return run_grader(grader, sample)


def flags(result):
    return [name for name, value in result["metadata"]["errors"].items() if value]


def similar(metric, given="{{ sample.output_text }}", reference="the cat sat"):
    return {"type": "text_similarity", "name": "s", "input": given, "reference": reference, "evaluation_metric": metric}


@pytest.mark.parametrize(
    ("operation", "reference", "reward"),
    [
        ("eq", "The Cat sat.", 1), ("eq", "the cat sat.", 0), ("ne", "x", 1), ("neq", "The Cat sat.", 0),
        ("like", "Cat", 1), ("like", "cat", 0), ("ilike", "{{ item.answer }}", 1), ("ilike", "dog", 0),
    ],
)  # fmt: skip
def test_group_12_string_check(operation, reference, reward):
    result = graded({**CHECK, "operation": operation, "reference": reference})
    assert (result["reward"], flags(result), result["sub_rewards"]) == (reward, [], {})
    assert result["metadata"]["scores"] == {"check": reward}
    assert len(result["metadata"]["errors"]) == 14


@pytest.mark.parametrize(
    ("template", "text", "flag"),
    [
        ("{{ item.list[0].x }}", "3", None),
        ("{{item.list}}", '[{"x": 3}]', None),
        ("{{ item.none }}", "null", None),
        ("a {{ item.answer }} b {{sample.output_text}}", "a cat b The Cat sat.", None),
        ("{{ item.nothing }}", "", "invalid_variable_error"),
        ("{{ item.list[9] }}", "", "invalid_variable_error"),
        ("{{ sample.output_tools }}", "", "invalid_variable_error"),
        ("{{ sample.output_json.a }}", "", "sample_parse_error"),
        ("{ item.answer } ${oc.env:HOME}", "{ item.answer } ${oc.env:HOME}", None),
    ],
)
def test_group_12_templates(template, text, flag):
    result = graded({**CHECK, "operation": "eq", "input": template, "reference": text})
    assert (result["reward"], flags(result)) == (0.0 if flag else 1.0, [flag] if flag else [])


def test_group_12_output_json():
    sample = Sample('{"a": {"b": [1, "x"]}}', {})
    assert graded({**CHECK, "operation": "eq", "input": "{{ sample.output_json.a.b[1] }}", "reference": "x"}, sample)[
        "reward"
    ]


TEXTS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("a", "a"),
    ("a b", "c d"),
    ("the the the the", "the cat"),
    ("The quick brown fox jumps over the lazy dog.", "A quick brown dog jumps over the lazy fox!"),
    ("one two three four five six seven", "seven six five four three two one"),
    ("", "a"),
]


def test_group_12_similarities_are_those_of_the_packages():
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from nltk.translate.gleu_score import sentence_gleu
    from rouge_score.rouge_scorer import RougeScorer

    names = {f"rouge_{size}": f"rouge{size}" for size in range(1, 6)} | {"rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()))
    for text, reference in TEXTS:
        expected = scorer.score(reference, text)
        for own, theirs in names.items():
            assert METRICS[own](text, reference) == pytest.approx(expected[theirs].fmeasure), (own, text)
        words, others = text.split(), reference.split()
        if not words:
            assert METRICS["bleu"](text, reference) == METRICS["gleu"](text, reference) == 0
            continue
        size = min(4, len(words), len(others))
        smooth = SmoothingFunction().method1
        theirs = sentence_bleu([others], words, weights=(1 / size,) * size, smoothing_function=smooth)
        assert METRICS["bleu"](text, reference) == pytest.approx(theirs), text
        assert METRICS["gleu"](text, reference) == pytest.approx(sentence_gleu([others], words)), text


def test_group_12_fuzzy_match_and_limits():
    assert graded(similar("fuzzy_match"))["reward"] == pytest.approx(18 / 23)
    assert graded(similar("rouge_l"))["reward"] == 1.0
    long = Sample("a " * 15_000, {})
    assert flags(graded(similar("rouge_l"), long)) == ["truncated_observation_error"]
    long = Sample("a " * 3_000, {})
    assert flags(graded(similar("fuzzy_match"), long)) == ["truncated_observation_error"]
    assert flags(graded(similar("rouge_l"), long)) == []
    repeated = {**CHECK, "operation": "eq", "input": "{{ sample.output_text }}" * 1000}
    assert flags(graded(repeated, long)) == ["truncated_observation_error"]


@pytest.mark.parametrize("text", ["{{" * 50_000, "{{ item.x" * 10_000, "{" * 100_000, "{{ item.x }" * 9_000])
def test_group_12_braces_are_read_at_once(text):
    began = time.process_time()
    with pytest.raises(ApiError, match="begins no variable"):
        check_grader({**CHECK, "operation": "eq", "input": text})
    assert time.process_time() - began < 1.0


def test_group_12_multi_as_map_list_and_single():
    one, two = {**CHECK, "operation": "ilike"}, similar("rouge_1")
    two["name"] = "other"
    formula = {"type": "multi", "name": "m"}
    mapped = graded({**formula, "graders": {"a": one, "b": two}, "calculate_output": "0.5 * a + 0.25 * b"})
    assert (mapped["reward"], mapped["sub_rewards"]) == (0.75, {"a": 1.0, "b": 1.0})
    listed = graded({**formula, "graders": [one, two], "calculate_output": "min(check, other)"})
    assert (listed["reward"], listed["metadata"]["scores"]) == (1.0, {"check": 1.0, "other": 1.0})
    assert graded({**formula, "graders": one, "calculate_output": "check"})["reward"] == 1.0
    failing = graded({**formula, "graders": [{**one, "input": "{{item.no}}"}], "calculate_output": "check + 1"})
    assert (failing["reward"], flags(failing)) == (1.0, ["invalid_variable_error"])
    for text in ("9^9^9^9", "1 / (check - 1)", "log(check - 1)", "sqrt(0 - 1)", "exp(1000)", "(0-1)^0.5"):
        broken = graded({**formula, "graders": [one], "calculate_output": text})
        assert (broken["reward"], flags(broken)) == (0.0, ["formula_parse_error"]), text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", 7), ("2 ^ 3 ^ 2", 512), ("-2 ^ 2", -4), ("2 ^ -1", 0.5), ("(1 + 2) * 3", 9), ("10 / 4 / 5", 0.5),
        ("1 - 2 - 3", -4), ("max(a, b, 0.9)", 0.9), ("floor(a * 10) + ceil(b)", 6), ("abs(-a)", 0.5), ("1e-1 + .5", 0.6),
        ("1" + "+1" * 999, 1000), ("sqrt(exp(log(b * 16)))", 2), ("--a", 0.5), ("min(a)", 0.5), ("a^b", 0.5**0.25),
    ],
)  # fmt: skip
def test_group_12_formulas(text, value):
    assert Formula(text, ("a", "b"))({"a": 0.5, "b": 0.25}) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "", "a +", "c", "a b", "a.b", "a[0]", "__import__('os')", "min()", "abs(a, b)", "a if b else a", "1 2", "(a", "a)",
        "eval(a)", "a == b", "a; b", "(" * 100 + "a" + ")" * 100, "-" * 100 + "a", "1+" * 1500 + "1", "a^" * 100 + "a",
        "lambda: 1", "٣", "1e", "${oc.env:HOME}",
    ],
)  # fmt: skip
def test_group_12_what_is_no_formula(text):
    with pytest.raises(FormulaError):
        Formula(text, ("a", "b"))


@pytest.mark.parametrize(
    ("grader", "param", "code"),
    [
        ({"type": "python", "name": "p", "source": "def grade(sample, item): return 1"}, "grader.type", "unsupported_grader"),
        ({"type": "score_model"}, "grader.type", "unsupported_grader"),
        ({"type": "label_model"}, "grader.type", "unsupported_grader"),
        ({"type": "nothing"}, "grader.type", "invalid_grader"),
        ({"type": ["multi"]}, "grader.type", "invalid_grader"),
        (5, "grader", "invalid_grader"),
        ({**CHECK, "operation": "is"}, "grader.operation", "invalid_grader"),
        ({**CHECK, "operation": "eq", "name": ""}, "grader.name", "invalid_grader"),
        ({**CHECK, "operation": "eq", "extra": 1}, "grader.extra", "unknown_parameter"),
        ({**CHECK, "operation": "eq", "input": "{{ other.x }}"}, "grader.input", "invalid_grader"),
        ({**CHECK, "operation": "eq", "input": "{{ item.__class__() }}"}, "grader.input", "invalid_grader"),
        ({**CHECK, "operation": "eq", "input": "{% if item.x %}a{% endif %}"}, "grader.input", "invalid_grader"),
        (similar("cosine"), "grader.evaluation_metric", "unsupported_metric"),
        (similar("meteor"), "grader.evaluation_metric", "unsupported_metric"),
        (similar("bert"), "grader.evaluation_metric", "invalid_grader"),
        ({"type": "multi", "name": "m", "graders": {}, "calculate_output": "1"}, "grader.graders", "invalid_grader"),
        ({"type": "multi", "name": "m", "graders": {"a": {"type": "multi"}}, "calculate_output": "a"},
         "grader.graders.a.type", "invalid_grader"),
        ({"type": "multi", "name": "m", "graders": {"a": {"type": "python"}}, "calculate_output": "a"},
         "grader.graders.a.type", "unsupported_grader"),
        ({"type": "multi", "name": "m", "graders": {"a": {**CHECK, "operation": "eq"}}, "calculate_output": "a + b"},
         "grader.calculate_output", "formula_parse_error"),
    ],
)  # fmt: skip
def test_group_12_wrong_graders_are_refused_by_field(grader, param, code):
    with pytest.raises(ApiError) as caught:
        check_grader(grader)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


def test_group_12_with_the_official_client(tmp_path):
    async def main():
        async with cloud(tmp_path) as found:
            client = found.openai(_strict_response_validation=True)
            graders = client.fine_tuning.alpha.graders
            grader = {**CHECK, "operation": "ilike"}
            assert (await graders.validate(grader=grader)).grader.operation == "ilike"
            result = await graders.run(grader=grader, model_sample="A Cat", item={"answer": "cat"})
            assert (result.reward, result.metadata.errors.other_error) == (1.0, False)
            assert math.isfinite(result.metadata.execution_time)
            for given, param in (
                ({"grader": {"type": "python", "name": "p", "source": "x"}, "model_sample": "a"}, "grader.type"),
                ({"grader": grader, "model_sample": None}, "model_sample"),
                ({"grader": grader, "model_sample": "a", "item": []}, "item"),
                ({"grader": grader, "model_sample": "a", "extra_body": {"sample": 1}}, "sample"),
            ):
                with pytest.raises(openai.BadRequestError) as caught:
                    await graders.run(**given)
                assert caught.value.param == param
            raw = found.http(**{"content-type": "application/json"})
            half = json.dumps({"grader": {**CHECK, "operation": "eq", "name": "\ud83d"}, "model_sample": "a"})
            for path, body in (("run", half), ("validate", half.replace(', "model_sample": "a"', ""))):
                answer = await raw.post(f"/v1/fine_tuning/alpha/graders/{path}", content=body)
                assert (answer.status_code, "half of a character" in answer.text) == (400, True)

    asyncio.run(main())
