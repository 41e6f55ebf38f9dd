"""A small fine-tune as published notebooks do it, by whatever version of the official client is found; two lines are another's:
address and key. `client_flow.py URL KEY TRAINING VALIDATION [chats]` prints `good`."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import time
from pathlib import Path
from typing import Any

import openai


def main(url: str, key: str, training: str, validation: str, chats: str = "") -> None:
    client = openai.OpenAI(base_url=url, api_key=key)

    def upload(path: str) -> str:
        with Path(path).open("rb") as file:
            return client.files.create(file=file, purpose="fine-tune").id

    def poll(job: str, *until: str) -> Any:
        deadline = time.monotonic() + 900
        while (job_state := client.fine_tuning.jobs.retrieve(job)).status not in (
            "succeeded",
            "failed",
            "cancelled",
            *until,
        ):
            assert time.monotonic() < deadline, job_state
            time.sleep(0.2)
        return job_state

    files = {"training_file": upload(training), "validation_file": upload(validation)}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}}
    job = client.fine_tuning.jobs.create(model="tiny", **files, suffix="recipe-ner", method=method, seed=1)
    assert job.status in ("validating_files", "queued", "running"), job
    if poll(job.id, "running").status == "running":
        with contextlib.suppress(openai.BadRequestError):  # it has succeeded meanwhile
            client.fine_tuning.jobs.pause(job.id)
    if poll(job.id, "paused").status == "paused":
        client.fine_tuning.jobs.resume(job.id)
    job = poll(job.id)
    assert job.status == "succeeded", job
    events = list(client.fine_tuning.jobs.list_events(fine_tuning_job_id=job.id, limit=10))
    assert len(events) == len({event.id for event in events}) > 10
    assert any(event.message == "The job has successfully completed" for event in events)
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model
    content = client.files.content(job.result_files[0]).read().decode()
    assert [int(row["step"]) for row in csv.DictReader(io.StringIO(content))] == list(
        range(1, checkpoints[0].step_number + 1)
    )
    if chats:
        _chat(client, job.fine_tuned_model)
    slow: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50}}}
    second = client.fine_tuning.jobs.create(model="tiny", training_file=files["training_file"], method=slow)
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    assert [listed_job.id for listed_job in client.fine_tuning.jobs.list(limit=1)][:2] == [second.id, job.id]
    assert client.models.delete(job.fine_tuned_model).deleted
    code = ""
    try:
        client.models.retrieve(job.fine_tuned_model)
    except openai.NotFoundError as error:
        code = str(error.code)
    assert code == "model_not_found"
    print("good")


def _chat(client: openai.OpenAI, model: str) -> None:
    message: Any = {"role": "user", "content": "w1 w2"}
    answer = client.chat.completions.create(model=model, messages=[message], max_tokens=8, temperature=0)
    assert isinstance(answer.choices[0].message.content, str)


if __name__ == "__main__":
    main(*sys.argv[1:])
