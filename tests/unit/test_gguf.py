"""GGUF files hold the model: read back by transformers, weights within the format's rounding, tokenizer and template alike."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from dstune.checkpoint import store
from dstune.checkpoint.gguf_families import check_architecture, metadata_of
from dstune.checkpoint.gguf_file import write_gguf
from dstune.checkpoint.gguf_vocabulary import read_vocabulary
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.core.errors import UserError
from dstune.data.named_templates import joined
from dstune.inference import export_command
from dstune.testing.tiny import CHATML
from tests.support.gguf_models import MODELS, PREPEND, REPLACE, SIZES, SPLIT, save_byte_level, save_model, save_pieces
from tests.support.tiny import save_decoder

TEXT = "Numbers like 1234 and words, don't they?  <|im_start|>user\nhi<|im_end|>\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gguf")
    return {name: save_model(root / name, name) for name in MODELS}


def read_back(file: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 67).view(2, 32), use_cache=False).logits


def original(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def rounding(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The largest difference that storing a matrix makes: half a step of each number's own scale."""
    if kind == "f16":
        return weight.abs() * 2**-11 + 2**-25
    blocks = weight.reshape(-1, 32).abs().amax(-1, keepdim=True) / 127  # q8_0: a scale for 32 numbers, kept as f16
    return (blocks * (0.5 + 127 * 2**-11)).expand(-1, 32).reshape(weight.shape) + 1e-7


def assert_within_rounding(found, before, kind: str) -> None:
    weights = dict(before.named_parameters())
    assert {key for key, _ in found.named_parameters()} == set(weights)
    for key, weight in found.named_parameters():
        exact = kind == "f32" or weight.dim() < 2
        allowed = torch.zeros_like(weight) if exact else rounding(weights[key].data, kind)
        assert bool(((weight - weights[key]).abs() <= allowed).all()), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_a_model_is_read_back_within_the_rounding_of_its_type(models, name, kind, tmp_path):
    write_gguf(models[name], tmp_path / "model.gguf", kind, "model")
    found, before = read_back(tmp_path / "model.gguf")[0], original(models[name])
    assert_within_rounding(found, before, kind)
    difference = (logits(found) - logits(before)).square().mean().sqrt() / logits(before).square().mean().sqrt()
    assert difference < {"f32": 1e-6, "f16": 2e-3, "q8_0": 6e-2}[kind]


@pytest.mark.parametrize(
    ("kind", "most"), [("bf16", 3e-3), ("q5_1", 0.05), ("q5_0", 0.06), ("q4_1", 0.1), ("q4_0", 0.13)]
)
def test_further_types_are_read_back(models, kind, most, tmp_path):
    """To the mean error of a matrix, relative to its numbers."""
    write_gguf(models["llama"], tmp_path / "model.gguf", kind, "model")
    weights = dict(original(models["llama"]).named_parameters())
    for key, weight in read_back(tmp_path / "model.gguf")[0].named_parameters():
        error = (weight - weights[key]).square().mean().sqrt() / weights[key].square().mean().sqrt()
        assert (error < most) if weight.dim() == 2 else (error == 0), key
        assert weight.dim() < 2 or error > most / 8, f"{key} is not rounded"


def test_tokenizer_template_and_end_of_turn_are_in_it(models, tmp_path):
    from transformers import AutoTokenizer

    write_gguf(models["llama"], tmp_path / "model.gguf", "f16", "model")
    _, found = read_back(tmp_path / "model.gguf")
    before = AutoTokenizer.from_pretrained(models["llama"])
    assert found(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert found.chat_template == before.chat_template
    assert (found.eos_token, found.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_of_named_templates_it_has_what_chooses_among_them(models, tmp_path):
    from transformers import AutoTokenizer

    named = {"default": CHATML, "tool_use": "{{ tools }}" + CHATML}
    shutil.copytree(models["llama"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = named
    tokenizer.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16", "model")
    assert read_back(tmp_path / "model.gguf")[1].chat_template == joined(named)


def test_the_frequencies_of_llama_3(tmp_path):
    """llama.cpp divides the frequencies by what is stored; the quotient are those of transformers."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = save_byte_level(tmp_path / "model")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": rows, "rope_parameters": rope})))
    model.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16", "model")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    found = plain / torch.tensor(tensors["rope_freqs.weight"])
    torch.testing.assert_close(found, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert not torch.allclose(found, plain)


# -- SentencePiece ----------------------------------------------------------------------------------------------------


def metaspace(scheme: str, *, split: bool = False) -> dict:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


@pytest.mark.parametrize(
    ("normalizer", "before", "prefix"),
    [
        (PREPEND, None, True),  # Llama 2, Mistral 7B v0.1
        (None, metaspace("first"), True),
        (None, metaspace("always"), True),
        (None, metaspace("never"), False),
        (REPLACE, SPLIT, False),  # Gemma
        (REPLACE, None, False),
    ],
)
def test_a_space_is_put_in_front_of_a_text_where_the_tokenizer_does_so(normalizer, before, prefix, tmp_path):
    import gguf
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    rows = save_pieces(tmp_path / "model", normalizer, before)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    first = tokenizer.convert_ids_to_tokens(tokenizer("ab", add_special_tokens=False)["input_ids"])[0]
    assert first == ("▁ab" if prefix else "a")
    LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": rows}))).save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16", "model")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is prefix


@pytest.mark.parametrize(
    ("normalizer", "before", "named"),
    [
        ({"type": "NFKC"}, metaspace("first"), "NFKC, Metaspace"),
        (None, metaspace("first", split=True), "Metaspace"),
        (REPLACE, {"type": "Digits", "individual_digits": True}, "Replace, Digits"),
        (None, None, "nothing"),
    ],
)
def test_pieces_of_another_kind_are_refused_by_name(normalizer, before, named, tmp_path):
    from transformers import AutoTokenizer

    rows = save_pieces(tmp_path, normalizer, before)
    with pytest.raises(UserError, match=f"prepares text by {named}"):
        read_vocabulary(AutoTokenizer.from_pretrained(tmp_path), rows)


# -- what is refused, and the verb ------------------------------------------------------------------------------------


def test_other_architectures_are_refused_by_name():
    from transformers import GPT2Config, SmolVLMConfig

    with pytest.raises(UserError, match=r"gpt2(.|\n)*llama, mistral"):
        check_architecture(GPT2Config())
    with pytest.raises(UserError, match=r"smolvlm(.|\n)*llama, mistral"):  # its language model is a Llama
        check_architecture(SmolVLMConfig())


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "mscale": 0.7}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
BIDIRECTIONAL = {"use_bidirectional_attention": True}
SLIDING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Llama", {"rope_parameters": DYNAMIC}, "of the type dynamic"),
        ("Llama", {"rope_parameters": YARN}, "their own scale"),
        ("Llama", {"rope_parameters": YARN | {"mscale": None, "truncate": False}}, "bounds of yarn"),
        ("Llama", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "a part of each head"),
        ("Gemma2", {"query_pre_attn_scalar": 100}, "divides scores by the root of 256"),
        ("Gemma2", {"final_logit_softcapping": None}, "caps scores and logits"),
        ("Gemma3Text", SLIDING, "every 6th layer"),
        ("Gemma3Text", BIDIRECTIONAL, "both directions"),
        ("Gemma3Text", {"rope_local_base_freq": 5000.0}, "base 10,000"),
        ("Gemma4Text", EXPERTS, "mixtures of experts"),
        ("Gemma4Text", {"per_layer_config": {"0": {"head_dim": 64}}}, "heads of one size"),
        ("Qwen3_5Text", SLIDING | {"layer_types": ["full_attention", "linear_attention"]}, "every 1th layer"),
        ("Qwen3_5Text", {"linear_value_head_dim": 64}, "keys and values of one size"),
        ("Ministral3", {"rope_parameters": PLAIN}, "by yarn with mscale=1"),
        ("SmolLM3", {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}, "every 4th layer"),
        ("Olmo3", SLIDING, "every 4th layer"),
        ("Olmo3", {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": YARN}}, "in windows"),
        ("Qwen3Moe", {"norm_topk_prob": False}, "weights of the chosen experts"),
        ("Qwen3Moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "experts in every layer"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(kind: str, changes: dict, reason: str):
    import transformers

    config = getattr(transformers, f"{kind}Config")
    usual = {"Qwen3Moe": {"norm_topk_prob": True}}.get(kind, {})
    check_architecture(config(**usual))
    with pytest.raises(UserError, match=reason):
        check_architecture(config(**copy.deepcopy(changes)))


def test_a_window_that_llama_cpp_ignores_limits_the_context():
    from transformers import Gemma2Config, MistralConfig, Qwen2Config

    def context(config) -> int:
        return metadata_of(config)["context_length"]

    assert context(MistralConfig(sliding_window=4096, max_position_embeddings=32768)) == 4096
    assert context(MistralConfig(sliding_window=None, max_position_embeddings=32768)) == 32768
    assert context(Gemma2Config()) == 8192
    assert context(Qwen2Config(max_position_embeddings=32768)) == 32768


def test_other_tokenizers_are_refused_by_name(tmp_path):
    from transformers import AutoTokenizer

    folder = save_decoder(tmp_path / "words")
    with pytest.raises(UserError, match="WordLevel"):
        read_vocabulary(AutoTokenizer.from_pretrained(folder), 105)


def saved_run(folder: Path, model: Path) -> Path:
    """A run directory with one checkpoint at stage 0, whose weights are twice the base model's."""
    run_dir = folder / "run"
    run_dir.mkdir()
    overrides = ["data=files", "data.train=x.jsonl", "task=chat", "method=full"]
    write_run(run_dir / "run.yaml", compose([f"model.path={model}", *overrides]))
    written = store.folder(run_dir) / "step-00000003.incomplete"
    written.mkdir(parents=True)
    module = {name: parameter.detach() * 2 for name, parameter in original(model).named_parameters()}
    torch.save({"module": module, "buffer_names": [], "global_steps": 3}, written / "mp_rank_00_model_states.pt")
    store.commit(written, {"step": 3, "labels": [], "best": None})
    return run_dir


def test_the_verb_writes_one_file(models, tmp_path, capsys):
    run_dir = saved_run(tmp_path, models["llama"])
    assert export_command.main([str(run_dir), "--gguf", "q8_0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    file = run_dir / "export-gguf" / "run-q8_0.gguf"
    assert (result["export"], result["kind"]) == (str(file), "gguf")
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(
        ["Modelfile", "README.md", "chat_template.jinja", "dstune.json", "tokenizer.json", file.name]
    )
    found, twice = read_back(file)[0], original(models["llama"])
    for parameter in twice.parameters():
        parameter.data *= 2
    assert_within_rounding(found, twice, "q8_0")
    with pytest.raises(UserError, match="exists already"):
        export_command.main([str(run_dir), "--gguf", "q8_0"])
    assert export_command.main([str(run_dir), "--quantize", "gguf:q4_0", "--no-loss"]) == 0  # beside the first
    assert (run_dir / "export-gguf-q4_0" / "run-q4_0.gguf").is_file() and file.exists()
    with pytest.raises(UserError, match="exists already"):
        export_command.main([str(run_dir), "--gguf", "q4_0"])
    assert export_command.main([str(run_dir), "--gguf", "--force"]) == 0
    assert (run_dir / "export-gguf" / "run-f16.gguf").is_file() and not file.exists()


def test_the_verb_refuses_before_any_work(tmp_path):
    run_dir = saved_run(tmp_path, save_decoder(tmp_path / "words"))
    with pytest.raises(UserError, match="WordLevel"):
        export_command.main([str(run_dir), "--gguf"])
    assert not list(run_dir.glob("export*"))
