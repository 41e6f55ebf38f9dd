"""Does a base model that was tuned with a chat template stop by itself after its export?

Gemma 3 270M (base) learns the human dialogues in Gemma's chat template with LoRA, is exported merged, and answers held-out
prompts with plain transformers: no stop tokens but those of the exported `generation_config.json`. Once sampled as the
makers of Gemma 3 recommend (top_k 64, top_p 0.95), once greedily: there so small a model repeats itself. The untuned base
gets the same template and the same end tokens. About 15 minutes on two cores:

    python benchmarks/stopping.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dstune import samples

HELD_OUT_ROWS = 50
"""Rows at the end of the sample that are held out: one prompt each."""

DECODING = {"sampled": {"do_sample": True, "top_k": 64, "top_p": 0.95}, "greedy": {"do_sample": False}}
BATCH = 25


def split(folder: Path, rows: int) -> tuple[Path, list[list[dict[str, str]]]]:
    """Return a training file with `rows` dialogues, and the openings of held-out ones: one, three or five turns, the user's
    last."""
    lines = samples.resolve("sample://chitchat").read_text(encoding="utf-8").splitlines()
    train = folder / "train.jsonl"
    train.write_text("\n".join(lines[:rows]) + "\n", encoding="utf-8")
    prompts = []
    for number, line in enumerate(lines[-HELD_OUT_ROWS:]):
        messages = json.loads(line)["messages"]
        turns = (1, 3, 5)[number % 3]
        prompts.append(messages[:turns] if len(messages) >= turns else messages[:1])
    return train, prompts


def dstune(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dstune", *arguments], check=True)


def share_stopped(
    folder: str, template_of: str, prompts: list[Any], new_tokens: int, decoding: dict[str, Any]
) -> tuple[float, list[str]]:
    """Return share of `prompts` whose answer ends with an end token of the model's own settings; and the answers.

    template_of: folder of the tokenizer, with its template; its generation settings serve the base too.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(template_of, padding_side="left")
    model.generation_config = GenerationConfig.from_pretrained(template_of)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers: list[str] = []
    stopped = 0
    torch.manual_seed(0)
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer.apply_chat_template(
            prompts[start : start + BATCH],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            written = model.generate(**batch, max_new_tokens=new_tokens, **decoding)[:, batch["input_ids"].shape[1] :]
        for row in written:
            stopped += bool(ends & set(row.tolist()))
            answers.append(tokenizer.decode(row, skip_special_tokens=True).strip())
    return stopped / len(prompts), answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stopping"))
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("overrides", nargs="*", help="further overrides of the run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, prompts = split(arguments.out, rows=400)
    run_dir, export = arguments.out / "run", arguments.out / "export"
    started = time.perf_counter()
    dstune(
        "train",
        "model.path=sample://gemma3",
        "model.chat_template=gemma",
        "data=files",
        f"data.train={train}",
        "data.max_length=256",
        "data.packing=true",
        "task=chat",
        "method=lora",
        "optimizer.lr=1e-3",
        "schedule=cosine",
        "zero=stage1",
        "trainer.micro_batch_size=1",
        "trainer.global_batch_size=4",
        f"trainer.max_steps={arguments.steps}",
        "data.split.validation=0",
        "evaluate.at_start=false",
        "run.export=none",
        f"run.dir={run_dir}",
        *arguments.overrides,
    )
    trained = time.perf_counter()
    dstune("export", str(run_dir), "--merge", "--out", str(export), "--force")
    print(f"training: {arguments.steps} steps, {trained - started:.0f} s")
    print(f"stopped by itself within {arguments.new_tokens} tokens, of {len(prompts)} held-out prompts:")
    base = str(samples.resolve("sample://gemma3"))
    for name, decoding in DECODING.items():
        tuned, answers = share_stopped(str(export), str(export), prompts, arguments.new_tokens, decoding)
        untuned, _ = share_stopped(base, str(export), prompts, arguments.new_tokens, decoding)
        print(f"  {name:<8}  tuned and exported {tuned:.0%}   untuned base, same template {untuned:.0%}")
        for prompt, answer in list(zip(prompts, answers, strict=True))[:5]:
            print(f"    > {prompt[-1]['content']!r}\n      {answer!r}")


if __name__ == "__main__":
    main()
