"""Writes a complete model in 4 bits by AWQ (Lin et al. 2023, arXiv:2306.00978), as compressed-tensors packs it and vLLM reads it.

auto-round searches the scales with which channels that carry large activations are rounded less, on rows of the training.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.paths import cache_root
from dstune.core.rank_env import RankEnv
from dstune.core.stored_implementations import without_stored_implementations

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = (128, 64, 32)
"""Numbers of weights of a row that may share a scale: the sizes that vLLM's kernels for GPUs (Marlin) take."""
BLOCKS, TOKENS = 128, 512
"""Pieces of text for the search of scales, and their length in tokens, as in the code of the paper."""
ALONE = RankEnv(0, 1, 0, 1, "alone")


def read_calibration(config: RunConfig) -> list[Tensor]:
    """Join the training rows end to end and cut them into at most `BLOCKS` pieces of token ids, [1, tokens]. Raises UserError where
    there are none."""
    import torch

    from dstune.data.build import prepare
    from dstune.generation.answers import write_texts
    from dstune.models.load import load_tokenizer

    train = prepare(config, load_tokenizer(config.model), ALONE, cache_root(), write=write_texts).train
    rows: list[np.ndarray] = []
    for number in range(len(train.lengths)):
        rows.append(np.asarray(train.sample(number)["input_ids"]))
        if sum(map(len, rows)) >= BLOCKS * TOKENS:
            break
    tokens = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    length = min(TOKENS, len(tokens))
    if not length:
        raise UserError(
            Problem("--quantize", "AWQ chooses its scales on training rows, and there are none", "fp8", "awq")
        )
    blocks = torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, 1, length)
    return list(blocks[:BLOCKS])


def write_awq(whole: Path, folder: Path, blocks: list[Tensor]) -> None:
    """Write the whole model in `whole` to `folder`, its other files too. blocks: token ids [1, tokens].

    Memory: the model in bf16, and its activations of a layer. Raises UserError where auto-round refuses the model.
    """
    import torch
    from auto_round import AutoRound
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder, prefix="awq-") as scratch, _quiet():
        # It gives norms back their stored values where these are fp32, and loses the scales that it has put into them.
        source = Path(scratch, "source")
        config = without_stored_implementations(AutoConfig.from_pretrained(whole))
        AutoModelForCausalLM.from_pretrained(whole, config=config, dtype=torch.bfloat16).save_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(whole)
        rounding = AutoRound(
            model=model,
            scheme="W4A16",
            alg_configs=["awq", "rtn"],
            tokenizer=tokenizer,
            format="llm_compressor",
            dataset=[{"input_ids": block, "attention_mask": torch.ones_like(block)} for block in blocks],
            nsamples=len(blocks),
            seqlen=blocks[0].shape[-1],
            iters=0,
            batch_size=1,
            group_size=group_size(model),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
        )
        try:
            rounding.quantize_and_save(output_dir=str(Path(scratch, "made")), format="llm_compressor")
        except (ValueError, NotImplementedError, RuntimeError) as error:
            fix = "--quantize fp8, or gguf:q4_k_m"
            raise UserError(Problem("--quantize", f"auto-round: {first_line(error)}", fix, "awq")) from error
        (made,) = (file.parent for file in Path(scratch, "made").rglob("config.json"))
        for file in whole.iterdir():
            if file.is_file() and not file.name.startswith("model") and file.name != "config.json":
                shutil.copy(file, folder / file.name)
        for file in made.glob("model*"):
            shutil.move(file, folder / file.name)
            os.chmod(folder / file.name, 0o644)
        config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
        written = json.loads((made / "config.json").read_text(encoding="utf-8"))
        config |= {"quantization_config": written["quantization_config"], "dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def group_size(model: Any) -> int | None:
    """Return the largest of `GROUPS` that divides the rows of all linear layers; None if none does."""
    from torch import nn

    sizes = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    return next((group for group in GROUPS if not any(inputs % group for inputs in sizes)), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence auto-round, and keep it from asking the hub."""
    with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing):
        logging.getLogger("autoround").setLevel(logging.ERROR)
        yield
