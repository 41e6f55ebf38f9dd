"""What ranks are started with: command line, environment, number, port."""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dstune
from dstune.config.convert import EnvironmentText
from dstune.config.schema import tracking_class
from dstune.core.errors import UserError
from dstune.launch import commands
from dstune.launch.commands import (
    Machine,
    count_cores,
    count_gpus,
    exported,
    free_port,
    idle_gpus,
    local_plan,
    number_of_ranks,
)
from dstune.launch.local.config import LocalConfig
from dstune.tracking.trackers.mlflow import MlflowConfig
from dstune.tracking.trackers.wandb import WandbConfig, WandbMode
from tests.support.configs import run_config

PARENT = {
    "PATH": "/bin",
    "HOME": "/home/me",
    "HF_HOME": "/cache",
    "WANDB_API_KEY": "key",
    "NCCL_DEBUG": "INFO",
    "https_proxy": "proxy",
    "LC_ALL": "C.UTF-8",
    "RANK": "7",
    "WORLD_SIZE": "9",
    "MASTER_ADDR": "elsewhere",
    "SLURM_PROCID": "0",
    "OMPI_COMM_WORLD_SIZE": "9",
    "PMI_RANK": "3",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "MY_SETTING": "mine",
}


TWO_RANKS = LocalConfig(processes=2)
EIGHT_CORES = Machine(gpus=0, cores=8)


def plan(launch=TWO_RANKS, parent=PARENT, machine=EIGHT_CORES, **arguments):
    return local_plan(
        run_config(launch=launch), Path("runs/one"), parent_env=parent, machine=machine, port=4242, **arguments
    )


def test_command_line_of_every_rank():
    expected = (sys.executable, "-u", "-m", "dstune.worker", str(Path("runs/one").absolute()))
    assert plan().argv == (expected, expected)
    assert plan().size == 2


def test_ranks_find_each_other():
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4242"}
    for rank, env in enumerate(plan().env):
        expected = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        assert {name: env[name] for name in expected} == expected


def test_inherited_environment_is_a_list():
    (env, _) = plan().env
    for name in ("PATH", "HOME", "HF_HOME", "NCCL_DEBUG", "https_proxy", "LC_ALL"):
        assert env[name] == PARENT[name]
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "AWS_SECRET_ACCESS_KEY", "MY_SETTING"):
        assert name not in env


def test_keys_go_to_the_rank_that_needs_them():
    parent = PARENT | {"HF_TOKEN": "hf", "MLFLOW_TRACKING_TOKEN": "ml", "DATABRICKS_TOKEN": "db"}
    keys = ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")

    def given(tracking, **launch):
        config = run_config(launch=LocalConfig(processes=2, **launch), tracking=tracking)
        plan = local_plan(config, Path("run"), parent_env=parent, machine=EIGHT_CORES, port=1)
        return [[name for name in keys if name in env] for env in plan.env]

    assert given(tracking_class()(wandb=WandbConfig(mode=WandbMode.offline))) == [[], []]
    assert given(tracking_class()(wandb=WandbConfig(mode=WandbMode.online))) == [["WANDB_API_KEY"], []]
    assert given(tracking_class()(mlflow=MlflowConfig("http://host"))) == [
        ["MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN"],
        [],
    ]
    assert given(tracking_class()(), export_env=["HF_TOKEN"]) == [["HF_TOKEN"], ["HF_TOKEN"]]


def test_export_env_adds_to_the_list():
    (env,) = plan(LocalConfig(processes=1, export_env=["MY_SETTING"])).env
    assert env["MY_SETTING"] == "mine"
    with pytest.raises(UserError, match=r"launch.export_env=ABSENT[\s\S]*launch.export_env=GONE"):
        plan(LocalConfig(export_env=["ABSENT", "MY_SETTING", "GONE"]))


def test_variables_that_run_yaml_refers_to_are_exported():
    tracking = replace(tracking_class()(), project=EnvironmentText("mine", "${oc.env:MY_SETTING}"))
    config = run_config(launch=LocalConfig(processes=1), tracking=tracking)
    (env,) = local_plan(config, Path("run"), parent_env=PARENT, machine=Machine(0, 8), port=1).env
    assert env["MY_SETTING"] == "mine"


def test_ranks_stay_off_the_net():
    parent = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        assert plan(parent=parent).env[0][name] == "1"
    assert plan().env[0]["DO_NOT_TRACK"] == "1"


def test_threads_are_shared_among_the_ranks():
    assert plan(machine=Machine(0, 8)).env[0]["OMP_NUM_THREADS"] == "4"
    assert plan(LocalConfig(processes=3), machine=Machine(0, 2)).env[0]["OMP_NUM_THREADS"] == "1"
    assert plan(parent={"OMP_NUM_THREADS": "3"}).env[0]["OMP_NUM_THREADS"] == "3"


def test_console_of_rank_0():
    assert plan().env[0]["DSTUNE_CONSOLE"] == "plain"
    assert plan(console="tty:100").env[0]["DSTUNE_CONSOLE"] == "tty:100"


def test_a_checkout_is_found_by_the_ranks_wherever_they_run():
    home = str(Path(dstune.__file__).parent.parent)
    assert plan(parent={"PYTHONPATH": "/mine"}).env[0]["PYTHONPATH"] == f"{home}{os.pathsep}/mine"
    assert plan(parent={}).env[0]["PYTHONPATH"] == home


@pytest.mark.parametrize(
    ("requested", "machine", "ranks"),
    [
        (None, Machine(gpus=4, cores=64), 4),
        (None, Machine(gpus=0, cores=64), 2),
        (None, Machine(gpus=0, cores=1), 1),
        (3, Machine(gpus=0, cores=1), 3),
        (3, Machine(gpus=4, cores=1), 3),
    ],
)
def test_number_of_ranks(requested, machine, ranks):
    assert number_of_ranks(run_config(launch=LocalConfig(processes=requested)), machine) == ranks


def test_more_processes_than_gpus_is_refused():
    with pytest.raises(UserError, match=r"launch.processes=3: this machine shows 2 GPU\(s\)"):
        plan(LocalConfig(processes=3), machine=Machine(2, 8))


def test_far_more_processes_than_cores_are_refused_unless_forced():
    launch = LocalConfig(processes=17)
    with pytest.raises(UserError, match=r"launch.processes=17: this machine has 2 core\(s\) and no GPU"):
        number_of_ranks(run_config(launch=launch), Machine(gpus=0, cores=2))
    forced = run_config(launch=launch)
    forced = replace(forced, run=replace(forced.run, force=True))
    assert number_of_ranks(forced, Machine(gpus=0, cores=2)) == 17


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("GPU-8a, GPU-9b", 2), ("0,-1,1", 1), ("1,", 1)]
)
def test_visible_gpus(visible, count):
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_gpus_by_the_drivers_tool(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho '  MIG 1g.10gb Device 0'\necho 'GPU 1: H100'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert count_gpus({}) == 2
    tool.write_text("#!/bin/sh\nexit 9\n")  # what it does where the driver is not loaded
    monkeypatch.setattr(commands, "Path", lambda _: tmp_path / "absent")
    assert count_gpus({}) == 0


@pytest.mark.parametrize(
    ("version", "visible", "expected"),
    [
        ("2.13.0+cpu", "0,1", ["this machine shows 2 GPU(s), but PyTorch 2.13.0+cpu is built for CPUs"]),
        ("2.13.0+cpu", "", []),
        ("2.13.0+cu130", "0,1", []),
    ],
)
def test_gpus_that_a_build_for_cpus_leaves_alone_are_told(monkeypatch, version, visible, expected):
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    assert [text.partition(", so ")[0] for text in idle_gpus({"CUDA_VISIBLE_DEVICES": visible})] == expected


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 2),
        ({"HIP_VISIBLE_DEVICES": "0"}, 1),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2", "HIP_VISIBLE_DEVICES": "1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
    ],
)
def test_gpus_of_amd_are_counted_where_torch_is_built_for_them(tmp_path, monkeypatch, variables, count):
    for number, units in enumerate((0, 304, 304)):  # a CPU and two GPUs
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "properties").write_text(f"cpu_cores_count 64\nsimd_count {units}\n")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.13.0+rocm7.1")
    assert count_gpus(variables, tmp_path) == count
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.13.0+cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_gpus({"HIP_VISIBLE_DEVICES": "0"}, tmp_path) == 0


def test_cores_respect_a_container_quota(tmp_path):
    limit = tmp_path / "cpu.max"
    unlimited = count_cores(tmp_path / "absent")
    assert unlimited >= 1
    for text, expected in (("max 100000", unlimited), ("100000 100000", 1), ("20000 100000", 1), ("?", unlimited)):
        limit.write_text(text)
        assert count_cores(limit) == expected


def test_a_machine_that_cannot_reach_itself_is_refused(monkeypatch):
    def unreachable(address, timeout):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(UserError, match=r"network=127.0.0.1: .*Network is unreachable[\s\S]*ip link set lo up"):
        free_port()


def test_a_free_port_is_one_that_can_be_bound():
    port = free_port()
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_no_rank_is_offered_the_fork_server_of_its_command():
    """A rank is given to other machines too, where the folder does not exist."""
    variables = {"DSTUNE_FORK_SERVER": "/tmp/dstune-1", "DSTUNE_CACHE": "/cache"}
    assert exported(variables, []) == {"DSTUNE_CACHE": "/cache"}
