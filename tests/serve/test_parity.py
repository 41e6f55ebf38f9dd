"""What parity says of a stub of an engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from dstune.serve.engines.base import Engine, Limits, Unprovable
from dstune.serve.parity import Refused, prove, read_reference
from tests.support.serving import stub_source, write_reference


@dataclass
class AnswersAsGiven(Engine):
    """Answers what the test gave it."""

    name: ClassVar[str] = "stub"
    ids: list[int] = field(default_factory=lambda: [1, 2])
    found: dict[str, Any] = field(default_factory=dict)

    async def prompt_ids(self, model, row):
        return self.ids

    async def logprobs(self, model, prompt, targets):
        if model not in self.found:
            raise Unprovable("nothing")
        return self.found[model]


def proof(tmp_path, *, dtype="float32", base=None, **given):
    row = {"messages": [], "prompt_ids": [1, 2], "target_ids": [3, 4], "logprobs": [-1.0, -2.0]}
    write_reference(tmp_path, [row])
    source = stub_source("m", folder=tmp_path)
    engine = AnswersAsGiven(source, "m", tmp_path, tmp_path, Limits(), **given)
    engine.dtype = dtype
    return asyncio.run(prove(engine, "m", source, base))


def test_equal_is_proven_and_different_is_refused(tmp_path):
    near, far = [-1.00005, -2.0], [-1.0, -2.0002]
    found = proof(tmp_path, found={"m": near})
    assert (found.status, found.rows) == ("proven", 1) and found.difference == pytest.approx(5e-5)
    with pytest.raises(Refused, match="log-probabilities of row 1"):
        proof(tmp_path, found={"m": far})
    assert proof(tmp_path, found={"m": far}, dtype="bfloat16").status == "proven"
    with pytest.raises(Refused):
        proof(tmp_path, found={"m": [float("nan"), -2.0]})
    with pytest.raises(Refused, match=r"differ from token 1 on \(\.\.\. 7"):
        proof(tmp_path, found={"m": near}, ids=[1, 7])
    with pytest.raises(Refused, match="another prompt"):
        proof(tmp_path, found={"m": near}, ids=[1])


def test_vectors_are_compared_as_a_whole(tmp_path):
    """In bf16 the mean of the differences of single numbers would let any vector pass: each is small in a long one."""
    right = [1 / 16] * 256
    row = {"row": {"text": "a"}, "ids": [1], "answer": {"vector": right}}
    write_reference(tmp_path, [row])
    source = stub_source("m", folder=tmp_path, task="embedding", generates=False, serves=("embed",))

    def proof_of(vector, dtype):
        engine = AnswersAsGiven(source, "m", tmp_path, tmp_path, Limits())
        engine.dtype = dtype

        async def answers(rows):
            return {"ids": [[1]], "answers": [{"vector": vector}]}

        engine.answers = answers
        return asyncio.run(prove(engine, "m", source))

    near, other = [one + 2e-3 for one in right], [one * (-1) ** number for number, one in enumerate(right)]
    assert proof_of(near, "bfloat16").difference == pytest.approx(0.032)
    for vector, dtype in ((other, "bfloat16"), (near, "float32"), ([float("nan"), *right[1:]], "bfloat16")):
        with pytest.raises(Refused, match="is not the model that was trained"):
            proof_of(vector, dtype)


def test_a_reader_is_known_by_its_spans_too(tmp_path):
    answer = {"predicted": "w1 w2", "no_answer": 0.0}
    row = {"row": {"question": "a"}, "ids": [1], "answer": answer}
    write_reference(tmp_path, [row])
    source = stub_source("m", folder=tmp_path, task="question_answering", generates=False, serves=("answer",))

    def proof_of(answer):
        engine = AnswersAsGiven(source, "m", tmp_path, tmp_path, Limits())
        engine.dtype = "float32"

        async def answers(rows):
            return {"ids": [[1]], "answers": [answer]}

        engine.answers = answers
        return asyncio.run(prove(engine, "m", source)).status

    assert proof_of(answer) == "proven"
    with pytest.raises(Refused, match="is not the model that was trained"):
        proof_of(answer | {"predicted": "w3"})


def test_an_adapter_has_to_differ_from_its_base(tmp_path):
    same = [-1.0, -2.0]
    with pytest.raises(Refused, match="has no effect"):
        proof(tmp_path, base="b", found={"m": same, "b": [-1.0005, -2.0]})
    found = proof(tmp_path, base="b", found={"m": same, "b": [-1.5, -2.0]})
    assert found.effect == pytest.approx(0.5)


def test_a_small_effect_is_proven_in_bf16_where_the_reference_tells_what_the_base_says(tmp_path):
    """A change of 0.2 among differences of 0.05 between two libraries; one that shows none of it is refused."""

    def proof_of(engine_change: float):
        trained, base = [-1.0, -2.0, -3.0, -1.5], [-1.2, -1.8, -3.2, -1.3]
        noise = [0.05, 0.05, -0.05, -0.05]
        row = {
            "messages": [],
            "prompt_ids": [1, 2],
            "target_ids": [3, 4, 5, 6],
            "logprobs": trained,
            "base_logprobs": base,
        }
        write_reference(tmp_path, [row] * 12)
        source = stub_source("m", folder=tmp_path)
        said = [one + wrong for one, wrong in zip(trained, noise, strict=True)]
        plain = [one - engine_change * (a - b) for one, a, b in zip(said, trained, base, strict=True)]
        engine = AnswersAsGiven(source, "m", tmp_path, tmp_path, Limits(), found={"m": list(said), "b": list(plain)})
        engine.dtype = "bfloat16"
        return asyncio.run(prove(engine, "m", source, "b"))

    assert proof_of(1.0).status == "proven"
    assert proof_of(0.8).effect == pytest.approx(0.16)
    for change in (0.0, 0.2, -1.0):
        with pytest.raises(Refused, match="has no effect"):
            proof_of(change)


def test_what_cannot_be_compared_is_unproven(tmp_path):
    assert proof(tmp_path).detail == "nothing"
    assert proof(tmp_path, dtype="float8", found={"m": []}).status == "unproven"
    with pytest.raises(Refused):  # the tokens are compared all the same
        proof(tmp_path, ids=[9])
    (tmp_path / "reference.json").write_text("{")
    with pytest.raises(Refused, match="cannot be read"):
        read_reference(tmp_path)
