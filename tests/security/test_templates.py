"""Chat templates of a stranger: one without end, or that takes all memory, is refused; a row that makes it so is a bad row."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from unit.data_helpers import CHATML, byte_tokenizer, exchange

from dstune.core.confinement import here as limits
from dstune.core.confinement.here import TooMuch, in_child, limited
from dstune.core.confinement.table import TEMPLATE, Limits
from dstune.core.errors import UserError
from dstune.data.chat import template as chat_template
from dstune.data.chat.template import ChatTemplate, RenderError, TemplateRefusal
from dstune.data.render import ChatRenderer

SPACE = "{% set ns = namespace(x=[1], y=[1]) %}{% for _ in range(60) %}"
ENDLESS = {
    "loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "power": "{{ 10**(10**9) }}",
    "power_of_a_field": "{{ (messages|length + 9)**(10**9) }}",
    "doubled_text": "{% set ns = namespace(t='aaaaaaaa') %}{% for _ in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "repeated_text": "{{ 'a' * 10**11 }}",
    "centred": "{{ 'a'|center(10**11) }}",
    "format": "{{ '%099999999999d'|format(1) }}",
    # Comparing these takes 2**60 steps in C, where no signal is looked for.
    "comparison": SPACE + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "printed_sharing": SPACE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_refused(name):
    start = time.process_time()
    with pytest.raises(UserError, match=r"chat template is refused: .* takes more than"):
        ChatRenderer(byte_tokenizer(CHATML + ENDLESS[name]), "2025-03-09")
    assert time.process_time() - start < 2.0, "the work is done in a child"


def test_a_template_that_is_slow_each_time_is_refused():
    """Each printing is within the limits; some 35 show how the template writes."""
    start = time.process_time()
    with pytest.raises(UserError, match=r"refused: to print .* takes more than"):
        ChatRenderer(byte_tokenizer(CHATML + 4 * "{% for a in range(99999) %}{{ a ** 9 }}{% endfor %}"), "2025-03-09")
    assert time.process_time() - start < 2.0


def talk(answer: str) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = exchange("a", answer)["messages"]
    return messages


def in_thread(work: Callable[[], object]) -> object:
    """Return the result or the error of `work` in a thread, as a server's; fail if it does not end."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert results, "it does not end"
    return results[0]


@pytest.mark.parametrize("name", ["loops", "comparison", "doubled_text"])
def test_a_conversation_that_makes_a_template_endless_ends_in_a_server_too(name: str) -> None:
    """Python delivers signals, by which a timer ends work, to the main thread alone."""
    tokenizer = byte_tokenizer(CHATML + "{% if 'zzz' in messages[-1].content %}" + ENDLESS[name] + "{% endif %}")
    template = ChatTemplate(tokenizer, None)
    plain = template.text(talk("b"))
    memory = resource.getrlimit(resource.RLIMIT_DATA)
    began = time.process_time()
    error = in_thread(lambda: template.text(talk("zzz")))
    assert isinstance(error, RenderError) and "takes more than" in str(error)
    assert time.process_time() - began < 2.0, "the work is done in a child"
    assert in_thread(lambda: template.text(talk("b"))) == plain
    assert resource.getrlimit(resource.RLIMIT_DATA) == memory


def test_a_thread_renders_as_the_main_thread_does() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    extras = "{{ bos_token }}{{ tools | tojson }}{{ more }}{{ strftime_now('%Y') }}"
    marked = CHATML + extras + "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    for source in (CHATML, CHATML + extras, marked):
        template = ChatTemplate(byte_tokenizer(source), "2025-03-09", {"more": 3})

        def texts(template: ChatTemplate = template) -> list[object]:
            values: list[object] = []
            for messages in (talk("\ud800 <ü>"), talk("b")):
                for render in (template.text, template.direct, template.marks):
                    try:
                        values.append(render(messages, tools=tools, arguments={"more": [1, None]}, prompt=True))
                    except RenderError as error:
                        values.append(str(error))
            return values

        assert in_thread(texts) == texts()
    refusing = ChatTemplate(byte_tokenizer(CHATML + "{{ raise_exception('not ' ~ messages|length) }}"), None)
    with pytest.raises(TemplateRefusal) as refusal:
        refusing.text(talk("b"))
    error = in_thread(lambda: refusing.text(talk("b")))
    assert isinstance(error, TemplateRefusal) and str(error) == str(refusal.value)


def test_a_template_is_tried_once(monkeypatch):
    tried = []

    def without_end(work, seconds):
        tried.append(seconds)
        raise TooMuch("takes more than 1.9 s")

    monkeypatch.setattr(limits, "in_child", without_end)
    for _ in range(2):
        with pytest.raises(UserError, match="chat template is refused"):
            ChatRenderer(byte_tokenizer(CHATML + "{# tried once #}"), "2025-03-09")
    assert len(tried) == 1


FAULTY = {
    "endless_macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "division": "{{ 1 / 0 }}",
    "overflow": "{{ 10.0**400 }}",
    "recursion": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "raised": "{{ raise_exception('no') }}",
    "syntax": "{% if %}",
    "digits": "{{ ('9' * 5000)|int }}{{ 9**5000 }}",
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_template_is_a_message(name, monkeypatch):
    # pytest's formats what a destructor raised, a thousand frames deep, within the time limit of the template.
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    with pytest.raises(UserError):
        ChatRenderer(byte_tokenizer(FAULTY[name] + CHATML), "2025-03-09")


def of_row(attack: str) -> str:
    return CHATML + "{% if 'attack' in messages[0]['content'] %}" + attack + "{% endif %}"


@pytest.mark.parametrize("name", ["loops", "power_of_a_field", "doubled_text", "repeated_text", "format"])
def test_a_row_that_makes_a_template_endless_is_a_bad_row(name):
    renderer = ChatRenderer(byte_tokenizer(of_row(ENDLESS[name])), "2025-03-09")
    assert renderer.passages(exchange("Hi", "Yes")["messages"])
    start = time.process_time()
    with pytest.raises(RenderError, match="the chat template takes more than"):
        renderer.passages(exchange("attack", "Yes")["messages"])
    assert time.process_time() - start < 5 * TEMPLATE.seconds
    assert renderer.passages(exchange("Hi", "Yes")["messages"]), "rows after it are as good as before"


def test_a_template_that_is_slow_for_many_rows_is_refused(monkeypatch):
    monkeypatch.setattr(chat_template, "TEMPLATE", replace(TEMPLATE, seconds=0.02))
    template = ChatTemplate(byte_tokenizer(of_row(ENDLESS["loops"])), None)
    for _ in range(chat_template.MAX_SLOW_ROWS - 1):
        with pytest.raises(RenderError):
            template.text(exchange("attack", "Yes")["messages"])
    with pytest.raises(UserError, match="chat template is refused"):
        template.text(exchange("attack", "Yes")["messages"])


HELD = """
import time
from dstune.core.confinement.here import limited
from dstune.core.confinement.table import Limits
a, b = [1], [1]
for _ in range(60):
    a, b = [a, a], [b, b]
with limited(Limits(seconds=0.1, added_bytes=2**30)):
    a == b
"""


def test_what_no_signal_reaches_ends_the_process():
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=60)
    assert done.returncode < 0
    assert "most recent call first" in done.stderr, "its last words say where it was"


def test_the_memory_of_a_child_is_limited_and_its_faults_are_its_own():
    with pytest.raises(TooMuch, match="GiB"):
        in_child(lambda: bytearray(2**31), Limits(seconds=5, added_bytes=2**29))
    limits_of_a_child = Limits(seconds=5, added_bytes=2**30)
    in_child(lambda: 1 / 0, limits_of_a_child)
    with pytest.raises(TooMuch):
        in_child(lambda: os._exit(1), limits_of_a_child)
    with pytest.raises(TooMuch):
        in_child(lambda: os.kill(os.getpid(), 9), limits_of_a_child)


@pytest.mark.ci
def test_time_that_ends_while_the_work_fails_leaves_nothing_behind():
    """The timer may fire between the work, which has raised something, and the end of the limits."""

    def deep(depth: int) -> None:
        deep(depth + 1)

    for number in range(400):
        with (
            contextlib.suppress(TooMuch, RecursionError),
            limited(replace(TEMPLATE, seconds=0.0005 + number * 1e-5), 60.0),
        ):
            deep(0)
        assert not limits._State.active
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_limits_leave_nothing_behind():
    with limited(Limits(1.0, 2**28)), pytest.raises(MemoryError):
        bytearray(2**30)
    assert len(bytearray(2**30)) == 2**30
