"""Signs digests with the user's key and checks signatures: they show that this user, or somebody of the same team, signed.

The key is a file in the config folder that only this user can read, created at the first signature, or the text in
`DSTUNE_TRUST_KEY`, which a team can share. It is never copied elsewhere, nor passed to a rank.
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
"""Prefix of the signed content, so that no signature is valid for anything else that a team signs with the same key."""

OWN, TEAM = "own", "team"


def key_file() -> Path:
    """Return the path of this user's key (not created here). Raises RuntimeError if there is no home folder."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME", "")).expanduser()
    if folder.is_absolute():  # a relative one would depend on the working directory
        return folder / "dstune" / "trust.key"
    return Path.home() / ".config" / "dstune" / "trust.key"


def sign(digests: Mapping[str, str]) -> dict[str, Any] | None:
    """Return this user's signature of `digests` (digest by name); None if there is no key and none can be stored.

    Raises:
        UserError: the key is too short, or others can read it.
    """
    key = _team_key() or _own_key(make=True)
    if key is None:
        return None
    return {"of": dict(digests), "key": key_id(key), "hmac": _proof(key, digests)}


def signed_by(signature: Any) -> tuple[dict[str, str], str, str]:
    """Check a signature. Return the signed digests by name, whose key made it (`OWN` or `TEAM`), and why it is not valid. If it is
    valid, the reason is empty; otherwise the other two are.

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
    """Return the SHA-256 digest of a value that JSON or YAML can hold, as hexadecimal text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def key_id(key: bytes) -> str:
    """Return a short id of the key, which distinguishes it from other keys without revealing it."""
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
    except (OSError, RuntimeError):  # no home folder, or a read-only one
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
    """Create the key. If several launches do so at once, the first one's key stays. Raises OSError."""
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
