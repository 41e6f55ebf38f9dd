"""`dstune data show`: rows in pieces, figures of all rows, terminal, page and JSON; with a tokenizer and no weights."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.command import Commands
from unit.data_helpers import CHATML, byte_tokenizer, chats, exchange, metaspace_tokenizer, write_jsonl

from dstune import cli
from dstune.data import statistics
from dstune.data.collate import NO_TARGET
from dstune.show.facts import Preview, Row
from dstune.show.segments import Segment, segments
from dstune.show.terminal import Style, text, visible

COLOURS, PLAIN = Style(colours=True, blocks=True), Style(colours=False, blocks=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that has no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(vocab_size=420, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def show(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`dstune data show` in this process, in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["data", "show", f"model.path={model}", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), metaspace_tokenizer(CHATML)], ids=["byte-level", "metaspace"])
def test_pieces_joined_are_the_text(tokenizer) -> None:
    ids = tokenizer("<|im_start|>user\n what is two and two?<|im_end|> yes it is four", add_special_tokens=False)[
        "input_ids"
    ]
    for boundary in range(1, len(ids)):
        labels = [NO_TARGET] * boundary + ids[boundary:]
        found = segments(tokenizer, ids, labels)
        assert sum(segment.tokens for segment in found) == len(ids)
        assert sum(segment.tokens for segment in found if segment.trained) == len(ids) - boundary
        assert [segment.text for segment in found if segment.special] == ["<|im_start|>", "<|im_end|>"]
        between = "".join(segment.text for segment in found).partition("<|im_start|>")[2]
        assert between.replace(" ", "") == "user\nwhatistwoandtwo?<|im_end|>yesitisfour"
        joined = "".join(segment.text for segment in found if not segment.special)
        assert "is two and two?" in joined, "a boundary between words loses no space"


def test_a_character_cut_by_a_boundary_loses_nothing_else() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a\u20acb", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5, "three bytes for the euro"
    found = segments(tokenizer, ids, [NO_TARGET, NO_TARGET, *ids[2:]])
    assert [(segment.tokens, segment.trained) for segment in found] == [(2, False), (3, True)]
    assert found[0].text.startswith("a")
    assert found[1].text.endswith("b")


# -- tasks --------------------------------------------------------------------------------------------------------------


def test_chat_in_a_pipe(show, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "my.jsonl", [exchange("Two and two?", "Four."), exchange("Who?", "Me.")])
    code, printed, errors = show("data.train=my.jsonl", "data.split.validation=0")
    assert code == 0, errors
    assert "\x1b" not in printed
    assert "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n[[Four.<|im_end|>]]" in printed
    assert re.search(r"sample 0 of 2, \d+ tokens, \d+ trained", printed)
    assert "tokens that count in the loss are [[trained]]" in printed
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"my.jsonl", "cache"}, "no run directory is left"


def test_causal_lm_on_a_terminal(model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": "two and two is four"}, {"text": "yes"}])
    command = [sys.executable, "-m", "dstune", "data", "show", f"model.path={model}", "task=causal_lm"]
    command += ["data.train=corpus.jsonl", "data.split.validation=0"]
    terminal, end = pty.openpty()
    environment = {**Commands(tmp_path).env, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=end, stderr=subprocess.PIPE)
    os.close(end)
    printed = b""
    try:
        while block := os.read(terminal, 65536):
            printed += block
    except OSError:  # the other end is closed
        pass
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors.decode()
    # Nothing comes before the first token, so nothing predicts it.
    assert re.search(r"\n[a-z]+\x1b\[32m[a-z ]*is four\x1b\[0m\x1b\[32m\x1b\[1m<\|im_end\|>\x1b\[0m", printed.decode())


def test_classification_with_no_color(show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reviews.csv").write_text("review,stars\nwhat a day,good\nis it not,bad\n" * 5)
    columns = "data.columns={text: review, label: stars}"
    given = ("task=classification", "data.train=reviews.csv", columns, "data.split.validation=0", "data.packing=false")
    monkeypatch.setenv("NO_COLOR", "1")
    code, printed, errors = show(*given, "--rows", "1")
    assert code == 0, errors
    assert "label good" in printed
    assert "what a day" in printed
    assert "[[" not in printed
    assert "packing" not in printed


# -- what is said -----------------------------------------------------------------------------------------------------


def test_json_and_page(show, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "my.jsonl", chats(30))
    code, out, _ = show("data.train=my.jsonl", "data.max_length=32", "--rows", "3", "--json", "--html", "rows.html")
    assert code == 0
    preview = json.loads(out)
    assert (preview["split"], len(preview["rows"])) == ("train", 3)
    assert [row["number"] for row in preview["rows"]] == [
        0,
        round((preview["samples"] - 1) / 2),
        preview["samples"] - 1,
    ]
    row = preview["rows"][0]
    assert sum(segment["tokens"] for segment in row["segments"]) == row["tokens"]
    assert sum(segment["tokens"] for segment in row["segments"] if segment["trained"]) == row["targets"]
    assert preview["longer_than"]["32"] == preview["report"]["truncated"]
    assert 0 < preview["report"]["packing"] <= 1
    page = (tmp_path / "rows.html").read_text()
    assert "<mark>The answer is 2." in page
    assert "two and two" not in page


def test_another_split_and_how_to_get_one(show, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "my.jsonl", chats(30))
    code, out, _ = show("data.train=my.jsonl", "data.split.validation=0.3", "--split", "validation", "--json")
    assert code == 0
    assert json.loads(out)["split"] == "validation"
    code, _, err = show("data.train=my.jsonl", "--split", "test")
    assert code == 2
    assert "there are no test rows" in err
    assert show("data.train=my.jsonl", "--split", "test", "data.split.test=0.1")[0] == 0


def test_repetitions_are_counted(show, tmp_path: Path) -> None:
    rows = [exchange("Ping?", "Pong.")] * 4 + [exchange(f"Say {number}", "I do not know.") for number in range(3)]
    write_jsonl(tmp_path / "my.jsonl", [*rows, *chats(5)])
    given = ("data.train=my.jsonl", "data.split.validation=0", "data.clean.duplicates=keep", "--json")
    preview = json.loads(show(*given)[1])
    (duplicate,) = preview["duplicates"]
    assert duplicate["count"] == 4
    assert "Ping?" in duplicate["text"]
    (answer,) = preview["answers"]
    assert (answer["count"], answer["text"]) == (3, "I do not know.")


def test_mistakes_are_those_of_train(show, capsys: pytest.CaptureFixture[str], model: Path) -> None:
    given = ["data.train=gone.jsonl", "data.max_lenght=3", "optimizer.lr=x"]
    code, _, err = show(*given)
    assert code == 2
    assert cli.main(["train", f"model.path={model}", *given]) == 2
    assert err == capsys.readouterr().err
    assert show("data.train=gone.jsonl")[0] == 2
    assert show("--rows", "-1")[0] == 2
    assert cli.main(["data", "shwo"]) == 2


def test_one_row_by_its_place(show, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "my.jsonl", [*chats(3), {"messages": [{"role": "nobody", "content": "x"}]}])
    code, out, _ = show("data.train=my.jsonl", "--row", "my.jsonl:2")
    assert code == 0
    assert "[[The answer is 3.<|im_end|>]]" in out
    code, _, err = show("data.train=my.jsonl", "--row", "my.jsonl:4")
    assert code == 2
    assert "my.jsonl:4: message 1 has the unknown role 'nobody'" in err
    assert show("data.train=my.jsonl", "--row", "my.jsonl:9")[0] == 2
    assert show("data.train=my.jsonl", "--row", "my.jsonl")[0] == 2


def test_the_rows_of_a_run(show, tmp_path: Path, model: Path) -> None:
    from dstune.config.compose import compose
    from dstune.config.run_file import write_run

    write_jsonl(tmp_path / "my.jsonl", chats(5))
    run = tmp_path / "run"
    run.mkdir()
    write_run(run / "run.yaml", compose([f"model.path={model}", "data.train=my.jsonl", "data.max_length=77"]))
    assert cli.main(["data", "show", str(run), "data.split.validation=0", "--rows", "0", "--html", "rows.html"]) == 0
    assert "max_length 77" in (tmp_path / "rows.html").read_text()
    assert [path.name for path in run.iterdir()] == ["run.yaml"]


def test_a_pair_shows_both_answers_and_counts_what_is_trained(show, tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": "Two and two?", "chosen": "It is four.", "rejected": "It is five, no?"}]
    )
    given = ("task=preference", "data.train=pairs.jsonl", "data.split.validation=0")
    code, printed, _ = show(*given)
    assert code == 0
    assert "[[It is four.<|im_end|>]]" in printed
    counted = json.loads(show(*given, "--json")[1])["rows"][0]
    trained = sum(piece["tokens"] for piece in counted["segments"] if piece["trained"])
    assert counted["targets"] == trained > 1
    rejected = "".join(piece["text"] for piece in counted["rejected"])
    assert rejected.strip() == "It is five, no?<|im_end|>"
    alone = {"prompt": "Two and two?", "completion": "It is five, no?"}
    write_jsonl(tmp_path / "chat.jsonl", [alone])
    as_chat = json.loads(show("data.train=chat.jsonl", "data.split.validation=0", "--json")[1])["rows"][0]
    assert sum(piece["tokens"] for piece in counted["rejected"] if piece["trained"]) == as_chat["targets"]
    assert f"rejected, {as_chat['targets']} trained:\n[[It is five, no?<|im_end|>]]" in printed
    assert show(*given, "--html", "rows.html")[0] == 0
    assert "<span>rejected</span>" in (tmp_path / "rows.html").read_text()


# -- the terminal -----------------------------------------------------------------------------------------------------


def preview_of(*pieces: Segment) -> Preview:
    row = Row(0, sum(piece.tokens for piece in pieces), 1, None, None, list(pieces))
    return Preview("m", "chat", "train", 1, [row], {}, {"max_length": 8, "packing": False})


def test_colours_and_brackets() -> None:
    pieces = (Segment("<s>", 1, False, True), Segment("ask", 1, False, False), Segment("a\nb", 2, True, False))
    preview = preview_of(*pieces, Segment("</s>", 1, True, True))
    assert text(preview, PLAIN).endswith("<s>ask[[a\nb</s>]]")
    coloured = "\x1b[35m<s>\x1b[0mask\x1b[32ma\x1b[0m\n\x1b[32mb\x1b[0m\x1b[32m\x1b[1m</s>\x1b[0m"
    assert text(preview, COLOURS).endswith(coloured)


def test_text_cannot_command_the_terminal() -> None:
    assert visible("\x1b[2J\x07\u202eevil\u2028\ttab\n") == "\\x1b[2J\\x07\\u202eevil\\u2028\ttab\n"
    assert "\x1b[2J" not in text(preview_of(Segment("\x1b[2J", 1, True, False)), COLOURS)


def test_long_pieces_lose_their_middle() -> None:
    printed = text(preview_of(Segment("a" * 5000 + "b" * 5000, 9, False, False)), PLAIN)
    assert "a" * 600 + " [... 8,800 characters ...] " + "b" * 600 in printed


@pytest.mark.parametrize(
    ("terminal", "environ", "colours"),
    [(True, {}, True), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False), (False, {}, False)],
)
def test_when_there_are_colours(terminal: bool, environ: dict[str, str], colours: bool) -> None:
    class Stream(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return terminal

    assert Style.of(Stream(), environ) == Style(colours, blocks=True)


# -- lengths ----------------------------------------------------------------------------------------------------------


def test_a_histogram_counts_powers_of_two_exactly() -> None:
    lengths = np.random.default_rng(0).integers(1, 5000, 2000)
    counted = statistics.histogram(lengths)
    assert sum(counted.values()) == 2000
    for power in (1, 2, 16, 256, 4096, 8192):
        assert statistics.longer_than(counted, power) == int((lengths > power).sum())
    halves = [statistics.histogram(half) for half in (lengths[:700], lengths[700:])]
    assert statistics.merged(halves) == counted
    assert statistics.histogram(np.array([], dtype=np.int64)) == {}


def test_packing_efficiency_by_hand() -> None:
    # Rows of 10: 6 + 4, 5 + 3 + 2 are full; a further 5 leaves half of a third row free.
    assert statistics.packing(np.array([3, 6, 4, 5, 2]), 10) == 1.0
    assert statistics.packing(np.array([3, 6, 4, 5, 2, 5]), 10) == pytest.approx(25 / 30)
    assert statistics.packing(np.array([]), 10) is None
    many = np.full(statistics.PACKED_SAMPLE * 3, 4)
    assert statistics.packing(many, 10) == pytest.approx(0.8, abs=1e-4)
