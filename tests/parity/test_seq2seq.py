"""Encoder-decoders and decoders that write targets for sources: a plain torch loop = dstune, on 1 to 3 ranks at ZeRO 0 to 3;
what evaluation generates on any layout is what plain transformers generates from the export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity.reference import train_plainly
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.tiny import save_bart, save_decoder, save_encoder, save_joined_encoders, save_t5, write_pairs
from support.workshop import PLAIN, VOLATILE, Results

from dstune.config.compose import compose

PROGRAM = Path(__file__).with_name("train_cases.py")

BASE = [
    *PLAIN,
    "task=seq2seq",
    "task.prompt='w0 {source}'",
    "data.max_length=64",
    "data.split.validation=0.2",
    "optimizer.lr=0.05",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=10",  # five micro-batches: no number of ranks but one divides them
    "trainer.max_steps=3",
    "evaluate.max_rows=7",  # four batches: no number of ranks but one, two and four divides them
]
KINDS = {
    "t5": ["model.config_overrides={dropout_rate:0.1}"],
    "bart": ["model.config_overrides={dropout:0.1}"],
    "joined": [],
    "decoder": ["model.config_overrides={attention_dropout:0.1}"],
    "packed": ["data.packing=true"],
}


class Workshop(Results):
    def __init__(self, folder: Path):
        self.folder = folder
        self.models = {
            "t5": save_t5(folder / "t5"),
            "bart": save_bart(folder / "bart"),
            "joined": save_joined_encoders(folder / "joined", save_encoder(folder / "encoder")),
            "decoder": save_decoder(folder / "decoder"),
        }
        self.models["packed"] = self.models["decoder"]
        self.data = write_pairs(folder / "pairs.jsonl", 60)
        self.references: dict[str, object] = {}

    def composed(self, kind: str, name: str, *overrides: str):
        sources = [f"model.path={self.models[kind]}", f"data.train={self.data}"]
        return compose([*sources, *BASE, *KINDS[kind], f"run.dir={self.folder / name}", *overrides])

    def case(
        self, kind: str, name: str, *overrides: str, directory: str | None = None, room: float | None = None
    ) -> dict:
        return self.written(name, self.composed(kind, name, *overrides), directory) | {"room": room}

    def reference(self, kind: str):
        if kind not in self.references:
            self.references[kind] = train_plainly(self.composed(kind, "reference").config, self.folder / "cache")
        return self.references[kind]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        yield Workshop(folder)


LAYOUTS = {
    1: [("t5", 0), ("t5", 3), ("bart", 3), ("joined", 2), ("packed", 3)],
    2: [("t5", 1), ("bart", 2), ("decoder", 3)],
    3: [("t5", 0), ("t5", 1), ("t5", 2), ("t5", 3), ("bart", 1), ("joined", 3), ("decoder", 2), ("packed", 3)],
}


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.ci), 2, pytest.param(3, marks=pytest.mark.ci)])
def test_any_layout_equals_the_plain_loop_and_generates_what_the_export_does(workshop, size):
    cases = {f"{kind}-s{stage}-n{size}": (kind, stage) for kind, stage in LAYOUTS[size]}
    jobs = [workshop.case(kind, name, f"zero=stage{stage}") for name, (kind, stage) in cases.items()]
    if size == 3:
        jobs.append(workshop.case("t5", "in-step", "zero=stage3", room=0.5))
        jobs.append(workshop.case("decoder", "decoder-in-step", "zero=stage3", room=0.0))
        cases |= {"in-step": ("t5", 3), "decoder-in-step": ("decoder", 3)}
    run_ranks(PROGRAM, size, jobs)
    for name, (kind, _) in cases.items():
        expected = workshop.reference(kind)
        rows = [row for row in workshop.rows(name) if "loss" in row]
        assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-6), name
        assert [row["grad_norm"] for row in rows] == pytest.approx(expected.grad_norms, rel=2e-6), name
        trained = load_file(workshop.folder / name / "export" / "model.safetensors")
        for key, weight in expected.weights.items():
            assert (trained[key] - weight).abs().max() < 2e-6, f"{name}: {key}"
        found = workshop.result(name)["eval_final"]
        assert found["generated"] == 7
        scores = {key: found[key] for key in ("bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL")}
        assert scores == pytest.approx(plain_scores(workshop, name, kind), rel=1e-9), name


def plain_scores(workshop: Workshop, name: str, kind: str) -> dict[str, float]:
    """Metrics of the libraries for what transformers alone generates from the export, source by source."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf, corpus_ter
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from dstune.core.rank_env import RankEnv
    from dstune.data.build import prepare
    from dstune.models.load import load_tokenizer
    from dstune.trainer.evaluate import limited

    config = workshop.composed(kind, name).config
    data = prepare(config, load_tokenizer(config.model), RankEnv(0, 1, 0, 1, "test"), workshop.folder / "cache")
    assert data.validation is not None
    split = limited(data.validation, 7, config.task)
    export = workshop.folder / name / "export"
    decoder = kind in ("decoder", "packed")
    model = (AutoModelForCausalLM if decoder else AutoModelForSeq2SeqLM).from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    most = -(-5 * int(split.weights.max()) // 4)
    answers, targets = [], []
    for index in range(len(split.lengths)):
        texts = split.source_and_target(index)
        text = f"w0 {texts['source']}"
        if decoder:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**inputs, max_new_tokens=most, do_sample=False)[0]
        if decoder:
            written = written[inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(written, skip_special_tokens=True).strip())
        targets.append(texts["target"])
    kinds = ["rouge1", "rouge2", "rougeL"]
    rouge = [RougeScorer(kinds).score(target, answer) for target, answer in zip(targets, answers, strict=True)]
    return {
        "bleu": corpus_bleu(answers, [targets]).score,
        "chrf": corpus_chrf(answers, [targets]).score,
        "ter": corpus_ter(answers, [targets]).score,
        **{kind: sum(score[kind].fmeasure for score in rouge) / len(rouge) for kind in kinds},
    }


@pytest.mark.ci
def test_resumed_equals_uninterrupted_and_an_adapter_is_one_of_its_kind(workshop):
    common = ["optimizer=adamw", "optimizer.lr=1e-2", "schedule=cosine", "evaluate.every=2"]
    full, lora = [*common, "zero=stage3"], [*common, "zero=stage2", "method=lora"]
    limit = "run.time_limit=0.000001"  # over after the first step of each launch
    first = [
        workshop.case("t5", "whole", *full),
        workshop.case("t5", "adapter", *lora),
        workshop.case("t5", "cut", *full, limit, directory="cut"),
        workshop.case("t5", "end", *full, directory="cut"),
    ]
    run_ranks(PROGRAM, 2, first)
    whole, cut = (
        [{key: value for key, value in row.items() if key not in VOLATILE} for row in workshop.rows(name)]
        for name in ("whole", "cut")
    )
    assert cut == whole and any("eval/chrf" in row for row in whole)
    left, right = (load_file(workshop.folder / name / "export" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(left[key], right[key]) for key in left)
    settings = json.loads((workshop.folder / "adapter" / "export" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM"
    card = (workshop.folder / "adapter" / "export" / "README.md").read_text()
    assert "AutoPeftModelForSeq2SeqLM" in card and "w0 TEXT" in card
    for name in ("whole", "adapter"):
        assert_the_verb_generates(workshop, name)


def assert_the_verb_generates(workshop: Workshop, name: str) -> None:
    """`dstune generate` asks as in training: a batch of sources gives what transformers gives for each."""
    import contextlib
    import io

    from peft import AutoPeftModelForSeq2SeqLM
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from dstune.inference import generate

    export = workshop.folder / name / "export"
    loader = AutoPeftModelForSeq2SeqLM if name == "adapter" else AutoModelForSeq2SeqLM
    model, tokenizer = loader.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    sources = ["w5 w7 w9", "w1", "w60 w61 w62 w63 w64 w65"]
    expected = []
    for source in sources:
        inputs = tokenizer(f"w0 {source}", return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        expected.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    prompt_flags = [word for source in sources for word in ("--prompt", source)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert generate.main([str(workshop.folder / name), *prompt_flags, "--max-new-tokens", "8", "--json"]) == 0
    assert [json.loads(line)["answer"] for line in out.getvalue().splitlines()] == expected
