"""Hostfiles, include and exclude against DeepSpeed's own reading of them; every mistake with its line."""

import pytest

from dstune.core.errors import UserError
from dstune.launch import host_slots as hostfile

TEXT = "# two racks\nnode1 slots=4\n\nnode2 slots=2  # old\nnode3 slots=4\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        (None, None),
        ("node2", None),
        ("node3@node1:0,2", None),
        ("node1:1@node1:3", None),
        (None, "node2"),
        (None, "node1:0,1,2,3@node3:1"),
    ],
)
def test_slots_are_those_that_deepspeed_takes(file, include, exclude):
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    expected = parse_inclusion_exclusion(fetch_hostfile(str(file)), include or "", exclude or "")
    assert hostfile.select_slots(hostfile.read_hostfile(str(file)), include, exclude) == dict(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1\n", "hosts:1=node1: this is not `HOST slots=N`"),
        ("node1 slots=2\nnode1 slots=2\n", "hosts:2=node1: this host is listed twice"),
        ("node1 slots=0\n", "a host without slots"),
        ("# nothing\n", "it lists no host"),
    ],
)
def test_bad_lines(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError) as caught:
        hostfile.read_hostfile(str(tmp_path / "hosts"))
    assert message in str(caught.value)


def test_all_wrong_lines_at_once(tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=x\nnode2 slots=1\nnode3 4\n")
    with pytest.raises(UserError, match=r"hosts:1[\s\S]*hosts:3"):
        hostfile.read_hostfile(str(tmp_path / "hosts"))
    with pytest.raises(UserError, match="cannot be read"):
        hostfile.read_hostfile(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("node4", None, "launch.include=node4: the hostfile has no such host"),
        ("node2:2", None, "launch.include=node2:2: node2 has 2 slots"),
        (None, "node1@node2@node3", "no slot is left"),
        ("node1:a", None, "this is not HOST or HOST:SLOT,SLOT"),
    ],
)
def test_bad_choices(file, include, exclude, message):
    with pytest.raises(UserError) as caught:
        hostfile.select_slots(hostfile.read_hostfile(str(file)), include, exclude)
    assert message in str(caught.value)
