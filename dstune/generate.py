"""The verb `dstune generate`: text from a run, an export, an adapter or any model."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config.schema import ChatConfig, ClassificationConfig, ModelConfig
from dstune.errors import EXIT_DONE, Problem, UserError

if TYPE_CHECKING:
    import torch

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Request:
    """What to answer: a conversation, or with `messages` None a text to go on with."""

    shown: str
    where: str
    messages: Messages | None = None


def main(argv: list[str]) -> int:
    """`dstune generate RUN|EXPORT|MODEL`. Raises UserError; returns the exit code."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    interactive = not arguments.prompt and arguments.file is None and sys.stdin.isatty() and not arguments.json
    requests = [] if interactive else _requests(arguments)  # bad input is refused before a model is loaded
    with _opened(arguments) as writer:
        if interactive:
            _converse(writer)
        else:
            _answer_all(writer, requests, as_json=arguments.json)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dstune generate", description="Text from a run, an export or a model.")
    parser.add_argument("model", metavar="RUN|EXPORT|MODEL", help="run directory, folder, hub id or sample://NAME")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--file", type=Path, help="prompts: a .jsonl with `prompt` or `messages` in each row, or a text with one a line"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling with a temperature")
    parser.add_argument("--plain", action="store_true", help="go on with the text as it is, without the chat template")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: prompt, answer, tokens")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    problems = []
    if arguments.max_new_tokens < 1:
        problems.append(Problem("--max-new-tokens", "must be at least 1", value=str(arguments.max_new_tokens)))
    if not arguments.temperature >= 0:
        problems.append(Problem("--temperature", "must be at least 0", value=str(arguments.temperature)))
    if problems:
        raise UserError(problems)


# -- prompts ----------------------------------------------------------------------------------------------------------


def _requests(arguments: argparse.Namespace) -> list[Request]:
    requests = [Request(text, f"--prompt {number}") for number, text in enumerate(arguments.prompt, 1)]
    if arguments.file is not None:
        requests += read_file(arguments.file)
    elif not requests:
        requests = [Request(sys.stdin.read().rstrip("\n"), "stdin")]
    empty = [request.where for request in requests if not request.shown.strip() and not request.messages]
    if empty:
        raise UserError(Problem(where, "the prompt is empty", "give --prompt TEXT or --file PATH") for where in empty)
    return requests


def read_file(path: Path) -> list[Request]:
    """The prompts of a file, one for each line that is not blank. Raises UserError with every bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise UserError(Problem("--file", f"cannot be read: {reason}", value=str(path))) from error
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(Problem("--file", "there are no prompts in it", value=str(path)))
    if path.suffix not in (".jsonl", ".json"):
        return [Request(line, where) for where, line in numbered]
    requests, problems = [], []
    for where, line in numbered:
        try:
            requests.append(_from_row(line, where))
        except ValueError as error:
            problems.append(Problem(where, str(error), 'write {"prompt": "..."} or {"messages": [...]}'))
    if problems:
        raise UserError(problems)
    return requests


def _from_row(line: str, where: str) -> Request:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from None
    prompt, messages = (row.get("prompt"), row.get("messages")) if isinstance(row, dict) else (None, None)
    if isinstance(prompt, str):
        return Request(prompt, where)
    if not isinstance(messages, list) or not messages:
        raise ValueError("has neither a `prompt` nor `messages`")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages):
        raise ValueError("has a message without `role` or `content`")
    if messages[-1]["role"] == "assistant":
        raise ValueError("ends with the assistant's message, so there is nothing to answer")
    return Request(str(messages[-1]["content"]), where, messages)


# -- the model --------------------------------------------------------------------------------------------------------


class Writer:
    """A model in memory with its tokenizer, and how answers are drawn from it."""

    def __init__(
        self, model: Any, tokenizer: Any, *, chat: bool, date: str | None, max_new_tokens: int, temperature: float
    ):
        from dstune.data.stopping import stop_token_ids
        from dstune.data.template_date import freeze_date
        from dstune.models.generation import end_tokens

        self._model, self._tokenizer = model, tokenizer
        self.chat = chat and bool(tokenizer.chat_template)
        self._template = freeze_date(tokenizer.get_chat_template(), date) if self.chat else None
        self._limit = max_new_tokens
        self._temperature = temperature
        self._ends = end_tokens(model, stop_token_ids(tokenizer))

    def prompt_ids(self, request: Request) -> list[int]:
        """The tokens that the model goes on from. Raises UserError where the template refuses the conversation."""
        import jinja2

        if not self.chat:
            if request.messages is not None:
                reason = "holds messages, but the model has no chat template (or --plain switched it off)"
                raise UserError(Problem(request.where, reason, "give `prompt` instead"))
            return self._tokenizer(request.shown)["input_ids"]
        messages = request.messages or [{"role": "user", "content": request.shown}]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(Problem(request.where, f"the chat template refuses this conversation: {error}")) from error
        # The template prints the special tokens itself; the tokenizer would double the first one.
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def write(self, request: Request, *, stream: bool = False) -> tuple[str, int]:
        """The answer and its number of tokens; printed while it is being written with `stream`."""
        import torch
        from transformers import GenerationConfig, TextStreamer

        prompt = self.prompt_ids(request)
        room = self._room(len(prompt), request)
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        # Values that greedy decoding ignores are set to their neutral ones, or the model's own would be warned about.
        neutral = {} if self._temperature else {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
        settings = GenerationConfig(
            max_new_tokens=min(self._limit, room),
            eos_token_id=self._ends or None,
            pad_token_id=self._tokenizer.pad_token_id,
            use_cache=True,
            **sampling,
            **neutral,
        )
        tokens = torch.tensor([prompt], device=next(self._model.parameters()).device)
        with torch.inference_mode():
            written = self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=settings,
                streamer=TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
            )[0, len(prompt) :]
        return self._tokenizer.decode(written, skip_special_tokens=True).strip(), len(written)

    def _room(self, length: int, request: Request) -> int:
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        if length >= longest:
            raise UserError(Problem(request.where, f"has {length} tokens; the model takes {longest}, answer included"))
        return longest - length


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[Writer]:
    """The model that was asked for, loaded."""
    path = Path(arguments.model)
    wanted = ModelConfig(
        path=arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    chat, date = not arguments.plain, None
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        if (path / "run.yaml").is_file():
            task, trust, folder = _learnt(path, Path(scratch))
            wanted = replace(wanted, path=str(folder), trust_remote_code=trust or arguments.trust_remote_code)
            chat = chat and isinstance(task, ChatConfig)
            date = task.template_date if isinstance(task, ChatConfig) else None
        import torch
        from transformers import set_seed
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model, tokenizer = load(wanted)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        set_seed(arguments.seed)
        yield Writer(
            model,
            tokenizer,
            chat=chat,
            date=date,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
        )


def _learnt(run_dir: Path, scratch: Path) -> tuple[Any, bool, Path]:
    """The task of a run, whether it trusts the model's code, and the folder of what it has learnt."""
    from dstune.checkpoint.export import exported
    from dstune.config.compose import read_run

    config = read_run(run_dir / "run.yaml").config
    if isinstance(config.task, ClassificationConfig):
        reason = "the run trained a classifier, which writes no text"
        raise UserError(Problem("RUN", reason, f"dstune evaluate {run_dir}", str(run_dir)))
    return config.task, config.model.trust_remote_code, exported(run_dir, scratch)


def load(wanted: ModelConfig) -> tuple[Any, Any]:
    """Language model and tokenizer of a folder, hub id or sample; an adapter is put on its base.

    Raises UserError where they cannot be had, or the model writes no text.
    """
    from transformers import AutoTokenizer

    folder = Path(wanted.path)
    if not (folder / "adapter_config.json").is_file():
        source = _located(wanted)
        return _language_model(source, wanted), AutoTokenizer.from_pretrained(**source)
    import peft

    settings = json.loads((folder / "adapter_config.json").read_text())
    base = replace(wanted, path=settings["base_model_name_or_path"], revision=settings.get("revision"))
    source = _located(base)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(**(source | {"pretrained_model_name_or_path": folder} if own else source))
    model = _language_model(source, base)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return peft.PeftModel.from_pretrained(model, folder), tokenizer


def _located(wanted: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model that is on this machine by now."""
    from dstune.launch.preflight import resolve_model
    from dstune.models.load import local_path

    flags = {
        "model.path": "MODEL",
        "model.revision": "--revision",
        "model.trust_remote_code": "--trust-remote-code",
    }
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr)  # noqa: E731
    try:
        resolved = resolve_model(wanted, tell)
    except UserError as error:
        raise UserError(replace(p, where=flags.get(p.where, p.where)) for p in error.problems) from error
    revision = {} if resolved.revision is None else {"revision": resolved.revision}
    return {
        "pretrained_model_name_or_path": local_path(resolved.path),
        "trust_remote_code": resolved.trust_remote_code,
        "local_files_only": True,
        **revision,
    }


def _language_model(source: dict[str, Any], wanted: ModelConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = AutoConfig.from_pretrained(**source)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            **source, dtype=_dtype(architecture), use_safetensors=True, output_loading_info=True
        )
    except ValueError as error:
        raise UserError(Problem("MODEL", f"cannot be loaded: {str(error).splitlines()[0]}", "", wanted.path)) from error
    absent = sorted(loading["missing_keys"])
    if absent:
        reason = f"is no language model: it has no weights for {', '.join(absent[:2])}"
        raise UserError(Problem("MODEL", reason, "give a model that writes text", wanted.path))
    return model


def _dtype(architecture: Any) -> torch.dtype:
    """The number format to compute in: the stored one on a GPU, and on a CPU what it computes fast."""
    import torch

    from dstune.zero.precision import fast_bf16

    stored = architecture.dtype or torch.float32
    if torch.cuda.is_available():
        return stored
    return torch.bfloat16 if stored is not torch.float32 and fast_bf16() else torch.float32


# -- output -----------------------------------------------------------------------------------------------------------


def _answer_all(writer: Writer, requests: list[Request], *, as_json: bool) -> None:
    stream = sys.stdout.isatty() and not as_json
    for request in requests:
        if len(requests) > 1 and not as_json:
            print(f"> {request.shown}", flush=True)
        answer, tokens = writer.write(request, stream=stream)
        if as_json:
            row = {"prompt": request.messages or request.shown, "answer": answer, "tokens": tokens}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        elif not stream:
            print(answer, flush=True)


def _converse(writer: Writer) -> None:
    """Answer what is typed, until the end of input. A chat model remembers the conversation."""
    import readline  # noqa: F401  (gives input() a history and editing)

    print("end with Ctrl-D" + ("; an empty line starts another conversation" if writer.chat else ""))
    history: Messages = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            history = []
            continue
        history.append({"role": "user", "content": text})
        request = Request(text, "input", list(history) if writer.chat else None)
        try:
            answer, _ = writer.write(request, stream=True)
        except UserError as error:  # too long by now
            print(f"dstune: {error}; starting another conversation")
            history = []
            continue
        history.append({"role": "assistant", "content": answer})
