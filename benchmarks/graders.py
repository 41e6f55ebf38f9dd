#!/usr/bin/env python3
"""What the kept libraries for ROUGE, BLEU and formulas take and say, beside the graders of dstune.

    python benchmarks/graders.py [--characters 20000]      needs rouge-score, sacrebleu, nltk (dstune[test]) and simpleeval

Prints seconds of the processor and values, for two made-up texts of the longest length that a grader takes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

from dstune.grading import similarity
from dstune.grading.formula import Formula

SHORT = ("the cat sat on the mat", "the cat is on the mat")
FORMULAS = ("2 ^ 3 ^ 2 - 1", "pass * 2")
"""The second one has a grader whose name is a word of Python's."""


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    began = time.process_time()
    value = work()
    return {"value": value, "cpu_seconds": round(time.process_time() - began, 4)}


def rouge_and_bleu(text: str, reference: str) -> dict[str, Any]:
    began = time.process_time()
    from rouge_score.rouge_scorer import RougeScorer

    rouge_import = time.process_time() - began
    import sacrebleu

    scorers = {name: RougeScorer([name]) for name in ("rouge2", "rougeL")}
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1
    seconds_by_function: dict[str, Any] = {"import rouge_score, seconds": round(rouge_import, 2)}
    for name, texts in (("long", (text, reference)), ("short", SHORT)):
        first, second = texts
        seconds_by_function[name] = {
            "rouge_2": measured(lambda: similarity.rouge(2)(first, second)),  # noqa: B023
            "rouge_2 of rouge-score": measured(lambda: scorers["rouge2"].score(second, first)["rouge2"].fmeasure),  # noqa: B023
            "rouge_l": measured(lambda: similarity.rouge_l(first, second)),  # noqa: B023
            "rouge_l of rouge-score": measured(lambda: scorers["rougeL"].score(second, first)["rougeL"].fmeasure),  # noqa: B023
            "bleu": measured(lambda: similarity.bleu(first, second)),  # noqa: B023
            "bleu of nltk": measured(
                lambda: sentence_bleu([second.split()], first.split(), smoothing_function=smoothing)  # noqa: B023
            ),
            "bleu of sacrebleu": measured(lambda: sacrebleu.sentence_bleu(first, [second]).score / 100),  # noqa: B023
        }
    return seconds_by_function


def formulas() -> dict[str, Any]:
    import simpleeval

    result_by_formula = {}
    for text in FORMULAS:
        values = {"pass": 3.0}
        try:
            simpleeval_result: Any = simpleeval.SimpleEval(names=values).eval(text)
        except Exception as error:
            simpleeval_result = f"{type(error).__name__}: {error}"
        result_by_formula[text] = {"ours": Formula(text, values)(values), "simpleeval": simpleeval_result}
    return result_by_formula


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=similarity.MOST_CHARACTERS)
    count = parser.parse_args().characters
    choose = random.Random(0)
    texts = [" ".join(f"w{choose.randrange(400)}" for _ in range(count))[:count] for _ in range(2)]
    print(json.dumps({**rouge_and_bleu(texts[0], texts[1]), "formulas": formulas()}, indent=1))


if __name__ == "__main__":
    main()
