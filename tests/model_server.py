"""An OpenAI-compatible server of a tiny model: what lm-evaluation-harness asks of a server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM


class Completions:
    """/v1/completions for prompts of token ids, greedy."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = LlamaForCausalLM.from_pretrained(path)
        self.num_requests = 0

    @torch.no_grad()
    def choice(self, prompt: list[int], request: dict[str, Any]) -> dict[str, Any]:
        if request.get("echo"):
            logits = self.model(torch.tensor([prompt])).logits[0]
            log_probs = logits.log_softmax(-1)
            own = [None, *(float(row[i]) for row, i in zip(log_probs, prompt[1:], strict=False))]
            best = [{"": float(row.max())} for row in log_probs]
            logprobs = {"token_logprobs": [*own, best[-1][""]], "top_logprobs": [None, *best]}
            return {"text": "", "logprobs": logprobs}
        ids = self.model.generate(
            torch.tensor([prompt]), max_new_tokens=request["max_tokens"], do_sample=False
        )[0, len(prompt) :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in request["stop"]:
            text = text.split(stop)[0]
        return {"text": text}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        self.num_requests += 1
        choices = [self.choice(prompt, request) for prompt in request["prompt"]]
        return {"choices": [{"index": number, **choice} for number, choice in enumerate(choices)]}


@contextmanager
def serving(completions: Completions) -> Iterator[str]:
    """Serve the model `tiny` on a free port; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._reply(completions.answer(json.loads(body)))

        def _reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
