"""A pure function from a run to the script of its SLURM job.

The script stays in the run directory, where users can read it, or submit it by hand to continue the run in a new job.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from dstune.config.run_file import variables_for_ranks
from dstune.config.schema import RunConfig
from dstune.core.child_python import python_path
from dstune.core.errors import Problem, UserError
from dstune.launch.agents.task import Settings
from dstune.launch.commands import ALWAYS, UNLESS_SET, inherited, interface_variables
from dstune.launch.local.warm import rank_imports
from dstune.launch.slurm.config import ContainerRuntime, SlurmConfig

SCRIPT = Path("launch") / "job.sbatch"
REQUEUE = 85
"""Exit code of `slurm.job end` that makes the script return the job to the queue."""
NOTHING_LEFT = 10
"""Exit code of `slurm.job begin` if an earlier job of the chain has already ended the run."""


def job_script(
    config: RunConfig, launch: SlurmConfig, run_dir: Path, parent_env: Mapping[str, str], module: str = "dstune.worker"
) -> str:
    """Return the script. It contains the names of variables that the ranks inherit, but not their values.

    module: each rank runs it, with the run directory as its argument.

    Raises:
        UserError: an unset variable in `launch.export_env`; a path with a control character, such as a line break.
    """
    run = run_dir.absolute()
    for key, path in (("run.dir", str(run)), ("working directory", str(Path.cwd()))):
        if not path.isprintable():
            raise UserError(Problem(key, "its path has a control character in it", "use another folder", path))
    names = sorted(inherited(config, parent_env))
    lines = [
        "#!/usr/bin/env bash",
        f"# {config.run.name}: made by `dstune train launch=slurm`, and made anew by each start.",
        f"# By hand: sbatch {shlex.quote(str(run / SCRIPT))}   (continues the run with its current run.yaml)",
        *(f"#SBATCH {option}" for option in options(config, launch, run, names)),
        "",
        f"run={shlex.quote(str(run))}",
        f"python={shlex.quote(sys.executable)}",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        *_variables(launch, run, names, parent_env),
        *launch.setup,
        "",
        '"$python" -m dstune.launch.slurm.job begin "$run"; code=$?',
        f"[[ $code -eq {NOTHING_LEFT} ]] && exit 0  # an earlier job of the chain has ended the run",
        "[[ $code -eq 0 ]] || exit $code",
        "",
        "# An agent on each node starts the ranks of the node, and restarts them together with those of the others.",
        f'"$python" -m dstune.launch.slurm.job run "$run" srun {" ".join(_srun(launch))} \\',
        f"  {' '.join(_agent(config, launch, run, module))}",
        "code=$?",
        "",
        '"$python" -m dstune.launch.slurm.job end "$run" $code; code=$?',
        f"if [[ $code -eq {REQUEUE} ]]; then",
        *_requeue_lines(launch),
        "fi",
        "exit $code",
        "",
    ]
    return "\n".join(lines)


def options(config: RunConfig, launch: SlurmConfig, run: Path, names: list[str]) -> list[str]:
    """Return the options of sbatch, in the order of its manual. names: variables that the job inherits."""
    log = log_pattern(run, "slurm-%j.log")
    lines = [
        f"--job-name={_quoted(config.run.name)}",
        f"--nodes={launch.nodes + launch.spares}",
        f"--ntasks-per-node={launch.ranks_per_node}",
    ]
    valued = {
        "gres": f"gpu:{launch.gpus}" if launch.gpus else None,
        "cpus-per-task": launch.cpus,
        "mem": launch.memory,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "time": launch.time,
    }
    lines += [f"--{name}={_quoted(str(value))}" for name, value in valued.items() if value is not None]
    lines += [
        f"--output={_quoted(log)}",
        "--open-mode=append",
        # The ranks save and exit on it.
        f"--signal=USR1@{launch.signal_seconds}",
        "--requeue" if launch.requeue else "--no-requeue",
        # The agents replace lost nodes.
        *(["--no-kill"] if launch.restarts and launch.nodes + launch.spares > 1 else []),
        f"--export={','.join(names) or 'NIL'}",
    ]
    return lines + launch.directives


def _variables(launch: SlurmConfig, run: Path, names: list[str], parent_env: Mapping[str, str]) -> list[str]:
    constants = dict(ALWAYS) | interface_variables(launch.interface) | {"DSTUNE_CONSOLE": "plain"}
    constants |= variables_for_ranks(run)
    if path := python_path(parent_env.get("PYTHONPATH", "")):
        constants["PYTHONPATH"] = path
    lines = [f"export {name}={shlex.quote(value)}" for name, value in constants.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in UNLESS_SET.items() if name not in names]
    if "OMP_NUM_THREADS" not in names:
        lines.append('export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"')
    return lines


def _srun(launch: SlurmConfig) -> list[str]:
    words = [
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        f"--cpus-per-task={(launch.cpus or 1) * launch.ranks_per_node}",
        "--export=ALL",  # also variables that this script sets, which sbatch's --export does not name
    ]
    return words + [shlex.quote(option) for option in launch.srun_options]


def settings_of(config: RunConfig, launch: SlurmConfig) -> Settings:
    """Return the settings that all agents of the job share."""
    return Settings(
        nodes=launch.nodes,
        expected=launch.nodes + launch.spares,
        min_nodes=launch.min_nodes or launch.nodes,
        restarts=launch.restarts,
        silence_seconds=launch.silence_seconds,
        grace_seconds=launch.grace_seconds,
        requeues=launch.requeue,
        interface=launch.interface,
        signals=sorted({*config.run.signals, "SIGUSR1"}),
        warm=launch.warm,
        imports=list(rank_imports(config)),
    )


def _agent(config: RunConfig, launch: SlurmConfig, run: Path, module: str) -> list[str]:
    settings = shlex.quote(json.dumps(settings_of(config, launch).to_json()))
    worker = ["-u", "-m", "dstune.launch.agents", '"$run"', settings, str(launch.ranks_per_node), module]
    if launch.container is None:
        return ['"$python"', *worker]
    mounts = [str(run), str(Path.cwd()), *launch.container_mounts]
    image, python = shlex.quote(launch.container), shlex.quote(launch.container_python)
    if launch.container_runtime is ContainerRuntime.pyxis:
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        return [
            f"--container-image={image}",
            f"--container-mounts={shlex.quote(pairs)}",
            '--container-workdir="$PWD"',
            python,
            *worker,
        ]
    binds = [f"--bind {shlex.quote(mount)}" for mount in mounts]
    nvidia = ["--nv"] if launch.gpus else []
    return ["apptainer", "exec", *nvidia, *binds, '--pwd "$PWD"', image, python, *worker]


def _requeue_lines(launch: SlurmConfig) -> list[str]:
    """Return the lines that run when the run must continue in another job."""
    if not launch.requeue:
        return ["  code=75  # saved; the next job of the chain, or `dstune train`, continues"]
    return [
        "  code=75",
        '  scontrol requeue "$SLURM_JOB_ID" || echo "dstune: the job cannot be requeued; dstune train $run continues it" >&2',
    ]


def log_pattern(folder: Path, name: str) -> str:
    """Return the path of a log in `folder` for `--output`. name: has sbatch's symbols, such as `%j` for the number of the job."""
    return str(folder / "logs").replace("%", "%%") + f"/{name}"  # `%%` is a `%` that stands for itself


def _quoted(value: str) -> str:
    """Quote a value with spaces for an option line of sbatch."""
    return f'"{value}"' if any(character.isspace() for character in value) else value
