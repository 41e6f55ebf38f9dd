"""Values of the environment are shown by their reference, in every way in which dstune writes."""

import io
import json
import logging
import os
import pickle
import sys
from contextlib import suppress

import pytest
from support.configs import run_config

from dstune.config import schema
from dstune.config.compose import compose
from dstune.config.convert import EnvironmentText
from dstune.config.run_file import read_run, write_run
from dstune.config.validate import validate
from dstune.core import secrets as module
from dstune.core.errors import Problem, TrainingFailed, UserError, from_json, to_json
from dstune.core.secrets import is_secret, publish, redact, redact_output, redacted, remember
from dstune.core.text import Filtered
from dstune.launch import records
from dstune.tracking.trackers.wandb import WandbConfig

VALUE = 'planted "välue" 123'


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "_public", set())


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setenv("PLANTED", VALUE)
    return EnvironmentText(f"/data/{VALUE}/x", "/data/${oc.env:PLANTED}/x")


def test_the_whole_text_and_the_variable_alone_are_replaced(planted):
    assert redact(f"no such file: {planted}") == "no such file: /data/${oc.env:PLANTED}/x"
    assert redact(f"{VALUE}/y") == "${oc.env:PLANTED}/y"
    assert redact("nothing here") == "nothing here"


def test_json_is_searched_as_it_is_written(planted):
    assert VALUE not in json.dumps({"a": VALUE})  # quotes and letters beyond ASCII are escaped
    assert json.loads(redact(json.dumps({"a": str(planted)}))) == {"a": "/data/${oc.env:PLANTED}/x"}


def test_numbers_and_keys_of_a_file_stay(monkeypatch, tmp_path):
    from dstune.rank.finalize import write_result

    monkeypatch.setenv("DB_PASSWORD", "123456")
    result = {"tokens": 1234567, "checkpoint": "/x/123456", "123456": [0.123456, ("123456",), None, True]}
    placeholder = "${oc.env:DB_PASSWORD}"
    expected = {"tokens": 1234567, "checkpoint": f"/x/{placeholder}", "123456": [0.123456, [placeholder], None, True]}
    assert redacted(result) == expected
    write_result(tmp_path, result)
    assert records.read_result(tmp_path) == expected
    records.write_json(tmp_path / "launch.json", result)
    assert json.loads((tmp_path / "launch.json").read_text()) == expected


def test_a_reference_with_a_quoted_default_leaves_json_whole(monkeypatch, tmp_path):
    from dstune.rank.finalize import write_result

    reference = '${oc.env:ROWS,"a b"}/rows'
    remember("/mnt/secret/rows", reference)
    write_result(tmp_path, {"export": "/mnt/secret/rows"})
    assert records.read_result(tmp_path) == {"export": reference}


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "TOKEN",
        "WANDB_API_KEY",
        "OPENAI_APIKEY",
        "PGPASSWORD",
        "my_secret",
        "MYSQL_PWD",
        "X_CONNECTION_STRING",
    ],
)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["MONKEY", "TURKEY", "TOKENS", "KEYBOARD", "HF_TOKEN_PATH", "PWD", "OLDPWD", "PAT"])
def test_names_of_other_variables(name):
    assert not is_secret(name)


def test_a_proxy_needs_no_scheme_to_hold_a_password():
    assert is_secret("https_proxy", "me:planted@proxy.example:3128") and not is_secret(
        "HTTP_PROXY", "proxy.example:3128"
    )
    assert is_secret("SLACK_WEBHOOK_URL", "https://hooks.example/T0/B0/x") and is_secret("REGISTRY_CREDS")


def test_variables_that_hold_a_key_by_their_name_are_always_kept_back(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("HF_HOME", "/somewhere/else")
    assert redact("hf_abcdefghijkl at /somewhere/else") == "${oc.env:HF_TOKEN} at /somewhere/else"


def test_short_values_stay_readable(monkeypatch):
    monkeypatch.setenv("MODE", "auto")
    remember("auto", "${oc.env:MODE}")
    assert redact("precision auto") == "precision auto"


def test_the_path_of_the_run_directory_is_public(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    remember("/scratch/me/rows.jsonl", "${oc.env:SCRATCH}/rows.jsonl")
    publish("/scratch/me/runs/one")
    assert redact("/scratch/me/runs/one") == "/scratch/me/runs/one"


def test_errors_hold_the_reference_wherever_they_go(planted):
    problem = Problem(f"{planted}:3", f"the row of {planted} is bad", f"mend {planted}", planted)
    error = UserError(problem)
    texts = [str(error), to_json(error), str(from_json(to_json(error))), str(pickle.loads(pickle.dumps(error)))]
    texts += [str(TrainingFailed(f"lost {planted}")), to_json(TrainingFailed(f"lost {planted}"))]
    for text in texts:
        assert VALUE not in text and json.dumps(VALUE)[1:-1] not in text
        assert "${oc.env:PLANTED}" in text


def test_a_configuration_that_was_sent_to_another_rank_is_known_there(planted, monkeypatch):
    sent = pickle.dumps(planted)
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.delenv("PLANTED")
    pickle.loads(sent)
    assert redact(str(planted)) == "/data/${oc.env:PLANTED}/x"


def test_prints_tracebacks_and_loggers_are_redacted(planted, monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    handler = logging.StreamHandler(err)
    logger = logging.getLogger("a.library")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)  # handlers of other tests may write to streams that are closed
    redact_output()
    print("rows of", planted)
    logger.warning("cannot read %s", planted)
    try:
        raise FileNotFoundError(str(planted))
    except FileNotFoundError:
        sys.excepthook(*sys.exc_info())
    assert isinstance(sys.stdout, Filtered)
    written = out.getvalue() + err.getvalue()
    assert VALUE not in written and written.count("${oc.env:PLANTED}") == 3


def test_a_full_disk_refuses_no_print_of_a_rank(monkeypatch):
    """The logs of ranks are in the run directory, on the disk that checkpoints fill."""
    with open("/dev/full", "w") as out, open("/dev/full", "w", buffering=1) as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        redact_output()
        print("x" * 2**16, flush=True)
        print("step 1", file=sys.stderr)
        for stream in (out, err):
            with suppress(OSError):
                stream.close()
    with open(os.devnull, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        redact_output()
    with pytest.raises(ValueError, match="closed file"):
        print("any other fault is shown")


@pytest.mark.parametrize("key", ["run.name", "tracking.project", "tracking.group", "tracking.wandb.entity"])
def test_a_name_cannot_come_from_the_environment(key, monkeypatch):
    monkeypatch.setenv("NAME", "planted-name")
    value = EnvironmentText("planted-name", "${oc.env:NAME}")
    sections = {
        "run.name": {"run": schema.RunSection(name=value)},
        "tracking.project": {"tracking": schema.tracking_class()(project=value)},
        "tracking.group": {"tracking": schema.tracking_class()(group=value)},
        "tracking.wandb.entity": {"tracking": schema.tracking_class()(wandb=WandbConfig(entity=value))},
    }
    with pytest.raises(UserError) as caught:
        validate(run_config(**sections[key]))
    (problem,) = caught.value.problems
    assert (problem.where, problem.value) == (key, "${oc.env:NAME}")
    assert problem.fix.startswith(f'{key}="$NAME"')
    assert "planted-name" not in str(caught.value)


@pytest.mark.parametrize("text", ["${ oc.env:MY_TOKEN}", "${oc.env :MY_TOKEN}", "about ${\toc.env : MY_TOKEN}"])
def test_spaces_in_a_reference_do_not_give_its_value_away(text, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "planted0123456789")
    composed = compose(["data=chitchat", f"tracking.notes='{text}'"])
    assert composed.config.tracking.notes.endswith("planted0123456789")
    write_run(tmp_path / "run.yaml", composed)
    written = (tmp_path / "run.yaml").read_text()
    assert "planted" not in written and "${oc.env:" in written
    assert read_run(tmp_path / "run.yaml").config == composed.config
