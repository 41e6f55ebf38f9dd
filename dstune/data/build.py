"""Prepare memory-mapped samples from the configured files: built once (`builder.py`), cached by digest (`fingerprint.py`)."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.config.architectures import VisionFiles, vision_of
from dstune.config.data_schema import OnSuspiciousLabels
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.core.rank_env import RankEnv
from dstune.data import cache, mixture
from dstune.data.augment.rewrite import TextWriter
from dstune.data.builder import Builder, prove_samples
from dstune.data.chat import evidence
from dstune.data.chat.evidence import Proof
from dstune.data.fingerprint import fingerprint
from dstune.data.images.store import ImageFiles
from dstune.data.inputs import PARTS
from dstune.data.label_names import refuse_suspicious
from dstune.data.prepared import HELD_OUT, PreparedData, SamplePrompt, StreamStart, load_split
from dstune.data.recorded_files import file_digests
from dstune.data.row_sources import find_inputs
from dstune.data.swapped import load_swapped
from dstune.data.token_ids import check_tokenizer
from dstune.protocols import task_of

log = logging.getLogger(__name__)

HEAD_START_SECONDS = 0.3
"""Head start of a node's first rank, so that it does the work: rank 0 shows the progress."""

MOST_TRIES = 5
"""How often rows are prepared again because images changed: an entry may be of a state that changed while it was made."""


def prepare(
    config: RunConfig,
    tokenizer: Any,
    env: RankEnv,
    cache_root: Path,
    *,
    trains: bool = True,
    write: TextWriter | None = None,
) -> PreparedData:
    """Prepare the samples of `config`, memory-mapped. tokenizer: that of the model (transformers), with the run's chat template.

    Every rank calls this. One process per node does the work under a file lock while the others wait without any
    collective; the result is cached by content, tokenizer, settings and code. Rows of validation and test come in
    the order of their hashes, so that the first N of them are a fair and constant sample.

    trains: whether a run trains on `data.train`; only then are columns that `data.columns` names in vain, suspicious labels and
    too many synthetic rows checked. write: lets models rewrite rows; needed with `data.augment.models`.
    Raises UserError that names the key, or the file and line.
    """
    inputs = find_inputs(config)
    check_tokenizer(config, tokenizer)
    key = fingerprint(config, tokenizer, inputs, write)
    build = Builder(config, tokenizer, inputs, trains=trains, write=write)

    def make(folder: Path) -> None:
        log.info("preparing the rows")
        build(folder)

    if env.local_rank and not (cache_root / "data" / key).is_dir():
        time.sleep(HEAD_START_SECONDS)
    folder = cache.entry(cache_root / "data", key, make)
    tries = 0
    # The rows, and so the key, contain only the names of images: the files may have changed since.
    while (images := ImageFiles.of(folder)) is not None and not images.are_as_prepared():
        if (tries := tries + 1) > MOST_TRIES:
            raise UserError(Problem("data.train", "images of the rows change again and again while they are read"))
        key = f"{key}-{images.state()}"
        folder = cache.entry(cache_root / "data", key, make)
    data = replace(_load(folder, key, config, vision_of(tokenizer)), files=file_digests(inputs))
    if trains and config.data.on_suspicious_labels is OnSuspiciousLabels.error:
        refuse_suspicious(data.report["train"].get("labels", {}))
    if trains:
        refuse_synthetic(data.report["train"], config.data.max_synthetic_share)
    return data


def refuse_synthetic(counts: dict[str, Any], most: float) -> None:
    """Raise UserError if more than the share `most` of the training rows come from `dstune synthesize`."""
    synthetic, rows = counts.get("synthetic_rows", 0), counts["rows_read"] - counts["bad_rows"]
    if synthetic > most * rows:
        reason = f"{synthetic:,} of {rows:,} training rows are synthetic ({synthetic / rows:.0%})"
        raise UserError(
            Problem("data.max_synthetic_share", reason, "add rows that people wrote, or raise the share", f"{most:g}")
        )


def prove(config: RunConfig, tokenizer: Any, data: PreparedData) -> Proof:
    """Compare conversations of every kind in `data.train` with what a server renders.

    Raises UserError for the first turn that is trained differently.
    """
    if data.evidence is None:
        return Proof()
    proof = prove_samples(config, tokenizer, data.labels, data.train.table, data.evidence, data.train.images)
    counts = data.report.get("train", {})
    conversations, samples = counts.get("conversations", 0), counts.get("samples", 0)
    if not task_of(config.task).splits_conversations or samples <= conversations:
        return proof
    grown = (
        f"{conversations:,} conversations make {samples:,} samples with {counts['tokens'] / counts['tokens_once']:.1f} times the "
        "tokens, since the chat template rewrites earlier turns (docs/chat-templates.md; task.turns=last trains one of each)"
    )
    return replace(proof, note="; ".join(filter(None, [proof.note, grown])))


def _load(folder: Path, key: str, config: RunConfig, vision: VisionFiles | None) -> PreparedData:
    meta = json.loads((folder / "meta.json").read_text())
    report = meta["report"]
    parts = {part: replace(load_split(folder, part), vision=vision) for part in PARTS if part in report}
    if config.data.mixture:
        mixture.add_shares(report["train"]["sources"], config)
    return PreparedData(
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts.get("test"),
        guard=parts.get("guard"),
        ood=parts.get("ood"),
        labels=tuple(meta["labels"]),
        prompts=[SamplePrompt(**prompt) for prompt in meta["prompts"]],
        report=report,
        swapped={part: swapped_rows for part in PARTS[1:] if (swapped_rows := load_swapped(folder, part))},
        fingerprint=key,
        evidence=file if (file := folder / evidence.FILE).is_file() else None,
        stream=StreamStart(folder / HELD_OUT, **meta["stream"]) if "stream" in meta else None,
    )
