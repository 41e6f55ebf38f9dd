"""In the place of a job's process: validates at once, trains without a model, leaves what the real one leaves. Imports little,
so that thousands can be started. `stub_job.py FOLDER LOCK`; it notes when it lives in FOLDER/lives."""

import json
import os
import sys
import time

STEPS = 8
SECONDS = 0.05


def write(path: str, value: object) -> None:
    with open(f"{path}.new", "w") as stream:
        json.dump(value, stream)
    os.replace(f"{path}.new", path)


def live(folder: str, word: str) -> None:
    with open(f"{folder}/lives", "a") as stream:
        stream.write(f"{word} {os.getpid()} {time.time()}\n")


def main(folder: str) -> None:
    with open(f"{folder}/task.json") as stream:
        task = json.load(stream)
    if task["phase"] == "validate":
        with open(f"{folder}/training_file") as rows:
            write(f"{folder}/validated.json", {"training_file": {"rows": len(rows.readlines())}, "warnings": []})
        return
    live(folder, "begins")
    os.makedirs(f"{folder}/run", exist_ok=True)
    metrics = f"{folder}/run/metrics.jsonl"
    first = 1
    if os.path.exists(metrics):
        with open(metrics) as stream:
            first += len(stream.readlines())
    code = 0
    with open(f"{folder}/configuration/experiment/job.yaml") as stream:
        job = json.loads(stream.read().partition("\n")[2])  # below Hydra's line
    # A job of 50 epochs is still there to be cancelled.
    steps = 100 * STEPS if job["trainer"]["epochs"] == 50 else STEPS
    for step in range(first, steps + 1):
        time.sleep(SECONDS)
        if os.path.exists(f"{folder}/stop"):
            code = 75
            break
        row = {
            "step": step,
            "epoch": step / (STEPS / 2),
            "loss": 1 / step,
            "tokens": 10 * step,
            "step_seconds": SECONDS,
        }
        with open(metrics, "a") as stream:
            stream.write(json.dumps(row) + "\n")
    if code == 0:
        for step in (steps // 2, steps):
            os.makedirs(f"{folder}/models/step-{step}", exist_ok=True)
    live(folder, "ends")
    write(f"{folder}/ended.json", {"attempt": task["attempt"], "code": code, "problems": [], "tokens": 10 * STEPS})


if __name__ == "__main__":
    main(sys.argv[1])
