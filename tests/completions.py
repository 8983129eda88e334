"""A small HTTP server in the place of a generation server: it replays, records, or alters."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# What a real vLLM 0.32 on a CPU answered to the requests of test_generate_server.py.
EXCHANGE = Path(__file__).parent / "vllm_exchange.json"
Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


@contextmanager
def serving(reply: Reply) -> Iterator[str]:
    """Serve `reply` on a free port of this machine; yields the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            status, content = reply(json.loads(self.rfile.read(length)))
            body = json.dumps(content).encode()
            self.send_response(status)
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


def key_of(request: dict[str, Any]) -> str:
    return json.dumps(request, sort_keys=True)


def replay() -> Reply:
    """Answers as the recorded server did."""
    recorded = {key_of(pair["request"]): pair for pair in json.loads(EXCHANGE.read_text())}

    def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        pair = recorded[key_of(request)]
        return pair["status"], json.loads(json.dumps(pair["response"]))

    return reply


def forward(url: str, pairs: list[dict[str, Any]]) -> Reply:
    """Asks the server at `url`, and appends what was said to `pairs`."""

    def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked = urllib.request.Request(
            f"{url}/completions",
            json.dumps(request).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(asked, timeout=120) as response:
                status, content = response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            status, content = error.code, json.loads(error.read())
        pairs.append({"request": request, "status": status, "response": content})
        return status, content

    return reply
