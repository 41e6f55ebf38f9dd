"""Builds a Dockerfile without a daemon and without a registry: buildah, on a base that debootstrap makes.

Needs root, and Debian's buildah, netavark, debootstrap; a mirror of Debian and an index of Python packages as this machine
is set up for them.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap", "/usr/lib/podman/netavark": "netavark"}
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def missing() -> str | None:
    absent = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if absent:
        return f"not installed (Debian: apt-get install {' '.join(absent)})"
    return None if os.geteuid() == 0 else "building an image in a chroot needs root"


def _limits() -> dict[str, tuple[int, int]]:
    kinds = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    return {name: resource.getrlimit(kind) for name, kind in kinds.items()}


class Images:
    """A storage of images in `root`."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        # buildah's own defaults are refused where this process may not raise its limits.
        limits = [f'"{name}={hard}:{hard}"' for name, (_, hard) in _limits().items() if hard != resource.RLIM_INFINITY]
        (root / "containers.conf").write_text(f"[containers]\ndefault_ulimits = [{', '.join(limits)}]\n")
        (root / "pip.conf").write_text("\n".join(["[global]", "cert = /run/host-ca.crt", "timeout = 180", ""]))
        self.env = {**os.environ, "CONTAINERS_CONF": str(root / "containers.conf"), "BUILDAH_ISOLATION": "chroot"}
        # What this process was started with (wheels, indexes) is not part of an image, nor made for its C library.
        self.env = {name: value for name, value in self.env.items() if not name.startswith("PIP_")}

    def call(self, *words: str, timeout: float = 3000) -> str:
        storage = [
            "--root",
            str(self.root / "storage"),
            "--runroot",
            str(self.root / "run"),
            "--storage-driver",
            "overlay",
        ]
        done = subprocess.run(
            ["buildah", *storage, *words], env=self.env, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"buildah {words[0]}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()

    def base(self, name: str, release: str) -> None:
        """An image of Debian's `release` under the name that `FROM` uses, unless it is there from an earlier test."""
        if f"docker.io/library/{name}" in self.call("images", "--format", "{{.Name}}:{{.Tag}}").split():
            return
        tree = self.root / release
        done = subprocess.run(["debootstrap", "--variant=minbase", release, str(tree)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        for setting in Path("/etc/apt/apt.conf.d").glob("*"):  # proxies and mirrors of this machine
            if b"cquire" in setting.read_bytes():
                shutil.copy(setting, tree / "etc" / "apt" / "apt.conf.d")
        container = self.call("from", "scratch")
        self.call("add", "--quiet", container, str(tree), "/")
        self.call("config", "--cmd", "bash", container)
        self.call("commit", "--quiet", container, f"docker.io/library/{name}")
        self.call("rm", container)
        shutil.rmtree(tree)

    def build(self, dockerfile: Path, context: Path, name: str) -> None:
        mounts = [f"{CERTIFICATES}:/run/host-ca.crt:ro", f"{self.root / 'pip.conf'}:/etc/pip.conf:ro"]
        volumes = [word for mount in mounts for word in ("--volume", mount)]
        # OCI's format has no SHELL.
        form = ["--format", "docker"]
        self.call("bud", "--pull=never", *form, *volumes, "--tag", name, "--file", str(dockerfile), str(context))

    def start(self, name: str) -> str:
        """A container of the image, for `run`."""
        return self.call("from", name)

    def run(self, container: str, words: Sequence[str], mounts: Sequence[str] = (), timeout: float = 600) -> str:
        volumes = [word for mount in mounts for word in ("--volume", mount)]
        return self.call("run", *volumes, container, "--", *words, timeout=timeout)

    def configuration(self, name: str) -> dict[str, object]:
        return json.loads(self.call("inspect", "--type", "image", name))["OCIv1"]["config"]


if __name__ == "__main__":
    print(missing() or Images(Path(sys.argv[1])).base("debian:12-slim", "bookworm"))
