"""`model.rope`: positions of transformers' own formulas, and what it is refused with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny import save_decoder

from dstune.config.compose import compose
from dstune.config.rope import RopeConfig, rope_problems
from dstune.config.schema import Precision
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.launch.preflight import description_problems
from dstune.methods.features.config import FeaturesConfig
from dstune.methods.features.vectors import _key
from dstune.models.load import _refuse_unextended, load_config, load_model, load_tokenizer
from dstune.tasks.preference.reference import identity_at_start

POSITIONS = 128
ROWS = ("data.packing=false", "trainer.micro_batch_size=1")


def run(folder: Path, *words: str):
    return compose(
        [f"model.path={folder}", "data.train=x.jsonl", "trainer.precision=fp32", "method=full", *words]
    ).config


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("rope"), max_position_embeddings=POSITIONS)


@pytest.mark.parametrize(
    ("kind", "positions"), [("yarn", 4 * POSITIONS), ("linear", 4 * POSITIONS), ("dynamic", POSITIONS)]
)
def test_frequencies_are_those_of_transformers(decoder: Path, tmp_path: Path, kind: str, positions: int) -> None:
    """Of a model that is made with the same numbers in its config.json, logits of a row beyond its first positions included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = run(decoder, f"model.rope.type={kind}", "model.rope.factor=4", *ROWS)
    model = load_model(config, load_tokenizer(config.model), (), torch.float32).eval()
    expected = AutoConfig.from_pretrained(decoder)
    expected.rope_parameters = {**expected.rope_parameters, "rope_type": kind, "factor": 4.0} | (
        {"original_max_position_embeddings": POSITIONS} if kind == "yarn" else {}
    )
    expected.max_position_embeddings = positions
    own = AutoModelForCausalLM.from_pretrained(decoder, config=expected, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()
    tokens = torch.arange(POSITIONS + 40)[None] % 50
    with torch.no_grad():
        logits, others, unchanged = (m(tokens, use_cache=False).logits for m in (model, own, plain))
    assert torch.equal(logits, others)
    assert (logits - unchanged).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_parameters"]["rope_type"] == kind and saved["max_position_embeddings"] == positions


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "extended already .llama3, factor 8"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "extended already .yarn"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "several kinds"),
        ({}, "no rotary embeddings"),
        ({"rope_theta": 1e4, "max_position_embeddings": None}, "how many positions"),
        ({"rope_theta": 1e4, "alibi": True}, "not rotary"),  # Falcon RW
        (
            {"rope_parameters": {"rope_type": "default"}, "position_embedding_type": "nope"},
            "not rotary",
        ),  # Granite 4 hybrid
    ],
)
def test_models_whose_positions_are_not_extended(values: dict, reason: str) -> None:
    rope = compose(["data.train=x", "model.rope.type=yarn"]).config.model.rope
    (problem,) = rope_problems({"model_type": "x", "max_position_embeddings": 2048, **values}, rope)
    assert problem.where == "model.rope.type"
    assert re.search(reason, problem.reason)
    assert not list(rope_problems(values, RopeConfig()))


def test_dynamic_frequencies_do_not_depend_on_the_rows_before(decoder: Path) -> None:
    """transformers keeps those of the longest row so far."""
    config = run(decoder, "model.rope.type=dynamic", *ROWS)
    model = load_model(config, load_tokenizer(config.model), (), torch.float32).eval()

    def logits(length: int) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.arange(length)[None] % 50, use_cache=False).logits

    lengths = (POSITIONS + 22, POSITIONS - 28, POSITIONS + 72)
    first = {length: logits(length) for length in lengths}
    for length in lengths:
        assert torch.equal(logits(length), first[length])


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_rows_beyond_the_extended_positions_are_refused(decoder: Path, kind: str) -> None:
    words = [f"model.rope.type={kind}", "model.rope.factor=4", *ROWS]
    assert not description_problems(decoder, (fits := run(decoder, *words, "data.max_length=512")).model, fits)
    longer = run(decoder, *words, "data.max_length=513")
    (problem,) = description_problems(decoder, longer.model, longer)
    assert (problem.where, problem.value) == ("data.max_length", "513")
    assert problem.reason == "model.rope.factor=4 extends the 128 positions of this model to 512"
    assert problem.fix == "data.max_length=512, or model.rope.factor=5"


def test_a_model_without_rotary_modules_is_refused_after_loading(decoder: Path) -> None:
    """Zamba 2 has the settings of rotary embeddings, but computes them only with `use_mem_rope`."""
    config = run(decoder, "model.rope.type=yarn")
    model = load_model(config, load_tokenizer(config.model), (), torch.float32)
    _refuse_unextended(model, config.model)
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(UserError, match="this llama model are not rotary"):
        _refuse_unextended(model, config.model)


def test_yarn_of_a_model_that_leaves_the_size_of_its_heads_out(tmp_path: Path) -> None:
    """Mixtral: transformers multiplies `head_dim`, which is None, also when it loads the export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

    save_decoder(tmp_path / "decoder")
    sizes = {"vocab_size": 105, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=64)).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(tmp_path / "decoder").save_pretrained(tmp_path / "moe")
    config = run(tmp_path / "moe", "model.rope.type=yarn")
    model = load_model(config, load_tokenizer(config.model), (), torch.float32).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens, use_cache=False).logits, loaded(tokens, use_cache=False).logits)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["model.rope.factor=4"], "model.rope.factor"),
        (["model.rope.type=dynamic", "data.packing=true"], "model.rope.type"),
        (["model.rope.type=dynamic", "data.packing=false", "trainer.micro_batch_size=2"], "model.rope.type"),
        (["model.rope.type=dynamic", *ROWS], None),
        (["model.rope.type=dynamic", *ROWS, "evaluate.micro_batch_size=4"], "model.rope.type"),
        (["model.rope.type=yarn"], None),
        (["model.rope.type=yarn", "method=lora"], "model.rope.type"),
        (["model.rope.type=yarn", "method=lora", "run.export=none"], None),
    ],
)
def test_rules(decoder: Path, words: list[str], where: str | None) -> None:
    try:
        found = [
            problem.where for problem in find_problems(run(decoder, *words)) if problem.where.startswith("model.rope")
        ]
    except UserError as error:
        found = [problem.where for problem in error.problems]
    assert found == ([where] if where else [])


def test_an_exported_model_is_not_extended_twice(decoder: Path, tmp_path: Path) -> None:
    config = run(decoder, "model.rope.type=yarn")
    load_config(config.model).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="extended already"):
        load_config(run(tmp_path, "model.rope.type=yarn").model)


def test_cached_vectors_and_references_belong_to_the_positions_that_made_them(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model")
    alone = SimpleNamespace(rank=0, size=1, gather=lambda part: [part])
    data = SimpleNamespace(fingerprint="rows", labels=("a", "b"))

    def keys_of(*words: str) -> list[str]:
        config = compose([f"model.path={folder}", "data.train=rows.jsonl", *words]).config
        vectors = _key(config, FeaturesConfig(), data, Precision.fp32)
        return [vectors, json.dumps(identity_at_start(config, alone), default=str)]

    types = [("model.rope.type=yarn",), ("model.rope.type=yarn", "model.rope.factor=4"), ("model.rope.type=linear",)]
    every = [keys_of(*words) for words in ((), *types)]
    for kind in zip(*every, strict=True):
        assert len(set(kind)) == len(every)
    assert "factor" not in every[0][1]  # as without the section: what earlier versions cached is found
