"""`dstune predict`: rows without labels, answered by runs, exports and adapters as plain transformers answers them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from seqeval.metrics.sequence_labeling import get_entities
from transformers import AutoModel, AutoTokenizer

from dstune.core.errors import UserError
from dstune.inference import predict
from dstune.tasks.token_classification.predict import entities
from tests.support.ranks import run_ranks
from tests.support.tiny import (
    save_decoder,
    save_encoder,
    write_contrastive,
    write_labelled,
    write_preferences,
    write_questions,
    write_scored,
    write_tagged,
)
from tests.support.workshop import Workshop

PROGRAM = Path(__file__).parents[1] / "parity" / "train_cases.py"
BASE = [
    "data=files",
    "data.max_length=64",
    "data.split.validation=0.2",
    "optimizer.lr=0.005",
    "trainer.precision=fp32",
    "trainer.micro_batch_size=4",
    "trainer.global_batch_size=8",
    "trainer.max_steps=24",
    "evaluate.at_start=false",
    "run.export=last",
]
KINDS = {
    "labels": ["task=classification", "MODEL=encoder", "DATA=labels"],
    "labels-lora": ["task=classification", "MODEL=encoder", "DATA=labels", "method=lora", "method.rank=4"],
    # Nothing that could become part of the model: it is built as in training.
    "labels-prompt": [
        "task=classification",
        "MODEL=encoder",
        "DATA=labels",
        "method=prompt",
        "method.virtual_tokens=4",
    ],
    "several": ["task=classification", "task.multi_label=true", "MODEL=encoder", "DATA=several"],
    "number": ["task=classification", "task.regression=true", "MODEL=encoder", "DATA=numbers"],
    "tags": ["task=token_classification", "task.stride=2", "data.max_length=12", "MODEL=encoder", "DATA=tags"],
    "answers": ["task=question_answering", "task.no_answer=true", "MODEL=encoder", "DATA=questions"],
    "vectors": ["task=embedding", "MODEL=encoder", "DATA=texts"],
    "reward-lora": ["task=reward", "MODEL=decoder", "DATA=pairs", "method=lora", "method.rank=4"],
    "chat": ["task=preference", "MODEL=decoder", "DATA=pairs", "trainer.max_steps=1"],
}
TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w80 w85 w90", "w40", "w3 w88 w5 w70 w70 w70 w2 w61 w12 w9 w30", "w77 w4"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    labelled = [json.loads(line) for line in write_labelled(folder / "labels.jsonl", 60).read_text().splitlines()]
    several = [{**row, "label": [row["label"], "long"][: 1 + (len(row["text"]) > 30)]} for row in labelled]
    (folder / "several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
    write_scored(folder / "numbers.jsonl", 60)
    write_tagged(folder / "tags.jsonl", 60)
    write_questions(folder / "questions.jsonl", 60, unanswered=0.2)
    write_contrastive(folder / "texts.jsonl", 60)
    write_preferences(folder / "pairs.jsonl", 40)
    models = {"encoder": save_encoder(folder / "encoder"), "decoder": save_decoder(folder / "decoder")}

    def made(text: str) -> str:
        key, _, value = text.partition("=")
        return {"MODEL": f"model.path={models.get(value)}", "DATA": f"data.train={folder / value}.jsonl"}.get(key, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        shop = Workshop(folder, BASE)
        run_ranks(PROGRAM, 2, [shop.case(name, *map(made, given), "zero=stage2") for name, given in KINDS.items()])
        yield shop


def predicted(capsys, *arguments: object) -> list[dict]:
    capsys.readouterr()
    assert predict.main([*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.rstrip("\n").split("\n")]


def plain(folder: Path, kind: str, **options):
    """The export as anyone loads it, and its tokenizer."""
    import peft
    import transformers

    source = peft if (folder / "adapter_config.json").is_file() else transformers
    name = f"AutoPeftModelFor{kind}" if source is peft else f"AutoModelFor{kind}"
    model = getattr(source, name).from_pretrained(folder, **(options if source is peft else {}))
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def logits(model, tokenizer, *texts: str) -> torch.Tensor:
    return model(**tokenizer(*texts, return_tensors="pt", truncation=True, max_length=64)).logits[0]


@pytest.mark.parametrize("name", ["labels", "labels-lora", "labels-prompt"])
def test_a_run_and_its_export_label_texts(shop, capsys, name):
    run = shop.folder / name
    model, tokenizer = plain(run / "export", "SequenceClassification", num_labels=2)
    expected = [logits(model, tokenizer, text).softmax(0) for text in TEXTS]
    text_flags = [word for text in TEXTS for word in ("--text", text)]
    for source in (run, run / "export", run / "checkpoints" / "step-00000024"):
        rows = predicted(capsys, source, *text_flags, "--batch-size", 2, "--probabilities")
        assert [row["text"] for row in rows] == TEXTS
        assert [row["row"] for row in rows] == [f"--text {number}" for number in range(1, 6)]
        for row, chances in zip(rows, expected, strict=True):
            assert row["predicted"] == ("left", "right")[int(chances.argmax())]
            assert row["probability"] == pytest.approx(float(chances.max()), abs=1e-5)
            assert list(row["probabilities"].values()) == pytest.approx(chances.tolist(), abs=1e-5)
    chances = [row["probability"] for row in rows]
    assert max(chances) - min(chances) > 1e-3, "or an order could not be told"


def test_several_labels_and_numbers(shop, capsys):
    text_flags = [word for text in TEXTS for word in ("--text", text)]
    model, tokenizer = plain(shop.folder / "several" / "export", "SequenceClassification")
    names = [model.config.id2label[index] for index in range(3)]
    rows = predicted(capsys, shop.folder / "several", *text_flags, "--probabilities")
    assert any(row["predicted"] for row in rows)
    for row, text in zip(rows, TEXTS, strict=True):
        assert list(row["probabilities"]) == names
        chances = dict(zip(names, logits(model, tokenizer, text).sigmoid().tolist(), strict=True))
        assert row["predicted"] == [name for name in names if chances[name] > 0.5]
        assert row["probability"] == pytest.approx({name: chances[name] for name in row["predicted"]}, abs=1e-5)
    model, tokenizer = plain(shop.folder / "number" / "export", "SequenceClassification")
    found = [row["predicted"] for row in predicted(capsys, shop.folder / "number" / "export", *text_flags)]
    assert found == pytest.approx([float(logits(model, tokenizer, text)[0]) for text in TEXTS], abs=1e-5)


def test_words_have_tags_and_entities(shop, capsys, tmp_path):
    """Sentences that need several windows of twelve sub-words too."""
    rows = [{"tokens": text.split(), "id": number} for number, text in enumerate([*TEXTS, " ".join(TEXTS * 2)])]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = predicted(capsys, shop.folder / "tags", "--input", tmp_path / "asked.jsonl")
    model, tokenizer = plain(shop.folder / "tags" / "export", "TokenClassification")
    (tmp_path / "other.csv").write_text("message\nw1\nw2\n")
    with pytest.raises(UserError) as refused:
        predict.main([str(shop.folder / "labels"), "--input", str(tmp_path / "other.csv")])
    (problem,) = refused.value.problems
    assert "the columns here are 'message'" in problem.reason and "'data.columns={text: NAME}'" in problem.fix
    for row, given in zip(found, rows, strict=True):
        assert (row["id"], row["tokens"]) == (given["id"], given["tokens"])
        assert len(row["predicted"]) == len(given["tokens"])
        spans = [(one["type"], one["start"], one["end"] - 1) for one in row["entities"]]
        assert spans == get_entities(row["predicted"])
        assert all(one["text"] == " ".join(given["tokens"][one["start"] : one["end"]]) for one in row["entities"])
        if len(given["tokens"]) <= 10:  # a word is one token here, and none is added
            best = logits(model, tokenizer, " ".join(given["tokens"])).argmax(-1).tolist()
            assert row["predicted"] == [model.config.id2label[index] for index in best]
    as_text = predicted(capsys, shop.folder / "tags", "--text", TEXTS[3])
    assert as_text[0]["tokens"] == TEXTS[3].split()
    assert as_text[0]["predicted"] == found[3]["predicted"]


@pytest.mark.parametrize(
    ("tags", "count"), [("O I-x I-x I-y B-y B-y I-x O I-y", 6), ("B-x I-x E-x S-x S-x I-x O B-y E-y I-y", 6)]
)
def test_entities_are_those_that_metrics_count(tags, count):
    tags = tags.split()
    spans = [(one["type"], one["start"], one["end"] - 1) for one in entities(list("abcdefghij"), tags)]
    assert spans == get_entities(tags) and len(spans) == count


def test_marks_of_bilou_are_those_of_bioes():
    spans = [(one["text"], one["type"]) for one in entities(list("abcdef"), ["B-x", "I-x", "L-x", "U-x", "B-y", "L-y"])]
    assert spans == [("a b c", "x"), ("d", "x"), ("e f", "y")]


def test_questions_are_answered_with_words_of_their_text(shop, capsys, tmp_path):
    rows = [json.loads(line) for line in (shop.folder / "questions.jsonl").read_text().splitlines()][:12]
    questions = [{"question": row["question"], "context": row["context"]} for row in rows]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    run = shop.folder / "answers"
    sure = predicted(capsys, run, "--input", tmp_path / "asked.jsonl", "task.threshold=1e9")
    model, tokenizer = plain(run / "export", "QuestionAnswering")
    for row, given in zip(sure, questions, strict=True):
        inputs = tokenizer(given["question"], given["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets, own = inputs.pop("offset_mapping")[0].tolist(), inputs.sequence_ids(0)
        with torch.no_grad():
            output = model(**inputs)
        starts, ends = output.start_logits[0], output.end_logits[0]
        places = [place for place, sequence in enumerate(own) if sequence == 1]
        scores = {
            (first, last): float(starts[first] + ends[last])
            for first in places
            for last in places
            if first <= last < first + 30
        }
        first, last = max(scores, key=scores.__getitem__)
        assert row["predicted"] == given["context"][offsets[first][0] : offsets[last][1]]
        assert row["no_answer"] == pytest.approx(float(starts[0] + ends[0]) - scores[first, last], abs=1e-4)
    none = predicted(capsys, run, "--input", tmp_path / "asked.jsonl", "task.threshold=-1e9")
    assert {row["predicted"] for row in none} == {""}


def test_texts_have_vectors(shop, capsys):
    folder = shop.folder / "vectors" / "export"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text_flags = [word for text in TEXTS for word in ("--text", text)]
    for row, text in zip(predicted(capsys, folder, *text_flags), TEXTS, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert row["vector"] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)


def test_answers_have_a_reward(shop, capsys, tmp_path):
    pairs = [json.loads(line) for line in (shop.folder / "pairs.jsonl").read_text().splitlines()][:6]
    conversations = [{"messages": [*pair["prompt"], *pair["chosen"]]} for pair in pairs]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    model, tokenizer = plain(shop.folder / "reward-lora" / "export", "SequenceClassification", num_labels=1)
    for source in (shop.folder / "reward-lora", shop.folder / "reward-lora" / "export"):
        for row, given in zip(
            predicted(capsys, source, "--input", tmp_path / "asked.jsonl"), conversations, strict=True
        ):
            text = tokenizer.apply_chat_template(given["messages"], tokenize=False)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :64]
            with torch.no_grad():
                score = float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])
            assert row["score"] == pytest.approx(score, abs=1e-4)


def test_a_table_goes_through_in_order_and_goes_on_after_a_kill(shop, capsys, tmp_path, monkeypatch):
    """Columns by other names are kept; what was written before the end is not computed again."""
    file, out = tmp_path / "reviews.csv", tmp_path / "found.jsonl"
    texts = [" ".join(f"w{1 + (7 * row + word) % 90}" for word in range(1 + row % 9)) for row in range(70)]
    file.write_text("id,review\n" + "".join(f"{number},{text}\n" for number, text in enumerate(texts)))
    command = [str(shop.folder / "labels"), "data.columns={text: review}", "--input", str(file)]
    command += ["--output", str(out)]
    monkeypatch.setattr(predict, "BLOCK", 16)
    whole = predicted(capsys, *command[:4])
    append, blocks = predict.AnswersFile.append, []

    def killed(self, rows):
        append(self, rows)
        blocks.append(len(rows))
        if len(blocks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(predict.AnswersFile, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        predict.main(command)
    assert not out.exists()
    assert predict.main(command) == 0
    assert blocks == [16, 16, 16, 16, 6]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [int(row["id"]) for row in rows] == list(range(70)) and [row["review"] for row in rows] == texts
    assert [row["row"] for row in rows] == [f"{file}:{number}" for number in range(2, 72)]
    for row, alone in zip(rows, whole, strict=True):
        assert row["predicted"] == alone["predicted"]
        assert row["probability"] == pytest.approx(alone["probability"], abs=1e-5)
    with pytest.raises(UserError, match="exists already"):
        predict.main(command)


def test_the_rest_of_other_rows_is_not_written_behind(shop, tmp_path, monkeypatch):
    file, out = tmp_path / "rows.jsonl", tmp_path / "found.jsonl"
    monkeypatch.setattr(predict, "BLOCK", 2)
    file.write_text("".join(json.dumps({"text": f"w{number}"}) + "\n" for number in range(1, 6)))
    command = [str(shop.folder / "labels" / "export"), "--input", str(file), "--output", str(out)]
    append = predict.AnswersFile.append

    def killed(self, rows):
        append(self, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict.AnswersFile, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            predict.main(command)
    file.write_text(file.read_text().replace("w1", "w9"))
    with pytest.raises(UserError, match="other rows, another model or other settings"):
        predict.main(command)
    assert predict.main([*command, "--force"]) == 0
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["w9", "w2", "w3", "w4", "w5"]


def test_columns_of_any_kind_stay_beside_the_answer(shop, capsys, tmp_path):
    """Dates, nothing and half of a character are written as JSON that every reader takes; answers keep their names."""
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    day = datetime.datetime(2026, 1, 2, 3)
    columns = {
        "text": ["w1 w2", "w80"],
        "at": [day, None],
        "value": [float("nan"), 1.5],
        "score": [1, 2],
        "row": [7, 8],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = predicted(capsys, shop.folder / "labels", "--input", tmp_path / "rows.parquet")
    assert [(row["at"], row["value"]) for row in rows] == [(str(day), None), (None, 1.5)]
    assert [row["row"] for row in rows] == [f"{tmp_path / 'rows.parquet'}:{number}" for number in (1, 2)]
    assert not any("score" in row for row in rows)
    (tmp_path / "half.jsonl").write_text('{"text": "w1", "note": "\\ud83d"}\n')
    (row,) = predicted(capsys, shop.folder / "labels", "--input", tmp_path / "half.jsonl")
    assert row["note"] == "?"
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    with pytest.raises(UserError, match="surrogate"):
        predict.main([str(shop.folder / "labels"), "--input", str(tmp_path / "half.jsonl")])


def test_texts_and_pairs_may_be_mixed(shop, capsys, tmp_path):
    rows = [{"text": TEXTS[0]}, {"text": TEXTS[1], "text_pair": TEXTS[4]}, {"text": TEXTS[2]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = plain(shop.folder / "labels" / "export", "SequenceClassification")
    found = predicted(capsys, shop.folder / "labels", "--input", tmp_path / "rows.jsonl")
    for row, given in zip(found, rows, strict=True):
        chances = logits(model, tokenizer, *given.values()).softmax(0)
        assert row["probability"] == pytest.approx(float(chances.max()), abs=1e-5)
    as_trained = predicted(capsys, shop.folder / "labels", "--input", tmp_path / "rows.jsonl", "data.format=text_label")
    assert as_trained[1]["probability"] != pytest.approx(found[1]["probability"], abs=1e-5)


def test_rows_longer_than_the_model_are_cut_and_counted(shop, capsys):
    """The encoder has 128 learned positions."""
    assert predict.main([str(shop.folder / "labels"), "data.max_length=1024", "--text", "w9 " * 300, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["truncated"] and "1 rows are longer than the model reads" in captured.err


def test_bad_rows_are_left_out_where_that_is_requested(shop, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n{"text": ""}\n{"text": "w2"}\n')
    words = ["--input", str(tmp_path / "rows.jsonl"), "data.on_bad_row=skip", "--json"]
    assert predict.main([str(shop.folder / "labels"), *words]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["text"] for line in captured.out.splitlines()] == ["w1", "w2"]
    assert "1 rows are bad and left out" in captured.err and "rows.jsonl:2: column 'text' is empty" in captured.err


def test_a_prompt_that_leaves_no_room_has_no_reward(shop, capsys, tmp_path):
    rows = [{"prompt": "w3 " * 90, "completion": "w4"}, {"prompt": "w3", "completion": "w4"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    full, short = predicted(capsys, shop.folder / "reward-lora", "--input", tmp_path / "rows.jsonl")
    assert "score" not in full and "64 tokens" in full["problem"]
    assert isinstance(short["score"], float)


def test_standard_input_is_a_text_a_line(shop, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n\nw80\x85w4\n"))
    rows = predicted(capsys, shop.folder / "labels")
    assert [(row["row"], row["text"]) for row in rows] == [("stdin:1", "w1 w2"), ("stdin:3", "w80\x85w4")]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match="no rows"):
        predict.main([str(shop.folder / "labels")])


def test_words_of_a_table_may_be_a_list(shop, capsys, tmp_path):
    (tmp_path / "rows.csv").write_text('tokens\n"[""w1"", ""w2 w3""]"\nw1 w5 w6\n')
    rows = predicted(capsys, shop.folder / "tags", "--input", tmp_path / "rows.csv")
    assert [len(row["predicted"]) for row in rows] == [2, 3]


def renamed(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of an export as others publish models: without dstune's record, with another configuration."""
    shutil.copytree(folder, target)
    (target / "dstune.json").unlink()
    described = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({key: value for key, value in described.items() if value != "-"}))
    return target


def test_published_models_say_themselves_what_they_are_for(shop, capsys, tmp_path):
    words = ["--text", TEXTS[0]]
    (own,) = predicted(capsys, shop.folder / "labels", *words)
    bare = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    unnamed = renamed(shop.folder / "labels" / "export", tmp_path / "unnamed", problem_type=None, **bare)
    (found,) = predicted(capsys, unnamed, *words)
    assert found["predicted"] == f"LABEL_{['left', 'right'].index(own['predicted'])}"
    (found,) = predicted(capsys, unnamed, *words, "task.labels=[bad,good]")
    assert found["predicted"] == ("bad", "good")[["left", "right"].index(own["predicted"])]
    with pytest.raises(UserError, match="the model has 2 labels, and these are 3"):
        predict.main([str(unnamed), *words, "task.labels=[a,b,c]"])
    # One output is a number, whatever the configuration leaves out: a choice of one would always be certain.
    (own,) = predicted(capsys, shop.folder / "number", *words)
    (found,) = predicted(
        capsys, renamed(shop.folder / "number" / "export", tmp_path / "one", problem_type=None), *words
    )
    assert found["predicted"] == pytest.approx(own["predicted"], abs=1e-6)


@pytest.mark.parametrize(
    "named", [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {"pooling_mode": "cls"}]
)
def test_the_pooling_of_sentence_transformers_is_read(shop, capsys, tmp_path, named):
    folder = renamed(shop.folder / "vectors" / "export", tmp_path / "published")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **named}))
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        first = model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0, 0]
    (row,) = predicted(capsys, folder, "--text", TEXTS[0])
    assert row["vector"] == pytest.approx((first / first.norm()).tolist(), abs=1e-5)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="the pooling max_tokens, which dstune does not have"):
        predict.main([str(folder), "--text", "w1"])


def test_people_read_a_line_a_row(shop, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert predict.main([str(shop.folder / "labels"), "--text", TEXTS[0], "--text", "w9 " * 200]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] in ("left", "right") and first.endswith(TEXTS[0])
    assert len(second) <= 80 and second.endswith("...")


def test_bad_rows_are_named_before_a_model_is_loaded(shop, tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.inference.load.load", lambda *given: pytest.fail("a model was loaded"))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "w1"}\n{"text": ""}\n{"txt": "w2"}\n{"text": \n')
    with pytest.raises(UserError) as refused:
        predict.main([str(shop.folder / "labels"), "--input", str(file)])
    problems = [str(problem) for problem in refused.value.problems]
    assert [text.partition(" ")[0] for text in problems] == [*(f"{file}:{line}:" for line in (2, 3, 4)), "--input:"], (
        problems
    )
    assert "'text' is empty" in problems[0] and "missing column 'text'" in problems[1]
    assert "1 rows are good" in problems[3] and "data.on_bad_row=skip" in problems[3]
    for name, words, reason in (
        ("chat", ["--text", "w1"], "dstune generate"),
        ("answers", ["--text", "w1"], "more than a text"),
        ("labels/export", ["--text", "w1", "--checkpoint", "best"], "only a run has checkpoints"),
        ("labels", ["--text", "w1", "--revision", "main"], "a run has none"),
        ("labels", ["--text", "w1", "data.columns.txt=q"], "no such role"),
        ("labels", ["--text", "w1", "--output", str(tmp_path / "o.xlsx")], "o.jsonl"),
        ("tags", ["--text", "w1", "--probabilities", "--json"], "only a classifier has them"),
        ("labels", ["--text", "w1", "--probabilities"], "no room for them"),
        ("tags", ["--text", "w1", "data.max_length=4"], "data.max_length"),
        ("labels", ["--input", "absent.csv"], "--input=absent.csv: no such file"),
        ("reward-lora", ["--input", str(file)], "'messages', or 'prompt' and 'completion'"),
    ):
        with pytest.raises(UserError, match=reason):
            predict.main([str(shop.folder / name), *words])
    with pytest.raises(UserError, match="no trained classification head"):
        predict.main([str(shop.folder / "encoder"), "task=classification", "--text", "w1"])
    with pytest.raises(UserError, match="nothing tells what it was trained for"):
        predict.main([str(shop.folder / "encoder"), "--text", "w1"])
