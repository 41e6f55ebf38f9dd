"""The script of a SLURM job: what it asks for, what is in it and what is not."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from dstune.config import launch_rules
from dstune.config.launch_rules import check_launch
from dstune.config.schema import RunSection, tracking_class
from dstune.core.errors import UserError
from dstune.core.paths import STOP_REASON
from dstune.launch import records, runs
from dstune.launch import slurm_job as queued
from dstune.launch.agents.status import GroupStatus
from dstune.launch.slurm import job as slurm_job
from dstune.launch.slurm import jobs as slurm_jobs
from dstune.launch.slurm import submit as slurm
from dstune.launch.slurm.config import ContainerRuntime, SlurmConfig
from dstune.launch.slurm.script import NOTHING_LEFT, REQUEUE, job_script
from dstune.protocols import Launcher
from dstune.protocols.launcher import LaunchConfig
from dstune.tracking.trackers.wandb import WandbConfig, WandbMode
from tests.support.configs import run_config

PARENT = {
    "PATH": "/bin",
    "HF_HOME": "/cache",
    "WANDB_API_KEY": "hunter2hunter2",
    "SLURM_JOB_ID": "7",
    "MINE": "secret words",
}


NO_TRACKING = tracking_class()()


def script(tmp_path=Path("/shared/runs/one"), name="run", tracking=NO_TRACKING, **keys):
    config = run_config(launch=SlurmConfig(**keys), run=RunSection(name=name), tracking=tracking)
    return job_script(config, config.launch, tmp_path, PARENT)


def directives(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


@dataclass(frozen=True)
class OtherConfig(LaunchConfig):
    name: str = "other"
    constraint: str = 'gpu_model=="A100"'
    interface: str = 'a"b'


def test_quotes_are_refused_in_slurms_own_keys_alone(monkeypatch):
    """Their values stand between quotes in its script; what a plugin's key of the same name may say is the plugin's."""
    keys = ("partition", "account", "qos", "constraint", "memory", "time", "interface")
    refused = check_launch(run_config(launch=SlurmConfig(**dict.fromkeys(keys, 'a"b'))))
    assert {problem.where for problem in refused if "quote" in problem.reason} == {f"launch.{key}" for key in keys}
    monkeypatch.setattr(launch_rules, "launcher_of", Launcher)
    assert [problem.where for problem in check_launch(run_config(launch=OtherConfig()))] == ["launch.interface"]


def test_what_is_requested():
    requested = directives(
        script(
            nodes=2,
            gpus=4,
            cpus=8,
            memory="0",
            partition="gpu",
            account="me",
            qos="high",
            constraint="a100|h100",
            time="1-00:00:00",
            directives=["--exclusive", "--mail-type=END"],
        )
    )
    assert requested == [
        "--job-name=run",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gres=gpu:4",
        "--cpus-per-task=8",
        "--mem=0",
        "--partition=gpu",
        "--account=me",
        "--qos=high",
        "--constraint=a100|h100",
        "--time=1-00:00:00",
        "--output=/shared/runs/one/logs/slurm-%j.log",
        "--open-mode=append",
        "--signal=USR1@120",
        "--requeue",
        "--export=HF_HOME,PATH",
        "--exclusive",
        "--mail-type=END",
    ]


def test_a_percent_sign_in_the_folder_is_none_of_sbatchs_symbols():
    assert "--output=/shared/50%%jobs/logs/slurm-%j.log" in directives(script(Path("/shared/50%jobs")))


def test_variables_are_named_and_their_values_are_not_there():
    online = tracking_class()(wandb=WandbConfig(mode=WandbMode.online))
    text = script(tracking=online, export_env=["MINE"])
    assert "--export=HF_HOME,MINE,PATH,WANDB_API_KEY" in directives(text)
    assert "hunter2" not in text and "secret words" not in text
    assert "WANDB_API_KEY" not in script()


def test_ranks_on_each_node():
    assert "--ntasks-per-node=1" in directives(script())
    assert "--ntasks-per-node=3" in directives(script(processes=3, gpus=4))
    step = next(line for line in script(processes=3, cpus=4, nodes=2).splitlines() if " srun " in line)
    # One agent a node, with the cores of its ranks.
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=12" in step
    assert " 3 dstune.worker" in script(processes=3)


def test_spares_are_nodes_of_the_job_and_lost_nodes_do_not_end_it():
    text = script(nodes=2, spares=1, restarts=3)
    assert {"--nodes=3", "--no-kill"} <= set(directives(text))
    assert '"nodes": 2, "expected": 3, "min_nodes": 2, "restarts": 3' in text
    assert "--no-kill" not in directives(script(nodes=2))


@pytest.mark.parametrize("is_over", [False, True])
def test_each_node_has_a_step_of_its_own_which_ends_with_the_run(tmp_path, monkeypatch, is_over):
    """A step on a node that has died does not end: then the end of the run is enough."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "launch").mkdir()
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    group = tmp_path / slurm_job.GROUP_FILE
    status = json.dumps(asdict(GroupStatus(2, "node1", [], ["node1"], ["node2"], 0, True)))
    lasts = f"[ $DSTUNE_AGENT_ORDER = 1 ] && exec sleep 60; sleep 0.3; echo '{status}' >{group}" if is_over else ""
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words-$DSTUNE_AGENT_ORDER\n{lasts}\n')
    for program in ("scontrol", "srun"):
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setattr(slurm_job, "AFTER_SECONDS", 0.3)
    assert slurm_job.run_agents(tmp_path, ["srun", "--nodes=1", "agent"]) == 0
    for order in (0, 1):
        words = (tmp_path / f"words-{order}").read_text()
        log = tmp_path / "logs" / f"agent-{order}.log"
        assert words.startswith(f"--nodelist=node{order + 1} --output={log} ")
        assert words.endswith("--nodes=1 agent\n")


@pytest.fixture
def queue_programs(tmp_path, monkeypatch) -> Path:
    """A run directory, with programs of SLURM beside it that note what they are asked for."""
    run_dir = tmp_path / "run"
    for folder in (run_dir / "logs", run_dir / "launch", tmp_path / "bin"):
        folder.mkdir(parents=True)
    for name in ("scontrol", "scancel"):
        program = tmp_path / "bin" / name
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" >>{run_dir}/asked\n[ "$2" = hostnames ] && printf "node1\\nnode2\\n"\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return run_dir


def test_a_node_that_comes_back_gets_another_step(queue_programs, monkeypatch):
    """Its step failed when the node was lost, and once more because the node was not there yet."""
    run_dir = queue_programs
    status = json.dumps(asdict(GroupStatus(2, "node1", [], ["node1"], ["node2"], 0, True)))
    (run_dir.parent / "bin" / "srun").write_text(
        f"""#!/bin/sh
echo started >>{run_dir}/starts-$DSTUNE_AGENT_ORDER
tries=$(wc -l <{run_dir}/starts-$DSTUNE_AGENT_ORDER)
if [ $DSTUNE_AGENT_ORDER = 1 ]; then [ $tries -lt 3 ] && exit 1; echo '{status}' >{run_dir / slurm_job.GROUP_FILE}
else while [ ! -s {run_dir / slurm_job.GROUP_FILE} ]; do sleep 0.1; done; fi
"""
    )
    (run_dir.parent / "bin" / "srun").chmod(0o755)
    monkeypatch.setattr(slurm_job, "RESTART_SECONDS", 0.1)
    assert slurm_job.run_agents(run_dir, ["srun", "agent"]) == 0
    assert (run_dir / "starts-0").read_text().count("started") == 1
    assert (run_dir / "starts-1").read_text().count("started") == 3


def test_a_node_that_the_leader_has_lost_gets_another_step(queue_programs, monkeypatch):
    """srun is not told that the step has ended with its node."""
    run_dir = queue_programs
    group = run_dir / slurm_job.GROUP_FILE

    def status(spare: list[str], is_over: bool) -> str:
        return json.dumps(asdict(GroupStatus(2, "node1", ["node1"], spare, [], 0, is_over)))

    (run_dir.parent / "bin" / "srun").write_text(
        f"""#!/bin/sh
echo started >>{run_dir}/starts-$DSTUNE_AGENT_ORDER
[ $DSTUNE_AGENT_ORDER = 0 ] && exec sleep 60
[ $(wc -l <{run_dir}/starts-1) = 2 ] && echo '{status([], True)}' >{group} && exit
echo '{status(["node2"], False)}' >{group}; sleep 0.5; echo '{status([], False)}' >{group}; exec sleep 60
"""
    )
    (run_dir.parent / "bin" / "srun").chmod(0o755)
    for name, seconds in (("LOST_SECONDS", 0.5), ("RESTART_SECONDS", 0.1), ("AFTER_SECONDS", 0.3)):
        monkeypatch.setattr(slurm_job, name, seconds)
    assert slurm_job.run_agents(run_dir, ["srun", "agent"]) == 0
    assert (run_dir / "starts-0").read_text() == "started\n"
    assert (run_dir / "starts-1").read_text() == "started\n" * 2


@pytest.mark.parametrize(
    ("status", "code", "asked"),
    [("completed", 0, "scancel 7"), ("failed", 1, "scancel 7"), ("preempted", 75, "scontrol requeue 7")],
)
def test_a_job_whose_script_is_lost_is_ended_by_the_leader(queue_programs, monkeypatch, status, code, asked):
    monkeypatch.setattr(slurm_job, "AFTER_SECONDS", 0.0)
    monkeypatch.setattr(slurm_job, "SHORT_SECONDS", 0.0)
    monkeypatch.setattr("dstune.report.command.leave_behind", lambda run_dir, say: None)
    (queue_programs / "result.json").write_text(json.dumps({"status": status, "reason": "a node was lost", "steps": 3}))
    slurm_job.end_without_script(queue_programs, code)
    assert (queue_programs / "asked").read_text() == f"{asked}\n"


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"min_nodes": 1, "nodes": 2}, "launch.min_nodes"),
        ({"spares": 1}, "launch.spares"),
        ({"min_nodes": 3, "nodes": 2, "restarts": 1}, "launch.min_nodes"),
        ({"directives": ["--no-kill"]}, "launch.directives"),
        ({"srun_options": ["--gpus-per-task=1"]}, "launch.srun_options"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(keys, where):
    assert [problem.where for problem in check_launch(run_config(launch=SlurmConfig(**keys)))] == [where]
    assert not list(check_launch(run_config(launch=SlurmConfig(nodes=2, min_nodes=1, spares=1, restarts=1))))


def test_scripts_call_the_module_and_queued_ones_its_earlier_name():
    assert script().count('"$python" -m dstune.launch.slurm.job ') == 3
    assert queued.main is slurm_job.main


def test_containers():
    pyxis = script(container="img.sqsh", container_mounts=["/data", "/a:/b"])
    assert f"--container-mounts=/shared/runs/one:/shared/runs/one,{Path.cwd()}:{Path.cwd()},/data:/data,/a:/b" in pyxis
    assert "--container-image=img.sqsh" in pyxis
    assert 'python3 -u -m dstune.launch.agents "$run"' in pyxis
    apptainer = script(
        container="i.sif", container_runtime=ContainerRuntime.apptainer, gpus=2, container_mounts=["/data"]
    )
    assert "apptainer exec --nv --bind /shared/runs/one" in apptainer
    assert "--bind /data" in apptainer


@pytest.mark.parametrize(
    "keys", [{}, {"requeue": False, "chain": 2}, {"container": "i.sif", "setup": ["module load a"]}]
)
def test_it_is_a_script_that_shellcheck_accepts(tmp_path, keys):
    text = script(tmp_path / "a run's folder", name="my run", **keys)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    try:
        done = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    assert done.returncode == 0, done.stdout
    assert ("scontrol requeue" in text) == keys.get("requeue", True)


def result(run_dir, status, reason=""):
    records.write_json(run_dir / "result.json", {"status": status, "reason": reason, "steps": 3})


def test_a_job_goes_back_into_the_queue_when_the_clock_stopped_it_and_never_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.report.command.leave_behind", lambda *_: None)
    records.begin(tmp_path, "x", 2)
    for status, reason, code in (
        ("preempted", "received SIGUSR1", REQUEUE),
        ("preempted", "the time of the SLURM job is over", REQUEUE),
        ("preempted", STOP_REASON, 75),
        ("completed", "", 0),
        ("failed", "loss was not finite", 1),
    ):
        result(tmp_path, status, reason)
        assert slurm_job.end(tmp_path, 143) == code, (status, reason)
    (tmp_path / "result.json").unlink()
    assert slurm_job.end(tmp_path, 137) == 1
    assert records.read_result(tmp_path)["reason"] == "srun ended with exit code 137"


def test_a_signal_before_training_began_loses_nothing(tmp_path, monkeypatch):
    """The time limit may come while the ranks still import: srun dies of the signal, as 128 and its number."""
    monkeypatch.setattr("dstune.report.command.leave_behind", lambda *_: None)
    records.begin(tmp_path, "x", 2)
    assert slurm_job.end(tmp_path, 128 + signal.SIGUSR1) == REQUEUE
    assert records.read_result(tmp_path)["reason"] == "received SIGUSR1 before training began"
    (tmp_path / "result.json").unlink()
    # srun sends SIGTERM to the other ranks when one has failed: such a job must not come again for ever.
    for number in (signal.SIGSEGV, signal.SIGTERM):
        assert slurm_job.end(tmp_path, 128 + number) == 1
        (tmp_path / "result.json").unlink()


SBATCH = """\
#!/bin/sh
case "$*" in
  *dependency*) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1 ;;
esac
echo 41
"""


def test_half_a_chain_is_none(tmp_path, monkeypatch):
    for name, content in (("sbatch", SBATCH), ("scancel", f'#!/bin/sh\necho "$*" >{tmp_path}/cancelled\n')):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    config = run_config(launch=SlurmConfig(chain=3, requeue=False))
    with pytest.raises(UserError, match="QOSMaxSubmitJobPerUserLimit") as error:
        slurm.submit(config, config.launch, tmp_path)
    [refused] = error.value.problems
    assert str(tmp_path) not in refused.fix, "the run directory is removed"
    assert "--nodes=1" in refused.fix
    assert (tmp_path / "cancelled").read_text() == "41\n"


def test_slurms_programs_that_hang_are_named(tmp_path, monkeypatch):
    for name in ("sbatch", "scancel"):
        (tmp_path / name).write_text('#!/bin/sh\n[ "$1$2" = --parsable ] && echo 41 || exec sleep 5\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(slurm_jobs, "SECONDS", 0.5)
    config = run_config(launch=SlurmConfig(chain=2, requeue=False))
    with pytest.raises(UserError) as error:
        slurm.submit(config, config.launch, tmp_path)
    queued, left = error.value.problems
    assert "sbatch did not answer" in queued.reason
    assert "squeue --me" in str(queued.fix)
    assert "scancel did not answer" in left.reason
    assert left.fix == "scancel 41"


SQUEUE = """\
#!/bin/sh
echo "$*" >> "$0.calls"
case "$*" in
  *--jobs=7_1,8,7,9*) printf '7_2|7|PENDING|Resources|\\n7_3|7|RUNNING|None|node2\\n7_1|8|RUNNING|None|node1\\n' ;;
  *--jobs=7,-9*) echo "squeue: error: Invalid job id: -9" >&2; exit 1 ;;
  *--jobs=7_1*) echo "7_1|8|RUNNING|None|node1" ;;
  *--jobs=8*) echo "7_1|8|RUNNING|None|node1" ;;
  *--jobs=7*) printf '7_2|7|PENDING|Resources|\\n7_3|7|RUNNING|None|node2\\n' ;;
  *) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
esac
"""


def test_tasks_of_an_array_are_known_by_both_their_names(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text(SQUEUE)
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for name in ("7_1", "8"):
        assert [str(job) for job in slurm_jobs.alive([name])] == [f"job {name} is running on node1"]
    assert [str(job) for job in slurm_jobs.alive(["7"])] == ["job 7 is running on node2"]
    assert slurm_jobs.alive(["9"]) == []
    calls = tmp_path / "squeue.calls"
    calls.unlink()
    names = [str(job) for job in slurm_jobs.alive(["7_1", "8", "7", "9"])]
    assert names == [
        f"job {name} is running on {node}" for name, node in (("7_1", "node1"), ("8", "node1"), ("7", "node2"))
    ]
    assert len(calls.read_text().splitlines()) == 1, "one query for all"
    assert [job.id for job in slurm_jobs.alive(["7", "-9"])] == ["7"], "one refused id hides no other job"


def test_a_list_of_trials_asks_squeue_once(tmp_path, monkeypatch):
    """The tasks of an array of 200, and a run whose record names a task number on which squeue crashes."""
    (tmp_path / "squeue").write_text(
        '#!/bin/sh\necho x >> "$0.calls"\nfor i in $(seq 0 199); do echo "7_$i|7|PENDING|Resources|"; done\n'
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for number in range(200):
        run_dir = tmp_path / "runs" / f"trial-{number:03}"
        run_dir.mkdir(parents=True)
        (run_dir / "run.yaml").touch()
        records.begin(run_dir, "x", 1, [f"7_{number}"], "slurm")
    forged = json.loads((run_dir / "launch.json").read_text()) | {"jobs": ["1_99999999999999"]}
    (run_dir / "launch.json").write_text(json.dumps(forged))
    listed = runs.listed(tmp_path / "runs")
    assert [run.status for run in listed].count("pending") == 199
    assert len((tmp_path / "squeue.calls").read_text().splitlines()) == 1


def test_jobs_of_a_chain_behind_the_end_have_nothing_to_do(tmp_path):
    for status, reason, code in (
        ("completed", "", NOTHING_LEFT),
        ("failed", "no", NOTHING_LEFT),
        ("preempted", STOP_REASON, NOTHING_LEFT),
        ("preempted", "received SIGUSR1", 0),
    ):
        records.begin(tmp_path, "x", 2, ["5", "6"], "slurm")
        result(tmp_path, status, reason)
        assert slurm_job.begin(tmp_path, "6") == code, (status, reason)
    # Submitted by hand after a stop: somebody wants it to go on.
    records.begin(tmp_path, "x", 2, ["5"], "slurm")
    result(tmp_path, "preempted", STOP_REASON)
    assert slurm_job.begin(tmp_path, "9") == 0
    assert records.read_launch(tmp_path).jobs == ["9"]
    assert sys.executable in script()
