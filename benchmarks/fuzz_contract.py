#!/usr/bin/env python3
"""Fuzz the fine-tuning API by schemathesis with OpenAI's public OpenAPI document, against a server whose jobs are stubs.

usage: python benchmarks/fuzz_contract.py OPENAPI.json [--schemathesis PROGRAM] [--phases coverage,fuzzing] [--seconds 600]
    [--seed 1]

OPENAPI.json: `openapi.json` of the public repository openai/openai-openapi. schemathesis has an environment of its own
(`pip install schemathesis`). Checks: no 5xx and no 422; answers of 200 as the document has them; an error is
`{"error": {message, type, param, code}}` without a traceback; `x-request-id` always. Exit code of schemathesis.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

from tests.support.killing import stub_server

SERVED = ("/files", "/uploads", "/fine_tuning", "/batches", "/models")
CHECKS = "not_a_server_error,response_schema_conformance,unsupported_method,ignored_auth"
"""Not the types of contents: the document says that a file is JSON."""
HOOKS = """
import schemathesis


@schemathesis.check
def keeps_the_contract(ctx, response, case):
    assert response.headers["x-request-id"][0].startswith("req_")
    assert response.status_code != 422
    if response.status_code >= 400:
        error = response.json()
        assert set(error) == {"error"}, error
        assert set(error["error"]) == {"message", "type", "param", "code"}, error
        assert "Traceback (" not in response.text
    if response.status_code == 409:
        assert response.headers["x-should-retry"] == ["false"]
"""


def main(document: Path, program: str, phases: str, seconds: int, seed: int) -> int:
    described = json.loads(document.read_text())
    described["paths"] = {path: value for path, value in described["paths"].items() if path.startswith(SERVED)}
    with tempfile.TemporaryDirectory(prefix="dstune-contract-") as name:
        folder = Path(name)
        (folder / "hooks.py").write_text(HOOKS)
        (folder / "served.json").write_text(json.dumps(described))
        state = folder / "state"
        state.mkdir(mode=0o700)
        with stub_server(state) as (url, key):
            command = [
                program, "run", str(folder / "served.json"), "--url", url, "--header", f"Authorization: Bearer {key}", "--seed",
                str(seed), "--phases", phases, "--max-time", str(seconds), "--continue-on-failure",
                "--checks", f"{CHECKS},keeps_the_contract", "--suppress-health-check", "all", "--warnings", "off",
            ]  # fmt: skip
            env = os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": name}
            return subprocess.run(command, env=env, cwd=name).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    parser.add_argument("--schemathesis", default="schemathesis", metavar="PROGRAM")
    parser.add_argument("--phases", default="coverage,fuzzing")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(main(arguments.document, arguments.schemathesis, arguments.phases, arguments.seconds, arguments.seed))
