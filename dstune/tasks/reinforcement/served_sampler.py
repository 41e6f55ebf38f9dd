"""Sample completions on a server, with the weights that are about to be trained."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.generation.cache import configuration_of
from dstune.generation.completions import Completion
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.published_weights import PublishedWeights
from dstune.tasks.reinforcement.vllm_server import Sampled, Sampling, ServedModel, ServerDown, ServerRefused, VllmServer
from dstune.trainer.rollouts import RolloutsUnavailable
from dstune.zero.engine import Engine

T = TypeVar("T")

FOLDER = "sampler"
"""The folder in a run directory with the weights that the server reads."""
KEY = "DSTUNE_ROLLOUT_API_KEY"
"""The environment variable with the server's key."""
ASKED_AT_ONCE = 64
"""Number of prompts that a rank sends to the server at a time."""
ATTEMPTS = 3
"""Number of rollouts tried with the same weights if the server keeps failing."""
REMEDY = (
    "adapters: vllm serve MODEL --enable-lora --max-lora-rank RANK with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; whole weights and "
    "task.rollout_sleep: VLLM_SERVER_DEV_MODE=1; task.rollout_folder where both machines see it"
)


def weights_folder(shared: str | None, run_dir: Path) -> Path:
    """Return the folder in which a run writes the weights for its server: below `shared`, a separate one for each run. Weights are
    named by their content, so a run that removes its earlier ones would otherwise remove those of another run that started from
    the same model."""
    if shared is None:
        return run_dir / FOLDER
    return Path(shared).resolve() / f"{run_dir.name}-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:8]}"


def claim(folder: Path) -> str:
    """Make a folder below a shared one, where others may write too. Return why it cannot be used; empty if it can: another user who
    made it first could give the server other weights."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o755)
            return ""
        status = folder.lstat()
        with tempfile.TemporaryFile(
            dir=folder.parent
        ) as file:  # a network file system may know this user by another number
            user = os.fstat(file.fileno()).st_uid
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user:
        return f"{folder} is a link or belongs to another user"
    return ""


class ServedSampler:
    """The server at `task.rollout_url`, used by all ranks together. Rank 0 loads weights; each rank requests its own completions.

    All ranks call every method, unless its docstring says otherwise, and all raise the same error:
        RolloutsUnavailable: the server does not answer now, but may later.
        UserError: the server answers, but does not do what is needed.
    """

    def __init__(self, task: ReinforcementConfig, engine: Engine, world: World, run_dir: Path, ends: Collection[int]):
        assert task.rollout_url is not None
        self._task, self._world = task, world
        folder = weights_folder(task.rollout_folder, run_dir.resolve())
        reason = world.broadcast(claim(folder) if task.rollout_folder is not None and world.is_main else "")
        if reason:
            fix = "a folder in which no other user may write"
            raise UserError(Problem("task.rollout_folder", reason, fix, str(task.rollout_folder)))
        self._weights = PublishedWeights(engine, world, folder)
        self._server = VllmServer(task.rollout_url, read_key(), task.rollout_seconds)
        if self._weights.is_adapter:
            self._server.recover = self._load
        vocabulary = int(configuration_of(engine.module).vocab_size)
        self._sampling = Sampling(task.max_new_tokens, task.temperature, ends, vocabulary)
        self._base = ServedModel("", None)
        self.version = ""
        """Name of the weights that the server has."""

    def publish(self) -> str:
        """Give the server the current weights. Returns the name of this version."""
        earlier, self.version = self.version, self._weights.write()

        def give() -> ServedModel:
            if self._task.rollout_sleep:
                self._server.wake_up()
            base = self._server.base_model()
            if earlier != self.version:
                self._load()
            if self._weights.is_adapter and earlier not in ("", self.version):
                self._server.unload_adapter(earlier)
            return base

        base = self._agree(give if self._world.is_main else lambda: self._base)
        self._base = ServedModel(*self._world.broadcast((base.name, base.max_length)))
        if not earlier:
            self._weights.remove_earlier(self.version)
        if earlier not in ("", self.version):
            self._weights.remove(earlier)
        return self.version

    def complete(
        self, prompts: Sequence[tuple[int, Sequence[int]]], samples: int, keys: tuple[int, int]
    ) -> list[Completion]:
        """Return `samples` completions of each of this rank's prompts (number, tokens), grouped by prompt. keys: these and the
        prompt's number seed the server's noise."""
        longest = max((len(tokens) for _, tokens in prompts), default=0) + self._task.max_new_tokens
        if self._base.max_length is not None and longest > self._base.max_length:
            too_long = f"prompts and completions have up to {longest:,} tokens, the server's limit is {self._base.max_length:,}"
        else:
            too_long = ""
        name = self.version if self._weights.is_adapter else self._base.name

        def ask(prompt: tuple[int, Sequence[int]]) -> list[Sampled]:
            return self._server.sample(name, prompt[1], samples, self._sampling, _seed(keys, prompt[0]))

        def ask_all() -> list[list[Sampled]]:
            if too_long:
                raise ServerRefused(0, too_long)
            with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
                return list(pool.map(ask, prompts))

        sampled = self._sample_with_these_weights(ask_all)
        return [
            Completion(number, sample, answer.ids, answer.logps, -sum(answer.logps), answer.ended, version=self.version)
            for (number, _), answers in zip(prompts, sampled, strict=True)
            for sample, answer in enumerate(answers)
        ]

    def _sample_with_these_weights(self, ask_all: Callable[[], T]) -> T:
        """Return the result of `ask_all`, repeated if needed. A server that failed may have restarted with its initial weights. A
        missing adapter is noticed by its name; full weights have no name, so all completions are then requested again."""
        for _ in range(ATTEMPTS):
            failures = self._server.failures
            result = self._agree(ask_all)
            if self._weights.is_adapter or not self._world.any(self._server.failures > failures):
                return result
            self._agree(self._load if self._world.is_main else lambda: None)
        raise RolloutsUnavailable(f"{self._task.rollout_url} failed in each of {ATTEMPTS} rollouts")

    def rest(self) -> None:
        """Put the server to sleep if `task.rollout_sleep` is set: no request follows before the next weights."""
        if self._task.rollout_sleep:
            self._agree(self._server.sleep if self._world.is_main else lambda: None)

    def _load(self) -> None:
        """Load the weights of `self.version` into the server. A single rank may call this."""
        folder = str(self._weights.path_of(self.version))
        if self._weights.is_adapter:
            self._server.load_adapter(self.version, folder)
        else:
            self._server.load_weights(folder)

    def _agree(self, work: Callable[[], T]) -> T:
        """Return the result of `work` on this rank; an error on any rank is raised on all ranks."""
        result, down, refusal = None, "", ""
        try:
            result = work()
        except ServerDown as error:
            down = str(error)
        except ServerRefused as error:
            refusal = str(error)
        everyone = self._world.gather((down, refusal))
        if refusals := [reason for _, reason in everyone if reason]:
            raise UserError(Problem("task.rollout_url", refusals[0], REMEDY, str(self._task.rollout_url)))
        if reasons := [reason for reason, _ in everyone if reason]:
            raise RolloutsUnavailable(reasons[0])
        return result  # type: ignore[return-value]


def read_key() -> str:
    """Return the server's key; empty if there is none. Raises UserError, without showing the key, if no header can hold it."""
    key = os.environ.get(KEY, "").strip()  # files of secrets often end with a line break
    if not (key.isascii() and key.isprintable()):
        raise UserError(Problem(KEY, "holds characters that no header of a request can have", "the key alone"))
    return key


def _seed(keys: tuple[int, int], prompt: int) -> int:
    """Return a seed of 63 bits; the samples of a prompt use this seed and those after it."""
    text = f"{keys[0]}/{keys[1]}/{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
