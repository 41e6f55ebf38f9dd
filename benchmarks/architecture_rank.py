"""One of two ranks that train the cases of a file, one after another, and compare each with the plain loop."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from architecture_cases import Case, model_class_of, note
from architecture_compare import compare
from architecture_variants import VARIANTS


class Unbuilt(Exception):
    """The architecture has no tiny checkpoint."""


def checkpoint(case: Case, folder: Path) -> Path:
    """Return the tiny checkpoint of a kind."""
    from support.tiny import save_tokenizer
    from tiny_architectures import build, save_letters, small_config
    from transformers import AutoTokenizer

    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    try:
        kind, _, variant = case.kind.partition("@")
        config = small_config(kind, VARIANTS[case.group][case.kind] if variant else None)
        if case.group == "classification":
            config.id2label, config.label2id = {0: "left", 1: "right"}, {"left": 0, "right": 1}
            config.num_labels = 2
            if getattr(config, "pad_token_id", None) is None:
                config.pad_token_id = 2
        model = build(model_class_of(case, config), config)
        elements = sum(parameter.numel() for parameter in model.parameters())
        if elements > 20_000_000:
            raise Unbuilt(f"{elements:,} weights are left")
        model.save_pretrained(folder)
    except ImportError:  # a package is missing: dstune has to refuse by the configuration alone
        config.save_pretrained(folder)
    except Unbuilt:
        raise
    except Exception as error:
        raise Unbuilt(f"{type(error).__name__}: {first_line(error)}") from error
    save_tokenizer(folder)
    if not AutoTokenizer.from_pretrained(folder)("red").input_ids:
        # The class of the architecture's tokenizer (Qwen 2's) splits texts into bytes, whatever the file says: of words nothing
        # would be left.
        save_letters(folder)
    (folder / "done").touch()
    return folder


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def overrides(case: Case, folder: Path, data: Path, run_dir: Path) -> list[str]:
    from support.workshop import AT_THE_END, PLAIN

    tasks = {"causal": "chat", "classification": "classification", "seq2seq": "seq2seq"}
    further = []
    if case.group == "seq2seq":
        further = ["data.columns.source=source", "data.columns.target=target"]
    if case.method == "lora":
        further += ["method.rank=4", "method.alpha=8"]
    rows = 2 if case.packed else 4
    return [
        *PLAIN,
        *AT_THE_END,
        f"task={tasks[case.group]}",
        f"model.path={folder}",
        f"data.train={data / case.group}.jsonl",
        f"run.dir={run_dir}",
        f"method={case.method}",
        f"data.packing={str(case.packed).lower()}",
        f"zero=stage{case.stage}",
        "data.max_length=96",
        "optimizer.lr=1e-2",
        f"trainer.micro_batch_size={rows // 2}",
        f"trainer.global_batch_size={rows}",
        "trainer.max_steps=2",
        # At ZeRO-3 Gemma 3n reads weights of its router outside their module. They are small: by default every rank has them whole.
        *(["zero.param_persistence_threshold=100"] if "gemma3n" in case.kind else []),
        *further,
    ]


def run_case(case: Case, world: Any, work: Path) -> dict[str, Any]:
    """Train, then on rank 0 compare. Raises UserError where dstune refuses."""
    from dstune.config.compose import compose
    from dstune.config.run_file import read_run, write_run
    from dstune.core.errors import UserError
    from dstune.rank import worker

    folder, run_dir = work / "models" / f"{case.group}-{case.kind}", work / "run"
    problem = ""
    if world.is_main:
        try:
            checkpoint(case, folder)
            shutil.rmtree(run_dir, ignore_errors=True)
            run_dir.mkdir()
            write_run(run_dir / "run.yaml", compose(overrides(case, folder, work, run_dir)))
        except Unbuilt as error:
            problem = f"unbuilt: {error}"
        except UserError as error:
            problem = f"refused: {error.problems[0].reason}"
    if problem := world.broadcast(problem):
        status, _, reason = problem.partition(": ")
        return {"status": status, "reason": reason}
    config = read_run(run_dir / "run.yaml").config
    with disturbed_adapters(run_dir / "start"):
        worker.train(config, run_dir, world)
    return compare(case, config, folder, run_dir) if world.is_main else {}


@contextmanager
def disturbed_adapters(folder: Path) -> Iterator[None]:
    """Give adapters a second matrix that is not zero before a run trains them, so that the first one has a gradient too. `folder`
    gets what is trained as it is then."""
    import torch

    from dstune.rank.setup import Setup
    from dstune.zero.parts import full_shape, gathered, is_partitioned

    build_engine = Setup.build_engine

    def build(setup: Any, layout: Any, built: Any, method: Any) -> Any:
        start = {}
        if hasattr(built.module, "peft_config"):
            for number, (name, parameter) in enumerate(built.module.named_parameters()):
                if not parameter.requires_grad:
                    continue
                with gathered([parameter], modified_by_rank=0), torch.no_grad():
                    # A part of a partitioned one is sent by rank 0; a whole one every rank changes alike.
                    if ".lora_B." in name and (setup.world.is_main or not is_partitioned(parameter)):
                        noise = torch.Generator().manual_seed(number)
                        parameter.copy_(torch.randn(full_shape(parameter), generator=noise) * 0.05)
                    start[name] = parameter.detach().clone()
            if setup.world.is_main:
                built.module.peft_config["default"].save_pretrained(folder)
                torch.save(start, folder / "start.pt")
        return build_engine(setup, layout, built, method)

    Setup.build_engine = build  # type: ignore[method-assign]
    try:
        yield
    finally:
        Setup.build_engine = build_engine  # type: ignore[method-assign]


def rank_main(arguments: list[str]) -> None:
    """Run the cases of a file on each rank, one after another; rank 0 notes each in the state."""
    import warnings

    warnings.filterwarnings("ignore")
    import transformers
    from support.ranks import start_rank

    from dstune.core.errors import UserError

    cases, state, work = json.loads(Path(arguments[0]).read_text()), Path(arguments[1]), Path(arguments[2])
    transformers.logging.set_verbosity_error()
    world = start_rank()
    for number, values in enumerate(cases):
        case = Case(**values)
        begin = time.perf_counter()
        if world.is_main:
            note(state, case, {"status": "begun"})
        fatal = False
        try:
            result = run_case(case, world, work)
        except UserError as error:
            result = {"status": "refused", "reason": error.problems[0].reason, "where": error.problems[0].where}
        except Exception as error:
            fatal = True
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            result = {"status": "error", "reason": f"{type(error).__name__} at {place}: {first_line(error)}"}
            traceback.print_exc()
        if world.is_main or (
            fatal and "torch" not in result["reason"].split(":")[0] and "c10d" not in result["reason"]
        ):
            note(state, case, result | {"seconds": round(time.perf_counter() - begin, 2)})
        if fatal:
            os._exit(1)
        gc.collect()
        if number == 0:
            gc.freeze()  # what was imported is looked through three times a case otherwise: half of the time
    os._exit(0)
