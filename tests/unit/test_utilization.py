"""Floating-point operations of a window against arithmetic by hand, what is counted of a batch, and the peak."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.configs import run_config
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from dstune.config.schema import DataConfig, Precision, RunConfig
from dstune.data.collate import collate
from dstune.data.sampler import MicroBatch
from dstune.methods.features.config import FeaturesConfig
from dstune.methods.freeze.config import FreezeConfig
from dstune.methods.full import FullConfig
from dstune.methods.head.config import HeadConfig
from dstune.methods.lora.config import LoraConfig
from dstune.methods.ulmfit.config import UlmfitConfig
from dstune.planning.architecture import architecture
from dstune.planning.flops import backward_flops, forward_flops, step_flops, work_of
from dstune.planning.setup import Setup, setup
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.embedding.config import EmbeddingConfig
from dstune.tasks.preference.config import PreferenceConfig
from dstune.trainer import utilization
from dstune.trainer.callbacks.throughput import FLOPS, POSITIONS, TARGETS, Throughput, rates
from dstune.trainer.utilization import Counted, Utilization, counted, peak_flops, utilization_of
from dstune.zero import accelerator

VOCABULARY, HIDDEN, LAYERS = 105, 32, 2
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# Queries and outputs 32 x 32, keys and values 32 x 16, gate, up and down 32 x 64.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
# Scores and weighted values, 2 x 2 operations for each of 4 heads x 8.
PAIR = 4 * 32
PROJECTION = 2 * VOCABULARY * HIDDEN
LENGTHS, POSITIONS_OF, PAIRS, TARGETS_OF = (10, 6), 16, 100 + 36, 5
WORK = work_of(LENGTHS, window=None, projected=TARGETS_OF)


def of(method: Any, **changes: Any) -> Setup:
    values = {"model_type": "llama", **LLAMA, **changes}
    config = run_config(method=method)
    model = architecture(values)
    return setup(config, model, ranks=2, ranks_per_node=2, on_gpu=False, precision=Precision.fp32, values=values)


def test_all_weights_take_six_operations_a_weight_and_token() -> None:
    s = of(FullConfig())
    forward = 2 * LAYERS * LAYER * POSITIONS_OF, LAYERS * PAIR * PAIRS, PROJECTION * TARGETS_OF
    assert forward_flops(s, WORK) == forward
    assert backward_flops(s, WORK) == tuple(2 * part for part in forward)
    assert step_flops(s, WORK) == 3 * sum(forward)


def test_lora_takes_no_gradients_of_frozen_weights() -> None:
    s = of(LoraConfig(rank=4))
    adapter = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # of a layer
    linear = LAYERS * POSITIONS_OF * (4 * LAYER + 6 * adapter)
    assert step_flops(s, WORK) == linear + 3 * LAYERS * PAIR * PAIRS + 2 * PROJECTION * TARGETS_OF


def test_a_head_alone_has_no_backward_pass_below_it() -> None:
    forward = 2 * LAYERS * LAYER * POSITIONS_OF + LAYERS * PAIR * PAIRS
    # The head's own gradient, and none of what it reads.
    assert step_flops(of(HeadConfig()), WORK) == forward + 2 * PROJECTION * TARGETS_OF


def test_the_backward_pass_ends_above_frozen_layers() -> None:
    s = of(FreezeConfig(first_layers=1, embeddings=True))
    linear = POSITIONS_OF * (2 * 2 * LAYER + 4 * LAYER)
    attention = PAIR * PAIRS * (2 + 2)
    assert step_flops(s, WORK) == linear + attention + 3 * PROJECTION * TARGETS_OF
    # With a trained embedding below them it goes through them, and takes their weights' gradients out alone.
    through = of(FreezeConfig(first_layers=1, embeddings=False))
    linear = POSITIONS_OF * (2 * 2 * LAYER + 2 * 2 * LAYER + 2 * LAYER)
    assert step_flops(through, WORK) == linear + 3 * LAYERS * PAIR * PAIRS + 3 * PROJECTION * TARGETS_OF


def test_a_window_bounds_what_a_position_looks_at() -> None:
    s = of(FullConfig(), model_type="mistral", sliding_window=4)
    work = work_of((10, 6, 3), window=4, projected=0)
    assert (work.positions, work.pairs, work.windowed_pairs) == (19, 145, 40 + 24 + 9)
    assert forward_flops(s, work)[1] == LAYERS * PAIR * 73


# ---- what is counted of a batch ----


class Rows:
    """Samples of some lengths; all but the first three tokens are targets."""

    images = None

    def __init__(self, *lengths: int, **columns: Any):
        self.lengths, self._columns = np.array(lengths), columns

    def sample(self, index: int) -> dict[str, Any]:
        ids = np.arange(1, self.lengths[index] + 1)
        return {"input_ids": ids, **(self._columns or {"labels": np.where(ids <= 3, -100, ids)})}


def batches(rows: Rows, *micro_batches: MicroBatch, packing: bool) -> list[tuple[MicroBatch, dict[str, torch.Tensor]]]:
    return [(one, collate(rows, one, pad_token_id=0, packing=packing)) for one in micro_batches]  # type: ignore[arg-type]


CHAT = run_config(task=ChatConfig())


def test_packed_samples_are_texts_of_their_own() -> None:
    rows = Rows(10, 6, 12)
    found = counted(CHAT, rows, batches(rows, MicroBatch(0, ((0, 1), (2,))), packing=True))  # type: ignore[arg-type]
    assert found == Counted(texts=(10, 6, 12), positions=2 * 16, targets=7 + 3 + 9)


def test_neither_padding_nor_fillers_are_texts_but_they_are_computed() -> None:
    rows = Rows(10, 6, 12)
    real, filler = MicroBatch(0, ((0,), (1,))), MicroBatch(1, ((2,),), filler=True)
    found = counted(CHAT, rows, batches(rows, real, filler, packing=False))  # type: ignore[arg-type]
    assert found == Counted(texts=(10, 6), positions=2 * 16 + 16, targets=7 + 3)


def test_labels_of_rows_are_no_tokens() -> None:
    config, rows = run_config(task=ClassificationConfig()), Rows(10, 6, label=1)
    found = counted(config, rows, batches(rows, MicroBatch(0, ((0,), (1,))), packing=False))  # type: ignore[arg-type]
    assert found == Counted(texts=(10, 6), positions=2 * 16, targets=0)


# ---- of a run ----

WORLD: Any = SimpleNamespace(size=2, local_size=2, broadcast=lambda value: value)


def needed(config: RunConfig, model: Any, found: Counted, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(utilization, "peak_flops", lambda *_, **__: 1e9)
    return utilization_of(config, model, model, Precision.fp32, WORLD, 2).flops(found)


def on_meta(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind.from_config(config)


FOUND = Counted(texts=LENGTHS, positions=32, targets=TARGETS_OF)


def test_a_run_counts_its_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(AutoModelForCausalLM, LlamaConfig(**LLAMA))
    assert needed(CHAT, model, FOUND, monkeypatch) == pytest.approx(step_flops(of(FullConfig()), WORK))
    no_vocabulary = step_flops(of(FullConfig()), replace(WORK, projected=0))
    classifier = on_meta(AutoModelForSequenceClassification, LlamaConfig(**LLAMA))
    config = run_config(task=ClassificationConfig(), data=DataConfig(train="rows", packing=False))
    assert needed(config, classifier, replace(FOUND, targets=0), monkeypatch) == pytest.approx(no_vocabulary)
    # A body alone names its parameters without the prefix that a whole model gives them.
    config = replace(config, task=EmbeddingConfig())
    assert needed(config, on_meta(AutoModel, LlamaConfig(**LLAMA)), FOUND, monkeypatch) == pytest.approx(no_vocabulary)


def test_an_encoder_projects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = on_meta(AutoModelForSequenceClassification, BertConfig(num_attention_heads=4, **sizes))
    config = run_config(task=ClassificationConfig(), data=DataConfig(train="rows", packing=False))
    layer = 4 * 32 * 32 + 2 * 32 * 64
    expected = 3 * (2 * 2 * layer * POSITIONS_OF + 2 * PAIR * PAIRS)
    assert needed(config, model, replace(FOUND, targets=0), monkeypatch) == pytest.approx(expected)


def test_gradual_unfreezing_counts_what_is_trained_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "peak_flops", lambda *_, **__: 1e9)
    model = on_meta(AutoModelForCausalLM, LlamaConfig(**LLAMA))
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    own = utilization_of(run_config(method=UlmfitConfig()), model, model, Precision.fp32, WORLD, 0)
    assert own.flops(FOUND, 1) == pytest.approx(step_flops(of(HeadConfig()), WORK))
    model.requires_grad_(True)
    assert own.flops(FOUND, 2) == pytest.approx(step_flops(of(FullConfig()), WORK))


def test_what_cannot_be_counted_has_no_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "peak_flops", lambda *_, **__: 1e9)
    llama = on_meta(AutoModelForCausalLM, LlamaConfig(**LLAMA))
    unknown = on_meta(AutoModelForCausalLM, GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=105))
    for config, model in (
        (CHAT, unknown),
        (run_config(task=PreferenceConfig()), llama),
        (run_config(method=FeaturesConfig(), task=ClassificationConfig()), llama),
    ):
        own = utilization_of(config, model, model, Precision.fp32, WORLD, 2)
        assert own.flops(FOUND) == own.capacity(1.0) == 0
    monkeypatch.setattr(utilization, "peak_flops", lambda *_, **__: None)
    own = utilization_of(CHAT, llama, llama, Precision.fp32, WORLD, 0)
    assert own.flops(FOUND) == own.capacity(1.0) == 0


def test_rates_of_a_step_and_of_all_timed_ones() -> None:
    used = {POSITIONS: 64.0, TARGETS: 10.0, FLOPS: 3e9}
    own = Utilization(SimpleNamespace(), 1e9, 2)  # type: ignore[arg-type]
    assert own.capacity(2.0) == 4e9
    assert rates(used, 2.0, own.capacity(2.0)) == {
        "positions_per_second": 32.0,
        "targets_per_second": 5.0,
        "utilization": 0.75,
    }
    assert rates(used | {TARGETS: 0.0, FLOPS: 0.0}, 2.0, 0.0) == {"positions_per_second": 32.0}
    throughput = Throughput(Utilization(None, None, 1))
    assert throughput.results() == {"tokens_per_second": None}
    throughput.load_state_dict({"tokens": 30, "seconds": 2.0, "flops": 3e9, "capacity": 4e9})
    assert throughput.results() == {"tokens_per_second": 15.0, "utilization": 0.75}


# ---- the peak ----


def remember(cache: Path, device: str, threads: int, ranks: int = 2) -> None:
    speed = {"flops": 5e9, "saved": 1.0, "logits": 1.0, "weights": 1.0, "link": 1.0, "attention": 0.0, "fixed": 0.0}
    found = {"device": device, "ranks": ranks, "threads": threads, "speeds": {"4": speed}}
    (cache / "calibration-2.json").write_text(json.dumps({str(ranks): found}))


def test_the_peak_is_what_was_measured_with_as_many_ranks_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    assert peak_flops(Precision.fp32, 2, on_gpu=False) is None
    remember(tmp_path, "CPU", threads)
    assert peak_flops(Precision.fp32, 2, on_gpu=False) == 5e9
    assert peak_flops(Precision.bf16, 2, on_gpu=False) is None, "only fp32 was measured"
    assert peak_flops(Precision.fp32, 3, on_gpu=False) is None
    remember(tmp_path, "CPU", threads + 1)
    assert peak_flops(Precision.fp32, 2, on_gpu=False) is None
    for broken in ("{", "[]", '{"2": 1}', '{"2": {"device": "CPU", "threads": 1, "speeds": {"4": {"flop": 1}}}}'):
        (tmp_path / "calibration-2.json").write_text(broken)
        assert peak_flops(Precision.fp32, 2, on_gpu=False) is None


def test_the_peak_of_a_gpu_that_was_not_measured_is_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path))
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(accelerator, "name", lambda: name)
    assert peak_flops(Precision.bf16, 8, on_gpu=True) == 989e12
    assert peak_flops(Precision.fp32, 8, on_gpu=True) is None, "published is that of 16 bits"
    remember(tmp_path, name, 1, ranks=8)
    assert peak_flops(Precision.fp32, 8, on_gpu=True) == 5e9
    remember(tmp_path, "NVIDIA A100-SXM4-80GB", 1, ranks=8)
    assert peak_flops(Precision.fp32, 8, on_gpu=True) is None, "another machine that shares the cache"
    for other in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100 PCIe", "NVIDIA T4"):
        name = other
        assert peak_flops(Precision.bf16, 8, on_gpu=True) is None
