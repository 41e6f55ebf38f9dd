"""The part of a report that shows how rewarded answers changed."""

from __future__ import annotations

import json

import pytest

from dstune.report.html import render
from dstune.report.rollouts import LONGEST_TEXT, SHOWN_ANSWERS, SHOWN_STEPS, SHOWN_TURNS, Turn, by_reward, story


def completion(prompt: int, sample: int, text: str, reward: float | None, **further) -> dict:
    row = {"prompt": prompt, "sample": sample, "text": text, "ended": True, "reward": reward, "rewards": {"r": reward}}
    return row | ({"question": f"question {prompt}"} if not sample else {}) | further


def write(folder, step: int, rows: list[dict]) -> None:
    (folder / "rollouts").mkdir(exist_ok=True)
    (folder / "rollouts" / f"step-{step:06d}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_the_first_and_the_last_step_and_some_between(tmp_path):
    for step in range(1, 41):
        write(tmp_path, step, [completion(0, 0, "a", step / 40), completion(0, 1, "b", 0.0)])
    found = story(tmp_path)
    assert len(found) == SHOWN_STEPS
    assert (found[0].step, found[-1].step, found[-1].reward) == (1, 40, "0.500")
    assert [answer.label for answer in found[0].answers] == ["best", "worst"]
    assert found[0].answers[0].rewards == [("r", "0.025")]


def test_the_prompt_is_the_one_whose_answers_differ_most(tmp_path):
    rows = [completion(3, 0, "same", 1.0), completion(3, 1, "same", 1.0)]
    rows += [completion(4, 0, "x" * 5000, 0.2), completion(4, 1, "none", None), completion(4, 2, "good", 0.9)]
    turns = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}]
    turns += [{"role": "tool", "content": "found"}, {"role": "assistant", "content": "it is found"}]
    write(tmp_path, 1, rows)
    write(tmp_path, 2, [completion(5, 0, "raw", 1.0, messages=turns)])
    first, second = story(tmp_path)
    assert first.prompt == "question 4"
    assert [answer.text for answer in first.answers] == ["good", "x" * LONGEST_TEXT + " …"]
    assert second.answers[0].turns == [
        Turn("model", "", ["look({})"]), Turn("tool", "found"), Turn("model", "it is found")
    ]  # fmt: skip
    assert story(tmp_path / "nothing") == []


def test_what_a_model_wrote_is_text_on_the_page(tmp_path):
    write(tmp_path, 1, [completion(0, 0, "<script>alert(1)</script>", 1.0)])
    page = render(
        "report.html.j2", title="t", runs=[], one=None, charts=[], results=[], differences=[], samples=[],
        story=story(tmp_path), by_reward=(0, []), version="0", made="",
    )  # fmt: skip
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page


def test_answers_that_nothing_scores(tmp_path):
    """Of on-policy distillation."""
    write(tmp_path, 5, [{"prompt": 7, "ids": [1], "text": "hello", "ended": False}])
    (episode,) = episodes = story(tmp_path)
    assert (episode.reward, episode.prompt) == ("", "prompt 7")
    assert [(answer.label, answer.text, answer.rewards) for answer in episode.answers] == [("answer", "hello", [])]
    page = render(
        "report.html.j2", title="t", runs=[], one=None, charts=[], results=[], differences=[], samples=[],
        story=episodes, by_reward=(0, []), version="0", made="",
    )  # fmt: skip
    assert "hello" in page and "reward" not in page.split("How the answers changed")[1].split("</section>")[0]


def test_a_file_that_dstune_did_not_write_is_refused(tmp_path):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step-000001.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises((LookupError, TypeError, ValueError)):
        story(tmp_path)


def test_answers_of_the_last_scored_step_from_the_best_to_the_worst(tmp_path):
    write(tmp_path, 1, [completion(0, 0, "early", 1.0)])
    rows = [completion(number, 0, f"answer {number}", (number * 7 % 20) / 20, ended=number > 3) for number in range(20)]
    write(tmp_path, 2, [*rows, completion(30, 0, "unscored", None)])
    step, answers = by_reward(tmp_path)
    assert (step, len(answers)) == (2, SHOWN_ANSWERS)
    assert [answer.label for answer in answers] == ["0.95", "0.7", "0.45", "0.25", "0"]
    assert (answers[0].prompt, answers[0].text) == ("question 17", "answer 17")
    page = render(
        "report.html.j2", title="t", runs=[], one=None, charts=[], results=[], differences=[], samples=[],
        story=[], by_reward=(step, answers), version="0", made="",
    )  # fmt: skip
    assert page.index("answer 17") < page.index("question 0") < page.index("answer 0")
    assert by_reward(tmp_path / "nothing") == (0, [])


def test_an_episode_is_read_turn_by_turn(tmp_path):
    call = {"function": {"name": "look", "arguments": '{"at": "<b>"}'}}
    turns = [{"role": "assistant", "content": "I look.", "tool_calls": [call]}]
    turns += [{"role": "tool", "name": "look", "content": "a door"}, {"role": "assistant", "content": "a door"}]
    write(tmp_path, 1, [completion(5, 0, "raw", 1.0, messages=turns)])
    (episode,) = story(tmp_path)
    page = render(
        "report.html.j2", title="t", runs=[], one=None, charts=[], results=[], differences=[], samples=[],
        story=[episode], by_reward=(0, []), version="0", made="",
    )  # fmt: skip
    said = [page.index(text) for text in ("I look.", "look({&#34;at&#34;: &#34;&lt;b&gt;&#34;})", "a door</span></li>")]
    assert said == sorted(said) and "raw" not in page.split('id="story"')[1].split("</section>")[0]
    write(tmp_path, 1, [completion(5, 0, "raw", 1.0, messages=turns * 40)])
    (episode,) = story(tmp_path)
    assert len(episode.answers[0].turns) == SHOWN_TURNS + 1
