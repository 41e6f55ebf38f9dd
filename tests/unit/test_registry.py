"""One member of a kind is found without the rooms of the others, and the order of members is that of the rooms."""

from __future__ import annotations

import subprocess
import sys

import pytest

FIND = """
import sys
from dstune.protocols import LAUNCHERS, METHODS, OPTIMIZERS, SCHEDULES, TASKS
KINDS = (TASKS, METHODS, OPTIMIZERS, SCHEDULES, LAUNCHERS)
kind = next(kind for kind in KINDS if kind.kind == sys.argv[1])
found = kind.find(sys.argv[2])
print(found and found.name, len(kind.present()), *kind)
"""


def find(kind: str, name: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", FIND, kind, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("kind", "name", "order"),
    [
        ("task", "seq2seq", "chat causal_lm classification"),
        ("method", "ulmfit", "full head features"),
        ("launch", "slurm", "local hostfile openmpi slurm"),
        ("schedule", "linear", "cosine linear"),
    ],
)
def test_a_member_is_found_alone_and_the_others_keep_their_order(kind, name, order):
    found, imported, *members = find(kind, name)
    assert found == name and int(imported) <= 2  # a room may build on another one
    assert " ".join(members).startswith(order)


@pytest.mark.parametrize("name", ["chart", "__init__", "config", "a.b", ""])
def test_no_such_member(name):
    found, imported, *members = find("task", name)
    assert found == "None" and int(imported) == len(members) == 11


def test_showing_a_configuration_imports_the_rooms_that_it_chooses():
    program = (
        "import sys\nfrom dstune.cli import main\n"
        "assert main(['train', '--cfg', 'hydra', 'task=classification', 'method=lora', 'trainer.max_steps=3']) == 0\n"
        "print(*sorted({'.'.join(name.split('.')[:3]) for name in sys.modules"
        " if name.startswith(('dstune.tasks.', 'dstune.methods.', 'dstune.launch.'))}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "task: classification" in done.stdout, done.stderr
    rooms = set(done.stderr.split())
    assert {"dstune.tasks.classification", "dstune.methods.lora", "dstune.launch.local"} <= rooms
    assert rooms.isdisjoint({"dstune.tasks.embedding", "dstune.methods.ulmfit", "dstune.launch.slurm"})


def test_entry_points_are_read_only_if_a_package_mentions_the_group(tmp_path):
    program = (
        "import sys\nfrom dstune.core.entry_points import named_in\n"
        "print([point.value for point in named_in('my.group')], 'importlib.metadata' in sys.modules)"
    )

    def named(*paths: str) -> str:
        start = f"import sys; sys.path += {list(paths)}\n"
        done = subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[other.group]\na = b\n")
    assert named(str(tmp_path), str(tmp_path / "not there")) == "[] False"
    (info / "entry_points.txt").write_text("[my.group]\na = mine\n")
    assert named(str(tmp_path)) == "['mine'] True"
    (archive := tmp_path / "packages.zip").write_bytes(b"PK\5\6" + bytes(18))
    (info / "entry_points.txt").unlink()
    assert named(str(tmp_path), str(archive)) == "[] True"
