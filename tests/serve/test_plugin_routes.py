"""Routes and engines of plugins, as docs/plugins.md has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.plugins import folder_of_plugins

from dstune.cli import main
from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.serve import options
from tests.support.serving import run

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
BUDGET = re.search(r"```python\n# budget\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
ENGINE = """
import dstune

@dstune.engine
class Echo(dstune.EngineKind):
    name = "echo"
    options = frozenset({"--dtype"})

    def check(self, arguments):
        if arguments.dtype != "float32":
            yield dstune.Problem("--dtype", "echo is exact", "--dtype float32", arguments.dtype or "")

    def engine_factory(self, arguments, key, **place):
        return lambda source, base: ("echo", source, base, place)
"""

folder = pytest.fixture(folder_of_plugins)


def trusted(folder: Path, content: str) -> None:
    (folder / "own.py").write_text(content)
    (folder / "dstune.yaml").write_text("plugins: [./own.py]\n")
    assert main(["trust", ".", "--yes"]) == 0


def test_routes_of_a_plugin_are_served_behind_keys(folder: Path, tmp_path: Path) -> None:
    plugins.load_built_ins()
    (folder / "budget.py").write_text(BUDGET)
    plugins.activate(["./budget.py"])
    arguments = options.parsed(["model", "--budget", "7"])
    (service,) = (service for service in options.served(arguments) if service.name == "budget")
    service.open(arguments, tmp_path, tmp_path)

    async def test(found):
        found.gateway.add_routes(service.routes(found.gateway))
        client, admin = found.client(), found.client(found.admin)
        assert (await client.get("/v1/budget")).json() == {"key": "one", "tokens": 7}
        assert (await found.client("wrong").get("/v1/budget")).status_code == 401
        assert (await client.post("/v1/budget", json={"tokens": 9})).status_code == 403
        refusal = await admin.post("/v1/budget", json={"tokens": "many"})
        assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "tokens")
        assert (await admin.post("/v1/budget", json={"tokens": 9})).json() == {"tokens": 9}
        assert (await client.get("/v1/budget")).json()["tokens"] == 9

    state = tmp_path / "state"
    state.mkdir()
    run(test, state)


def test_the_options_of_a_plugin_are_those_of_serve_where_the_folder_is_trusted(folder: Path, capsys) -> None:
    (folder / "own.py").write_text(BUDGET)
    (folder / "dstune.yaml").write_text("plugins: [./own.py]\n")
    assert main(["serve", "model", "--budget", "7"]) == 2
    assert "you have not trusted this folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "--budget" not in capsys.readouterr().out
    trusted(folder, BUDGET)
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "--budget N" in capsys.readouterr().out


def test_an_engine_of_a_plugin_is_chosen_by_its_name(folder: Path, capsys) -> None:
    trusted(folder, ENGINE)
    assert main(["serve", "model", "--engine", "echo", "--threads", "3"]) == 2
    found = capsys.readouterr().err
    assert "--dtype: echo is exact" in found
    assert "--threads=3: it is of the engine local" in found
    arguments = options.parsed(["model", "--engine", "echo", "--dtype", "float32"])
    options.check(arguments)
    assert arguments.engine_kind.engine_factory(arguments, "", limits=1)("source", "base")[:3] == (
        "echo",
        "source",
        "base",
    )


def test_an_option_that_two_routes_have_is_refused(folder: Path) -> None:
    plugins.load_built_ins()
    (folder / "twice.py").write_text(BUDGET.replace("--budget", "--host"))
    plugins.activate(["./twice.py"])
    with pytest.raises(UserError, match="--host"):
        options.parsed(["model"])
