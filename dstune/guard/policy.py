"""What is looked for on which route, and what follows: a YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dstune.config.names import nearest
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.parsing import parse_yaml, read_file
from dstune.guard.calibration import CALIBRATES, DIRECTIONS, LEVELS, TRAINS

PACKAGED = {name: Path(__file__).with_name(f"{name}.yaml") for name in ("default", "rules")}
FORMAT = 1
BLOCK, MASK, FLAG = "block", "mask", "flag"
CLOSED, OPEN = "closed", "open"
OFF = "off"
"""In the place of a policy's name: the route is not guarded."""

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
"""Detectors of personal data by the kinds of `data.clean`."""
MODERATED = "moderated_content/"
SPANS = frozenset({*PII.values(), SECRETS, LINKS})
"""Detectors that know where in a text something stands, so that it can be masked."""
EXACT = (*PII.values(), SECRETS, LINKS, LEAK, RULES)
NOT_FOUND_HERE = ("pii/name", "pii/address")
ROUTES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/moderations"),
    *("/classify", "/rerank", "/score", "/tags", "/answers", "/rewards", "/v2/guard"),
)

WITH_DOCUMENTS = ("/rerank", "/answers")
WITHOUT_ANSWERS = (*WITH_DOCUMENTS, "/v1/embeddings", "/v1/moderations", "/classify", "/score", "/tags")
"""Routes on which no assistant speaks; on the first ones documents are read as results of tools."""


def needs_model(detector: str) -> bool:
    return detector == PROMPT_ATTACK or detector.startswith(MODERATED)


@dataclass(frozen=True)
class Watch:
    """One detector in one direction."""

    detector: str
    action: str
    level: str = ""
    """Of a model's: the least certain one that counts."""


@dataclass(frozen=True)
class Limits:
    """Of one request. What is beyond them was not checked, and `on_failure` says what follows."""

    characters: int = 200_000
    windows: int = 512
    seconds: float = 30.0


@dataclass(frozen=True)
class Policy:
    name: str
    on_failure: str = CLOSED
    directions: Mapping[str, tuple[Watch, ...]] = field(default_factory=dict)
    links: tuple[str, ...] = ()
    """Hosts that `unknown_links` knows, with all below them."""
    canaries: tuple[str, ...] = ()
    """Words that no answer may hold."""
    codes: bool = False
    """Whether words of letters and digits in the system prompt are canaries too."""
    document_markers: tuple[tuple[str, str], ...] = ()
    """Texts around documents within messages: what stands between them is a tool's result."""
    limits: Limits = Limits()

    def watches(self, direction: str) -> tuple[Watch, ...]:
        return self.directions.get(direction, ())

    @property
    def all_watches(self) -> Iterator[Watch]:
        return (watch for watches in self.directions.values() for watch in watches)


@dataclass(frozen=True)
class Policies:
    """All that a file says."""

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
        """None where there is no such project."""
        if project is None:
            return self.of_route("/v2/guard")
        name = self.projects.get(project)
        return None if name is None else self.policies[name]

    def check_answers(self) -> None:
        """Raises UserError where `/v2/guard`, served alone, could answer nobody."""
        if self.of_route("/v2/guard") is None and not self.projects:
            reason = "--guard-only serves /v2/guard alone, and neither routes nor projects names a policy for it"
            fix = f"routes: {{/v2/guard: {next(iter(self.policies))}}}"
            raise UserError(Problem(f"{self.file}: routes", reason, fix))

    def check_models(self, calibrated: Iterable[str]) -> None:
        """calibrated: detectors whose model has thresholds. Raises UserError where a policy would block by any other."""
        known, problems = set(calibrated), []
        for policy in self.policies.values():
            for direction, watches in policy.directions.items():
                for watch in watches:
                    if not needs_model(watch.detector) or watch.action == FLAG or watch.detector in known:
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
    """How a policy gets a model that may block."""
    if detector != PROMPT_ATTACK:
        return f"{CALIBRATES} FOLDER --label LABEL, then models.{detector}: FOLDER; or action: {FLAG}"
    model = f"models.{detector}: RUN/export (or --guard-model)"
    return f"{TRAINS}, {CALIBRATES} RUN/export, then {model}; or --guard rules, which needs none"


def no_folder(key: str, folder: Path) -> list[Problem]:
    """Why there is no model of a guard."""
    if folder.is_dir():
        return []
    reason = "there is no such folder; a guard's model is an export or a folder of a classifier"
    fix = f"{TRAINS} makes one; for one of the hub: hf download ID --local-dir FOLDER"
    return [Problem(key, reason, fix, str(folder))]


def read(
    path: str | Path,
    model: str | None = None,
    *,
    key: str = "--guard",
    kinds: str = "a file of policies, rules or default",
) -> Policies:
    """The policies in a file; `default` and `rules` name packaged ones. model: of `prompt_attack`, in the place of the file's.
    key: what gave the path. kinds: what may be given there.

    Raises UserError with all that is wrong.
    """
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
    found, problems = reader.policies(value), reader.problems
    if model is not None:
        if not problems and not any(
            watch.detector == PROMPT_ATTACK for one in found.policies.values() for watch in one.all_watches
        ):
            reason = f"no policy of {path} looks for {PROMPT_ATTACK}"
            problems.append(Problem("--guard-model", reason, "--guard default, or leave it out", model))
        found = replace(found, models={**found.models, PROMPT_ATTACK: Path(model)})
    for detector, folder in found.models.items():
        of_option = detector == PROMPT_ATTACK and model is not None
        problems += no_folder("--guard-model" if of_option else f"{found.file}: models.{detector}", folder)
    if problems:
        raise UserError(problems)
    return found


def _looks(policy: Policy, route: str) -> bool:
    """Whether it has detectors for what is looked at on this route."""
    results = bool(policy.document_markers) or route in WITH_DOCUMENTS
    passing = ("input", "tool_result") if results else ("input",)
    return route not in WITHOUT_ANSWERS or any(policy.watches(direction) for direction in passing)


class _Reader:
    """Reads a file to its end, and collects what is wrong."""

    def __init__(self, file: str, folder: Path):
        self.problems: list[Problem] = []
        self._file, self._folder = file, folder

    def _wrong(self, key: str, reason: str, fix: str = "", value: Any = "") -> None:
        self.problems.append(Problem(f"{self._file}: {key}", reason, fix, str(value)[:200]))

    def _object(self, value: Any, key: str, known: Iterable[str] | None) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            self._wrong(key or "the file", "must be a mapping")
            return {}
        for name in sorted(set(value) - set(known)) if known is not None else ():
            near = nearest(name, list(known or ()))
            self._wrong(f"{key}.{name}".lstrip("."), "there is no such key", (near and f"did you mean {near}?") or "")
        return value

    def _texts(self, value: Any, key: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
            self._wrong(key, "must be a list of texts")
            return ()
        return tuple(value)

    def policies(self, value: Any) -> Policies:
        given = self._object(value, "", ("format", "models", "policies", "routes", "projects"))
        if given.get("format") != FORMAT:
            self._wrong("format", f"must be {FORMAT}", f"format: {FORMAT}", given.get("format"))
        models = dict(self._models(given.get("models", {})))
        named = self._object(given.get("policies"), "policies", None)
        if not named:
            self._wrong("policies", "needs at least one policy")
        policies = {name: self._policy(name, one) for name, one in named.items()}
        routes = self._object(given.get("routes", {}), "routes", ROUTES)
        projects = self._object(given.get("projects", {}), "projects", None)
        for key, table in (("routes", routes), ("projects", projects)):
            for place, name in table.items():
                if name is False:  # YAML reads a bare off so
                    table[place] = name = OFF
                if not (isinstance(name, str) and name in policies) and not (name == OFF and key == "routes"):
                    fix = f"one of {', '.join(policies)}{' or off' if key == 'routes' else ''}"
                    self._wrong(f"{key}.{place}", "names no policy of this file", fix, name)
                elif key == "routes" and name != OFF and not _looks(policies[name], place):
                    self._wrong(f"{key}.{place}", "nothing that the policy looks for passes there", value=name)
        return Policies(policies, models, routes, projects, self._file)

    def _models(self, value: Any) -> Iterator[tuple[str, Path]]:
        for detector, path in self._object(value, "models", None).items():
            if not needs_model(detector):
                self._wrong(f"models.{detector}", "takes no model", f"{PROMPT_ATTACK}, or {MODERATED}KIND")
            elif not isinstance(path, str) or not path:
                self._wrong(f"models.{detector}", "must be a folder", value=path)
            else:
                yield detector, self._folder / Path(path).expanduser()

    def _policy(self, name: str, value: Any) -> Policy:
        key = f"policies.{name}"
        own = ("on_failure", "links", "canaries", "codes", "document_markers", "limits")
        given = self._object(value, key, (*own, *DIRECTIONS))
        failure = given.get("on_failure", CLOSED)
        if failure not in (CLOSED, OPEN):
            self._wrong(f"{key}.on_failure", f"must be {CLOSED} or {OPEN}", value=failure)
        if not isinstance(codes := given.get("codes", False), bool):
            self._wrong(f"{key}.codes", "must be true or false", value=codes)
        hosts = self._texts(given.get("links", []), f"{key}.links")
        for host in hosts:
            if not re.fullmatch(r"(?:[a-z0-9-]+\.)+[a-z0-9-]+", host):
                self._wrong(f"{key}.links", "must be host names in lower case and ASCII", "example.com", host)
        markers = given.get("document_markers", [])
        good = isinstance(markers, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) and one for one in pair)
            for pair in markers
        )
        if not good:
            self._wrong(
                f"{key}.document_markers", "must be a list of pairs of texts", '[["<document>", "</document>"]]'
            )
        directions = {
            direction: tuple(self._watches(given[direction], f"{key}.{direction}"))
            for direction in DIRECTIONS
            if direction in given
        }
        if not any(directions.values()):
            self._wrong(key, "looks for nothing", f"give detectors under {', '.join(DIRECTIONS)}")
        return Policy(
            name,
            failure,
            directions,
            hosts,
            self._texts(given.get("canaries", []), f"{key}.canaries"),
            bool(codes),
            tuple((pair[0], pair[1]) for pair in markers) if good else (),
            self._limits(given.get("limits", {}), f"{key}.limits"),
        )

    def _limits(self, value: Any, key: str) -> Limits:
        given = self._object(value, key, ("characters", "windows", "seconds"))
        found: dict[str, Any] = asdict(Limits())
        for name, most in (("characters", 8_000_000), ("windows", 100_000), ("seconds", 600)):
            number = given.get(name, found[name])
            if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number <= most:
                self._wrong(f"{key}.{name}", f"must be a number above 0 and at most {most}", value=number)
            elif name in given:
                found[name] = float(number) if name == "seconds" else int(number)
        return Limits(**found)

    def _watches(self, value: Any, key: str) -> Iterator[Watch]:
        if not isinstance(value, list):
            self._wrong(key, "must be a list of detectors", "- {detector: secrets, action: mask}")
            return
        seen: set[str] = set()
        for number, one in enumerate(value):
            place = f"{key}[{number}]"
            given = self._object(one, place, ("detector", "level", "action"))
            for watch in self._watch(given, place, key.rpartition(".")[2]):
                if watch.detector in seen:
                    self._wrong(place, "the detector is there twice", value=watch.detector)
                seen.add(watch.detector)
                yield watch

    def _watch(self, given: Mapping[str, Any], key: str, direction: str) -> Iterator[Watch]:
        detector, action, level = given.get("detector"), given.get("action"), given.get("level")
        if not isinstance(detector, str):
            self._wrong(f"{key}.detector", "must be the name of a detector", value=detector)
            return
        if detector in NOT_FOUND_HERE:
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
        if action not in (BLOCK, MASK, FLAG):
            self._wrong(f"{key}.action", f"must be {BLOCK}, {MASK} or {FLAG}", value=action)
            return
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
        for one in detectors:
            yield Watch(one, action, str(level or ""))
