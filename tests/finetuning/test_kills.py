"""The server is killed at random while clients create, cancel and upload (group 5); and the checker that says what that left."""

from __future__ import annotations

import pytest

from dstune.finetuning.jobs.check import inconsistencies, main
from dstune.finetuning.jobs.states import State
from dstune.finetuning.jobs.tables import Job, TunedModel
from dstune.finetuning.tables import Creation
from tests.support import killing
from tests.support.jobs import Bench


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_is_lost_doubled_or_stuck(tmp_path, kills):
    report = killing.run(tmp_path, kills)
    assert not report.problems, str(report)
    assert report.answered
    assert "succeeded" in report.states


def test_the_checker_finds_what_is_wrong(tmp_path, capsys):
    """Each of them by breaking a store that is consistent."""
    tmp_path.chmod(0o700)
    bench = Bench(tmp_path)
    bench.folder = tmp_path / "finetuning" / "jobs"
    bench.folder.mkdir(parents=True)
    bench.reconciler = bench.another()
    job = bench.add()
    bench.step(2)
    bench.train(job, 1, 8)
    bench.end(job, 0, exports=(4, 8), tokens=80)
    bench.step()
    assert bench.state(job) == State.SUCCEEDED
    # The bench keeps its blobs beside the folder of the API.
    (tmp_path / "blobs").rename(tmp_path / "finetuning" / "blobs")
    assert main([str(tmp_path), "--at-rest"]) == 0
    assert "1 jobs, consistent" in capsys.readouterr().out

    def after(**changes: object) -> str:
        with bench.database.writing() as session:
            row = session.query(Job).one()
            for name, value in changes.items():
                setattr(row, name, value)
            session.flush()
            found = list(inconsistencies(session, tmp_path / "finetuning", at_rest=True))
            session.rollback()
        return "; ".join(found)

    assert "finished_at is None" in after(finished_at=None)
    assert "nothing becomes of it" in after(state=State.RUNNING)
    assert "keeps the devices [0]" in after(taken=[0])
    assert "and 1 are counted" in after(active=True, taken=[0, 1])
    assert "is not there" in after(fine_tuned_model="ft:x")
    assert "step 9 of 8" in after(last_step=9)
    with bench.database.writing() as session:
        for _ in range(2):
            given = {"project": "p", "key": "k", "route": "fine_tuning.jobs", "digest": "d", "created": 1.0}
            session.add(Creation(object="ftjob-lost", **given))
        session.query(TunedModel).filter(TunedModel.step == 4).one().folder = "nowhere"
        session.flush()
        found = "; ".join(inconsistencies(session, tmp_path / "finetuning"))
        session.rollback()
    for words in ("was created 2 times", "was answered to a client, and is not there", "its folder is not there"):
        assert words in found
    bench.of(job).snapshot("training_file").write_text("")
    (bench.folder / f"ftjob-{'a' * 24}").mkdir()
    assert main([str(tmp_path)]) == 1
    assert "a folder without a row" in capsys.readouterr().out
