"""Command lines of launchers over several hosts: what they say, what they must not show; and what ssh's words mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dstune.config.schema import ModelConfig, tracking_class
from dstune.core import handoff
from dstune.core.errors import UserError
from dstune.launch import hosts
from dstune.launch.hostfile.commands import pdsh_plan
from dstune.launch.hostfile.config import HostfileConfig
from dstune.launch.hosts import Answer, Ssh
from dstune.launch.openmpi import OpenMpi
from dstune.launch.openmpi.commands import mpirun_plan
from dstune.launch.openmpi.config import OpenMpiConfig
from dstune.tracking.trackers.wandb import WandbConfig, WandbMode
from tests.support.configs import run_config

SLOTS = {"node1": [0, 1], "node2": [0]}
PARENT = {
    "PATH": "/bin",
    "HOME": "/home/me",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "NCCL_DEBUG": "INFO",
    "HF_TOKEN": "hf-secret",
    "WANDB_API_KEY": "wandb-secret",
    "WANDB_PROJECT": "mine",
    "MY_TOKEN": "my-secret",
    "LC_MESSAGES": 'a "quoted" $value',
    "RANK": "3",
}
ONLINE = tracking_class()(wandb=WandbConfig(mode=WandbMode.online))


def pdsh(parent=PARENT, tracking=ONLINE, **keys):
    config = run_config(launch=HostfileConfig(hostfile="hosts", **keys), tracking=tracking)
    given = {"launch_id": "id", "parent": parent, "address": "10.0.0.1", "port": 4242, "on_cpu": False}
    return pdsh_plan(config, Path("run"), SLOTS, **given)


def mpirun(parent=PARENT, **keys):
    config = run_config(launch=OpenMpiConfig(**keys), tracking=ONLINE)
    given = {"launch_id": "id", "parent": parent, "program": "/usr/bin/mpirun", "as_root": True, "on_cpu": True}
    return mpirun_plan(config, Path("run"), SLOTS, **given)


def test_deepspeeds_launcher_gets_hosts_and_command():
    plan = pdsh(include="node1@node2:0", user="me", port=2222)
    assert plan.size == 3
    assert plan.argv == (
        *(sys.executable, "-u", "-m", "deepspeed.launcher.runner"),
        f"--hostfile={Path('hosts').absolute()}",
        "--include=node1@node2:0",
        *("--launcher=pdsh", "--force_multi", "--no_ssh_check", "--master_addr=10.0.0.1", "--master_port=4242"),
        *("--ssh_port=2222", "--launcher_args=-l me", "--no_local_rank"),
        *("--module", "dstune.worker", str(Path("run").absolute())),
    )


@pytest.mark.parametrize(
    "plan", [pdsh(export_env=["MY_TOKEN"]), mpirun(export_env=["MY_TOKEN"])], ids=["pdsh", "mpirun"]
)
def test_no_command_line_and_no_file_shows_a_secret(plan):
    formatted = "\n".join([*plan.argv, *plan.files.values(), *plan.env.values()])
    assert not [secret for secret in ("hf-secret", "wandb-secret", "my-secret") if secret in formatted]
    assert plan.handoff["all"]["MY_TOKEN"] == "my-secret"
    assert plan.handoff["first"]["WANDB_API_KEY"] == "wandb-secret"
    assert "HF_TOKEN" not in json.dumps(plan.handoff)
    # What two shells would change goes the same way.
    assert plan.handoff["all"]["LC_MESSAGES"] == 'a "quoted" $value'


def test_variables_that_run_yaml_only_names_are_not_printed_either():
    """Their values may be anybody's; the ranks resolve `${oc.env:NAME}` again."""
    config = run_config(launch=HostfileConfig(hostfile="hosts"), model=ModelConfig(path="${oc.env:STORE}/base"))
    given = {"launch_id": "id", "parent": {"STORE": "/private"}, "address": "10.0.0.1", "port": 1, "on_cpu": False}
    plan = pdsh_plan(config, Path("run"), SLOTS, **given)
    assert "/private" not in "\n".join([*plan.argv, *plan.files.values(), *plan.env.values()])
    assert plan.handoff["all"]["STORE"] == "/private"


def test_what_belongs_to_this_machine_stays_here():
    lines = dict(line.split("=", 1) for line in pdsh(interface="ib0").files[".deepspeed_env"].splitlines())
    assert not {"HOME", "CUDA_VISIBLE_DEVICES", "RANK"} & set(lines)
    assert lines["NCCL_DEBUG"] == "INFO"
    assert lines["NCCL_SOCKET_IFNAME"] == lines["GLOO_SOCKET_IFNAME"] == "ib0"
    assert lines["DSTUNE_FOLDER"] == str(Path.cwd())
    assert "" not in lines.values()  # DeepSpeed reads no empty lines, and exports no empty values


def test_deepspeed_reads_the_file_of_variables_as_it_is_meant():
    """Its own code: `key, value = line.split("=", maxsplit=1)` for each line."""
    for line in pdsh().files[".deepspeed_env"].splitlines(keepends=True):
        name, value = line.split("=", maxsplit=1)
        assert name.isidentifier()
        assert value.endswith("\n")


def test_mpirun_gets_names_of_variables_and_hosts_with_slots():
    plan = mpirun(port=2222, interface="ib0", mpirun_options=["--report-bindings"])
    assert plan.argv[:5] == ("/usr/bin/mpirun", "-n", "3", "--host", "node1:2,node2:1")
    assert "ssh -o BatchMode=yes" in plan.argv[plan.argv.index("plm_ssh_agent") + 1]
    assert "-p 2222" in plan.argv[plan.argv.index("plm_ssh_agent") + 1]
    exported = [plan.argv[place + 1] for place, word in enumerate(plan.argv) if word == "-x"]
    assert "NCCL_DEBUG" in exported
    assert not [name for name in exported if "=" in name or name not in plan.env]
    assert plan.env["OMPI_ALLOW_RUN_AS_ROOT"] == "1"
    assert plan.argv[-5:] == (sys.executable, "-u", "-m", "dstune.worker", str(Path("run").absolute()))
    assert "--report-bindings" in plan.argv


def test_mpirun_is_given_no_slots_by_their_numbers(tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=4\nnode2 slots=4\n")

    def slots(**keys):
        return OpenMpi(OpenMpiConfig(hostfile=str(tmp_path / "hosts"), **keys)).slots()

    for key, value in (("exclude", "node1:0"), ("include", "node2:0,2")):
        with pytest.raises(UserError, match="mpirun takes a host's first slots") as error:
            slots(**{key: value})
        assert error.value.problems[0].where == f"launch.{key}"
    assert slots(include="node1@node2:0,1") == {"node1": [0, 1, 2, 3], "node2": [0, 1]}


def test_handoff_files_reach_the_ranks_that_need_it(tmp_path, monkeypatch):
    monkeypatch.setattr(handoff, "handoff_file", lambda name: tmp_path / name)
    (tmp_path / "x").write_text(json.dumps({"all": {"A": "1"}, "first": {"B": "2"}}))
    (tmp_path / "x").chmod(0o600)
    for rank, expected in ((0, {"A": "1", "B": "2"}), (1, {"A": "1"})):
        variables = {handoff.HANDOFF_FILE: "x"}
        handoff.take(rank, variables)
        assert {name: variables[name] for name in ("A", "B") if name in variables} == expected
    nothing: dict[str, str] = {}
    handoff.take(0, nothing)
    assert nothing == {}


@pytest.mark.parametrize(
    ("code", "message", "reason"),
    [
        (255, "ssh: Could not resolve hostname n9: Name or service not known", "no machine has this name"),
        (255, "me@n1: Permission denied (publickey).", "it refuses the key"),
        (255, "ssh: connect to host n1 port 22: Connection refused", "it does not answer"),
        (255, "ssh: connect to host n1 port 22: No route to host", "it does not answer"),
        (255, "Host key verification failed.", "its host key is unknown"),
        (127, "env: '/opt/python': No such file or directory", f"it has no {sys.executable}"),
    ],
)
def test_what_ssh_says_in_words_of_the_user(code, message, reason):
    report, fix = hosts.explain("n1", code, message)
    assert reason in report
    assert fix


def test_other_versions_and_files_are_named_by_host():
    mine = hosts.here([])
    old = {**mine, "files": {}, "packages": {**mine["packages"], "torch": "2.6.0", "peft": None}}
    answers = [Answer("n1", {**mine, "files": {}}, 0.1, 0.0), Answer("n2", old, 0.1, 0.0)]
    [problem] = hosts.compare(answers, [])
    assert problem.value == "n2"
    assert "torch 2.6.0 (here" in problem.reason
    assert "peft is missing" in problem.reason


def test_clocks():
    facts = hosts.here([])
    answers = [Answer("n1", facts, 0.2, 0.3), Answer("n2", facts, 0.2, -61.0), Answer("slow", facts, 30.0, 9.0)]
    assert hosts.common_skew(answers) == {"n2": -61.0}


def test_a_host_whose_file_system_hangs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(Ssh, "command", lambda *_: ["sleep", "5"])
    [problem] = hosts.sees(["n1"], Ssh(), tmp_path)
    assert (problem.where, problem.value) == ("run.dir", "n1")
    assert "does not answer there" in problem.reason


def test_ssh_never_asks():
    words = Ssh("me", 2222).command("n1", ["echo", "a b"])
    assert words[0] == "ssh"
    assert "BatchMode=yes" in words
    assert words[-6:] == ["2222", "-l", "me", "--", "n1", "echo 'a b'"]
