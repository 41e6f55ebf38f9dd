"""Checks that the database and the job folders agree.

`python -m dstune.finetuning.jobs.check STATE [--store URL] [--files URL]` prints every inconsistency and exits with 1 if there are
any. Run it while no job runs.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dstune.core.errors import EXIT_DONE, EXIT_FAILED
from dstune.finetuning.blobs import Blobs, RemoteBlobs
from dstune.finetuning.jobs.folder import JOB_ID, JobFolder
from dstune.finetuning.jobs.states import TERMINAL, State
from dstune.finetuning.jobs.tables import Job, JobCheckpoint, JobEvent, TunedModel
from dstune.finetuning.tables import Blob, Creation, File
from dstune.serve.state import open_database

HAS_PROCESS = (State.RUNNING, State.PAUSING)


def inconsistencies(
    session: Session, folder: Path, *, at_rest: bool = False, blobs: Blobs | None = None
) -> Iterator[str]:
    """Yield every inconsistency. folder: of the fine-tuning API. at_rest: whether every job should have ended or paused. blobs:
    where files are stored, if not in the folder."""
    jobs = list(session.scalars(select(Job)))
    yield from _rows(session, jobs, at_rest=at_rest)
    yield from _events(session, jobs)
    yield from _models(session, jobs, folder / "jobs")
    yield from _folders(jobs, folder / "jobs")
    yield from _files(session, blobs or Blobs(folder))


def _rows(session: Session, jobs: list[Job], *, at_rest: bool) -> Iterator[str]:
    taken: Counter[int] = Counter()
    for job in jobs:
        state = State(job.state)
        if (job.finished_at is not None) != (state in TERMINAL):
            yield f"{job.id}: is {state}, finished_at is {job.finished_at}"
        if (job.error is not None) != (state is State.FAILED):
            yield f"{job.id}: is {state}, error is {job.error}"
        for name in ("fine_tuned_model", "result_file", "trained_tokens"):
            if (getattr(job, name) is not None) != (state is State.SUCCEEDED):
                yield f"{job.id}: is {state}, {name} is {getattr(job, name)}"
        if state in HAS_PROCESS and not job.active:
            yield f"{job.id}: is {state} and has no devices"
        if job.taken and not job.active:
            yield f"{job.id}: keeps the devices {job.taken} and is not active"
        if job.taken and len(job.taken) != job.devices:
            yield f"{job.id}: has the devices {job.taken}, and {job.devices} are counted"
        if job.last_step > (job.total_steps or 0):
            yield f"{job.id}: step {job.last_step} of {job.total_steps}"
        if at_rest and (job.active or state not in (*TERMINAL, State.PAUSED)):
            yield f"{job.id}: is {state}{' with a process' if job.active else ''}, and nothing becomes of it"
        taken.update(job.taken)
    yield from (f"device {device} is given to {count} jobs" for device, count in taken.items() if count > 1)
    made = Counter(session.scalars(select(Creation.object).where(Creation.route == "fine_tuning.jobs")))
    yield from (f"{name}: was created {count} times" for name, count in made.items() if count > 1)
    job_ids = {job.id for job in jobs}
    yield from (f"{name}: was answered to a client, and is not there" for name in made if name not in job_ids)


def _events(session: Session, jobs: list[Job]) -> Iterator[str]:
    query = select(JobEvent.job, func.count(), func.max(JobEvent.step)).where(JobEvent.step.is_not(None))
    counts = {job: (count, newest) for job, count, newest in session.execute(query.group_by(JobEvent.job))}
    for job in jobs:
        count, newest = counts.get(job.id, (0, 0))
        if job.state == State.SUCCEEDED and newest != job.total_steps:
            yield f"{job.id}: succeeded with {count} steps told, the newest {newest} of {job.total_steps}"
    ends = ("The job has successfully completed", "Fine-tuning job started")
    query_texts = select(JobEvent.job, JobEvent.message, func.count()).where(JobEvent.message.in_(ends))
    for name, message, count in session.execute(query_texts.group_by(JobEvent.job, JobEvent.message)):
        if count > 1:
            yield f"{name}: {message!r} is told {count} times"


def _models(session: Session, jobs: list[Job], folder: Path) -> Iterator[str]:
    models = list(session.scalars(select(TunedModel)))
    finals = Counter(model.job for model in models if model.step is None)
    yield from (f"{job}: has {count} final models" for job, count in finals.items() if count > 1)
    names = {model.name for model in models}
    for job in jobs:
        if job.fine_tuned_model is not None and job.fine_tuned_model not in names:
            yield f"{job.id}: the model {job.fine_tuned_model} is not there"
    for checkpoint in session.scalars(select(JobCheckpoint)):
        if checkpoint.model not in names:
            yield f"{checkpoint.job}: the checkpoint {checkpoint.step} has no model"
    for model in models:
        if model.deleted_at is None and not (folder / model.folder).is_dir():
            yield f"{model.name}: its folder is not there"


def _folders(jobs: list[Job], folder: Path) -> Iterator[str]:
    job_by_id = {job.id: job for job in jobs}
    for path in folder.glob("ftjob-*"):
        if JOB_ID.fullmatch(path.name) and path.name not in job_by_id:
            yield f"{path.name}: a folder without a row (removed after an hour)"
    for job in jobs:
        job_folder = JobFolder.of(folder, job.id)
        if not job_folder.path.is_dir():
            yield f"{job.id}: has no folder"
        elif job.state not in TERMINAL and not job_folder.snapshot("training_file").exists():
            yield f"{job.id}: is {job.state}, and its training file is gone"
        elif job.state not in HAS_PROCESS and not job.active and job.state in TERMINAL and job_folder.is_alive():
            yield f"{job.id}: is {job.state}, and a process of it lives"


def _files(session: Session, blobs: Blobs) -> Iterator[str]:
    count_by_blob = Counter(session.scalars(select(File.blob).where(File.blob.is_not(None))))
    for blob in session.scalars(select(Blob)):
        if blob.references != count_by_blob[blob.id]:
            yield f"{blob.id}: counts {blob.references} files, {count_by_blob[blob.id]} name it"
        if blobs.size(blob.id) != blob.bytes:
            yield f"{blob.id}: its bytes are not there"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dstune.finetuning.jobs.check", description=__doc__)
    parser.add_argument("state", type=Path, help="folder of the server")
    parser.add_argument("--store", metavar="URL", help="of the database, where it is not SQLite")
    parser.add_argument("--files", metavar="URL", help="of the store of files, where it is not the folder")
    parser.add_argument("--at-rest", action="store_true", help="every job should have ended or paused")
    arguments = parser.parse_args(argv)
    database = open_database(arguments.state, arguments.store, create=False)
    folder = arguments.state / "finetuning"
    blobs = RemoteBlobs(folder, arguments.files) if arguments.files else None
    with database.session() as session:
        lines = list(inconsistencies(session, folder, at_rest=arguments.at_rest, blobs=blobs))
        count = session.scalar(select(func.count()).select_from(Job))
    print("\n".join(lines) or f"{count} jobs, consistent")
    return EXIT_FAILED if lines else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
