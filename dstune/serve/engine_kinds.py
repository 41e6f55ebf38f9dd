"""The engines of `dstune serve`. Each engine's modules are imported only when it is chosen."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from dstune.core.errors import Problem
from dstune.protocols import EngineKind, engine


@engine
class Local(EngineKind):
    name = "local"
    options = frozenset({"--dtype", "--neutral-label", "--max-sequences", "--max-cached-tokens", "--threads"})

    def engine_factory(self, arguments: argparse.Namespace, key: str, **place: Any) -> Callable[..., Any]:
        from dstune.serve.engines.local.engine import LocalEngine

        return partial(LocalEngine, **place, number_format=arguments.dtype or "")


@engine
class Vllm(EngineKind):
    name = "vllm"
    options = frozenset({"--engine-url", "--engine-python", "--", "--dtype"})
    one_template = True

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        if not (arguments.engine_python or arguments.engine_url):
            reason = (
                "vLLM cannot be installed beside dstune; name the Python of its own environment, or a running server"
            )
            yield Problem("--engine-python", reason, "--engine-python /opt/vllm/bin/python, or --engine-url URL")

    def engine_factory(self, arguments: argparse.Namespace, key: str, **place: Any) -> Callable[..., Any]:
        from dstune.serve.engines.remote import check_address
        from dstune.serve.engines.vllm import VllmEngine

        if arguments.engine_url:
            check_address(arguments.engine_url, arguments.allow_engine)
        return partial(
            VllmEngine,
            **place,
            python=arguments.engine_python,
            address=arguments.engine_url,
            key=key,
            arguments=arguments.engine_arguments,
            number_format=arguments.dtype or "",
        )


@engine
class LlamaCpp(EngineKind):
    name = "llama.cpp"
    options = frozenset({"--engine-python", "--"})

    def engine_factory(self, arguments: argparse.Namespace, key: str, **place: Any) -> Callable[..., Any]:
        from dstune.serve.engines.llama_cpp import LlamaCppEngine

        return partial(LlamaCppEngine, **place, program=arguments.engine_python, arguments=arguments.engine_arguments)


@engine
class Remote(EngineKind):
    name = "remote"
    options = frozenset({"--engine-url"})

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        if not arguments.engine_url:
            yield Problem("--engine-url", "this is missing", "--engine-url https://HOST/v1")

    def engine_factory(self, arguments: argparse.Namespace, key: str, **place: Any) -> Callable[..., Any]:
        from dstune.serve.engines.remote import RemoteEngine, check_address

        check_address(arguments.engine_url, arguments.allow_engine)
        return partial(RemoteEngine, **place, address=arguments.engine_url, key=key)
