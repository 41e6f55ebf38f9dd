"""A server that samples as vLLM 0.32 does, with a tiny model, by the routes that a trainer uses; it fails where it is told to."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class RolloutServer:
    """`with RolloutServer(model_folder) as server: ... server.address`"""

    def __init__(self, folder: Path, *, port: int = 0, max_length: int = 256):
        self.folder, self.max_length = folder, max_length
        self.fault = ""
        """What it does in secret: one of `stale`, `lost adapter`, `top-p`, `raw`, `temperature`, `other prompt`, `other name`,
        `other end`."""
        self.failures = 0
        """How many of the next requests it answers with 503."""
        self.gone_after: int | None = None
        """After how many completions it answers nothing any more."""
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.is_asleep = False
        self._lock = threading.Lock()
        self.restart()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

            def answer(self, body: dict[str, Any]) -> None:
                status, content = outer.respond(self.path, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._http.server_port
        self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> RolloutServer:
        self._thread.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def restart(self) -> None:
        """As a server that died and was started again: with the weights of its start, and no adapter."""
        self.base = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.adapters: dict[str, Any] = {}

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.requests if asked == path]

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.requests.append((path, body))
            if self.gone_after is not None and len(self.bodies("/v1/completions")) > self.gone_after:
                return 503, {"error": {"message": "gone"}}
            if self.failures:
                self.failures -= 1
                return 503, {"error": {"message": "overloaded"}}
            if self.is_asleep and path not in ("/wake_up", "/v1/models"):
                return 500, {"error": {"message": "asleep"}}
            try:
                return 200, self._routes[path](self, body)
            except KeyError as error:
                return 404, {"error": {"message": f"{error} does not exist"}}
            except ValueError as error:
                return 400, {"error": {"message": str(error)}}

    def models(self, body: dict[str, Any]) -> dict[str, Any]:
        base = {"id": "base", "parent": None, "max_model_len": self.max_length}
        return {"data": [base, *({"id": name, "parent": "base", "max_model_len": None} for name in self.adapters)]}

    def add(self, body: dict[str, Any]) -> dict[str, Any]:
        import peft

        if body["lora_name"] in self.adapters:
            raise ValueError(f"The lora adapter '{body['lora_name']}' has already been loaded.")
        if self.fault == "stale" and self.adapters:
            adapter = next(iter(self.adapters.values()))
        elif self.fault == "lost adapter":
            adapter = self.base
        else:
            plain = AutoModelForCausalLM.from_pretrained(self.folder)
            adapter = peft.PeftModel.from_pretrained(plain, body["lora_path"]).eval()
        self.adapters[body["lora_name"]] = adapter
        return {}

    def remove(self, body: dict[str, Any]) -> dict[str, Any]:
        del self.adapters[body["lora_name"]]
        return {}

    def reload(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights"
        if self.fault != "stale":
            self.base = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
        return {"results": [None]}

    def sleep(self, body: dict[str, Any]) -> dict[str, Any]:
        self.is_asleep = True
        return {}

    def wake(self, body: dict[str, Any]) -> dict[str, Any]:
        self.is_asleep = False
        return {}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        model = self.base if body["model"] == "base" else self.adapters[body["model"]]
        prompt, count, ends = body["prompt"], body["n"], set(body["stop_token_ids"])
        if len(prompt) + body["max_tokens"] > self.max_length:
            raise ValueError(f"This model's maximum context length is {self.max_length} tokens.")
        temperature = body["temperature"] * (0.7 if self.fault == "temperature" else 1.0)
        generator = torch.Generator().manual_seed(body["seed"] % 2**62)
        start = [10, 11, 12, 13, *prompt] if self.fault == "other prompt" else prompt
        rows = torch.tensor([start] * count)
        tokens: list[list[int]] = [[] for _ in range(count)]
        logps: list[list[float]] = [[] for _ in range(count)]
        open_rows = set(range(count))
        with torch.no_grad():
            while open_rows and len(tokens[min(open_rows)]) < body["max_tokens"]:
                logits = model(input_ids=rows).logits[:, -1].float()
                told = torch.log_softmax(logits if self.fault == "raw" else logits / temperature, -1)
                drawn_from = torch.softmax(logits / temperature, -1)
                if self.fault == "top-p":
                    ordered, places = drawn_from.sort(descending=True)
                    cut = torch.zeros_like(drawn_from).scatter(1, places, (ordered.cumsum(-1) - ordered > 0.9).float())
                    drawn_from = drawn_from.masked_fill(cut > 0, 0.0)
                    drawn_from = drawn_from / drawn_from.sum(-1, keepdim=True)
                    told = drawn_from.log()
                drawn = torch.multinomial(drawn_from, 1, generator=generator)
                for row in sorted(open_rows):
                    token = int(drawn[row])
                    tokens[row].append(token)
                    logps[row].append(float(told[row, token]))
                    if token in ends:
                        open_rows.discard(row)
                rows = torch.cat([rows, drawn], dim=1)
        choices = [
            {
                "index": row,
                "token_ids": tokens[row],
                "prompt_token_ids": prompt,
                "logprobs": {"token_logprobs": logps[row]},
                "finish_reason": "stop" if (tokens[row][-1] in ends) != (self.fault == "other end") else "length",
            }
            for row in range(count)
        ]
        return {"model": "base" if self.fault == "other name" else body["model"], "choices": choices[::-1]}

    _routes = {  # noqa: RUF012
        "/v1/models": models,
        "/v1/completions": complete,
        "/v1/load_lora_adapter": add,
        "/v1/unload_lora_adapter": remove,
        "/collective_rpc": reload,
        "/reset_prefix_cache": lambda self, body: {},
        "/sleep?level=1": sleep,
        "/wake_up": wake,
    }
