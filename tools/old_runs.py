#!/usr/bin/env python3
"""Make tests/data/old-runs-COMMIT.tar.xz: runs of an earlier commit that ended in the middle, and how it goes on with them.

usage: tools/old_runs.py OLD_TREE [--work FOLDER] [--output FILE.tar.xz]

OLD_TREE is a checkout of the commit (`git worktree add --detach ../old COMMIT`). For each task (with method=full), each
method and each of FEATURES a run of four steps on a model of a few thousand parameters, of which the checkpoint of the second
step stays, as after a kill in the third step.
`expected.json` has the metrics and the export of the undisturbed run, and the kind of machine on which they hold to the
bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.case_matrix import DAY, HOME, METHODS, TASKS
from tools.case_server import Case, machine
from tools.side_by_side import Tree

TASK_OF_METHOD = {"head": "classification", "features": "classification", "ulmfit": "classification"}
STEPS, KEPT = 4, "step-00000002"
SETTINGS = [
    *("launch.processes=1", "trainer.precision=fp32", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"),
    *(
        f"trainer.max_steps={STEPS}",
        "optimizer.lr=1e-2",
        "data.max_length=32",
        "checkpoint.every=2",
        "evaluate.every=2",
    ),
]
SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
FEATURES: dict[str, list[str]] = {
    "packed": ["task=chat", "method=full", "zero=stage2", *TASKS["chat"], "data.packing=true"],
    "stage3-lora": ["task=chat", "method=lora", "zero=stage3", *TASKS["chat"], "data.packing=false"],
    "preference-lora": ["task=preference", "method=lora", "zero=stage1", *TASKS["preference"]],
    "reinforcement": [
        *(
            "task=reinforcement",
            "method=lora",
            "zero=stage1",
            "model.path=MODELS/decoder",
            "data.train=DATA/prompts.jsonl",
        ),
        *("task.rewards=[pattern]", "task.samples=4", "task.max_new_tokens=8", "data.clean.leaks=false"),
    ],
    "distillation": [
        *("task=distillation", "method=full", "zero=stage2", "model.path=MODELS/decoder", "data.train=DATA/chat.jsonl"),
        *("task.teacher=MODELS/teacher", DAY, "evaluate.samples=0"),
    ],
    "images": [
        *(
            "task=chat",
            "method=lora",
            "zero=stage1",
            "model.path=MODELS/vision",
            "data.train=DATA/images/rows.jsonl",
            DAY,
        ),
        "evaluate.samples=0",
    ],
}
"""Runs whose way through the program differs from those of the tasks and methods."""
DROPPED = ("checkpoints/step-00000004", "export", "result.json", "report.html", "launch.json", "logs", ".lock")
"""What a run does not have, or need not have, that was killed in its third step."""


def make_inputs(folder: Path) -> None:
    """Write inputs as those of side_by_side, and smaller: what is committed is mostly their weights and the optimizer's."""
    from tests.support import sight, tiny

    models, data = folder / "models", folder / "data"
    data.mkdir(parents=True)
    tiny.save_decoder(models / "decoder", num_key_value_heads=2, **SMALL)
    tiny.save_encoder(models / "encoder", **SMALL)
    tiny.save_t5(models / "t5", d_model=8, d_kv=4, d_ff=16, num_heads=2)
    # Blocks of 64 weights share a scale of qlora.
    tiny.save_decoder(models / "wide", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_key_value_heads=4)
    tiny.save_decoder(models / "teacher", seed=1, num_key_value_heads=2, **SMALL)
    sight.save("llava", models / "vision")
    sight.write_rows(data / "images", 12, images=lambda row: row % 3)
    rows = 24
    tiny.write_dialogues(data / "chat.jsonl", rows)
    tiny.write_labelled(data / "labelled.jsonl", rows)
    tiny.write_preferences(data / "preferences.jsonl", rows)
    tiny.write_contrastive(data / "contrastive.jsonl", rows)
    tiny.write_tagged(data / "tagged.jsonl", rows)
    tiny.write_questions(data / "questions.jsonl", rows)
    tiny.write_pairs(data / "pairs.jsonl", rows)
    letters = "abcdefghijklmnopqrstuvwx"
    (data / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": letter * 3, "pattern": letter}) + "\n" for letter in letters)
    )
    texts = [json.loads(line)["text"] for line in (data / "labelled.jsonl").read_text().splitlines()]
    (data / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def cases(home: Path) -> list[Case]:
    chosen = {f"task-{task}": (task, "full", stage % 4) for stage, task in enumerate(TASKS)}
    for stage, method in enumerate(METHODS):
        if method != "full":
            chosen[f"method-{method}"] = (
                TASK_OF_METHOD.get(method, "chat"),
                method,
                2 if method == "qlora" else stage % 4,
            )
    made = []
    for name, (task, method, stage) in chosen.items():
        words = {word.partition("=")[0]: word for word in (*SETTINGS, *TASKS[task], *METHODS[method])}
        argv = [f"task={task}", f"method={method}", f"zero=stage{stage}", *words.values(), f"run.dir=runs/{name}"]
        argv = [word.replace("MODELS", "models").replace("DATA", "data") for word in argv]
        made.append(Case(name, ["train", *argv], 1, str(home), f"runs/{name}"))
    for feature, settings in FEATURES.items():
        name = f"feature-{feature}"
        words = {word.partition("=")[0]: word for word in (*SETTINGS, *settings)}
        argv = [
            word.replace("MODELS", "models").replace("DATA", "data")
            for word in (*words.values(), f"run.dir=runs/{name}")
        ]
        made.append(Case(name, ["train", *argv], 1, str(home), f"runs/{name}"))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    commit = subprocess.check_output(["git", "-C", chosen.tree, "rev-parse", "--short=7", "HEAD"], text=True).strip()
    output = chosen.output or HOME / "tests" / "data" / f"old-runs-{commit}.tar.xz"
    with tempfile.TemporaryDirectory() as work:
        home = Path(work) / "home"
        make_inputs(home)
        tree = Tree(chosen.tree.resolve(), Path(work) / "old", models=home / "models")
        expected = {}
        for case in cases(home):
            outcome = tree.run(case, again=True)
            print(f"{case.name}: exit code {outcome.exit_code}", flush=True)
            if outcome.exit_code:
                print(outcome.log, outcome.problems)
                return 1
            expected[case.name] = {"metrics": outcome.metrics, "samples": outcome.samples, "export": outcome.export}
            for name in DROPPED:
                path = home / case.run / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            # A first stage in a folder of its own is over; its export is what the run began with.
            assert [path.name for path in (home / case.run / "checkpoints").iterdir()] == [KEPT]
        tree.close()
        content = {"machine": machine(), "runs": expected}
        (home / "expected.json").write_text(json.dumps(content, sort_keys=True))
        with tarfile.open(output, "w:xz", preset=9) as archive:
            for name in ("expected.json", "models", "data", "runs"):
                archive.add(home / name, name, filter=anonymous)
    print(f"{output}: {output.stat().st_size / 2**20:.2f} MiB")
    return 0


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry


if __name__ == "__main__":
    sys.exit(main())
