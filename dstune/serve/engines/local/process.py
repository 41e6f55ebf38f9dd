"""The process of the local engine: `python -m dstune.serve.engines.local.process`.

It reads its settings from standard input, and ends when standard input closes, so that it never outlives the gateway.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from dstune.core.errors import DstuneError, to_json
from dstune.serve.server import Server, make_config, run


def run_process(make_app: Callable[[ExitStack, dict[str, Any]], Any]) -> NoReturn:
    """Serve an application until the parent process ends.

    make_app: builds the application from its settings, which come as one line of JSON on standard input.
    """
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    # A failed load must not look like a crash: the gateway reads the reason from the status file.
    try:
        with ExitStack() as stack:
            code = run(serve_socket(make_app(stack, settings), settings))
    except DstuneError as error:
        Path(settings["status"]).write_text(to_json(error), encoding="utf-8")
        print(f"dstune: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    sys.stdout.flush()
    os._exit(code)


def end_with_parent() -> None:
    """Wait for the end of standard input, then end the process."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(10)
    os._exit(1)


def build_app(stack: ExitStack, settings: dict[str, Any]) -> Any:
    """Load the model that `settings` name, and build the application that serves it."""
    return _build_language_app(stack, settings) if settings["generates"] else _build_encoder_app(settings)


def _build_language_app(stack: ExitStack, settings: dict[str, Any]) -> Any:
    from dstune.config.schema import ModelConfig
    from dstune.inference.voices import open_speaker
    from dstune.serve.engines.local.app import LanguageApp
    from dstune.serve.engines.local.model import LocalModel
    from dstune.serve.engines.local.scheduler import Scheduler

    set_threads(settings)
    model_config = ModelConfig(
        path=settings["folder"], revision=settings["revision"], trust_remote_code=settings["trust_remote_code"]
    )
    speaker = stack.enter_context(open_speaker(model_config, "last", {}))
    compute_in(settings["dtype"], speaker.model)
    model = LocalModel(speaker, settings["base"], settings["adapter"])
    scheduler = Scheduler(
        model.model,
        model.use_adapter,
        max_sequences=settings["max_sequences"],
        max_waiting=settings["max_waiting"],
        max_cached_tokens=settings["max_cached_tokens"],
        on_failure=lambda: os.kill(os.getpid(), signal.SIGTERM),  # the gateway restarts it
    )
    stack.callback(scheduler.stop)
    return LanguageApp(model, scheduler)


def _build_encoder_app(settings: dict[str, Any]) -> Any:
    from dstune.config.overrides import quoted
    from dstune.config.schema import ModelConfig
    from dstune.inference.load import find, load
    from dstune.serve.engines.local.encoders import EncoderApp

    set_threads(settings)
    model = ModelConfig(
        path=settings["folder"], revision=settings["revision"], trust_remote_code=settings["trust_remote_code"]
    )
    plugins = settings["plugins"]
    request = find(model, "last", [f"plugins=[{','.join(map(quoted, plugins))}]"] if plugins else [])
    predictor = load(request, Path(settings["scratch"]))
    compute_in(settings["dtype"], predictor.model)
    return EncoderApp(settings["base"], predictor, settings["neutral_labels"])


def compute_in(dtype: str, model: Any) -> None:
    """Convert the parameters to `dtype`, if it is not empty.

    Buffers keep their type: the frequencies of rotary embeddings stay in fp32 as everywhere else.
    """
    import torch

    for parameter in model.parameters() if dtype else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))


def set_threads(settings: dict[str, Any]) -> None:
    """Set the number of threads to one less than the number of cores: spinning threads would starve the gateway."""
    import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(settings["threads"] or int(os.environ.get("OMP_NUM_THREADS", 0)) or max(cores - 1, 1))


async def serve_socket(app: Any, settings: dict[str, Any]) -> int:
    """Serve on a Unix socket, accessible to this user only, until SIGTERM."""
    config = make_config(
        app, uds=settings["socket"], timeout_graceful_shutdown=settings["drain_seconds"], timeout_keep_alive=3600
    )
    os.umask(0o077)
    server = Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    await server.serve()
    return 0


if __name__ == "__main__":
    run_process(build_app)
