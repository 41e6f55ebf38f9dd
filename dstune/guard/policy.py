"""Policies in a YAML file: which detectors run on which route, and with which action."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dstune.config.names import nearest
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.parsing import parse_yaml, read_file
from dstune.guard.calibration import CALIBRATE_COMMAND, DIRECTIONS, LEVELS, TRAIN_COMMAND
from dstune.serve.validation import CLOSED as NO_OTHER_KEYS
from dstune.serve.validation import Expected, read_tree, wrong

T = TypeVar("T")

PACKAGED = {name: Path(__file__).with_name(f"{name}.yaml") for name in ("default", "rules")}
FORMAT = 1
BLOCK, MASK, FLAG = "block", "mask", "flag"
CLOSED, OPEN = "closed", "open"
OFF = "off"
"""Replaces a policy's name for a route that is not guarded."""

PROMPT_ATTACK, RULES, SECRETS = "prompt_attack", "prompt_attack/rules", "secrets"
LINKS, LEAK = "unknown_links", "system_prompt_leak"
PII: Mapping[str, str] = {
    "EMAIL": "pii/email",
    "PHONE": "pii/phone_number",
    "IBAN": "pii/iban_code",
    "CARD": "pii/credit_card",
    "IP_ADDRESS": "pii/ip_address",
    "SSN": "pii/us_social_security_number",
}
"""Detectors of personal data, by the kinds of `data.clean`."""
MODERATED = "moderated_content/"
SPANS = frozenset({*PII.values(), SECRETS, LINKS})
"""Detectors that report a place in the text, which can be masked."""
EXACT = (*PII.values(), SECRETS, LINKS, LEAK, RULES)
UNSUPPORTED_PII = ("pii/name", "pii/address")
ROUTES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/moderations"),
    *("/classify", "/rerank", "/score", "/tags", "/answers", "/rewards", "/v2/guard"),
)

WITH_DOCUMENTS = ("/rerank", "/answers")
WITHOUT_ANSWERS = (*WITH_DOCUMENTS, "/v1/embeddings", "/v1/moderations", "/classify", "/score", "/tags")
"""Routes without an assistant's answer; on the first ones, documents count as results of tools."""


def needs_model(detector: str) -> bool:
    return detector == PROMPT_ATTACK or detector.startswith(MODERATED)


@dataclass(frozen=True)
class Watch:
    """A detector in one direction."""

    detector: str
    action: str
    level: str = ""
    """For a model: the least certain level that counts."""


@dataclass(frozen=True)
class Limits:
    """Limits for one request. Text beyond them is not checked, and `on_failure` decides what follows."""

    characters: int = 200_000
    windows: int = 512
    seconds: float = 30.0


@dataclass(frozen=True)
class Policy:
    name: str
    on_failure: str = CLOSED
    directions: Mapping[str, tuple[Watch, ...]] = field(default_factory=dict)
    links: tuple[str, ...] = ()
    """Hosts that `unknown_links` allows, including their subdomains."""
    canaries: tuple[str, ...] = ()
    """Words that no answer may contain."""
    codes: bool = False
    """Whether words of letters and digits in the system prompt are canaries too."""
    document_markers: tuple[tuple[str, str], ...] = ()
    """Texts around documents in messages: what is between them counts as a tool's result."""
    limits: Limits = Limits()

    def watches(self, direction: str) -> tuple[Watch, ...]:
        return self.directions.get(direction, ())

    @property
    def all_watches(self) -> Iterator[Watch]:
        return (watch for watches in self.directions.values() for watch in watches)


@dataclass(frozen=True)
class Policies:
    """The content of a policy file."""

    policies: Mapping[str, Policy]
    models: Mapping[str, Path] = field(default_factory=dict)
    """By detector."""
    routes: Mapping[str, str] = field(default_factory=dict)
    projects: Mapping[str, str] = field(default_factory=dict)
    """By the `project_id` of `/v2/guard`."""
    file: str = ""

    def of_route(self, route: str) -> Policy | None:
        name = self.routes.get(route, OFF)
        return None if name == OFF else self.policies[name]

    def of_project(self, project: str | None) -> Policy | None:
        """Return the policy of a project; None if there is no such project."""
        if project is None:
            return self.of_route("/v2/guard")
        name = self.projects.get(project)
        return None if name is None else self.policies[name]

    def check_answers(self) -> None:
        """Raises UserError if `/v2/guard`, served alone, could not answer any request."""
        if self.of_route("/v2/guard") is None and not self.projects:
            reason = "--guard-only serves /v2/guard alone, and neither routes nor projects names a policy for it"
            fix = f"routes: {{/v2/guard: {next(iter(self.policies))}}}"
            raise UserError(Problem(f"{self.file}: routes", reason, fix))

    def check_models(self, calibrated: Iterable[str]) -> None:
        """Check that the model of every blocking detector has thresholds. calibrated: detectors whose model has thresholds. Raises
        UserError if a policy would block by another."""
        calibrated_detectors, problems = set(calibrated), []
        for policy in self.policies.values():
            for direction, watches in policy.directions.items():
                for watch in watches:
                    if (
                        not needs_model(watch.detector)
                        or watch.action == FLAG
                        or watch.detector in calibrated_detectors
                    ):
                        continue
                    where = f"{self.file}: policies.{policy.name}.{direction}: {watch.detector}"
                    path = self.models.get(watch.detector)
                    reason = (
                        f"blocks by {path}, which has no calibration (guard.json)"
                        if path
                        else "blocks, and has no model"
                    )
                    problems.append(Problem(where, reason, _model_of(watch.detector), watch.action))
        if problems:
            raise UserError(problems)


def _model_of(detector: str) -> str:
    """Return instructions for getting a model that may block."""
    if detector != PROMPT_ATTACK:
        return f"{CALIBRATE_COMMAND} FOLDER --label LABEL, then models.{detector}: FOLDER; or action: {FLAG}"
    model = f"models.{detector}: RUN/export (or --guard-model)"
    return f"{TRAIN_COMMAND}, {CALIBRATE_COMMAND} RUN/export, then {model}; or --guard rules, which needs none"


def no_folder(key: str, folder: Path) -> list[Problem]:
    """Return the problem of a missing model folder."""
    if folder.is_dir():
        return []
    reason = "there is no such folder; a guard's model is an export or a folder of a classifier"
    fix = f"{TRAIN_COMMAND} makes one; for one of the hub: hf download ID --local-dir FOLDER"
    return [Problem(key, reason, fix, str(folder))]


def read(
    path: str | Path,
    model: str | None = None,
    *,
    key: str = "--guard",
    kinds: str = "a file of policies, rules or default",
) -> Policies:
    """Read policies from a file; `default` and `rules` name packaged ones. model: replaces the file's model of `prompt_attack`.
    key: the option that named the path, for messages. kinds: what may be given there, for messages. Raises UserError with every
    problem."""
    file = PACKAGED.get(str(path)) or Path(path)
    try:
        value = parse_yaml(read_file(file).decode())
    except FileNotFoundError:
        near = nearest(str(path), PACKAGED)
        fix = f"did you mean {near}?" if near else kinds
        raise UserError(Problem(key, "there is no such file", fix, str(path))) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = f"cannot be read as YAML: {first_line(error)}"
        raise UserError(Problem(key, reason, "rules is a packaged policy that needs no model", str(path))) from None
    reader = _Reader(f"policy {path}" if str(path) in PACKAGED else str(path), file.parent)
    policies, problems = reader.policies(value), reader.problems
    if model is not None:
        if not problems and not any(
            watch.detector == PROMPT_ATTACK for policy in policies.policies.values() for watch in policy.all_watches
        ):
            reason = f"no policy of {path} looks for {PROMPT_ATTACK}"
            problems.append(Problem("--guard-model", reason, "--guard default, or leave it out", model))
        policies = replace(policies, models={**policies.models, PROMPT_ATTACK: Path(model)})
    for detector, folder in policies.models.items():
        of_option = detector == PROMPT_ATTACK and model is not None
        problems += no_folder("--guard-model" if of_option else f"{policies.file}: models.{detector}", folder)
    if problems:
        raise UserError(problems)
    return policies


def _has_detectors_for(policy: Policy, route: str) -> bool:
    """Return whether the policy has detectors for the texts of this route."""
    results = bool(policy.document_markers) or route in WITH_DOCUMENTS
    passing = ("input", "tool_result") if results else ("input",)
    return route not in WITHOUT_ANSWERS or any(policy.watches(direction) for direction in passing)


# -- schema of the file


def _check_text(value: str) -> str:
    if not value.strip():
        raise wrong("must not be empty")
    return value


Texts = Annotated[list[Annotated[str, AfterValidator(_check_text)]], Expected("must be a list of texts")]
Hosts = Annotated[
    list[Annotated[str, Field(pattern=r"^(?:[a-z0-9-]+\.)+[a-z0-9-]+$")]],
    Expected("must be host names in lower case and ASCII, such as [example.com]"),
]
_Pair = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=2)]
Markers = Annotated[list[_Pair], Expected('must be a list of pairs of texts, such as [["<document>", "</document>"]]')]


def _limit(most: int) -> Any:
    return Annotated[float, Field(gt=0, le=most), Expected(f"must be a number above 0 and at most {most}")]


class _Entry(BaseModel):
    model_config = ConfigDict(**NO_OTHER_KEYS, strict=True)


class WatchEntry(_Entry):
    detector: Annotated[str, Expected("must be the name of a detector")]
    action: Annotated[Literal["block", "mask", "flag"], Expected(f"must be {BLOCK}, {MASK} or {FLAG}")]
    level: Any = None


class LimitsEntry(_Entry):
    characters: _limit(8_000_000) = Limits.characters  # type: ignore[valid-type]
    windows: _limit(100_000) = Limits.windows  # type: ignore[valid-type]
    seconds: _limit(600) = Limits.seconds  # type: ignore[valid-type]


Watches = Annotated[list[WatchEntry], Field(default_factory=list)]


class PolicyEntry(_Entry):
    on_failure: Annotated[Literal["closed", "open"], Expected(f"must be {CLOSED} or {OPEN}")] = "closed"
    links: Hosts = Field(default_factory=list)
    canaries: Texts = Field(default_factory=list)
    codes: Annotated[bool, Expected("must be true or false")] = False
    document_markers: Markers = Field(default_factory=list)
    limits: LimitsEntry = Field(default_factory=LimitsEntry)
    input: Watches
    output: Watches
    tool_result: Watches


class FileEntry(_Entry):
    """The file. Policies are validated one by one, so that a problem in one does not hide those of others."""

    format: Annotated[Literal[1], Expected(f"must be {FORMAT}")]
    models: dict[str, Any] = Field(default_factory=dict)
    policies: Annotated[dict[str, Any], Field(min_length=1), Expected("needs at least one policy")]
    routes: dict[str, Any] = Field(default_factory=dict)
    projects: dict[str, Any] = Field(default_factory=dict)


KEYS = {name for entry in (FileEntry, PolicyEntry, LimitsEntry, WatchEntry) for name in entry.model_fields}


class _Reader:
    """Reads a file completely and collects its problems."""

    def __init__(self, file: str, folder: Path):
        self.problems: list[Problem] = []
        self._file, self._folder = file, folder

    def _wrong(self, key: str, reason: str, fix: str = "", value: Any = "") -> None:
        self.problems.append(Problem(f"{self._file}: {key}", reason, fix, str(value)[:200]))

    def _read(self, entry: type[T], value: Any, key: str) -> T | None:
        made, problems = read_tree(entry, value, f"{self._file}: {key}", KEYS)
        self.problems += problems
        return made

    def policies(self, value: Any) -> Policies:
        """Return everything that is valid; the rest becomes problems."""
        self._read(FileEntry, value, "")
        content = (
            {name: part for name, part in value.items() if isinstance(part, dict)} if isinstance(value, dict) else {}
        )
        models = dict(self._models(content.get("models", {})))
        policies = {
            str(name): self._policy(str(name), policy_value)
            for name, policy_value in content.get("policies", {}).items()
        }
        routes = {
            place: self._policy_name(f"routes.{place}", name, policies)
            for place, name in content.get("routes", {}).items()
        }
        for place, name in routes.items():
            if place not in ROUTES:
                near = nearest(str(place), ROUTES)
                self._wrong(f"routes.{place}", "there is no such key", (near and f"did you mean {near}?") or "")
            elif (policy := policies.get(name)) is not None and not _has_detectors_for(policy, place):
                self._wrong(f"routes.{place}", "nothing that the policy looks for passes there", value=name)
        projects = {
            place: self._policy_name(f"projects.{place}", name, policies, may_be_off=False)
            for place, name in content.get("projects", {}).items()
        }
        return Policies(policies, models, routes, projects, self._file)

    def _policy_name(self, key: str, name: Any, policies: Mapping[str, Policy], *, may_be_off: bool = True) -> str:
        """Return the name of the policy of a route or project."""
        name = OFF if name is False else name  # YAML reads an unquoted off as False
        if not (isinstance(name, str) and name in policies) and not (may_be_off and name == OFF):
            fix = f"one of {', '.join(policies)}{' or off' if may_be_off else ''}"
            self._wrong(key, "names no policy of this file", fix, name)
        return str(name)

    def _models(self, value: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
        for detector, path in value.items():
            if not needs_model(str(detector)):
                self._wrong(f"models.{detector}", "takes no model", f"{PROMPT_ATTACK}, or {MODERATED}KIND")
            elif not isinstance(path, str) or not path:
                self._wrong(f"models.{detector}", "must be a folder", value=path)
            else:
                yield detector, self._folder / Path(path).expanduser()

    def _policy(self, name: str, value: Any) -> Policy:
        key = f"policies.{name}"
        entry = self._read(PolicyEntry, value, f"{key}.")
        if entry is None:
            return Policy(name)
        directions = {
            direction: tuple(self._watches(getattr(entry, direction), f"{key}.{direction}"))
            for direction in DIRECTIONS
            if direction in entry.model_fields_set
        }
        if not any(directions.values()):
            self._wrong(key, "looks for nothing", f"give detectors under {', '.join(DIRECTIONS)}")
        limits = Limits(int(entry.limits.characters), int(entry.limits.windows), float(entry.limits.seconds))
        return Policy(
            name,
            entry.on_failure,
            directions,
            tuple(entry.links),
            tuple(entry.canaries),
            entry.codes,
            tuple((begin, end) for begin, end in entry.document_markers),
            limits,
        )

    def _watches(self, entries: Iterable[WatchEntry], key: str) -> Iterator[Watch]:
        seen: set[str] = set()
        for number, entry in enumerate(entries):
            place = f"{key}[{number}]"
            for watch in self._watch(entry, place, key.rpartition(".")[2]):
                if watch.detector in seen:
                    self._wrong(place, "the detector is there twice", value=watch.detector)
                seen.add(watch.detector)
                yield watch

    def _watch(self, entry: WatchEntry, key: str, direction: str) -> Iterator[Watch]:
        detector, action, level = entry.detector, entry.action, entry.level
        if detector in UNSUPPORTED_PII:
            self._wrong(f"{key}.detector", "names and addresses of people are not found here", value=detector)
            return
        all_pii = detector == "pii"
        if not all_pii and detector not in EXACT and not needs_model(detector):
            near = nearest(detector, ["pii", PROMPT_ATTACK, *EXACT])
            self._wrong(
                f"{key}.detector", "there is no such detector", (near and f"did you mean {near}?") or "", detector
            )
            return
        detectors = tuple(PII.values()) if all_pii else (detector,)
        if action == MASK and not SPANS.issuperset(detectors):
            self._wrong(
                f"{key}.action", f"{detector} does not say where in a text it stands", f"{BLOCK} or {FLAG}", action
            )
        if needs_model(detectors[0]) and not (isinstance(level, str) and level in LEVELS):
            self._wrong(f"{key}.level", f"must be one of {', '.join(LEVELS)}", value=level)
        elif not needs_model(detectors[0]) and level is not None:
            self._wrong(f"{key}.level", f"{detector} is exact: it has no level", value=level)
        if detectors[0] == LEAK and direction != "output":
            self._wrong(f"{key}.detector", "looks at answers, so it belongs under output", value=detector)
        for detector_name in detectors:
            yield Watch(detector_name, action, str(level or ""))
