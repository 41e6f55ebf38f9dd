"""`dstune prune`: the saved model is the larger one without what was cut."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from dstune.compression import cut
from dstune.compression.command import main
from dstune.core.errors import UserError
from tests.support.tiny import save_decoder, write_dialogues


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    save_decoder(folder / "model", num_hidden_layers=5)
    write_dialogues(folder / "chats.jsonl", 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        yield folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prune(place, name, *flags, capsys=None):
    assert main([str(place / "model"), "--output", str(place / name), *flags]) == 0
    return json.loads((place / name / "pruning.json").read_text()), load(place / name), load(place / "model")


def test_layers_stay_as_they_are(place):
    record, small, large = prune(place, "even", "--layers", "3")
    assert record["kept"] == [0, 2, 4] and small.config.num_hidden_layers == 3
    for number, of_large in enumerate(record["kept"]):
        for own, other in zip(
            small.model.layers[number].parameters(), large.model.layers[of_large].parameters(), strict=True
        ):
            assert torch.equal(own, other)
    assert torch.equal(small.lm_head.weight, large.lm_head.weight)
    assert record["parameters"][1] == sum(p.numel() for p in small.parameters()) < record["parameters"][0]


def test_the_layers_that_do_most_are_those_whose_loss_hurts_most(place):
    large = load(place / "model")
    with torch.no_grad():  # a layer that does nothing
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            large.model.layers[3].get_submodule(name).weight.zero_()
    large.save_pretrained(place / "idle")
    (place / "idle" / "tokenizer.json").write_bytes((place / "model" / "tokenizer.json").read_bytes())
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (place / "idle" / name).write_bytes((place / "model" / name).read_bytes())
    flags = ["--layers", "4", "--choose", "influence", f"data.train={place / 'chats.jsonl'}"]
    assert main([str(place / "idle"), "--output", str(place / "cut"), *flags]) == 0
    record = json.loads((place / "cut" / "pruning.json").read_text())
    assert record["kept"] == [0, 1, 2, 4] and abs(record["influences"][3]) < 1e-6
    tokens = torch.arange(5, 30)[None]
    torch.testing.assert_close(load(place / "cut")(tokens).logits, load(place / "idle")(tokens).logits)


def test_the_most_active_neurons_stay(place):
    flags = ["--feed-forward", "40", "--rows", "8", f"data.train={place / 'chats.jsonl'}"]
    record, small, large = prune(place, "narrow", *flags)
    assert small.config.intermediate_size == 40 and record["kept"] == [0, 1, 2, 3, 4]
    tokens = [torch.arange(5, 40)]
    active = cut.activations_of(large, tokens)
    assert [len(each) for each in active] == [64] * 5
    for own, other in zip(small.model.layers, large.model.layers, strict=True):
        rows = [
            next(at for at in range(64) if torch.equal(other.mlp.up_proj.weight[at], row))
            for row in own.mlp.up_proj.weight
        ]
        assert rows == sorted(rows) and len(rows) == 40
        assert torch.equal(own.mlp.down_proj.weight, other.mlp.down_proj.weight[:, rows])
        assert torch.equal(own.mlp.gate_proj.weight, other.mlp.gate_proj.weight[rows])


def test_activations_and_influences_are_means_over_tokens():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=30)).eval()
    samples = [torch.arange(5), torch.arange(7, 20)]
    with torch.no_grad():
        states = [model(s[None], output_hidden_states=True, use_cache=False).hidden_states for s in samples]
        cosines = torch.cat([torch.cosine_similarity(one[0][0], one[1][0], dim=-1) for one in states])
    assert cut.influences_of(model, samples)[0] == pytest.approx(1 - float(cosines.mean()), abs=1e-6)
    first = model.model.layers[0]
    seen: list[torch.Tensor] = []
    handle = first.mlp.down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
    expected = cut.activations_of(model, samples)[0]
    handle.remove()
    torch.testing.assert_close(torch.cat(seen).abs().mean(dim=0).double(), expected, rtol=1e-5, atol=1e-7)


def test_what_it_refuses(place):
    for flags in (
        [],
        ["--layers", "9"],
        ["--layers", "0"],
        ["--layers", "2", "--keep", "1"],
        ["--keep", "3,1"],
        ["--keep", "0,9"],
        ["--feed-forward", "8"],
        ["--layers", "2", "--choose", "influence"],
        ["--feed-forward", "640", f"data.train={place / 'chats.jsonl'}"],
    ):
        with pytest.raises(UserError):
            main([str(place / "model"), "--output", str(place / "refused"), *flags])
    assert not (place / "refused").exists()
    with pytest.raises(UserError, match="exists already"):
        main([str(place / "model"), "--output", str(place / "model"), "--layers", "2"])


def test_weights_of_bitsandbytes_are_refused(tmp_path):
    save_decoder(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    with pytest.raises(UserError, match="stored in 4 bits by bitsandbytes, which cannot be cut"):
        main([str(tmp_path / "model"), "--output", str(tmp_path / "pruned"), "--layers", "1"])
