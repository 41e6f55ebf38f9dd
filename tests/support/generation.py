"""What tests of `generate` share: answers of transformers alone, runs with checkpoints, a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from dstune.checkpoint import store
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.core.errors import UserError
from dstune.inference import generate


def expected(folder: Path, prompt: str, *, chat: bool = True, count: int = 8) -> str:
    """Return what transformers alone answers, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt").input_ids
    with torch.no_grad():
        tokens = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def answers(capsys, *arguments: object) -> list[dict]:
    assert generate.main([*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        generate.main(list(map(str, arguments)))
    return str(caught.value)


def saved_run(folder: Path, model: Path, *overrides: str) -> Path:
    """Return a run directory with one checkpoint at stage 0, whose weights are twice the base model's."""
    run_dir = folder / "run"
    run_dir.mkdir()
    write_run(run_dir / "run.yaml", compose([f"model.path={model}", "data=files", "data.train=x.jsonl", *overrides]))
    save_step(run_dir, model, 3, factor=2)
    return run_dir


def save_step(run_dir: Path, model: Path, step: int, *, factor: float) -> Path:
    """Save another checkpoint, whose weights are `factor` times the model's."""
    from transformers import AutoModelForCausalLM

    written = store.folder(run_dir) / f"{store.tag(step)}.incomplete"
    written.mkdir(parents=True)
    trained = AutoModelForCausalLM.from_pretrained(model)
    module = {name: parameter.detach() * factor for name, parameter in trained.named_parameters()}
    state = {"module": module, "buffer_names": [], "global_steps": step}
    torch.save(state, written / "mp_rank_00_model_states.pt")
    return store.commit(written, {"step": step, "labels": [], "best": None})


def damage(checkpoint: Path) -> str:
    """Change one byte of the weights; the size stays. Returns the file's name."""
    file = checkpoint / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
