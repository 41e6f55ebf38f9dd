"""Models and data before a launch: folders, samples and the hub, with the hub's real exceptions and no connection."""

import errno
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from dstune import samples
from dstune.config.data_schema import DataConfig, OnBadRow, SourceConfig
from dstune.config.schema import InitialWeights, ModelConfig, Precision, TrainerConfig
from dstune.core.errors import Problem, UserError
from dstune.data import inputs
from dstune.launch import preflight
from dstune.launch.first_rows import first_row_problems, hardware_problems
from dstune.launch.preflight import looks_local, resolve_model, resolve_run
from tests.support.configs import run_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def folder(path, *names, config=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    return path


def quiet(text):
    pass


def refusal(path, **fields):
    with pytest.raises(UserError) as caught:
        resolve_model(ModelConfig(path=str(path), **fields), quiet)
    return str(caught.value)


# ---- folders ----


def test_a_whole_folder_passes(tmp_path):
    config = ModelConfig(path=str(folder(tmp_path / "model", "model.safetensors", "tokenizer.json")))
    assert resolve_model(config, quiet) == config


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["tokenizer.json"], r"there are no weights"),
        (
            ["tokenizer.json", "pytorch_model.bin"],
            r"only pickled weights \(\.bin\)[\s\S]*AutoModel\.from_pretrained[\s\S]*AutoTokenizer",
        ),
        (["tokenizer.json", "model.gguf"], r"only GGUF weights"),
        (["model.safetensors"], r"no tokenizer files"),
    ],
)
def test_incomplete_folders(tmp_path, names, expected):
    message = refusal(folder(tmp_path / "model", *names))
    assert re.search(expected, message)
    assert "model.path=" in message


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("BertModel", "AutoModel"),
    ],
)
def test_pickled_weights_are_converted_with_their_head(tmp_path, architecture, auto):
    model = folder(tmp_path / "model", "tokenizer.json", "pytorch_model.bin")
    (model / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert f" {auto}.from_pretrained(PATH)" in refusal(model)


def test_weights_are_not_needed_for_random_ones(tmp_path):
    config = ModelConfig(path=str(folder(tmp_path / "model", "tokenizer.json")), weights=InitialWeights.random)
    assert resolve_model(config, quiet) == config


def test_a_missing_shard_is_named(tmp_path):
    model = folder(tmp_path / "model", "tokenizer.json", "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 weight file(s) of its index are missing, first model-2.safetensors" in refusal(model)


def test_folders_that_are_no_models(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "this is an adapter" in refusal(tmp_path / "adapter")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("")
    assert f"model.path={tmp_path / 'run' / 'export'}" in refusal(tmp_path / "run")
    folder(tmp_path / "outer" / "inner")
    assert f"fix: model.path={tmp_path / 'outer' / 'inner'}" in refusal(tmp_path / "outer")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "no readable config.json" in refusal(tmp_path / "broken")


def test_mistyped_paths(tmp_path):
    folder(tmp_path / "smollm")
    assert f"did you mean {tmp_path / 'smollm'}?" in refusal(tmp_path / "smolm")
    assert "this folder does not exist" in refusal("./model")
    assert "write the path out" in refusal("~/model")
    (tmp_path / "weights.safetensors").touch()
    assert "this is a file" in refusal(tmp_path / "weights.safetensors")
    assert "no revisions" in refusal(folder(tmp_path / "m", "model.safetensors", "tokenizer.json"), revision="main")


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("gpt2", False),
        ("meta-llama/Llama-3.1-8B", False),
        ("./gpt2", True),
        ("../a/b", True),
        ("/a", True),
        ("a/b/c", True),
        ("~/a", True),
        ("a b", True),
    ],
)
def test_hub_ids_and_paths(path, local):
    assert looks_local(path) is local


def test_a_mistyped_run_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_local("runs/mine")
    for run in ("runs/mine2", "runs/name/2026"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "run.yaml").touch()
        assert looks_local("runs/mine")
        (tmp_path / run / "run.yaml").unlink()


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}, False),  # transformers has its own
        ({"model_type": "somebodys", "auto_map": {"AutoConfig": "x.Y"}}, True),
        ({"auto_map": {"AutoConfig": "x.Y"}}, True),
    ],
)
def test_remote_code_needs_permission(tmp_path, config, needed):
    model = folder(tmp_path / "model", "model.safetensors", "tokenizer.json", config=config)
    if needed:
        assert "model.trust_remote_code=false" in refusal(model)
    else:
        resolve_model(ModelConfig(path=str(model)), quiet)
    resolve_model(ModelConfig(path=str(model), trust_remote_code=True), quiet)


# ---- the hub ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose answers the test sets (`info` may be an exception to raise), and which notes what it is asked."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    snapshot = folder(tmp_path / "cache" / COMMIT, "model.safetensors", "tokenizer.json")
    names = ["config.json", "tokenizer.json", "model.safetensors"]
    state = SimpleNamespace(names=names, info=None, cached=True, requests=[], requested=[], snapshot=snapshot)

    def model_info(self, repo_id, *, revision=None, timeout=None):
        state.requested.append((repo_id, revision))
        if isinstance(state.info, Exception):
            raise state.info
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in state.names])

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, local_files_only=False):
        state.requests.append((revision, sorted(allow_patterns), local_files_only))
        if local_files_only and not state.cached:
            raise errors.LocalEntryNotFoundError("not in the cache")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def http(kind, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None, text="", json=dict)
    return kind(f"{status} Client Error", response=response)


def test_a_branch_becomes_a_commit_and_only_what_is_needed_is_downloaded(hub):
    hub.names += [
        "chat_template.jinja",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "onnx/config.json",
        "README.md",
        "modeling_x.py",
    ]
    messages = []
    resolved = resolve_model(ModelConfig(path="owner/name", revision="main"), messages.append)
    assert resolved.revision == COMMIT
    assert hub.requested == [("owner/name", "main")]
    assert hub.requests == [
        (COMMIT, ["chat_template.jinja", "config.json", "tokenizer.json"], False),
        (COMMIT, ["model.safetensors"], False),
    ]
    assert "owner/name at commit 0123456789ab" in messages[0]


def test_shards_and_remote_code_are_downloaded(hub):
    hub.names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    hub.names += ["model.safetensors.index.json", "modeling_x.py", "tokenizer.model"]
    resolve_model(ModelConfig(path="owner/name", trust_remote_code=True), quiet)
    assert {name for _, names, _ in hub.requests for name in names} == set(hub.names)


def test_random_weights_download_none(hub):
    resolve_model(ModelConfig(path="owner/name", weights=InitialWeights.random), quiet)
    assert hub.requests == [(COMMIT, ["config.json", "tokenizer.json"], False)]


def test_remote_code_is_refused_before_the_weights_are_downloaded(hub):
    (hub.snapshot / "config.json").write_text('{"model_type": "somebodys", "auto_map": {}, "x": 1}')
    resolve_model(ModelConfig(path="owner/name"), quiet)
    hub.requests.clear()
    (hub.snapshot / "config.json").write_text('{"model_type": "somebodys", "auto_map": {"AutoConfig": "a.B"}}')
    assert "model.trust_remote_code=false" in refusal("owner/name")
    assert len(hub.requests) == 1


def test_pickled_weights_are_refused_before_anything_is_downloaded(hub):
    hub.names = ["config.json", "pytorch_model.bin"]
    assert "only pickled weights" in refusal("owner/name")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("error", "key", "reason", "fix"),
    [
        (http(errors.GatedRepoError, 403), "model.path", "has to be granted", "https://huggingface.co/owner/name"),
        (http(errors.GatedRepoError, 401), "model.path", "has to be granted", "hf auth login"),
        (http(errors.RepositoryNotFoundError, 401), "model.path", "no such model", "https://huggingface.co/owner/name"),
        (http(errors.RepositoryNotFoundError, 404), "model.path", "no such model", "https://huggingface.co/owner/name"),
        (http(errors.RevisionNotFoundError, 404), "model.revision", "no such revision", "owner/name/tree/main"),
        (http(errors.HfHubHTTPError, 403), "model.path", "refuses access (403)", "https://huggingface.co/owner/name"),
        (http(errors.HfHubHTTPError, 404), "model.path", "(404)", "https://huggingface.co/owner/name"),
        (errors.HFValidationError("bad id"), "model.path", "neither a folder nor a hub id", "sample://"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache"), "HF_HOME", "cannot be written", "free space"),
    ],
)
def test_refusals_of_the_hub_name_the_page(hub, error, key, reason, fix):
    hub.info = error
    message = refusal("owner/name", revision="v2")
    assert message.startswith(f"{key}=")
    assert reason in message
    assert fix in message


@pytest.mark.parametrize("error", [http(errors.HfHubHTTPError, 503), ConnectionError("refused"), TimeoutError()])
def test_without_a_connection_the_cache_serves_or_exit_2(hub, error):
    hub.info = error
    messages = []
    assert resolve_model(ModelConfig(path="owner/name"), messages.append).revision == COMMIT
    assert "cannot be reached; using owner/name as cached" in messages[0]
    hub.cached = False
    message = refusal("owner/name")
    assert "the hub cannot be reached" in message
    assert "https://huggingface.co/owner/name" in message


def test_an_error_of_the_http_library_is_a_connection_problem(hub):
    kind = errors.HfHubHTTPError.__mro__[1]  # HTTPError of whatever library this release of huggingface_hub uses
    hub.info = kind("connection reset")
    assert resolve_model(ModelConfig(path="owner/name"), quiet).revision == COMMIT


def test_a_fault_of_our_own_is_not_called_a_connection_problem(hub):
    hub.info = AttributeError("a bug")
    with pytest.raises(AttributeError):
        resolve_model(ModelConfig(path="owner/name"), quiet)


def test_offline_by_choice(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model(ModelConfig(path="owner/name", revision="v1"), quiet).revision == COMMIT
    assert hub.requested == []
    assert hub.requests == [("v1", ["config.json"], True)]
    (hub.snapshot / "model.safetensors").unlink()
    assert "the cache holds this model without its weights" in refusal("owner/name")
    hub.cached = False
    message = refusal("owner/name", revision="v1")
    assert "HF_HUB_OFFLINE is set" in message
    assert "at revision v1" in message
    assert "https://huggingface.co/owner/name" in message


def test_a_folder_nearby_is_suggested_for_what_looks_like_a_hub_id(hub, tmp_path, monkeypatch):
    hub.info = http(errors.RepositoryNotFoundError, 404)
    folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert "or is model meant?" in refusal("modle")


# ---- data and samples ----


def test_every_problem_of_the_run_is_listed(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    data = DataConfig(train=str(tmp_path / "trian.jsonl"), test=str(tmp_path / "*.parquet"))
    model = ModelConfig(path=str(tmp_path / "none"), chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(UserError) as caught:
        resolve_run(run_config(model=model, data=data))
    problems = {problem.where: problem for problem in caught.value.problems}
    assert set(problems) == {"model.path", "data.train", "data.test", "model.chat_template"}
    assert problems["data.train"].fix == f"did you mean {tmp_path / 'train.jsonl'}?"
    assert problems["data.test"].reason == "no file matches"


def test_samples_are_fetched_and_checked_for_their_kind(tmp_path, monkeypatch):
    fetched, rows = [], tmp_path / "rows.jsonl"
    written(rows, {"prompt": "a", "completion": "b"})
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(samples, "resolve", lambda uri, fetch=True: (fetch and fetched.append(uri)) or rows)
    messages = []
    model, data = ModelConfig(path="sample://smollm2"), DataConfig(train="sample://chitchat")
    config = run_config(model=model, data=data)
    resolved = resolve_run(config, messages.append)
    split = resolved.data.split
    assert isinstance(split.validation, float), "the share of held-out rows is chosen here"
    assert resolved == replace(config, zero=resolved.zero, data=replace(config.data, split=split))
    assert fetched == ["sample://smollm2", "sample://chitchat"]
    assert "fetching sample://smollm2 (93 MB)" in messages
    with pytest.raises(UserError, match=r"model.path=sample://chitchat: this sample is no model"):
        resolve_run(run_config(model=ModelConfig(path="sample://chitchat"), data=data))


def test_a_sample_that_cannot_be_had_names_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path))

    def resolve(uri, fetch=True):
        raise UserError(Problem("sample://ner", "no connection", "connect"))

    monkeypatch.setattr(samples, "resolve", resolve)
    with pytest.raises(UserError, match=r"data.train=sample://ner: no connection"):
        preflight.check_data("data.train", "train", run_config(data=DataConfig(train="sample://ner")), quiet)


# ---- first rows and hardware ----


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def first_rows(config):
    return [problem for key, part, own in inputs.row_inputs(config) for problem in first_row_problems(own, part, key)]


def test_columns_that_do_not_fit_are_found_in_the_first_row(tmp_path):
    strange = written(tmp_path / "a.jsonl", {"question": "w1", "reply": "w2"})
    broken_later = written(tmp_path / "b.jsonl", {"prompt": "w1", "completion": "w2"}, {"prompt": "w1"})
    config = run_config(data=DataConfig(train=strange, validation=broken_later))
    [problem] = first_rows(config)
    assert problem.where == f"{strange}:1"
    assert "missing column" in problem.reason
    mapped = DataConfig(train=strange, columns={"prompt": "question", "completion": "reply"})
    assert first_rows(run_config(data=mapped)) == []
    assert first_rows(run_config(data=DataConfig(train=broken_later))) == []  # that is for the ranks to list


def test_a_bad_first_row_counts_unless_bad_rows_are_skipped(tmp_path):
    rows = written(tmp_path / "a.jsonl", {"messages": [{"role": "robot", "content": "w1"}]})
    [problem] = first_rows(run_config(data=DataConfig(train=rows)))
    assert (problem.where, "robot" in problem.reason, "on_bad_row" in problem.fix) == (f"{rows}:1", True, True)
    assert first_rows(run_config(data=DataConfig(train=rows, on_bad_row=OnBadRow.skip))) == []


def test_behind_a_bad_first_row_the_others_are_listed_too(tmp_path):
    good, bad = {"prompt": "w1", "completion": "w2"}, {"prompt": "w1", "completion": ""}
    rows = written(tmp_path / "a.jsonl", bad, good, {"prompt": "w1"}, good, *[bad] * 10)
    problems = first_rows(run_config(data=DataConfig(train=rows)))
    assert [problem.where for problem in problems] == [f"{rows}:{line}" for line in (1, 3, 5, 6, 7, 8, 9, 10, 11, 12)]
    assert problems[1].reason == "missing column 'completion', the columns here are 'prompt'"
    assert problems[-1].reason == "column 'completion' is empty (and 2 more bad rows, 12 in all)"
    assert first_rows(run_config(data=DataConfig(train=rows, on_bad_row=OnBadRow.skip))) == []


def test_a_first_row_of_no_format_is_one_bad_row_if_a_later_one_has_a_format(tmp_path):
    good = {"prompt": "w1", "completion": "w2"}
    rows = written(tmp_path / "a.jsonl", {"note": "made by hand"}, good, {"note": "the end"})
    problems = first_rows(run_config(data=DataConfig(train=rows)))
    assert [problem.where for problem in problems] == [f"{rows}:1", f"{rows}:3"]
    wrong = written(tmp_path / "b.jsonl", *[{"note": "a"}] * 100, good)
    [problem] = first_rows(run_config(data=DataConfig(train=wrong)))
    assert "missing column: task=" in problem.reason


def test_an_unknown_role_of_columns_is_reported_once(tmp_path):
    rows = written(tmp_path / "a.jsonl", {"prompt": "w1", "completion": "w2"})
    config = run_config(data=DataConfig(train=rows, validation=rows, columns={"prmpt": "prompt"}))
    model = folder(tmp_path / "model", "model.safetensors", "tokenizer.json")
    with pytest.raises(UserError) as caught:
        resolve_run(replace(config, model=ModelConfig(path=str(model))))
    assert [problem.where for problem in caught.value.problems] == ["data.columns.prmpt"]


def test_sources_of_a_mixture_are_looked_at_in_their_own_formats(tmp_path):
    rows = written(tmp_path / "a.jsonl", {"question": "w1", "reply": "w2"})
    columns = {"prompt": "question", "completion": "reply"}
    mixture = {"good": SourceConfig(path=rows, columns=columns), "bad": SourceConfig(path=rows)}
    [problem] = first_rows(run_config(data=DataConfig(mixture=mixture)))
    assert problem.where == f"{rows}:1"
    gone = {"gone": SourceConfig(path=str(tmp_path / "gone.jsonl"))}
    model = folder(tmp_path / "model", "model.safetensors", "tokenizer.json")
    with pytest.raises(UserError, match=r"data\.mixture\.gone\.path"):
        resolve_run(run_config(model=ModelConfig(path=str(model)), data=DataConfig(mixture=gone)))


def test_fp16_needs_a_gpu():
    half = run_config(trainer=TrainerConfig(precision=Precision.fp16))
    [problem] = hardware_problems(half, gpus=0)
    assert (problem.where, problem.value) == ("trainer.precision", "fp16")
    assert not list(hardware_problems(half, gpus=1))
    assert not list(hardware_problems(run_config(), gpus=0))
