"""Computes the vectors of a frozen body for the rows of a run, once, and maps them into memory from the cache.

Every rank computes its share of the rows of each part of the data and writes an Arrow file; a node whose disk does not have the
file of another rank gets a copy. `meta.json` is written last and names the files, so a different number of ranks can read them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import transformers
import xxhash
from transformers import PreTrainedModel

from dstune.config.schema import InitialWeights, OptimizerOffload, Precision, RunConfig, stage_of
from dstune.core.distributed import World
from dstune.core.files import hash_file
from dstune.data.collate import ROW_COLUMNS, collate
from dstune.data.prepared import PreparedData, Split
from dstune.data.sampler import padded_batches, share
from dstune.methods.features.classifier import feature_classifier
from dstune.methods.features.config import FeaturesConfig
from dstune.models import pooled
from dstune.models.heads.base import inputs_of
from dstune.models.load import load_model, local_path, trained_config
from dstune.protocols.method import Preparation
from dstune.trainer.sanity_checks import check_padding
from dstune.zero import accelerator
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import full_count, partitioned_loading
from dstune.zero.precision import DTYPES

if TYPE_CHECKING:
    from dstune.trainer.loop import Training

log = logging.getLogger(__name__)

META = "meta.json"
CHUNK_ROWS = 1000


@dataclass(frozen=True)
class Vectors(Preparation):
    """The prepared data of a run, with vectors instead of texts.

    Tables have `features` list<float32> [hidden], `label` and `index`; a row counts as one position.
    """

    method: FeaturesConfig
    seconds: float
    """Time to compute them; 0 if they were in the cache."""
    body_parameters: int

    def model(self, run: RunConfig, tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
        return feature_classifier(trained_config(run, tokenizer, self.data.labels), dtype, run.trainer.seed)

    @property
    def parameters_left_out(self) -> int:
        return self.body_parameters

    def messages(self) -> Iterator[str]:
        took = f"computed in {self.seconds:.1f} s" if self.seconds else "found in the cache"
        yield f"features of all rows: {took}; the body is not run again"

    def result(self, run: Training) -> dict[str, Any]:
        from dstune.methods.features.classical import classical_results

        return {
            "feature_seconds": round(self.seconds, 3),
            "classifiers": classical_results(run.config, self.method, run.data),
        }


def features_of(
    config: RunConfig,
    method: FeaturesConfig,
    data: PreparedData,
    tokenizer: Any,
    precision: Precision,
    world: World,
    cache_root: Path,
) -> Vectors:
    """Return the vectors of all parts of `data`, from the cache if possible. Every rank must call it."""
    folder = cache_root / "features" / world.broadcast(_key(config, method, data, precision) if world.is_main else "")
    seconds = 0.0
    if world.any(not (folder / META).is_file()):
        began = time.perf_counter()
        _compute(config, data, tokenizer, precision, world, folder)
        seconds = time.perf_counter() - began
    meta = json.loads((folder / META).read_text())
    parts: dict[str, Any] = {}
    for split in data.splits:
        files = [folder / name.format(part=split.name) for name in meta["files"]]
        parts[split.name] = _load(split, files)
    with_vectors = replace(data, **parts, prompts=[])
    return Vectors(with_vectors, method, seconds, meta["body_parameters"])


def _key(config: RunConfig, method: FeaturesConfig, data: PreparedData, precision: Precision) -> str:
    """Return the digest of everything that the vectors depend on: rows, body, pooling, arithmetic, code."""
    folder = Path(local_path(config.model.path))
    body: Any = [config.model.path, config.model.revision]
    if folder.is_dir():
        body = {
            file.name: hash_file(file) for file in sorted(folder.glob("*")) if file.suffix in (".json", ".safetensors")
        }
    if config.model.weights is InitialWeights.random:
        body = [body, config.trainer.seed]
    if config.model.rope.type is not None:
        body = [body, asdict(config.model.rope)]
    parts = [
        data.fingerprint,
        data.labels,
        body,
        config.model.config_overrides,
        method.pooling.value,
        precision.value,
        *([] if config.data.pads_rows else ["without padding"]),
        [hash_file(Path(file)) for file in (__file__, pooled.__file__)],
        transformers.__version__,
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def _compute(
    config: RunConfig, data: PreparedData, tokenizer: Any, precision: Precision, world: World, folder: Path
) -> None:
    """Run the body over every row once, as evaluation does, and write `folder`."""
    stage = 3 if stage_of(config.zero) == 3 else 0  # without an optimizer, stages 1 and 2 have nothing to partition
    alone = replace(config, zero=replace(config.zero, stage=stage, offload_optimizer=OptimizerOffload.none))
    settings = deepspeed_config(alone, world.size, precision, on_gpu=accelerator.present())
    with partitioned_loading(settings):
        model = load_model(alone, tokenizer, data.labels, DTYPES[precision])
    body_parameters = sum(full_count(parameter) for parameter in model.base_model.parameters())
    engine = Engine(model, None, settings, world)
    check_padding(config, engine, model, tokenizer, data, world, log.warning)
    engine.train(False)
    folder.mkdir(parents=True, exist_ok=True)
    pattern = "{part}-%d-of-%d.arrow"
    for split in data.splits:
        log.info("the frozen body reads %d %s rows", len(split.lengths), split.name)
        own_file = folder / (pattern % (world.rank, world.size)).format(part=split.name)
        _write(_vectors(alone, split, engine, world, tokenizer.pad_token_id), own_file)
        for rank in range(world.size):
            _bring(folder / (pattern % (rank, world.size)).format(part=split.name), rank, world)
    engine.close()
    if world.local_rank == 0:
        meta = {"files": [pattern % (rank, world.size) for rank in range(world.size)]}
        _write_whole(folder / META, json.dumps(meta | {"body_parameters": body_parameters}).encode())
    world.barrier()


def _vectors(config: RunConfig, split: Split, engine: Engine, world: World, pad_token_id: int) -> pa.Table:
    """Compute the vectors of this rank's share of the rows of `split`."""
    batches = padded_batches(split.lengths, config)
    vectors: list[np.ndarray] = []
    indices: list[int] = []
    for micro_batch in share(batches, world.rank, world.size):
        batch = collate(split, micro_batch, pad_token_id=pad_token_id, packing=False)
        inputs = {key: value.to(engine.device) for key, value in inputs_of(batch).items()}
        pooled = engine.evaluate(_pooled, inputs)
        if not micro_batch.filler:
            vectors.append(pooled.float().cpu().numpy())
            indices += micro_batch.samples
    columns = {name: split.table.with_format(None)[name] for name in ROW_COLUMNS if name in split.table.column_names}
    return pa.table(
        {
            "features": _lists(vectors),
            **{name: pa.array([values[index] for index in indices]) for name, values in columns.items()},
            "index": pa.array(indices, pa.int64()),
        }
    )


def _lists(vectors: list[np.ndarray]) -> pa.ChunkedArray:
    """Convert vectors, float32 [rows, hidden] each, to an array of lists. It has chunks, since its offsets have 32 bits and a rank
    may have more than 2**31 numbers."""
    kind = pa.list_(pa.float32())
    if not vectors:
        return pa.chunked_array([], kind)
    table = np.concatenate(vectors)
    parts = [table[start : start + CHUNK_ROWS] for start in range(0, len(table), CHUNK_ROWS)]
    return pa.chunked_array(
        [pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1]).cast(kind) for part in parts]
    )


def _pooled(forward: Any, inputs: Any) -> Any:
    return forward(**inputs).pooled


def _write(table: pa.Table, target: Path) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=CHUNK_ROWS)
    _write_whole(target, sink.getvalue().to_pybytes())


def _write_whole(target: Path, content: bytes) -> None:
    """Write the file atomically; another process may write the same content at the same time."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.incomplete")
    temporary.write_bytes(content)
    temporary.replace(target)


def _bring(file: Path, owner: int, world: World) -> None:
    """Copy `file`, which rank `owner` has written, to every node that lacks it."""
    if not world.any(not file.is_file()):
        return
    content = world.gather(file.read_bytes() if world.rank == owner else None)[owner]
    if not file.is_file() and world.local_rank == 0:
        assert content is not None
        _write_whole(file, content)
    world.barrier()


def _load(split: Split, files: list[Path]) -> Split:
    """Return the vectors of `split` in the order of its rows."""
    shards = [datasets.Dataset.from_file(str(file)) for file in files]
    table = datasets.concatenate_datasets([shard for shard in shards if len(shard)])
    order = np.argsort(np.asarray(table.with_format("numpy")["index"][:]), kind="stable")
    assert len(order) == len(split.lengths), f"{files[0].parent} has {len(order)} of {len(split.lengths)} rows"
    lengths = np.ones(len(order), dtype=np.int32)
    return replace(split, table=table.select(order), lengths=lengths)
