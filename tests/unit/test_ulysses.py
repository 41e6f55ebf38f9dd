"""Rows that ranks share: who gets what of a row, which heads can be divided, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.tiny import save_decoder, save_encoder

from dstune.config.compose import compose
from dstune.config.parallel_rules import heads_problem, repeats_of_keys
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.models.spans import SPANS
from dstune.models.ulysses import SequenceCut, refuse

SOURCES = ["model=smollm2", "data=chitchat", "parallel=ulysses"]


def cut(part: int, parts: int) -> SequenceCut:
    found = SequenceCut.__new__(SequenceCut)
    found.parts, found.part = parts, part
    return found


def test_the_parts_of_a_packed_row_are_the_row():
    ids = torch.arange(10)[None]
    inputs = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])}
    labels = ids + 100
    found = [cut(part, 4).model_inputs(inputs, labels) for part in range(4)]
    assert torch.cat([own["input_ids"] for own, _ in found], dim=1).tolist() == [[*range(10), 0, 0]]
    assert torch.cat([own["position_ids"] for own, _ in found], dim=1).tolist() == [[0, 1, 2, 3, *range(6), 0, 1]]
    assert torch.cat([of for _, of in found], dim=1).tolist() == [[*range(100, 110), -100, -100]]
    # What fills the row up belongs to no sample: nothing sees it.
    assert {own[SPANS] for own, _ in found} == {(((0, 4), (4, 10)),)}


def test_padding_of_a_row_is_no_sample_and_positions_count_on():
    inputs = {
        "input_ids": torch.zeros(2, 6, dtype=torch.long),
        "attention_mask": torch.tensor([[1] * 6, [1, 1] + [0] * 4]),
    }
    own, _ = cut(1, 2).model_inputs(inputs, torch.zeros(2, 6, dtype=torch.long))
    assert own[SPANS] == (((0, 6),), ((0, 2),))
    assert own["position_ids"].tolist() == [[3, 4, 5], [3, 4, 5]]


@pytest.mark.parametrize(("heads", "parts", "sizes"), [(9, 3, None), (9, 2, "3|9"), (12, 6, None), (1, 2, "none")])
def test_heads_that_can_be_divided(heads, parts, sizes):
    problem = heads_problem(heads, parts)
    if sizes is None:
        assert problem is None
    else:
        assert problem is not None and sizes in problem.fix


def test_heads_of_keys_reach_the_ranks_of_their_queries():
    """Head h of 12 queries reads head h // 3 of 4 keys: repeated, each of 6 ranks gets those of its own two."""
    for heads, of_keys, parts in ((12, 4, 6), (12, 4, 2), (32, 8, 16), (4, 1, 4), (18, 6, 9)):
        repeated = [head for head in range(of_keys) for _ in range(repeats_of_keys(of_keys, parts))]
        assert len(repeated) % parts == 0 and heads % len(repeated) == 0
        for part in range(parts):
            here = repeated[part * len(repeated) // parts : (part + 1) * len(repeated) // parts]
            queries = range(part * heads // parts, (part + 1) * heads // parts)
            read = [key for key in here for _ in range(len(queries) // len(here))]
            assert read == [query // (heads // of_keys) for query in queries]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data=sentiment", "model=minilm", "task=classification"], "parallel"),
        (["method=prompt"], "parallel"),
        (["trainer.micro_batch_size=auto"], "trainer.micro_batch_size"),
        (["model.attention=eager"], "model.attention"),
        (["evaluate.slices=[source]"], "evaluate.slices"),
        (["launch.processes=3"], "parallel.size"),
        (["parallel.size=1"], "parallel.size"),
    ],
)
def test_what_cannot_be_shared_is_refused(overrides, key):
    assert key in [problem.where for problem in find_problems(compose([*SOURCES, *overrides]).config)]
    assert find_problems(compose([*SOURCES, "launch.processes=4"]).config) == []


def test_ranks_that_cannot_be_divided_are_refused_with_what_can():
    with pytest.raises(UserError, match=r"(?s)6 ranks cannot be divided.*size=2\|3\|6"):
        SequenceCut(SimpleNamespace(size=6, rank=0), 4)


def test_rows_that_ranks_share_cannot_go_to_the_model_as_they_are():
    with pytest.raises(UserError, match=r"(?s)parallel=ulysses: rows that ranks share have other logits.*by 80%"):
        cut(0, 2).refuse("by 80%")


def test_models_that_cannot_be_cut(tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(save_decoder(tmp_path / "decoder"))
    refuse(decoder, 4)
    with pytest.raises(UserError, match="4 attention heads"):
        refuse(decoder, 3)
    decoder.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(UserError, match="depend on the length of the row"):
        refuse(decoder, 4)
    capped = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    capped.config.attn_logit_softcapping = 50.0
    with pytest.raises(UserError, match="caps its scores"):
        refuse(capped, 2)
    for changes, why in (
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"attention_chunk_size": 8}, "in chunks"),
        ({"layerdrop": 0.1}, "leaves out layers"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "longrope"},
                }
            },
            "longrope",
        ),
    ):
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
        for key, value in changes.items():
            setattr(other.config, key, value)
        with pytest.raises(UserError, match=why):
            refuse(other, 2)
    encoder = AutoModel.from_pretrained(save_encoder(tmp_path / "encoder"))
    encoder._supports_attention_backend = False
    with pytest.raises(UserError, match="cannot be replaced"):
        refuse(encoder, 2)
