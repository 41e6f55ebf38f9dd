"""The files of an export that decide what a server answers, and whether somebody has edited them.

Held-out rows reveal a changed template or vocabulary only if one of them uses what was changed; a default system prompt, a token
or a temperature may occur in none. So a reference also has digests of these files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dstune.checkpoint.gguf_header import metadata_digests
from dstune.checkpoint.record import NAME as RECORD
from dstune.config.registered import fetched_path
from dstune.core.files import write
from dstune.core.parsing import open_file, read_object
from dstune.core.text import one_line

FILES = (
    *(
        "*config*.json",
        "*token*.json",
        "*vocab*.json",
        "chat_template*.json",
        "modules.json",
        "params.json",
        "tekken.json",
    ),
    *("*.jinja", "*.py", "*.model", "*.tiktoken", "vocab*.txt", "merges.txt", RECORD, "*.gguf"),
)
"""Patterns of their names: configuration, tokenizer, chat templates, processors, generation settings, code."""
FOLDERS = re.compile(r"additional_chat_templates|\d{1,3}_\w{1,60}")
"""Folders beside the weights that hold such files too: templates by name, and modules of sentence-transformers."""
BASE_FILES = ("config.json", "generation_config.json", "*.py")
"""Files of an adapter's base model that decide answers; the adapter has its own tokenizer and template."""
BASE = "base/"
"""Prefix of the names of `BASE_FILES`."""
RECORDED = "files"
"""Key of `dstune.json` with the digests of the export as it was written."""

WITHOUT_EFFECT = frozenset(
    {"transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "torch_dtype", "dtype"}
    | {"base_model_name_or_path", "base_model_class", "parent_library"}
)
"""Keys of configurations that change no answer. The engine compares the number format, and log-probabilities reveal another
base model."""
PROVENANCE = frozenset({"dstune", "checkpoint", "step", "base_model", RECORDED})
"""Keys of `dstune.json` that say where the export comes from."""
LONGEST_VALUE = 60
"""Characters up to which a value is stored as it is; a longer one is stored as a digest."""
MOST_NAMED = 3
"""Changed keys of a file that a message lists."""

Digest = dict[str, Any]
"""`sha256` of a file, and `values`: by key, the JSON text of short values and the digest of long ones."""


def base_folder(path: str, revision: str | None) -> Path | None:
    """Return the folder of a base model: a local one, or the one in the hub's cache; None if it is not on this machine."""
    path = fetched_path(path)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:  # the name that a server elsewhere has for it
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def digest_files(folder: Path, base: Path | None = None) -> dict[str, Digest]:
    """Return the digests, by name, of the files in `folder` that decide answers. base: for an adapter, its base model's folder."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("*")) if _is_decisive(path, FILES)]
    for inner in sorted(folder.glob("*/")):
        if FOLDERS.fullmatch(inner.name):
            names += [f"{inner.name}/{path.name}" for path in sorted(inner.glob("*")) if _is_decisive(path, FILES)]
    digests = {name: _digest(folder / name) for name in names}
    for path in sorted(base.glob("*")) if base is not None else ():
        if _is_decisive(path, BASE_FILES):
            digests[BASE + path.name] = _digest(path)
    return digests


def changed_files(before: Mapping[str, Digest], after: Mapping[str, Digest]) -> list[str]:
    """Return a text for each file that differs. Files of a base model are compared only if both sides have some."""
    both_have_base = all(any(name.startswith(BASE) for name in digests) for digests in (before, after))
    changes = []
    for name in sorted({*before, *after}):
        first, second = before.get(name), after.get(name)
        if first is None or second is None:
            if both_have_base or not name.startswith(BASE):
                changes.append(f"{one_line(name)} {'was added' if first is None else 'is missing'}")
        elif not _is_equal(first, second):
            changes.append(one_line(name) + _changed_values(first, second))
    return changes


def record_files(folder: Path) -> None:
    """Write the digests of an export into its `dstune.json`, so that a later reference can detect edits."""
    record = read_object(folder / RECORD)
    if record is not None:
        record[RECORDED] = digest_files(folder)
        write(folder / RECORD, json.dumps(record, indent=1) + "\n")


def valid_digests(value: Any) -> dict[str, Digest] | None:
    """Return digests that were read from a file; None if it holds something else."""
    if not isinstance(value, dict):
        return None
    for digest in value.values():
        if not isinstance(digest, dict) or not isinstance(digest.get("sha256"), str):
            return None
        values = digest.get("values", {})
        if not isinstance(values, dict) or not all(isinstance(text, str) for text in values.values()):
            return None
    return value


def _is_decisive(path: Path, patterns: tuple[str, ...]) -> bool:
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _digest(path: Path) -> Digest:
    """Digest a file; of JSON, each value too. Raises OSError."""
    if path.suffix == ".gguf":  # the tensors are proven by what they answer
        try:
            return {"sha256": "", "values": metadata_digests(path)}
        except ValueError:  # the engine refuses it, with the reason
            return {"sha256": ""}
    hashed = hashlib.sha256()
    with open_file(path) as stream:
        while block := stream.read(1 << 20):
            hashed.update(block)
    digest: Digest = {"sha256": hashed.hexdigest()}
    if path.suffix == ".json" and (content := read_object(path)) is not None:
        ignored = PROVENANCE if path.name == RECORD else WITHOUT_EFFECT
        digest["values"] = {key: _text(value) for key, value in _flattened(content, ignored)}
    if path.name == RECORD:  # it holds its own digest
        digest["sha256"] = ""
    return digest


def _flattened(content: Mapping[str, Any], ignored: frozenset[str]) -> list[tuple[str, Any]]:
    """Return keys and values, two levels deep: `eos_token_id`, `model.vocab`."""
    pairs = []
    for key, value in content.items():
        if key in ignored:
            continue
        if isinstance(value, dict) and value:
            pairs += [(f"{key}.{inner}", item) for inner, item in value.items() if inner not in ignored]
        else:
            pairs.append((key, value))
    return pairs


def _text(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= LONGEST_VALUE else f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _is_equal(first: Digest, second: Digest) -> bool:
    if first["sha256"] and first["sha256"] == second["sha256"]:
        return True
    return "values" in first and first["values"] == second.get("values")


def _changed_values(first: Digest, second: Digest) -> str:
    values_before, values_after = first.get("values"), second.get("values")
    if values_before is None or values_after is None:
        return ""
    keys = [key for key in sorted({*values_before, *values_after}) if values_before.get(key) != values_after.get(key)]
    texts = [_changed_value(key, values_before.get(key), values_after.get(key)) for key in keys[:MOST_NAMED]]
    further = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return f" ({', '.join(texts)}{further})"


def _changed_value(key: str, before: str | None, after: str | None) -> str:
    name = one_line(key[:LONGEST_VALUE])
    texts = ["absent" if text is None else one_line(text[:LONGEST_VALUE]) for text in (before, after)]
    return name if any(text.startswith("sha256:") for text in texts) else f"{name} {texts[0]} -> {texts[1]}"
