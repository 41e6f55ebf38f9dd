"""Keep the versions of a model, and the share of an alias's traffic that each of them gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in

REGISTRY = "registry.json"


@dataclass
class Registry:
    """The content of `registry.json`; `dstune serve --aliases` reads it."""

    path: Path
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: `run`, `digest`, `parent`, `status` (current, challenger, former, refused), `cycle`."""
    aliases: dict[str, dict[str, float]] = field(default_factory=dict)
    """Shares of the traffic by version; those of one alias sum to 1."""
    former: list[str] = field(default_factory=list)
    """Versions that were current, the newest last."""

    @classmethod
    def read(cls, folder: Path) -> Registry:
        content = object_in(folder / REGISTRY)
        return cls(
            folder / REGISTRY,
            dict(content.get("versions") or {}),
            {name: dict(shares) for name, shares in (content.get("aliases") or {}).items()},
            list(content.get("former") or []),
        )

    def write(self) -> None:
        """Replace the file atomically: a server reads either the old or the new one."""
        content = {"versions": self.versions, "aliases": self.aliases, "former": self.former}
        files.write(self.path, json.dumps(content, indent=1) + "\n", sync=True)

    @property
    def current(self) -> str | None:
        return next((name for name, version in self.versions.items() if version["status"] == "current"), None)

    @property
    def challenger(self) -> str | None:
        return next((name for name, version in self.versions.items() if version["status"] == "challenger"), None)

    def holds_deleted_rows(self, name: str) -> bool:
        """Return whether a version was trained on rows that were deleted since."""
        return bool(self.versions[name].get("holds_forgotten"))

    def share(self, alias: str, share: float) -> None:
        """Give the challenger its share of the traffic, and the current version the rest."""
        current, challenger = self.current, self.challenger
        assert current is not None
        shares = {current: 1.0}
        if challenger is not None and share > 0:
            shares = {current: 1.0 - share, challenger: share}
        self.aliases[alias] = shares

    def challenge(self, alias: str, share: float) -> str:
        """Give a held challenger its share of the traffic. Raises UserError if there is none, or if it holds deleted rows."""
        challenger = self.waiting("challenge")
        self.share(alias, share)
        return challenger

    def waiting(self, action: str) -> str:
        """Return the challenger that `action` is about. Raises UserError if there is none, or if it holds deleted rows."""
        challenger = self.challenger
        if challenger is None:
            raise UserError(Problem(action, "there is no challenger", "`dstune cycle CONFIG` makes one"))
        if self.holds_deleted_rows(challenger):
            reason = f"{challenger} was trained on rows that were deleted since"
            raise UserError(Problem(action, reason, "`dstune cycle CONFIG` trains one without them"))
        return challenger

    def promote(self, alias: str) -> str:
        """Make the challenger the current version. Raises UserError if there is none, or if it holds deleted rows."""
        challenger, current = self.waiting("promote"), self.current
        if current is not None:
            self.versions[current]["status"] = "former"
            self.former.append(current)
        self.versions[challenger]["status"] = "current"
        self.aliases[alias] = {challenger: 1.0}
        return challenger

    def roll_back(self, alias: str) -> tuple[str, str]:
        """Drop the challenger, or without one return to the newest earlier version that does not hold deleted rows.

        Returns what ended, and what serves now. Raises UserError where there is nothing to return to.
        """
        current, challenger = self.current, self.challenger
        if challenger is not None and current is not None:
            self.versions[challenger]["status"] = "refused"
            self.aliases[alias] = {current: 1.0}
            return challenger, current
        choices = [name for name in self.former if not self.holds_deleted_rows(name)]
        if current is None or not choices:
            raise UserError(
                Problem("rollback", "there is no earlier version", "`dstune cycle CONFIG status` lists them")
            )
        earlier = choices[-1]
        self.former = self.former[: self.former.index(earlier)]
        self.versions[current]["status"] = "refused"
        self.versions[earlier]["status"] = "current"
        self.aliases[alias] = {earlier: 1.0}
        return current, earlier


def chosen_version(shares: Mapping[str, float], served: Mapping[str, object], name: str) -> str | None:
    """Return the version that answers a conversation, always the same one; None where none of the alias is served.

    name: tells the conversation or its user. Versions that are not served leave their share to the others.
    """
    served_shares = {version: share for version, share in shares.items() if version in served and share > 0}
    if not served_shares:
        return None
    place = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2.0**64
    place *= sum(served_shares.values())
    for version, share in served_shares.items():
        if place < share:
            return version
        place -= share
    return next(reversed(served_shares))
