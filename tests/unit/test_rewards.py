"""Built-in rewards, and the process that runs rewards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dstune
from dstune.core import plugins
from dstune.core.confinement.table import PROGRAM, Limits
from dstune.core.errors import UserError
from dstune.data.problems import RowError
from dstune.grading import sandbox
from dstune.protocols import REWARDS
from dstune.rewards import code
from dstune.rewards.answers import boxed, last_number
from dstune.rewards.code import CodeTests, code_of, passed
from dstune.tasks.reinforcement import reward_process, rules
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.reward_child import descendants
from dstune.tasks.reinforcement.reward_process import RewardProcess
from dstune.tasks.reinforcement.rows import Prompt

needs_sandbox = pytest.mark.skipif(bool(sandbox.missing_reason()), reason=sandbox.missing_reason() or "there is one")


def score(name: str, completions: list[str], **columns: Any) -> list[float | None]:
    ids = [list(range(len(text.split()))) for text in completions]
    return list(REWARDS[name]()([""] * len(completions), completions, ids, **columns))


def test_answers():
    assert score("exact_answer", [" Paris\n", "paris is"], answer=["paris", "Paris"]) == [1.0, 0.0]
    assert score("number", ["it is 1,000.0", "3 or 4", "none"], answer=[1000, "3", "7"]) == [1.0, 0.0, 0.0]
    assert score("number", ["5"], answer=[None]) == [None]
    texts = [r"so \boxed{42}", r"\boxed{\frac{1}{2}}", r"\boxed{42", "42"]
    assert score("boxed_answer", texts, answer=["42.0", r"\frac{1}{2}", "42", "42"]) == [1.0, 1.0, 0.0, 0.0]
    assert boxed(r"\boxed{1} and \boxed{a{b}c}") == "a{b}c"
    assert [last_number(text) for text in ("-3.5e2", "1,234,567", "v.2", "no")] == [
        -350,
        1234567,
        Fraction(1, 5),
        None,
    ]


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("3/2", "1/2"), ("(1,2)", "(3,2)"), ("(1, 2)", "(2, 1)"), ("1000000001", "1000000000"), ("3/0", "3"),
        ("1e999999999", "1"), (r"\frac{3}{2}", "2"),
    ],
)  # fmt: skip
def test_other_numbers_are_wrong(written, answer):
    assert score("number", [written], answer=[answer]) == [0.0]
    assert score("number", [answer], answer=[answer]) == [1.0]


RIGHT = [
    (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\tfrac12", "1/2"), (r"\text{yes}", "yes"), (r"\mathrm{Yes}", "yes"),
    (r"5\text{ cm}", "5"), ("5 cm", "5"), (r"1{,}000", "1000"), (r"90^\circ", "90"), ("x=5", "5"), (r"\$5", "5"),
    ("0.5", r"\frac{1}{2}"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"\left(1,2\right)", "(1,2)"), ("x^2+2x+1", "(x+1)^2"),
    (r"\{1,2\}", r"\{2,1\}"), (r"\pi/2", r"\frac{\pi}{2}"), (r"\text{(A)}", "(A)"), (r"3\cdot 10^2", "300"),
    (r"\frac{-1}{2}", "-0.5"), ("$5$", "5"), ("5.", "5"), (r"12\,\text{m}^2", "12"), (r"x \in [1,2]", "[1,2]"),
]  # fmt: skip
WRONG = [
    ("3/2", "1/2"), ("(1,2)", "(3,2)"), ("1000000001", "1000000000"), ("x=6", "5"), (r"\text{no}", "yes"),
    ("[0,1]", "(0,1)"), ("", "5"), (r"9^{9^{9^{9}}}", "1"), ("A", "B"), ("x" * 10**5, "1"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "answer", "expected"), [(*r, 1.0) for r in RIGHT] + [(*w, 0.0) for w in WRONG])
def test_boxed_answers_are_compared_as_mathematics(written, answer, expected):
    assert score("boxed_answer", [rf"It is \boxed{{{written}}}."], answer=[answer]) == [expected]


def test_boxed_answers_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    problems = list(rules.check_machine(ReinforcementConfig(rewards=["boxed_answer"])))
    assert [problem.fix for problem in problems] == ["pip install '.[reinforcement]' in a clone of dstune"]


def test_forms():
    texts = ["<think>a</think> b", "<think></think> b", "a</think> b", "<think>a</think>", "b"]
    assert score("reasoning_format", texts) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert score("pattern", ["abc", "xyz"], pattern=["b", "^b"]) == [1.0, 0.0]
    assert score("json_object", ['{"a": 1}', "[1]", "{", '{"b": 1}'], keys=[["a"], None, None, ["a"]]) == [1.0, 0, 0, 0]
    assert score("brevity", ["", "a b", "a b c d e"], max_length=[4, 4, 4]) == [1.0, 0.5, 0.0]
    assert score("word_count", ["a b", "a", "a b c d e", "x"], words=[2, 2, 2, None]) == [1.0, 0.5, 0.0, None]
    assert score("script", ["да нет", "да no", "12", "是的"], script=["cyrillic", "cyrillic", "latin", "cjk"]) == [
        1,
        0.5,
        0,
        1,
    ]


def test_a_schema_fetches_nothing():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    texts = ['{"n": 1}', '{"n": "1"}', "n", '{"n": 1}']
    assert score("json_schema", texts, schema=[schema, schema, schema, json.dumps(schema)]) == [1.0, 0.0, 0.0, 1.0]
    assert score("json_schema", ["1"], schema=[{"$ref": "http://192.0.2.1/schema.json"}]) == [None]


@needs_sandbox
def test_code_is_run_against_tests():
    limits = replace(PROGRAM, seconds=5)
    doubles = "Here:\n```python\nprint(2 * int(input()))\n```\n"
    cases = [{"input": "2", "output": "4"}, {"input": "3\n", "output": "6\n"}, {"input": "x", "output": "xx"}]
    assert passed(doubles, cases, limits) == pytest.approx(2 / 3)
    assert passed("print(4)", cases, limits) == pytest.approx(1 / 3)
    assert passed("def f(x): return x + 1", "assert f(1) == 2", limits) == 1.0
    assert passed("def f(x): return x", "assert f(1) == 2", limits) == 0.0
    assert passed("raise SystemExit(0)", "assert f(1) == 2", limits) == 0.0, "it ends before its tests"
    assert passed("print(1)", [], limits) is None


@pytest.mark.parametrize(
    "tests",
    [
        [{"input": "1", "output": None}], [{"input": "1", "outputs": "1"}], [{"inputs": "1", "output": "1"}],
        [{"input": "1", "output": [1]}], [{"input": "1", "output": 0.5}], [{"input": "1", "output": True}], ["1"],
        {"input": "1"}, "assert f(", [{"output": "1"}, {}],
    ],
)  # fmt: skip
def test_tests_that_cannot_be_run_are_a_problem_of_their_row(tests):
    assert CodeTests.row_problem({"tests": tests})
    assert CodeTests.row_problem({"tests": json.dumps(tests) if not isinstance(tests, str) else tests})
    assert passed("", tests, replace(PROGRAM, seconds=5)) is None


def test_rows_with_such_tests_are_refused_before_training():
    task = SimpleNamespace(config=ReinforcementConfig(rewards=["code_tests"]))
    row = {"prompt": "p", "columns": {"tests": [{"input": "1", "output": None}]}}
    with pytest.raises(RowError, match=r"code_tests cannot score it: tests\[0\] has no output"):
        Prompt().row(row, task)
    Prompt().row({"prompt": "p", "columns": {"tests": [{"input": "1", "output": 0}]}}, task)


def test_an_output_of_zero_has_to_be_printed(monkeypatch):
    # Not in the sandbox, which not every machine has: what counts here is the comparison.
    monkeypatch.setattr(
        code, "run_program", lambda program, read, limits: sandbox.Outcome("0\n" * bool(program), "", "")
    )
    cases = [{"input": 1, "output": 0}]
    assert [passed(program, cases, replace(PROGRAM, seconds=5)) for program in ("", "print(0)")] == [0.0, 1.0]
    assert passed("", json.dumps(cases), replace(PROGRAM, seconds=5)) == 0.0, "a table stores the list as text"


CODE = "for n in range(2):\n    print(n)\n"


@pytest.mark.parametrize(
    "text",
    [
        f"```python3\n{CODE}```", f"~~~python\n{CODE}~~~", f"```python\n{CODE}```".replace("\n", "\r\n"),
        "1. So:\n\n" + textwrap.indent(f"```python\n{CODE}```", "   "), textwrap.indent(f"```python\n{CODE}```", "      "),
        f"```python\n{CODE}```\nIt prints\n```\n0\n1\n```", f"```python\n{CODE}```\n```bash\npython a.py\n```",
        f"````Python title='a.py'\n{CODE}````", f"```{{.python}}\n{CODE}```", f"Here: ```python\n{CODE}```",
        f"```\n{CODE}```", f"```python\n{CODE}", f"```py\n1\n```\n```py\n{CODE}```", CODE,
    ],
)  # fmt: skip
def test_code_is_the_last_python_block(text):
    assert code_of(text).replace("\r", "").rstrip() == CODE.rstrip()


@needs_sandbox
def test_an_endless_loop_fails_its_own_tests_alone():
    cases = [{"input": "1", "output": "1"}, *[{"input": "2", "output": "2"}] * 9]
    loops = "n = input()\nwhile n == '2': pass\nprint(n)"
    began = time.monotonic()
    assert passed(loops, cases, replace(PROGRAM, seconds=0.5)) == pytest.approx(1 / 10)
    assert time.monotonic() - began < 4, "of nine endless loops one is waited for"
    assert passed("print(input())", cases, replace(PROGRAM, seconds=5), seconds=0) == pytest.approx(1 / 10), (
        "no other test begins"
    )


@needs_sandbox
@pytest.mark.parametrize("code", [71, 124])
def test_a_program_ends_with_any_code(code):
    outcome = sandbox.run_program(f"import os; os._exit({code})", "", replace(PROGRAM, seconds=5))
    assert outcome.failure and not outcome.is_out_of_time
    assert not sandbox.run_program(
        "import os; assert len(os.listdir('/proc/self/fd')) < 5", "", replace(PROGRAM, seconds=5)
    ).failure


ESCAPES = {
    "the network": ("import socket; socket.create_connection(('1.1.1.1', 80), 2)", "Network is unreachable"),
    "the machine's files": ("print(open('/etc/passwd').read())", "No such file"),
    "what it runs on": ("import sys; open(sys.prefix + '/mine', 'w')", "Read-only file system"),
    "files without end": ("open('/tmp/x', 'wb').write(bytes(2**24))", "File too large|No space left"),
    "memory": ("bytearray(2**40)", "MemoryError"),
    "processes": ("import os\nwhile True: os.fork()", "Resource temporarily unavailable"),
    "time": ("while True: pass", "longer than 2 s"),
    "sleep in a session of its own": (
        "import os, time\nif os.fork(): os.setsid()\ntime.sleep(1000)",
        "longer than 2 s",
    ),
    "output": ("while True: print('x' * 10**6)", "printed more than"),
    "error output": (
        "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
        "too much|File too large|longer than|printed more than",
    ),
    "the process that started it": ("import os; os.kill(1, 9); os.kill(-1, 9)", "not permitted|ended by"),
    "privileges": ("import os; os.setuid(0)", "not permitted"),
    "namespaces": ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
}


@needs_sandbox
@pytest.mark.ci
@pytest.mark.parametrize("what", ESCAPES)
def test_a_program_stays_in_its_sandbox(what):
    source, said = ESCAPES[what]
    before, began = set(descendants(os.getpid())), time.monotonic()
    outcome = sandbox.run_program(source, "", replace(PROGRAM, seconds=2, file_bytes=2**22))
    assert outcome.failure, outcome
    assert any(word in outcome.failure for word in said.split("|")), outcome.failure[:200]
    assert time.monotonic() - began < 20
    assert set(descendants(os.getpid())) <= before, "nothing is left"


@needs_sandbox
def test_a_program_has_its_libraries_and_no_variables(monkeypatch):
    monkeypatch.setenv("MY_VARIABLE", "mine")
    source = "import os, sys, numpy; print(numpy.arange(3).sum(), sys.stdin.read(), 'MY_VARIABLE' in os.environ)"
    assert sandbox.run_program(source, "given", replace(PROGRAM, seconds=20)).output == "3 given False\n"


FILTERED = """
import ctypes, errno, os, socket, sys
sys.path.insert(0, "/work")
libc = ctypes.CDLL(None, use_errno=True)
def fails(number, *arguments):
    ctypes.set_errno(0)
    assert libc.syscall(number, *arguments) == -1, number
    return errno.errorcode[ctypes.get_errno()]
place, numbers = 0 if os.uname().machine == "x86_64" else 1, {numbers}
print({{fails(pair[place], 0, 0, 0, 0, 0) for pair in numbers.values() if pair[place] is not None}})
print(fails({clone}[place], 0x10000000, 0, 0, 0, 0), fails({clone3}[place], 0, 0))
for family in (socket.AF_NETLINK, 38):
    try:
        socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        print(errno.errorcode[error.errno])
socket.socketpair(), os.waitpid(os.fork() or os._exit(0), 0)
import subprocess, threading
threading.Thread(target=print, args=("thread",)).start()
print(subprocess.run([sys.executable, "-c", "import os; print(os.uname().sysname)"], capture_output=True, text=True).stdout)
"""


@needs_sandbox
@pytest.mark.parametrize("user", ["this user", "an ordinary user"])
def test_the_kernel_does_for_a_program_what_programs_need(user, tmp_path):
    """Calls that attacks on the kernel begin with are refused, also those that an ordinary user may make elsewhere."""
    from dstune.core.confinement import system_calls

    source = FILTERED.format(numbers=system_calls.DENIED, clone=system_calls.CLONE, clone3=system_calls.CLONE3)
    if user == "this user":
        outcome = sandbox.run_program(source, "", replace(PROGRAM, seconds=20))
    else:
        if os.geteuid():
            pytest.skip("only root can start a process of another user")
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own are for this user alone
            outcome = run_as_nobody(source, Path(folder))
    assert not outcome.failure, outcome
    assert outcome.output.split() == ["{'EPERM'}", "EPERM", "ENOSYS", "EAFNOSUPPORT", "EAFNOSUPPORT", "thread", "Linux"]


@needs_sandbox
def test_a_machine_without_a_filter_of_system_calls_is_named_once(tmp_path, monkeypatch, caplog):
    for name in PARTS:
        source = (Path(dstune.__file__).parent / name).read_text()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(re.sub(r'"(x86_64|aarch64)": \(', '"another": (', source))
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "grading" / "sandbox_child.py")
    for _ in range(2):
        assert sandbox.run_program("print('inside')", "", replace(PROGRAM, seconds=20)).output == "inside\n"
    assert [record.message for record in caplog.records if "seccomp" in record.message] == [
        "this kernel, or processor, has no filter of system calls (seccomp): the namespaces of the sandbox alone keep programs in"
    ]


PARTS = [f"grading/{name}.py" for name in ("sandbox", "sandbox_child")]
PARTS += [f"core/confinement/{name}.py" for name in ("control_group", "inside", "system_calls", "table")]
"""Modules of the sandbox, which import no others."""


def run_as_nobody(source: str, folder: Path, limits: Limits | None = None) -> sandbox.Outcome:
    """The same by a process of `nobody`, whose interpreter is one that everybody may read."""
    for name in PARTS:
        (folder / "dstune" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(dstune.__file__).parent / name, folder / "dstune" / name)
    for package in (".", "grading", "core", "core/confinement"):
        (folder / "dstune" / package / "__init__.py").write_text("")
    folder.chmod(0o755)
    program = "import dataclasses, json, sys; from dstune.grading.sandbox import Limits, run_program\n"
    program += (
        "print(json.dumps(dataclasses.asdict(run_program(sys.stdin.read(), '', Limits(**json.loads(sys.argv[1]))))))"
    )
    interpreters = [f"{sys.base_prefix}/bin/python3", "/usr/bin/python3"]
    python = next((path for path in interpreters if is_readable_by_all(Path(path).resolve())), None)
    if python is None:
        pytest.skip("no interpreter that everybody may read")
    values = json.dumps(asdict(limits or replace(PROGRAM, seconds=20)))
    done = subprocess.run(
        [python, "-c", program, values], input=source, cwd=folder, user=65534, group=65534, extra_groups=[],
        env={"TMPDIR": "/tmp"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sandbox.Outcome(**json.loads(done.stdout))


def is_readable_by_all(file: Path) -> bool:
    return file.exists() and all(path.stat().st_mode & 0o001 for path in (file, *file.parents))


HOSTILE = """
import asyncio, os, subprocess, sys, time
import dstune

@dstune.reward
class Hangs(dstune.Reward):
    name = "hangs"
    def __call__(self, prompts, completions, completion_ids, **columns):
        subprocess.Popen(["sleep", "1234"])
        subprocess.Popen(["setsid", "sleep", "1234"], start_new_session=True)
        time.sleep(1000)

@dstune.reward
class Crashes(dstune.Reward):
    name = "crashes"
    def __call__(self, prompts, completions, completion_ids, **columns):
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)

@dstune.reward
class Prints(dstune.Reward):
    name = "prints"
    def __call__(self, prompts, completions, completion_ids, **columns):
        for _ in range(1000):
            os.write(1, b"x" * 2**20)
        return [1.0] * len(completions)

@dstune.reward
class Eats(dstune.Reward):
    name = "eats"
    def __call__(self, prompts, completions, completion_ids, **columns):
        return [float(len(bytearray(2**34)))] * len(completions)

@dstune.reward
class Forks(dstune.Reward):
    name = "forks"
    def __call__(self, prompts, completions, completion_ids, **columns):
        for _ in range(320):  # no real bomb: the machine that runs this test has others
            if os.fork() == 0:
                time.sleep(1000)
        time.sleep(1000)

@dstune.reward
class Counts(dstune.Reward):
    name = "counts"
    def __call__(self, prompts, completions, completion_ids, **columns):
        return [1.0]

@dstune.reward
class Knows(dstune.Reward):
    name = "knows"
    def __call__(self, prompts, completions, completion_ids, **columns):
        return [float("A_TOKEN_OF_MINE" in os.environ), float("PLAIN_OF_MINE" in os.environ)]

@dstune.reward
def like_trl(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("seen", completions)
    log_metric("steps", trainer_state.global_step)
    assert "environments" not in kwargs
    return [float(text == right) if isinstance(text, str) else None for text, right in zip(completions, answer)]

@dstune.reward
async def waits(prompts, completions, **kwargs):
    async def one(completion):
        await asyncio.sleep(0.2)
        return float(len(completion) if isinstance(completion, str) else len(completion[0]["content"]) / 10)
    return await asyncio.gather(*map(one, completions))
"""
NAMES = ("hangs", "crashes", "prints", "eats", "forks", "counts", "knows", "like_trl", "waits")


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    file = tmp_path / "hostile.py"
    file.write_text(HOSTILE)
    plugins.activate([str(file)])
    monkeypatch.setenv("A_TOKEN_OF_MINE", "secret")
    monkeypatch.setenv("PLAIN_OF_MINE", "plain")
    process = RewardProcess(ReinforcementConfig(rewards=[*NAMES, "exact_answer"], reward_seconds=3.0))
    yield lambda name: process(name, ["p", "p"], ["a", "b"], [[1], [2]], {"answer": ["a", "a"]}).scores, process
    process.close()
    plugins.activate([])


@pytest.mark.ci
def test_what_rewards_do_stays_in_their_process(hostile):
    ask, process = hostile
    for name, said in {
        "hangs": "longer than 3 s",
        "crashes": "last words",
        "prints": "File too large",
        "eats": "MemoryError",
        "forks": "more than 256 processes",
        "counts": "no list with a score for each",
    }.items():
        before, began = set(descendants(os.getpid())), time.monotonic()
        process._task = replace(process._task, reward_seconds=50.0 if name == "forks" else 3.0)
        assert ask(name) == [None, None], name
        assert said in process.last_error, (name, process.last_error)
        assert time.monotonic() - began < 60
        if name in ("hangs", "forks"):
            assert set(descendants(os.getpid())) <= before, f"nothing of {name} is left"
        assert ask("exact_answer") == [1.0, 0.0], f"another one after {name}"
    assert ask("knows") == [0.0, 1.0], "secrets do not reach rewards"


@pytest.mark.parametrize("name", ["A_TOKEN_OF_MINE", "DSTUNE_TRUST_KEY", "ENGINE_KEY"])
def test_variables_that_may_be_secret(name):
    assert reward_process._may_be_secret(name, "value")
    assert not reward_process._may_be_secret("PLAIN_OF_MINE", "value")


def test_what_a_reward_detached_ends_with_it(hostile):
    ask, process = hostile
    process._task = ReinforcementConfig(rewards=["hangs"], reward_seconds=0.5)
    process._start()
    assert ask("hangs") == [None, None]
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if line == b"sleep\0001234\0"]


def test_reward_functions_of_trl(hostile):
    _, process = hostile
    texts = ["a", "b"]
    state = {"global_step": 7, "max_steps": 9, "epoch": 0.5}
    scores = process("like_trl", ["p", "p"], texts, [[1], [2]], {"answer": ["a", "a"]}, state=state)
    assert (scores.scores, scores.extra, scores.metrics) == ([1.0, 0.0], {"seen": ["a", "b"]}, {"steps": 7.0})
    talks = [[{"role": "user", "content": "p"}]] * 2
    assert process("like_trl", talks, texts, [[1], [2]], {"answer": ["a", "a"]}, state=state).scores == [None, None]
    began = time.monotonic()
    assert process("waits", talks, ["abc", "b"], [[1], [2]], {}).scores == [0.3, 0.1], "messages of conversations"
    assert time.monotonic() - began < 0.39, "a coroutine function waits for all of them at once"


def test_rewards_that_cannot_be_imported_are_refused(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(
        "import os\nimport dstune\n\n@dstune.reward\nclass Broken(dstune.Reward):\n    name = 'broken'\n"
        "if 'BROKEN_ONCE' in os.environ:\n    raise RuntimeError('no such thing')\n"
    )
    plugins.activate([str(file)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROKEN_ONCE", "1")
        process = RewardProcess(ReinforcementConfig(rewards=["broken"]))
        with pytest.raises(UserError, match="no such thing"):
            process("broken", [""], ["a"], [[1]], {})
        process.close()
    plugins.activate([])


CHECK = {"type": "string_check", "name": "c", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}"}
GRADERS = {
    "equal": {**CHECK, "operation": "eq"},
    "json": {**CHECK, "operation": "eq", "input": "{{ sample.output_json.x }}"},
    "absent": {**CHECK, "operation": "eq", "reference": "{{ item.nothing }}"},
    "half": {
        "type": "multi",
        "name": "m",
        "graders": {"a": {**CHECK, "operation": "eq"}, "b": {**CHECK, "operation": "like"}},
        "calculate_output": "(a + b) / 4",
    },
}
PROGRAMS = {
    "python": "def grade(sample, item):\n    print('noise')\n    return sample['output_text'].count(item['answer']) / 2",
    "raises": "def grade(sample, item):\n    raise ValueError('mine')",
    "loops": "def grade(sample, item):\n    while True: pass",
    "reads": "def grade(sample, item):\n    return len(open('/etc/passwd').read())",
}


def graded(folder: Path, graders: dict[str, dict], completions: list[str], **settings: Any) -> dict[str, list]:
    for name, grader in graders.items():
        (folder / f"{name}.json").write_text(json.dumps(grader))
    files = [str(folder / f"{name}.json") for name in graders]
    process = RewardProcess(ReinforcementConfig(graders=files, **settings))
    count = len(completions)
    try:
        return {
            name: process(name, ["p"] * count, completions, [[1]] * count, {"answer": ["1"] * count}).scores
            for name in graders
        }
    finally:
        process.close()


def test_graders_of_the_fine_tuning_api(tmp_path):
    found = graded(tmp_path, GRADERS, ["1", '{"x": 1}', "31"])
    assert found == {"equal": [1, 0, 0], "json": [0, 1, 0], "absent": [None] * 3, "half": [0.5, 0.25, 0.25]}


@needs_sandbox
def test_python_graders_run_in_the_sandbox(tmp_path):
    programs = {name: {"type": "python", "name": name, "source": source} for name, source in PROGRAMS.items()}
    found = graded(tmp_path, programs, ["1", "11"], program_seconds=1.5)
    assert found == {"python": [0.5, 1.0], "raises": [None] * 2, "loops": [None] * 2, "reads": [None] * 2}


def test_a_file_that_holds_no_grader_is_refused(tmp_path):
    for content, said in {
        "{": "no JSON",
        '{"type": "string_check"}': "grader.name",
        '{"type": "label_model", "name": "x"}': "not supported",
        json.dumps({"type": "python", "name": "p", "source": "def grade(:"}): "no Python",
        json.dumps({"type": "python", "name": "p", "source": "def score(): pass"}): "grade(sample, item)",
    }.items():
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")):
            RewardProcess(ReinforcementConfig(graders=[str(tmp_path / "wrong.json")]))
