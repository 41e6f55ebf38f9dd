"""Writes the `Modelfile` that accompanies a GGUF file, for `ollama create NAME -f Modelfile`.

Ollama uses Go templates. This module derives one from the model's chat template by rendering made-up conversations. If the turns of
a conversation do not all look alike, it derives none, and Ollama's guess may differ from the template of training.
"""

from __future__ import annotations

from typing import Any

from dstune.data.chat.template import ChatTemplate, RenderError

_SYSTEM, _USER, _ANSWER, _AGAIN = "zqsystem", "zquser", "zqanswer", "zqagain"


def modelfile(gguf: str, tokenizer: Any, stops: list[int], date: str | None) -> str:
    """Return the text of Ollama's Modelfile. stops: tokens that end an answer. date: what the chat template takes as today."""
    lines = [f"FROM ./{gguf}"]
    template = go_template(tokenizer, date) if tokenizer.chat_template else None
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append(
            "# The chat template cannot be expressed turn by turn in Ollama's template language, so Ollama guesses one."
        )
    lines += [f"PARAMETER stop {_quoted(tokenizer.decode([token]))}" for token in stops]
    return "\n".join([*lines, ""])


def go_template(tokenizer: Any, date: str | None) -> str | None:
    """Translate the chat template into Ollama's. None if the turns do not all look alike, or contain a sequence that is special in
    the Modelfile. Raises UserError if rendering the chat template does not end."""
    template = ChatTemplate(tokenizer, date)

    def render(*turns: tuple[str, str], prompt: bool = False) -> str:
        return template.text([{"role": role, "content": content} for role, content in turns], prompt=prompt)

    user, answer, again, system = ("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN), ("system", _SYSTEM)
    try:
        whole = render(user, answer, again)
        requested, waiting = render(user), render(user, prompt=True)
        instructed = render(system, user)
        before_answer = waiting.removeprefix(requested) if waiting.startswith(requested) else ""
        after_user = requested.partition(_USER)[2]
        after_answer = render(user, answer).partition(_ANSWER)[2]
        between = whole.partition(_ANSWER)[2].partition(_AGAIN)[0]
        before_user = between.removeprefix(after_answer)
        head = requested.partition(_USER)[0].removesuffix(before_user)
        before_system, _, text_behind = instructed.partition(_SYSTEM)
        after_system = text_behind.partition(_USER)[0].removesuffix(before_user)
    except RenderError:  # a template may refuse any of these conversations
        return None
    bos = tokenizer.bos_token or ""
    first = head.removeprefix(bos) if bos else head  # llama.cpp itself adds the token that begins a text
    begin = bos if bos and requested.startswith(bos) else ""
    turn = f"{before_user}{_USER}{after_user}"
    written = f"{begin}{first}{turn}{before_answer}{_ANSWER}{after_answer}{before_user}{_AGAIN}{after_user}"
    reported = f"{before_system}{_SYSTEM}{after_system}{turn}"
    reserved = any(sign in part for part in (written, reported) for sign in ("{{", '"""'))
    if (written, reported) != (whole, instructed) or not before_user or reserved:
        return None
    system_start = before_system.removeprefix(bos) if bos else before_system
    default = f"{{{{ else }}}}{first}" if first else ""
    return (
        f"{{{{ if .System }}}}{system_start}{{{{ .System }}}}{after_system}{default}{{{{ end }}}}"
        "{{ range .Messages }}"
        f'{{{{ if eq .Role "user" }}}}{before_user}{{{{ .Content }}}}{after_user}'
        f'{{{{ else if eq .Role "assistant" }}}}{before_answer}{{{{ .Content }}}}{after_answer}{{{{ end }}}}'
        f"{{{{ end }}}}{before_answer}"
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
