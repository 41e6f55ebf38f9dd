"""The user's key, and what is signed with it: that this user, or somebody of the same team, wrote it.

The key is a file of this user alone in the config folder, made when something is signed first, or the text in
`DSTUNE_TRUST_KEY`, which a team can share. It is never written anywhere, nor handed to a rank.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.errors import Problem, UserError

VARIABLE = "DSTUNE_TRUST_KEY"
MIN_CHARACTERS = 32
"""A short key can be found from a signature by trying all of them."""
PURPOSE = b"dstune run 1\n"
"""Stands before what is signed, so that no signature is valid for anything else that a team signs with the same key."""

OWN, TEAM = "own", "team"


def key_file() -> Path:
    """Return where this user's key is (not made here). Raises RuntimeError where there is no home folder."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME", "")).expanduser()
    if folder.is_absolute():  # a relative one would lead into whatever folder the command is given in
        return folder / "dstune" / "trust.key"
    return Path.home() / ".config" / "dstune" / "trust.key"


def sign(digests: Mapping[str, str]) -> dict[str, Any] | None:
    """Return a signature of this user for `digests` (digest by name); None where there is no key and none can be stored.

    Raises:
        UserError: the key is too short, or others can read it.
    """
    key = _team_key() or _own_key(make=True)
    if key is None:
        return None
    return {"of": dict(digests), "key": key_id(key), "hmac": _proof(key, digests)}


def signed_by(signature: Any) -> tuple[dict[str, str], str, str]:
    """Check a signature. Returns the digests by name that it vouches for, whose key made it (`OWN` or `TEAM`), and a reason why
    it is not valid: without digests and key where there is a reason, else empty.

    Raises:
        UserError: the key is too short, or others can read it.
    """
    if signature is None:
        return {}, "", "nobody has signed it"
    try:
        signed_digests = {str(name): str(digest) for name, digest in signature["of"].items()}
        proof, name = str(signature["hmac"]), str(signature["key"])
    except (KeyError, TypeError, AttributeError):
        return {}, "", "its signature cannot be read"
    changed = False
    for whose, read in ((TEAM, _team_key), (OWN, lambda: _own_key(make=False))):
        if (key := read()) is None:
            continue
        if hmac.compare_digest(_proof(key, signed_digests).encode(), proof.encode()):
            return signed_digests, whose, ""
        changed |= key_id(key) == name
    return {}, "", "its signature was changed" if changed else "it was signed with another key than yours"


def digest(value: Any) -> str:
    """Return the digest of a value as JSON or YAML have it."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def key_id(key: bytes) -> str:
    """Return a short name of the key, which tells it from other keys without giving it away."""
    return hmac.digest(key, b"dstune key", "sha256").hex()[:12]


def _proof(key: bytes, digests: Mapping[str, str]) -> str:
    return hmac.digest(key, PURPOSE + json.dumps(digests, sort_keys=True).encode(), "sha256").hex()


def _team_key() -> bytes | None:
    text = os.environ.get(VARIABLE, "").strip()
    if text and len(text) < MIN_CHARACTERS:
        fix = f'export {VARIABLE}="$(openssl rand -hex 32)", the same for all of a team'
        raise UserError(Problem(VARIABLE, f"has fewer than {MIN_CHARACTERS} characters, so it can be guessed", fix))
    return text.encode() or None


def _own_key(*, make: bool) -> bytes | None:
    try:
        file = key_file()
        with contextlib.suppress(FileNotFoundError):
            return _read(file)
        if not make:
            return None
        _make(file)
        return _read(file)
    except (OSError, RuntimeError):  # a home folder that cannot be written, or none
        return None


def _read(file: Path) -> bytes:
    try:
        key = files.read_own(file).strip()
    except OSError as error:
        hidden = error.errno == errno.EACCES and not os.access(file.parent, os.X_OK)  # the home of another user
        if hidden or error.errno not in (errno.EPERM, errno.EACCES, errno.ELOOP):
            raise
        reason = "the key that signs your runs must be a file of yours that nobody else can read"
        raise UserError(
            Problem(str(file), reason, f"chmod 600 {file}; rm it if it was not you who made it; or export {VARIABLE}")
        ) from None
    if len(key) < MIN_CHARACTERS:
        raise UserError(Problem(str(file), "is no key", f"rm {file}: the next start of a run makes another one"))
    return key


def _make(file: Path) -> None:
    """Make the key; of several launches that do so at once the first one's stays. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    files.write(temporary, secrets.token_hex(32) + "\n", mode=0o600, sync=True)
    try:
        os.link(temporary, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
