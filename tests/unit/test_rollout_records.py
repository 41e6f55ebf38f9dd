"""Files of completions: read back as they were written, whatever is in them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dstune.core.errors import UserError
from dstune.generation.completions import Completion
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.recorded import recorded_step
from dstune.tasks.reinforcement.records import Scored, from_record, read_records, write_records

ALONE = SimpleNamespace(is_main=True, broadcast=lambda value: value)


def test_what_ends_a_line_elsewhere_stays_in_its_completion(tmp_path):
    """U+2028 and U+0085 end lines of a text for Python: a run that was stopped could not go on."""
    text = "a\u2028b\x85c\x1cd"
    scored = Scored(Completion(0, 0, [1], [-0.5], 0.1, True), text, [1.0], extra={"half": "\ud83d"})
    write_records(tmp_path / "rollouts", 1, [scored], ["brevity"], {0: "q\u2029"})
    (row,) = read_records(tmp_path / "rollouts", 1)
    assert (row["text"], row["question"], row["extra"]) == (text, "q\u2029", {"half": "?"})
    assert from_record(row, ["brevity"]).completion == scored.completion


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_replay_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "step-000001.jsonl").write_bytes(content.encode("latin-1"))
    task = ReinforcementConfig(replay=str(tmp_path))
    with pytest.raises(UserError, match="completions of step 1 cannot be read"):
        recorded_step(task, ALONE, 1)
