"""Compute the log-probabilities of the reference model once before training, and keep them in the cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dstune.config.architectures import vision_of
from dstune.config.schema import InitialWeights, ModelConfig, OptimizerOffload, Precision, RunConfig, stage_of
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.core.files import hash_file
from dstune.core.paths import cache_root
from dstune.data import cache
from dstune.data.batches import batch_of
from dstune.data.images.batch import with_images_everywhere
from dstune.data.inputs import PARTS
from dstune.data.prepared import PreparedData, Split
from dstune.data.sampler import padded_batches, share
from dstune.models.load import load_model, load_tokenizer, model_folder
from dstune.protocols import METHODS, method_of, task_of
from dstune.protocols.method_options import StartsFromAdapters
from dstune.protocols.task_options import NeedsReference
from dstune.tasks.preference.config import PreferenceConfig
from dstune.tasks.preference.head import JudgedHead, PairHead
from dstune.trainer.prefetcher import needs_images
from dstune.zero import accelerator
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import partitioned_loading
from dstune.zero.precision import DTYPES

activity = logging.getLogger(__name__)


def with_reference(
    config: RunConfig,
    data: PreparedData,
    engine: Engine,
    head: Any,
    world: World,
    pad_token_id: int,
    precision: Precision,
) -> PreparedData:
    """Return `data` with every row's log-probabilities under the model that training starts from, if the loss reads them from the
    cache. Every rank calls this before anything is trained or loaded from a checkpoint, so a continued run that finds the cache
    empty computes the same values again."""
    task = task_of(config.task)
    is_cached = isinstance(task, NeedsReference) and task.caches_reference(config)
    if not is_cached or _other_model(config) is not None:
        return data
    assert isinstance(head, (PairHead, JudgedHead))
    cache = _Cache(cache_root(), data, identity_at_start(config, world), precision)
    return cache.filled(data, world, lambda: _compute(config, data, engine, head, world, pad_token_id))


def with_reference_model(
    config: RunConfig, data: PreparedData, tokenizer: Any, world: World, precision: Precision
) -> PreparedData:
    """Return `data` with every row's log-probabilities under `task.reference_model`. That model is loaded for this and released
    before the trained model is loaded. Raises UserError if its tokens or its image processor differ."""
    other = _other_model(config)
    if other is None:
        return data
    reference_tokenizer, vision = load_tokenizer(other.model), vision_of(tokenizer)
    if data.train.images is not None and vision is not None and not vision.sees_as(vision_of(reference_tokenizer)):
        reason = "rows hold images, and the reference has another processor, so it would not see the same"
        raise UserError(Problem("task.reference_model", reason, "give a model of the same family", other.model.path))
    model_ids, reference_ids = tokenizer.get_vocab(), reference_tokenizer.get_vocab()
    if any(model_ids.get(token) != number for token, number in reference_ids.items()):
        reason = "the reference has other tokens than the model, so their probabilities cannot be compared"
        raise UserError(Problem("task.reference_model", reason, "give a model of the same family", other.model.path))
    # Tokens added by the run (`model.add_tokens`, or those of a template) get the embeddings that they have at the run's start.
    identity = [*identity_at_start(other, world), config.trainer.seed if len(model_ids) > len(reference_ids) else None]
    cache = _Cache(cache_root(), data, identity, precision)

    def compute() -> dict[str, np.ndarray]:
        settings = deepspeed_config(other, world.size, precision, on_gpu=accelerator.present())
        with partitioned_loading(settings):
            model = load_model(other, tokenizer, (), DTYPES[precision])
        head = task_of(other.task).head(model)
        assert isinstance(head, (PairHead, JudgedHead))
        engine = Engine(model, None, settings, world)
        computed = _compute(other, data, engine, head, world, tokenizer.pad_token_id)
        engine.close()
        return computed

    return cache.filled(data, world, compute)


def _other_model(config: RunConfig) -> RunConfig | None:
    """Return the configuration that loads `task.reference_model`; None if the run has no such model."""
    task = config.task
    if not isinstance(task, PreferenceConfig) or not task.compares or task.reference_model is None:
        return None
    model = ModelConfig(
        path=task.reference_model,
        revision=task.reference_revision,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    zero = replace(config.zero, stage=3 if stage_of(config.zero) == 3 else 0, offload_optimizer=OptimizerOffload.none)
    return replace(config, model=model, method=METHODS.default(), zero=zero)


class _Cache:
    """The cached arrays of all parts, keyed by data, model and precision."""

    def __init__(self, root: Path, data: PreparedData, identity: Sequence[Any], precision: Precision):
        parts = [data.fingerprint, identity, precision.name]
        self._root = root / "references"
        self._key = xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())

    def filled(self, data: PreparedData, world: World, compute: Any) -> PreparedData:
        """Return `data` with the arrays. If any rank lacks them, all ranks compute them."""
        if world.any(not (self._root / self._key).is_dir()):
            computed = compute()

            def make(folder: Path) -> None:
                for part, array in computed.items():
                    np.save(folder / f"{part}.npy", array)

            cache.entry(self._root, self._key, make)
            world.barrier()
        folder = self._root / self._key
        parts = {part: split for part in PARTS if (split := getattr(data, part)) is not None}
        return replace(
            data,
            **{
                part: replace(split, reference=np.load(folder / f"{part}.npy", mmap_mode="r"))
                for part, split in parts.items()
            },
        )


def _compute(
    config: RunConfig, data: PreparedData, engine: Engine, head: PairHead | JudgedHead, world: World, pad_token_id: int
) -> dict[str, np.ndarray]:
    """Compute the log-probabilities of every sample, by part: float32 [samples, 2], the same on every rank."""
    engine.train(False)
    logps_by_part = {}
    for part in PARTS:
        split: Split | None = getattr(data, part)
        if split is None:
            continue
        batches = padded_batches(split.lengths, config)
        batches = with_images_everywhere(batches, split, needed=needs_images(config, world))
        local_batches = share(batches, world.rank, world.size)
        pairs = []
        for number, micro_batch in enumerate(local_batches):
            activity.info("reference of the %s rows", part, extra={"done": number + 1, "total": len(local_batches)})
            batch = batch_of(config, split, micro_batch, pad_token_id)
            on_device = {key: value.to(engine.device) for key, value in batch.items()}
            values = engine.evaluate(head.log_probabilities, on_device).float().cpu().numpy()
            if not micro_batch.filler:
                pairs.append((micro_batch.samples, values[: len(micro_batch.samples)]))  # without a blank one
        array = np.zeros((len(split.lengths), 2), dtype=np.float32)
        for of_rank in world.gather(pairs):
            for samples, values in of_rank:
                array[samples] = values
        logps_by_part[part] = array
    engine.train(True)
    return logps_by_part


def identity_at_start(config: RunConfig, world: World) -> list[Any]:
    """Return what identifies the model that `config` starts from: settings, and digests of its files; every rank hashes a share."""
    model = config.model
    settings: list[Any] = [model.weights.name, model.config_overrides, model.add_tokens, model.attention.name]
    if model.weights is InitialWeights.random or model.add_tokens:
        settings.append(config.trainer.seed)
    if model.rope.type is not None:
        settings.append(asdict(model.rope))
    method = method_of(config.method)
    adapters = method.folders if isinstance(method, StartsFromAdapters) else []
    folders = [model_folder(model), *map(Path, adapters)]
    files = sorted(
        (number, path)
        for number, folder in enumerate(folders)
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".json", ".bin", ".py")
    )
    local_digests = {
        f"{number}/{path.name}": hash_file(path, bits=128) for number, path in files[world.rank :: world.size]
    }
    digests = {name: digest for part in world.gather(local_digests) for name, digest in part.items()}
    return [*settings, digests, method.identity()]
