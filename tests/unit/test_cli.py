"""The command line: verbs, messages, exit codes, and how a rank of somebody else's launch is recognised."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dstune
from dstune import cli
from dstune.config.run_file import Composed, read_run, write_run
from dstune.config.schema import RunSection
from dstune.core.errors import DstuneError, Preempted, Problem, UserError
from dstune.core.rank_env import RankEnv
from dstune.core.verb import GROUPS
from dstune.launch import preflight, train
from dstune.launch.local import Local
from tests.support.configs import run_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty working folder, no launcher's variables, and nothing fetched."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(preflight, "resolve_run", lambda config, stage, origins=(): config)


@pytest.fixture
def launched(monkeypatch):
    """Runs that reached the supervision, which is replaced; `code` is what it returns."""
    state = SimpleNamespace(calls=[], code=0)

    def run(self, request):
        state.calls.append((request.run, request.run_dir))
        result = {"status": "completed", "steps": 3, "eval_final": {"loss": 1.5}}
        (request.run_dir / "result.json").write_text(json.dumps(result))
        return state.code

    monkeypatch.setattr(Local, "start", run)
    return state


def dstune_process(*arguments, **options):
    command = [sys.executable, "-m", "dstune", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


# ---- dispatch ----


def test_help_names_every_verb_and_imports_nothing_heavy(capsys):
    assert cli.main(["--help"]) == 0
    help_text = capsys.readouterr().out
    for name, verb in cli.VERBS.classes().items():
        assert f"  {name:<12} {verb.summary}\n" in help_text
    assert cli.main([]) == 0
    assert capsys.readouterr().out == help_text
    code = (
        "import sys, dstune.cli as c; c.main(['--help']); sys.exit(bool({'yaml', 'psutil', 'hydra'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_help_lists_every_verb_once_under_the_heading_of_its_group():
    blocks = [block.splitlines() for block in cli.help_text().split("\n\n")]
    listed = {block[0]: block[1:] for block in blocks if block[0] in GROUPS}
    assert list(listed) == [group for group in GROUPS if group in listed]
    for group, lines in listed.items():
        of_group = [name for name, verb in cli.VERBS.classes().items() if verb.group == group]
        assert [line[:15].strip() for line in lines] == of_group
        assert max(map(len, lines)) <= 110
    assert sum(map(len, listed.values())) == len([*cli.VERBS])


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dstune {dstune.__version__}\n"


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_exists_and_explains_itself(verb, capsys):
    try:
        code = cli.main([verb, "--help"])
    except SystemExit as leaving:  # argparse
        code = leaving.code
    assert code == 0
    assert "dstune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean `dstune train`?"),
        (["zzz"], "the verbs are init, "),
        (["trainer.max_steps=3"], "fix: dstune train trainer.max_steps=3"),
        (["--cfg", "job"], "flags go after the verb"),
        (["train", "quickstart"], "experiment=quickstart"),
        (["train", "runs/none"], "there is no such run directory"),
        (["plan", "-m", "trainer.seed=1,2"], "--multirun: a sweep"),
        (["train", "trainer.max_step=3"], "did you mean trainer.max_steps=3?"),
        (["train", "--max-steps", "3"], "write trainer.max_steps="),
        (["train", "trainer.max_steps=-1"], "trainer.max_steps=-1"),
        (["train", "launch.processes=none"], "launch.processes=none"),
        (["train", "run.resume=nowhere"], "run.resume=nowhere"),
        (["completion", "tcsh"], "tcsh"),
        (["completion"], "dstune completion bash"),
        (["status", "none"], "no such run directory"),
        (["status", "none" * 1000], "cannot be used: File name too long"),
    ],
)
def test_mistakes_exit_2_with_a_message_and_no_traceback(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("dstune: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_several_problems_are_listed_together(capsys):
    assert cli.main(["train", "trainer.max_step=3", "model.pth=x"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("dstune: 2 problems\n  trainer.max_step=3: ")
    assert "\n      fix: did you mean trainer.max_steps=3?\n  model.pth=x: " in stderr


def test_errors_as_json(capsys):
    assert cli.main(["train", "trainer.max_step=3", "--json"]) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert (error["type"], error["exit_code"]) == ("UserError", 2)
    assert error["problems"][0]["where"] == "trainer.max_step"
    assert captured.err == ""


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (Preempted("later"), 75),
        (DstuneError("broken"), 1),
        (KeyboardInterrupt(), 1),
        (PermissionError(13, "Permission denied", "/home/other/run"), 2),
    ],
)
def test_exit_codes_of_errors(monkeypatch, raised, code, capsys):
    def run(arguments):
        raise raised

    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["train"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_an_unexpected_exception_keeps_its_traceback():
    code = "import dstune.cli as c; c.run = lambda a: 1 / 0; c.main(['train'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("buffering", ["", "1"])  # the write fails, or the flush at the end
def test_a_reader_that_goes_away(buffering):
    script = f"(sleep 0.5; exec {sys.executable} -m dstune --help) | true; exit ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": buffering}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1)
    assert done.stderr == ""


# ---- train ----


def test_train_writes_run_yaml_and_ends_with_the_summary(launched, capsys):
    assert cli.main(["train", "trainer.max_steps=3", "run.name=mine"]) == 0
    ((config, run_dir),) = launched.calls
    assert run_dir.parent == Path("runs/mine")
    written = read_run(run_dir / "run.yaml")
    assert written.config == config
    assert written.overrides == ["experiment=quickstart", "trainer.max_steps=3", "run.name=mine"]
    assert config.trainer.max_steps == 3
    captured = capsys.readouterr()
    assert "held-out loss  1.5000" in captured.out
    assert f"run {run_dir} starts" in captured.err


def test_train_as_json_prints_the_result_alone(launched, capsys):
    assert cli.main(["train", "--json", "run.dir=r"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3


def test_train_with_the_path_of_a_run_continues_it(launched, capsys):
    assert cli.main(["train", "trainer.max_steps=3", "run.dir=r"]) == 0
    assert cli.main(["train", "r", "trainer.max_steps=3"]) == 0
    assert "r was completed already" in capsys.readouterr().err
    assert len(launched.calls) == 1
    launched.code = 75
    assert cli.main(["train", "r", "trainer.max_steps=5"]) == 75
    assert "continue with: dstune train r" in capsys.readouterr().err
    assert read_run(Path("r/run.yaml")).config.trainer.max_steps == 5
    assert cli.main(["train", "r", "model=minilm"]) == 2
    assert "the groups of an existing run cannot be changed" in capsys.readouterr().err


def test_nothing_is_left_of_a_run_that_cannot_start(monkeypatch):
    def refuse(config, stage, origins=()):
        raise UserError(Problem("model.path", "absent"))

    monkeypatch.setattr(preflight, "resolve_run", refuse)
    assert cli.main(["train", "run.dir=r"]) == 2
    assert not Path("r").exists()


def test_cfg_shows_instead_of_training(launched, capsys):
    assert cli.main(["train", "--cfg", "job", "trainer.max_steps=7"]) == 0
    assert "max_steps: 7" in capsys.readouterr().out
    assert launched.calls == []
    assert cli.main(["train", "run.dir=r", "trainer.max_steps=3"]) == 0
    capsys.readouterr()
    assert cli.main(["train", "r", "--cfg", "job", "trainer.max_steps=8"]) == 0
    printed = capsys.readouterr().out
    assert "max_steps: 8" in printed
    assert "dir: r" in printed
    assert len(launched.calls) == 1


# ---- inside another launch ----


@pytest.fixture
def inside(monkeypatch):
    """`dstune.rank.worker` replaced by one that prepares on rank 0 and notes what it got."""
    noted = []

    def main_inside(env, prepare_run, prints=True):
        noted.append(env)
        if env.rank:
            return SimpleNamespace(code=0)
        try:
            noted.append(prepare_run())
            return SimpleNamespace(code=0)
        except DstuneError as error:
            noted.append(error)
            return SimpleNamespace(code=error.exit_code)

    def exit_now(code):
        noted.append(code)

    monkeypatch.setitem(sys.modules, "dstune.rank.worker", SimpleNamespace(main_inside=main_inside))
    monkeypatch.setattr("dstune.rank.process.exit_now", exit_now)
    for name in (*train.NO_TELEMETRY, *train.OFFLINE):
        monkeypatch.setenv(name, "0")
    return noted


def as_rank(monkeypatch, rank, size=2):
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    return RankEnv(rank, size, rank, size, "environment")


def test_rank_0_prepares_the_run(monkeypatch, inside, launched, capsys):
    env = as_rank(monkeypatch, 0)
    assert cli.main(["train", "trainer.max_steps=3", "run.dir=r"]) == 0
    assert inside[0] == env
    config, run_dir, place = inside[1]
    assert place == run_dir
    assert (config.trainer.max_steps, run_dir) == (3, Path("r"))
    assert inside[2] == 0
    assert launched.calls == []
    assert json.loads(Path("r/launch.json").read_text())["processes"] == 2
    assert os.environ["HF_HUB_OFFLINE"] == "0"  # it may still have to ask the hub


def test_other_ranks_prepare_nothing_and_stay_off_the_net(monkeypatch, inside):
    env = as_rank(monkeypatch, 1)
    assert cli.main(["train", "trainer.max_steps=3", "run.dir=r"]) == 0
    assert inside == [env, 0]
    assert not Path("r").exists()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_the_flag_that_launchers_put_before_the_verb_is_dropped(monkeypatch, inside, flag):
    env = as_rank(monkeypatch, 1)
    assert cli.main([flag, "train", "trainer.max_steps=3", "run.dir=r"]) == 0
    assert inside == [env, 0]


def test_that_flag_outside_a_launcher_is_refused(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.main(["--local_rank=0", "train"]) == 2
    assert "fix: remove it" in capsys.readouterr().err


def test_a_world_of_one_is_a_worker_too(monkeypatch, inside):
    as_rank(monkeypatch, 0, size=1)
    assert cli.main(["train", "run.dir=r"]) == 0
    assert len(inside) == 3


@pytest.mark.parametrize("arguments", [["trainer.max_stepp=3"], ["--max-steps=3"], ["runs/none"]])
def test_a_mistake_inside_a_launch_is_raised_where_all_ranks_hear_of_it(monkeypatch, inside, arguments, capsys):
    as_rank(monkeypatch, 0)
    assert cli.main(["train", *arguments]) == 2
    assert isinstance(inside[1], UserError)
    assert capsys.readouterr().err == ""  # the worker prints it once


def test_flags_that_show_are_answered_by_rank_0_alone(monkeypatch, inside, capsys):
    as_rank(monkeypatch, 1)
    assert cli.main(["train", "--cfg", "job"]) == 0
    assert capsys.readouterr().out == ""
    as_rank(monkeypatch, 0)
    assert cli.main(["train", "--cfg", "job"]) == 0
    assert "trainer:" in capsys.readouterr().out
    assert inside == []


# ---- completion ----


def test_completion_scripts_and_queries(tmp_path):
    script = dstune_process("completion", "bash", cwd=tmp_path)
    assert script.returncode == 0
    assert "complete" in script.stdout
    query = dstune_process("-sc", "query=bash", env={"COMP_LINE": "dstune trai", "COMP_POINT": "11"}, cwd=tmp_path)
    assert query.stdout.split() == ["train"]


def test_the_directory_of_a_trial_is_a_path_although_it_looks_like_an_override(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = run_config(run=RunSection(dir="sweep/lr=0.1"))
    Path("sweep/lr=0.1").mkdir(parents=True)
    write_run(Path("sweep/lr=0.1/run.yaml"), Composed(config, []))
    assert cli.main(["train", "sweep/lr=0.1", "--cfg", "job", "trainer.seed=5"]) == 0
    assert "seed: 5" in capsys.readouterr().out
    assert cli.main(["train", "sweep/lr=0.2", "--cfg", "job"]) == 2
