"""Somebody who makes run directories and gives them away, and a user who reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dstune.checkpoint import store
from dstune.cli import main
from dstune.config.compose import compose
from dstune.config.run_file import Composed, write_run
from dstune.core import plugins
from support.tiny import save_decoder, write_dialogues

TOKEN = "hf_planted0123456789"
VERBS: dict[str, list[str]] = {
    "train": ["train", "RUN"],
    "train --cfg": ["train", "RUN", "--cfg", "job"],
    "plan": ["plan", "RUN", "hardware=8xH100"],
    "data show": ["data", "show", "RUN"],
    "generate": ["generate", "RUN", "--prompt", "w1 w2"],
    "predict": ["predict", "RUN", "--text", "w1 w2"],
    "evaluate": ["evaluate", "RUN"],
    "export": ["export", "RUN", "--out", "OUT"],
    "upgrade": ["upgrade", "RUN"],
    "serve": ["serve", "RUN", "--port", "0"],
}
EVIL_CODE = """
import os, pathlib
pathlib.Path({sentinel!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class EvilConfig(LlamaConfig):
    model_type = "evil"

class Evil(LlamaForCausalLM):
    config_class = EvilConfig

class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Stranger:
    """Somebody who makes runs in a home of their own, and gives them to the user of this process."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self._patch = folder, patch
        self.sentinel = folder / "sentinel"
        self.run = folder / "run"
        self.model = save_decoder(folder / "model")
        write_dialogues(folder / "rows.jsonl", 20)
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        patch.delenv("DSTUNE_TRUST_KEY", raising=False)

    def at_home(self) -> None:
        self._patch.setenv("XDG_CONFIG_HOME", str(self.folder / "stranger"))

    def give(self, *overrides: str, **sections: object) -> Path:
        """Write the run, with a checkpoint and an export, and be the user again."""
        self.at_home()
        composed = compose([f"model.path={self.model}", "data.train=rows.jsonl", "zero=stage2", *overrides])
        config = replace(composed.config, run=replace(composed.config.run, dir=str(self.run)), **sections)
        self.run.mkdir(exist_ok=True)
        write_run(self.run / "run.yaml", Composed(config, [], composed.plugins))
        self.with_checkpoint()
        self.user()
        plugins._active.clear()
        return self.run

    def with_checkpoint(self) -> None:
        written = store.folder(self.run) / f"{store.tag(2)}{store.INCOMPLETE}"
        written.mkdir(parents=True)
        (written / "shard.pt").write_bytes(b"weights")
        state = {"step": 2, "train": {"step": 2}, "labels": [], "best": None}
        store.commit(written, state)

    def user(self) -> None:
        self._patch.setenv("XDG_CONFIG_HOME", str(self.folder / "user"))

    def edit(self, change: Callable[[dict], None]) -> None:
        content = yaml.safe_load((self.run / "run.yaml").read_text())
        change(content)
        (self.run / "run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def attack(self, verb: str, *further: str) -> int:
        words = [{"RUN": str(self.run), "OUT": str(self.folder / "out")}.get(word, word) for word in VERBS[verb]]
        return main([*words, *further])


ESCAPED = r"$\{oc.env\:HF_TOKEN\}"
"""Which Hydra reads as a reference."""


def read(stranger: Stranger, *overrides: str):
    from dstune.config.run_file import read_run

    return read_run(stranger.run / "run.yaml", overrides).config


def mine(stranger: Stranger, *overrides: str, **sections: object) -> None:
    stranger.give(*overrides, **sections)
    os.environ["XDG_CONFIG_HOME"] = str(stranger.folder / "stranger")


CONSEQUENTIAL = [
    "model.trust_remote_code=true",
    "model.revision=abc",
    "tracking.mlflow.uri=http://x/${oc.env:HF_TOKEN}",
    "tracking.notes='${oc.env:HF_TOKEN}'",
]
