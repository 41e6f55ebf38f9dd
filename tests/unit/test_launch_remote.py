"""Command lines of launchers over several hosts: what they say, what they must not show; and what ssh's words mean."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dstune.config.schema import ModelConfig, tracking_class
from dstune.core import handoff
from dstune.core.errors import UserError
from dstune.launch import hosts
from dstune.launch.agents.ranks import node_plan
from dstune.launch.agents.task import task_from_json
from dstune.launch.hostfile.commands import host_tasks
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


def tasks(parent=PARENT, tracking=ONLINE, on_cpu=False, **keys):
    config = run_config(launch=HostfileConfig(hostfile="hosts", **keys), tracking=tracking)
    return host_tasks(config, Path("run"), SLOTS, launch_id="id", parent=parent, on_cpu=on_cpu)


def mpirun(parent=PARENT, **keys):
    config = run_config(launch=OpenMpiConfig(**keys), tracking=ONLINE)
    given = {"launch_id": "id", "parent": parent, "program": "/usr/bin/mpirun", "as_root": True, "on_cpu": True}
    return mpirun_plan(config, Path("run"), SLOTS, **given)


def test_each_host_gets_its_ranks_and_devices():
    first, second = tasks(spares=1, restarts=3)
    assert (first.node, first.order, first.ranks) == ("node1", 0, 2)
    assert (second.node, second.order, second.ranks) == ("node2", 1, 1)
    assert first.variables["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "CUDA_VISIBLE_DEVICES" not in tasks(on_cpu=True)[0].variables
    assert first.command == ["dstune.worker", str(Path("run").absolute())]
    assert (first.settings.nodes, first.settings.expected, first.settings.min_nodes) == (1, 2, 1)
    assert first.settings.restarts == 3
    assert first.secret == second.secret


def test_a_task_survives_its_way_over_ssh():
    for task in tasks(min_nodes=1, restarts=1):
        assert task_from_json(json.loads(json.dumps(asdict(task)))) == task


def test_no_command_line_shows_a_secret():
    plan = mpirun(export_env=["MY_TOKEN"])
    visible = "\n".join([*plan.argv, *plan.env.values()])
    assert not [secret for secret in ("hf-secret", "wandb-secret", "my-secret") if secret in visible]
    assert plan.handoff["all"]["MY_TOKEN"] == "my-secret"
    assert plan.handoff["first"]["WANDB_API_KEY"] == "wandb-secret"
    assert "HF_TOKEN" not in json.dumps(plan.handoff)
    # What two shells would change goes the same way.
    assert plan.handoff["all"]["LC_MESSAGES"] == 'a "quoted" $value'


def test_rank_0_alone_gets_the_keys_of_trackers():
    task = tasks(export_env=["MY_TOKEN"])[0]
    assert task.variables["MY_TOKEN"] == "my-secret"
    assert task.first_variables["WANDB_API_KEY"] == "wandb-secret"
    assert "HF_TOKEN" not in json.dumps(asdict(task))
    assert "WANDB_API_KEY" not in task.variables
    [first, second] = node_plan(replace(task, ranks=2), {"MASTER_ADDR": "elsewhere"}, 0, 3).env
    assert first["WANDB_API_KEY"] == "wandb-secret"
    assert "WANDB_API_KEY" not in second
    assert "MASTER_ADDR" not in first


def test_variables_that_run_yaml_only_names_reach_the_ranks():
    """Their values may be anybody's; the ranks resolve `${oc.env:NAME}` again."""
    config = run_config(launch=HostfileConfig(hostfile="hosts"), model=ModelConfig(path="${oc.env:STORE}/base"))
    task = host_tasks(config, Path("run"), SLOTS, launch_id="id", parent={"STORE": "/private"}, on_cpu=False)[0]
    assert task.variables["STORE"] == "/private"


def test_what_belongs_to_this_machine_stays_here():
    task = tasks(interface="ib0", on_cpu=True)[0]
    assert not {"HOME", "CUDA_VISIBLE_DEVICES", "RANK"} & set(task.variables)
    assert task.variables["NCCL_DEBUG"] == "INFO"
    assert task.variables["NCCL_SOCKET_IFNAME"] == task.variables["GLOO_SOCKET_IFNAME"] == "ib0"
    assert task.folder == str(Path.cwd())


def test_ranks_of_a_node_know_their_places():
    task = tasks(on_cpu=True)[0]
    plan = node_plan(task, {"PATH": "/bin", "KEPT": "1"}, 4, 6)
    places = [(env["RANK"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"], env["WORLD_SIZE"]) for env in plan.env]
    assert places == [("4", "0", "2", "6"), ("5", "1", "2", "6")]
    assert plan.env[0]["KEPT"] == "1"


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
        with pytest.raises(UserError, match="mpirun always uses the first slots") as error:
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
    ("code", "stderr", "reason"),
    [
        (255, "ssh: Could not resolve hostname n9: Name or service not known", "no machine has this name"),
        (255, "me@n1: Permission denied (publickey).", "it refuses the key"),
        (255, "ssh: connect to host n1 port 22: Connection refused", "it does not answer"),
        (255, "ssh: connect to host n1 port 22: No route to host", "it does not answer"),
        (255, "Host key verification failed.", "its host key is unknown"),
        (127, "env: '/opt/python': No such file or directory", f"it has no {sys.executable}"),
    ],
)
def test_what_ssh_says_in_words_of_the_user(code, stderr, reason):
    explanation, fix = hosts.explain("n1", code, stderr)
    assert reason in explanation
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
    [problem] = hosts.check_shared_folder(["n1"], Ssh(), tmp_path)
    assert (problem.where, problem.value) == ("run.dir", "n1")
    assert "does not answer there" in problem.reason


def test_ssh_never_asks():
    words = Ssh("me", 2222).command("n1", ["echo", "a b"])
    assert words[0] == "ssh"
    assert "BatchMode=yes" in words
    assert words[-6:] == ["2222", "-l", "me", "--", "n1", "echo 'a b'"]
