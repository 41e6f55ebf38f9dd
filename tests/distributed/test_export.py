"""Exports of real DeepSpeed checkpoints: the trained weights, which transformers and peft alone load; what is beside them; the
verb that makes them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dstune.checkpoint import export, store
from dstune.checkpoint.shards import Weights
from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.inference import export_command
from tests.support.exports import CASES, Shelf, filled_shelf, load, logits, token_ids, with_weights


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return filled_shelf(tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith(("full", "tied", "alone")) and "bf16" not in name]
)
def test_a_full_export_is_the_trained_model(shelf, name):
    whole = shelf.whole(name)
    exported = load(shelf.run(name) / "export")
    found = dict(exported.named_parameters())
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert torch.equal(logits(exported), logits(with_weights(load(shelf.model(name)), whole)))
    assert not torch.equal(logits(exported), logits(load(shelf.model(name)))), "nothing was trained"
    assert exported.config.use_cache is True
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == (shelf.model(name).name == "tied")


def test_bf16_training_exports_its_fp32_weights(shelf):
    exported = load(shelf.run("full-bf16-1") / "export")
    whole = shelf.whole("full-bf16-1")
    assert {weight.dtype for weight in whole.values()} == {torch.bfloat16}
    for name, weight in exported.named_parameters():
        assert weight.dtype == torch.float32  # as the base model is stored
        assert torch.equal(weight.bfloat16(), whole[name])
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in exported.parameters())


def test_a_model_stored_in_bf16_is_exported_so(shelf):
    exported, whole = load(shelf.run("stored-bf16-2") / "export"), shelf.whole("stored-bf16-2")
    assert all(torch.equal(weight, whole[key].bfloat16()) for key, weight in exported.named_parameters())
    assert {weight.dtype for weight in exported.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", [f"lora-{stage}" for stage in range(4)])
def test_an_adapter_export_loads_with_peft_on_its_base(shelf, name):
    import peft

    folder, whole = shelf.run(name) / "export", shelf.whole(name)
    exported = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    trained = {key: weight for key, weight in whole.items() if "lora_" in key}
    found = dict(exported.named_parameters())
    assert trained.keys() == {key for key in found if "lora_" in key}
    assert all(torch.equal(found[key], weight) for key, weight in whole.items())
    assert not torch.allclose(logits(exported), logits(load(shelf.model(name))), atol=1e-3), "nothing was trained"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(shelf.model(name))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "dstune.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "name", [*(f"lora-{stage}" for stage in range(4)), *(n for n in CASES if n.startswith("lora-tied"))]
)
def test_a_merged_export_computes_what_the_adapter_does(shelf, name, tmp_path):
    """Also where one of two tied weights has an adapter of its own: then they are two in the merged model."""
    import peft

    folder = export.export_checkpoint(shelf.run(name), store.newest(shelf.run(name)), tmp_path / "merged", merge=True)
    unmerged = peft.AutoPeftModelForCausalLM.from_pretrained(shelf.run(name) / "export").eval()
    merged = load(folder)
    assert not [key for key, _ in merged.named_parameters() if "lora" in key]
    torch.testing.assert_close(logits(merged), logits(unmerged), rtol=0, atol=5e-5)


def test_of_four_tied_weights_the_one_with_an_adapter_is_parted(shelf, tmp_path):
    import peft

    run_dir = shelf.run("seq2seq-head-2")
    folder = export.export_checkpoint(run_dir, store.newest(run_dir), tmp_path / "merged", merge=True)
    unmerged = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(run_dir / "export").eval()
    ids = {"input_ids": token_ids(), "decoder_input_ids": token_ids()[:, :8]}
    with torch.no_grad():
        torch.testing.assert_close(load(folder, "Seq2SeqLM")(**ids).logits, unmerged(**ids).logits, rtol=0, atol=5e-5)


def test_a_model_stored_in_bf16_stays_so_and_its_adapter_does_not(shelf, tmp_path):
    import peft
    from safetensors.torch import load_file

    run_dir = shelf.run("lora-bf16-stored-3")
    adapter = load_file(run_dir / "export" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    folder = export.export_checkpoint(run_dir, store.newest(run_dir), tmp_path / "merged", merge=True)
    stored = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    base = load(shelf.model("lora-bf16-stored-3"), dtype=torch.float32)
    exact = peft.PeftModel.from_pretrained(base, run_dir / "export").merge_and_unload().state_dict()
    assert all(torch.equal(weight, exact[key].bfloat16()) for key, weight in stored.items())


def test_an_adapter_on_random_weights_is_exported_merged(shelf):
    whole = shelf.whole("lora-random-2")
    exported = dict(load(shelf.run("lora-random-2") / "export").named_parameters())
    name = "model.layers.1.self_attn.q_proj"
    parts = [
        whole[f"base_model.model.{name}.{part}.weight"] for part in ("base_layer", "lora_A.default", "lora_B.default")
    ]
    expected = parts[0] + parts[2] @ parts[1] * (32 / 4)
    torch.testing.assert_close(exported[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    assert torch.equal(exported["model.norm.weight"], whole["base_model.model.model.norm.weight"])


@pytest.mark.parametrize("name", ["labels-2", "labels-head-3", "labels-lora-3"])
def test_a_classifier_keeps_its_head_and_label_names(shelf, name):
    import peft
    from transformers import AutoModelForSequenceClassification as Classifier

    folder, whole = shelf.run(name) / "export", shelf.whole(name)
    labels = ["left", "right"]
    if "lora" in name:
        base = Classifier.from_pretrained(shelf.model(name), num_labels=2)
        exported = peft.PeftModel.from_pretrained(base, folder).eval()
    else:
        exported = load(folder, "SequenceClassification")
        assert exported.config.id2label == dict(enumerate(labels))
        assert exported.config.label2id == {"left": 0, "right": 1}
    found = dict(exported.named_parameters())
    unused = {key for key in whole if ".original_module." in key}  # the head that the adapter's own one replaces
    assert whole.keys() == found.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole.keys() - unused)


def test_what_was_drawn_new_is_trained_and_saved_with_an_adapter(shelf):
    """A new pooler that stayed frozen would be another one at every load."""
    import peft
    from transformers import AutoModelForSequenceClassification as Classifier

    whole = shelf.whole("pooler-lora-2")
    base = Classifier.from_pretrained(shelf.model("pooler-lora-2"), num_labels=2)
    exported = peft.PeftModel.from_pretrained(base, shelf.run("pooler-lora-2") / "export").eval()
    found = dict(exported.named_parameters())
    poolers = {key for key in whole if "pooler" in key and "original_module" not in key}
    assert len(poolers) >= 2
    assert all(torch.equal(found[key], whole[key]) for key in poolers)
    # And a method that freezes the body trains it too.
    name = "bert.pooler.dense.weight"
    first, last = shelf.whole("pooler-head-3", step=2)[name], shelf.whole("pooler-head-3")[name]
    assert not torch.equal(first, last)
    assert torch.equal(
        load(shelf.run("pooler-head-3") / "export", "SequenceClassification").bert.pooler.dense.weight, last
    )


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tokens")])
def test_added_tokens_are_trained_and_end_an_answer(shelf, name, tmp_path):
    import peft
    from transformers import AutoTokenizer, GenerationConfig

    folder = shelf.run(name) / "export"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    before = load(shelf.model(name)).config.vocab_size
    assert end >= before and len(tokenizer) == before + 3
    assert end in GenerationConfig.from_pretrained(folder).eos_token_id
    exported = load(folder) if "full" in name else peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(9, before + 3)[None]
    with torch.no_grad():
        expected = exported(input_ids=ids, use_cache=False).logits
    assert expected.shape[-1] == before + 3
    if "full" not in name:
        run_dir = shelf.run(name)
        merged = export.export_checkpoint(run_dir, store.newest(run_dir), tmp_path / "merged", merge=True)
        with torch.no_grad():
            torch.testing.assert_close(load(merged)(input_ids=ids).logits, expected, rtol=0, atol=5e-5)
        rows = [
            [weight for key, weight in shelf.whole(name, step).items() if "trainable_tokens_delta" in key]
            for step in (2, 3)
        ]
        assert len(rows[0]) == (1 if "-tied" in name else 2)
        assert all(not torch.equal(early, late) for early, late in zip(*rows, strict=True)), "they were not trained"


def test_rows_of_tokens_are_trained_alike_at_every_stage(shelf):
    """At stage 3 the vocabulary is partitioned, and peft reads it whole."""
    runs = [shelf.whole(f"tokens-untied-{stage}") for stage in (0, 2, 3)]
    keys = [key for key in runs[0] if "trainable_tokens_delta" in key]
    assert len(keys) == 2
    for other in runs[1:]:
        assert all(torch.allclose(runs[0][key], other[key], rtol=0, atol=1e-4) for key in keys)


def test_control_tokens_that_the_base_model_has_are_trained_too(shelf):
    """ChatML's are in the vocabulary; of a base model they are rows that no text has trained."""
    name = "control-2"
    early, late = (shelf.whole(name, step) for step in (2, 3))
    keys = [key for key in late if "trainable_tokens_delta" in key]
    assert len(keys) == 2 and all(late[key].shape == (2, 32) for key in keys)
    assert all(not torch.equal(early[key], late[key]) for key in keys)


def test_added_tokens_beside_a_frozen_body_are_refused(shelf):
    from dataclasses import replace

    from dstune.config.run_file import read_run
    from dstune.methods.head.config import HeadConfig
    from dstune.models.load import load_model, load_tokenizer
    from dstune.protocols import method_of

    config = replace(read_run(shelf.run("tokens-untied-2") / "run.yaml").config, method=HeadConfig())
    model = load_model(config, load_tokenizer(config.model), (), torch.float32)
    with pytest.raises(UserError, match="method=lora"):
        method_of(config.method).apply(model, config)


def test_answers_end_where_the_turn_ends(shelf):
    from transformers import GenerationConfig

    for name in ("full-2", "lora-2"):
        settings = GenerationConfig.from_pretrained(shelf.run(name) / "export")
        assert settings.eos_token_id == 4  # <|im_end|>
        assert settings.pad_token_id == 2


def test_large_models_are_written_in_several_files(shelf, tmp_path):
    run_dir = shelf.run("full-3")
    folder = export.export_checkpoint(run_dir, store.newest(run_dir), tmp_path / "out", max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load(folder)), logits(load(run_dir / "export")))


def test_shards_agree_with_deepspeeds_own_reader(shelf):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name in ("full-1", "full-2", "full-3", "labels-2"):
        checkpoint = store.newest(shelf.run(name))
        expected = get_fp32_state_dict_from_zero_checkpoint(checkpoint.parent, tag=checkpoint.name)
        found = Weights(checkpoint)
        assert expected.keys() == set(found)
        assert all(torch.equal(expected[key], found[key]) for key in found)


# -- what is beside the weights --------------------------------------------------------------------------------------


def test_the_model_card(shelf):
    from huggingface_hub import ModelCard

    card = ModelCard.load(shelf.run("lora-2") / "export" / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["dstune", "chat", "lora"]
    assert "base_model" not in data, "a folder of the user's own is no id on the hub"
    state = store.read_state(store.newest(shelf.run("lora-2")))
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == {name: value for name, value in state["metrics"].items() if name != "targets"}
    for expected in (
        "AutoPeftModelForCausalLM",
        "| optimizer | adamw |",
        "`chat.jsonl`",
        "| method.rank | 4 |",
        "| train |",
        "torch ",
    ):
        assert expected in card.content
    assert str(shelf.folder) not in card.content, "paths of this machine are nobody else's business"


def test_the_code_of_the_model_card_runs(shelf, capsys):
    for name in ("full-2", "lora-2", "labels-2", "labels-lora-3"):
        folder = shelf.run(name) / "export"
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        code = code.replace('"PATH"', repr(str(folder))).replace("max_new_tokens=256", "max_new_tokens=4")
        exec(compile(code, str(folder / "README.md"), "exec"), {})
    assert capsys.readouterr().out.count("\n") == 4


def test_an_export_says_how_it_is_evaluated(shelf):
    from dstune.checkpoint.record import recorded_overrides

    chat = recorded_overrides(shelf.run("full-2") / "export", [])
    assert chat[0] == "task=chat" and "data.max_length=64" in chat and "data.packing=true" in chat
    assert any(text.startswith("task.template_date='20") for text in chat)
    labels = recorded_overrides(shelf.run("labels-2") / "export", [])
    assert labels[0] == "task=classification" and "task.labels=['left','right']" in labels
    assert recorded_overrides(shelf.run("labels-2") / "export", ["task=chat"])[0].startswith("data.")
    compose([*labels, "data.train=x.jsonl"])


def test_a_classifier_of_other_origin_is_evaluated_as_one(shelf, tmp_path):
    from dstune.checkpoint.record import recorded_overrides

    folder = shutil.copytree(shelf.run("labels-2") / "export", tmp_path / "copy")
    (folder / "dstune.json").unlink()
    assert recorded_overrides(folder, []) == ["task=classification"]
    assert recorded_overrides(shelf.model("full-2"), []) == []


def test_what_vllm_asks_for(shelf, tmp_path):
    from dstune.checkpoint.serving import vllm_problems

    for name in ("full-3", "lora-2", "tokens-full-3"):
        assert vllm_problems(shelf.run(name) / "export") == [], name
    (problem,) = vllm_problems(shelf.run("tokens-tied-1") / "export")
    assert "no low-rank matrices" in problem
    assert "trained as a whole" in vllm_problems(shelf.run("labels-lora-3") / "export")[0]
    broken = shutil.copytree(shelf.run("full-3") / "export", tmp_path / "broken")
    for file in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (broken / file).unlink()
    assert len(vllm_problems(broken)) == 4


# -- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_exports_a_named_step(shelf, tmp_path, capsys):
    run_dir, out = shelf.run("full-3"), tmp_path / "out"
    assert export_command.main([str(run_dir), "--checkpoint", "2", "--out", str(out), "--json"]) == 0
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    expected = {
        "export": str(out),
        "kind": "model",
        "checkpoint": str(checkpoint),
        "vllm_problems": [],
        "reference": True,
    }
    printed = capsys.readouterr()
    assert json.loads(printed.out) == expected, printed.err
    whole = shelf.whole("full-3", step=2)
    assert all(torch.equal(weight, whole[key]) for key, weight in load(out).named_parameters())


def test_the_verb_merges_beside_the_adapter(shelf, capsys):
    run_dir = shelf.run("lora-1")
    try:
        assert export_command.main([str(run_dir), "--merge"]) == 0
        assert (run_dir / "export-merged" / "config.json").exists()
        assert (run_dir / "export" / "adapter_config.json").exists()
        assert str(run_dir / "export-merged") in capsys.readouterr().out
    finally:
        shutil.rmtree(run_dir / "export-merged", ignore_errors=True)


def refusal(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        export_command.main(arguments)
    return str(caught.value)


def test_what_the_verb_refuses(shelf, tmp_path):
    run_dir = shelf.run("full-3")
    before = (run_dir / "export" / "config.json").stat().st_mtime_ns
    step = json.loads((run_dir / "export" / "dstune.json").read_text())["step"]
    assert f"exists already: the export of step {step}" in refusal([str(run_dir)])
    assert (run_dir / "export" / "config.json").stat().st_mtime_ns == before
    assert "no such run directory" in refusal([str(tmp_path / "nowhere")])
    assert "no run.yaml" in refusal([str(tmp_path)])
    assert "there are steps 2, 3" in refusal([str(run_dir), "--checkpoint", "7", "--out", str(tmp_path / "out")])
    assert "nothing to merge" in refusal([str(run_dir), "--merge"])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert "no former export" in refusal([str(run_dir), "--out", str(precious), "--force"])
    assert (precious / "thesis.txt").exists()
    assert not list(tmp_path.glob("*.incomplete"))


def test_force_replaces_a_former_export(shelf, tmp_path):
    run_dir, out = shelf.run("full-2"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "leftover.safetensors").write_text("")
    assert export_command.main([str(run_dir), "--out", str(out), "--force"]) == 0
    assert not (out / "leftover.safetensors").exists()
    load(out)
