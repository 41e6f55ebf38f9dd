"""Which modules the processes of a training run load: one step of `task=chat method=lora` on a tiny model, in any commit's tree."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.case_matrix import COMMON, METHODS, TASKS
from tools.case_server import ENVIRONMENT

PACKAGE = "dstune"
USED = ("chat", "lora")
LIGHT = ("__init__", "config", "rules", "rows")
"""Files of a room that every process may load; the others belong to runs of its task or method alone."""

# Python imports `sitecustomize` before anything else. Ranks end by `os._exit`, which runs nothing that `atexit` knows.
RECORDER = """
import atexit, json, os, sys

def write():
    role = "rank" if "RANK" in os.environ else "launcher"
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    with open(f"{os.path.dirname(__file__)}/{role}-{os.getpid()}.json", "w") as output:
        json.dump([str(file or "") for file in files], output)

def leave(code, end=os._exit):
    write()
    end(code)

atexit.register(write)
os._exit = leave
"""


@dataclass(frozen=True)
class Loaded:
    """What one process had imported at its end."""

    modules: int
    files: list[Path]
    """Those of the package, relative to it."""

    def by_room(self) -> Counter[str]:
        """Count modules of the package in each room."""
        return Counter(map(room, self.files))

    def of_unused_rooms(self) -> list[str] | None:
        """Return the files that only runs of other tasks and methods need; None of a tree without rooms. A name that starts with
        `_` is a base of several rooms."""
        in_rooms = [path for path in self.files if path.parts[0] in ("tasks", "methods") and len(path.parts) > 2]
        if not in_rooms:
            return None
        return sorted(
            path.as_posix()
            for path in in_rooms
            if path.parts[1] not in USED and not path.parts[1].startswith("_") and path.stem not in LIGHT
        )


def room(path: Path) -> str:
    """Return what a module (relative to the package) is counted for: its folder, or its room in a folder of rooms."""
    folder = path.parts[0]
    if folder in ("tasks", "methods", "launch") and len(path.parts) > 2:
        return "/".join(path.parts[:2])
    return folder


def loaded(tree: Path) -> dict[str, Loaded]:
    """Return modules of the `launcher`, the process of `dstune train`, and of its `rank`. Raises: SystemExit if the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        recorder = home / "recorder"
        recorder.mkdir()
        (recorder / "sitecustomize.py").write_text(RECORDER)
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints what it has found
            make_inputs(home)
        task, method = USED
        settings = [f"task={task}", f"method={method}", *COMMON, *TASKS[task], *METHODS[method], "zero=stage0"]
        settings = [word.replace("MODELS", "models").replace("DATA", "data") for word in settings]
        done = subprocess.run(
            [sys.executable, "-m", PACKAGE, "train", *settings, "trainer.max_steps=1"],
            cwd=home,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": f"{recorder}:{tree}", "DSTUNE_CACHE": str(home / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"the run of {tree} ended with {done.returncode}:\n{done.stdout[-3000:]}")
        return {role: largest(recorder, role, tree / PACKAGE) for role in ("launcher", "rank")}


def make_inputs(home: Path) -> None:
    from tests.support import tiny

    tiny.save_decoder(home / "models" / "decoder")
    (home / "data").mkdir()
    tiny.write_dialogues(home / "data" / "chat.jsonl", 16)


def largest(recorder: Path, role: str, package: Path) -> Loaded:
    """Return the process of a role with the most modules: helpers that it forks, or starts for a question, have fewer."""
    records = [json.loads(path.read_text()) for path in recorder.glob(f"{role}-*.json")]
    files = max(records, key=len)
    return Loaded(len(files), [Path(file).relative_to(package) for file in files if file.startswith(f"{package}/")])
