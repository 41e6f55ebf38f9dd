"""Judges of texts: an export at one level, a policy as a server applies it, or a server by its URL."""

from __future__ import annotations

import http.client
import os
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core.api_client import Address, ApiClient
from dstune.core.errors import DstuneError, Problem, UserError
from dstune.core.parsing import parse_json
from dstune.guard.calibration import CALIBRATE_COMMAND, DIRECTIONS, TRAIN_COMMAND
from dstune.guard.check import entry_of, item_of
from dstune.guard.measure.report import Judged
from dstune.guard.model import WindowScore
from dstune.guard.policy import BLOCK, CLOSED, PROMPT_ATTACK, RULES, Limits, Policies, Policy, Watch, read
from dstune.guard.scanner import Scanner

CHUNK = 64
ROLES = {"input": "user", "output": "assistant", "tool_result": "tool"}
LEVEL = "l3_likely"
"""The default level for an export."""
KEY = "DSTUNE_API_KEY"
"""The environment variable with the key of a server."""
Judge = Callable[[Sequence[Mapping[str, Any]]], list[Judged]]


@dataclass
class LocalJudge:
    """Applies a policy in this process. A row is flagged if the policy would block it."""

    policy: Policy
    scanner: Scanner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Judged]:
        return list(_progress(self._judged(rows), len(rows)))

    def _judged(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Judged]:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            items = [item_of(self.policy, row["text"], row.get("direction", "input")) for row in chunk]
            prepared = [self.scanner.prepare(item) for item in items]
            computed: dict[str, Iterator[WindowScore]] = {}
            for detector, model in self.scanner.models.items():
                windows = [
                    w
                    for prepared_row in prepared
                    for reading in prepared_row.windows.get(detector, [])
                    for w in reading
                ]
                computed[detector] = iter(model.score_windows(windows))
            for row, prepared_row in zip(chunk, prepared, strict=True):
                scores = {
                    detector: [next(computed[detector]) for reading in pieces for _ in reading]
                    for detector, pieces in prepared_row.windows.items()
                }
                result = self.scanner.finish(prepared_row, scores)
                blocking = [
                    watch for watch in self.policy.watches(prepared_row.item.direction) if watch.action == BLOCK
                ]
                entries = [entry_of(watch, result) for watch in blocking]
                unchecked = any(entry.detected is None for entry in entries) and self.policy.on_failure == CLOSED
                scored = result.scores.get(PROMPT_ATTACK)
                flagged = unchecked or any(entry.detected for entry in entries)
                yield Judged(row, flagged, scored.level if scored else None)


@dataclass
class ServerJudge:
    """Asks `POST /v2/guard` of a server. A row is flagged if a blocking detector has found something, as in `LocalJudge`."""

    url: str
    key: str | None = None
    seconds: float = 60.0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Judged]:
        return list(_progress(map(self._judged, rows), len(rows)))

    def _judged(self, row: Mapping[str, Any]) -> Judged:
        message = {"role": ROLES[row.get("direction", "input")], "content": row["text"]}
        answer = self._ask({"messages": [message], "breakdown": True})
        if not isinstance(breakdown := answer.get("breakdown"), list):
            raise DstuneError(f"{self.url}: the answer has no breakdown")
        entries = [entry for entry in breakdown if isinstance(entry, dict)]
        levels = [entry.get("result") for entry in entries if entry.get("detector_type") == PROMPT_ATTACK]
        level = levels[0] if levels and isinstance(levels[0], str) else None
        # Lakera's entries have no action: every detection is flagged.
        blocked = any(entry.get("detected") and entry.get("action", BLOCK) == BLOCK for entry in entries)
        return Judged(row, blocked, level)

    def _ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = parse_json(ApiClient(Address(self.url, self.key or "", seconds=self.seconds)).ask_once("", body))
        except urllib.error.HTTPError as error:
            reason = error.read(500).decode("utf-8", "replace")
            if error.code == 401:
                raise UserError(
                    Problem(KEY, "the server asks for a key", f"{KEY}=... dstune guard test {self.url}")
                ) from None
            raise DstuneError(f"{self.url} answered {error.code}: {reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise DstuneError(f"{self.url} cannot be asked: {error}") from None
        return answer if isinstance(answer, dict) else {}


def _progress(judged: Iterator[Judged], rows: int) -> Iterator[Judged]:
    started = reported = time.monotonic()
    for number, row in enumerate(judged, 1):
        yield row
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            print(f"{number} of {rows} texts, {reported - started:.0f} s", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Target:
    judge: Judge
    threshold: Mapping[str, Any]
    """The decision rule, in words and values; the same for every suite."""


def target_of(spec: str, *, level: str | None, model: str | None, policy: str | None, rules: bool) -> Target:
    """Return the target to test. spec: a URL, an export's folder, a file of policies, `rules` or `default`. level, rules: for an
    export. model, policy: for a file. Raises UserError."""
    by_url, export = spec.startswith(("http://", "https://")), Path(spec).is_dir()
    of_export, of_file = {"--level": level, "--rules": rules}, {"--policy": policy, "--guard-model": model}
    passed_over = {**of_export, **of_file} if by_url else of_file if export else of_export
    kind = (
        "a server, which has its policy" if by_url else "an export" if export else "a file of policies, which says it"
    )
    if ignored := [name for name, value in passed_over.items() if value]:
        raise UserError(Problem(name, f"does nothing to {kind}", "leave it out") for name in ignored)
    if by_url:
        url = spec.rstrip("/")
        url = url if url.endswith("/guard") else f"{url}/v2/guard"
        return Target(ServerJudge(url, os.environ.get(KEY)), {"server": url, "rule": "blocked by the server's policy"})
    if export:
        return _export(Path(spec), level or LEVEL, rules)
    policies = read(spec, model, key="TARGET", kinds="a policy, an export's folder or a URL")
    chosen = _policy(policies, policy, spec)
    scanner = Scanner.load(policies.models)
    policies.check_models(scanner.calibrated)
    levels = {
        direction: {
            watch.detector: watch.level or "exact" for watch in chosen.watches(direction) if watch.action == BLOCK
        }
        for direction in DIRECTIONS
    }
    return Target(LocalJudge(chosen, scanner), {"policy": chosen.name, "file": spec, "blocks": levels})


def _export(folder: Path, level: str, rules: bool) -> Target:
    scanner = Scanner.load({PROMPT_ATTACK: folder})
    calibration = scanner.models[PROMPT_ATTACK].calibration
    if calibration is None:
        reason = "this model has no guard.json, so a score of it has no meaning"
        raise UserError(
            Problem(str(folder), reason, f"{CALIBRATE_COMMAND} {folder}; {TRAIN_COMMAND} makes such a model")
        )
    watches = (Watch(PROMPT_ATTACK, BLOCK, level), *((Watch(RULES, BLOCK),) if rules else ()))
    limits = Limits(characters=8_000_000, windows=100_000, seconds=600)
    policy = Policy("export", directions=dict.fromkeys(DIRECTIONS, watches), limits=limits)
    threshold = {
        "export": str(folder),
        "level": level,
        "rules": rules,
        "model_digest": calibration.model_digest,
        "part_tokens": calibration.part_tokens,
    }
    return Target(LocalJudge(policy, scanner), threshold)


def _policy(policies: Policies, name: str | None, file: str) -> Policy:
    policy_by_name = policies.policies
    if name is None and len(policy_by_name) == 1:
        return next(iter(policy_by_name.values()))
    if name is None or name not in policy_by_name:
        reason = "names no policy of the file" if name else "the file has several policies"
        raise UserError(Problem("--policy", reason, f"--policy with one of {', '.join(policy_by_name)}", name or file))
    return policy_by_name[name]
