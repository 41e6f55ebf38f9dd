"""Whether fine-tuning was worth it: SmolLM2 with LoRA on a fixed budget of tokens beside the same model prompted.

    python benchmarks/translation.py [--folder FOLDER] [OVERRIDE ...]

`experiment=translation` (English to Spanish verses), then chrF on the same 200 held-out verses of the trained model and of
the untuned one asked with 0 and 4 worked examples, as plain text and through its chat template. The best of these is
compared with the trained model by sacrebleu's paired bootstrap (Koehn 2004). With --folder what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHOTS = "0,4"
CHAT = [
    "task.chat=true",
    "task.prompt='Translate this sentence into Spanish. Answer with the translation only.\n\n{source}'",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="keep the results there")
    parser.add_argument("overrides", nargs="*", help="further overrides of experiment=translation")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    run_dir = folder / "run"
    if not (run_dir / "result.json").is_file():
        command = ["train", "experiment=translation", f"run.dir={run_dir}", "evaluate.generate_rows=0"]
        dstune(*command, *options.overrides)
    trained = rows_of(folder / "trained.jsonl", str(run_dir), "evaluate.generate_rows=200")
    model = ["experiment=translation", *options.overrides]
    prompted = {}
    for name, overrides in (("plain", []), ("chat", CHAT)):
        rows = rows_of(folder / f"{name}.jsonl", "sample://smollm2", *model, *overrides, "--shots", SHOTS)
        for shots in sorted({row["shots"] for row in rows}):
            prompted[f"prompted as {name} text, {shots} examples"] = [row for row in rows if row["shots"] == shots]
    report(json.loads((run_dir / "result.json").read_text()), trained, prompted)


def dstune(*arguments: str) -> None:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dstune", *arguments], check=True)
    print(f"{arguments[0]} took {time.perf_counter() - began:.0f} s", flush=True)


def rows_of(path: Path, target: str, *arguments: str) -> list[dict[str, Any]]:
    """Return what the model writes for each row."""
    if not path.is_file():
        dstune("evaluate", target, *arguments, "--output", str(path))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report(result: dict[str, Any], trained: list[dict[str, Any]], prompted: dict[str, list[dict[str, Any]]]) -> None:
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    targets = [row["target"] for row in trained]
    for name, rows in prompted.items():
        assert [row["target"] for row in rows] == targets, f"{name}: other rows"
    answers = {**{name: [row["answer"] for row in rows] for name, rows in prompted.items()}}
    answers["trained"] = [row["answer"] for row in trained]
    chrf = {name: CHRF().corpus_score(texts, [targets]).score for name, texts in answers.items()}
    best = max(prompted, key=chrf.__getitem__)
    systems = [(name, answers[name]) for name in (best, "trained")]
    _, scores = PairedTest(systems, {"chrF": CHRF(references=[targets])}, [targets], test_type="bs", n_samples=1000)()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "sacrebleu"))
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {packages}")
    print(
        f"{result['tokens']:,} tokens, {result['steps']} steps, {result['seconds']:.0f} s on {result['world_size']} ranks"
    )
    print(f"| {len(targets)} held-out verses | chrF | BLEU |\n|---|---|---|")
    for name, texts in answers.items():
        print(f"| {name} | {chrf[name]:.2f} | {BLEU().corpus_score(texts, [targets]).score:.2f} |")
    print(f"chrF {chrf['trained'] - chrf[best]:+.2f} over {best}")
    (test,) = (system_scores for name, system_scores in scores.items() if name.lower().startswith("chrf"))
    for (name, _), score in zip(systems, test, strict=True):
        print(f"paired bootstrap, {name}: mean {score.mean:.2f} ± {score.ci:.2f}, p = {score.p_value}")


if __name__ == "__main__":
    main()
