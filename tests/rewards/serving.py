"""A chat endpoint on this machine that answers as a test says, and a judge that asks it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from alignment.config.rewards import Reward
from alignment.rewards import Judge

KEY = "sk-secret-of-this-test-0123456789"
Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: Any) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@dataclass
class Server:
    """answer(question, how many questions came before it) -> what it says. asked: (path, headers, body) so far. close:
    nothing listens from then on."""

    answer: Callable[[dict[str, Any], int], Answer]
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: Any = field(default_factory=threading.Lock)
    port: int = 0
    close: Callable[[], None] = lambda: None


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(lambda question, before: completion("Score: 10"))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with made.lock:
                before = len(made.asked)
                made.asked.append((self.path, dict(self.headers), body))
                made.at_once += 1
                made.most_at_once = max(made.most_at_once, made.at_once)
            status, headers, text = made.answer(body, before)
            with made.lock:
                made.at_once -= 1
            try:
                if "Drip-Head" in headers:
                    self._drip(b"HTTP/1.1 200 OK\r\nX: " + text)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if "Drip" in headers:
                    self._drip(text)
                else:
                    self.wfile.write(text)
            except OSError:  # whoever asked has gone
                pass

        def _drip(self, text: bytes) -> None:
            for byte in text:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)

        def log_message(self, *args: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.port = listening.server_port
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()

    def close() -> None:
        listening.shutdown()
        listening.server_close()

    made.close = close
    yield made
    close()


SETTINGS = {
    "kind": "endpoint", "weight": 1.0, "model": "judge-7b", "system": None, "prompt": "Q: {prompt}\nA: {answer}",
    "pattern": r"Score:\s*(-?\d+)", "low": 1.0, "high": 10.0, "temperature": 0.0, "max_tokens": 16,
    "api_key_env": None, "timeout_s": 5.0, "retries": 2, "backoff_s": 0.01, "concurrency": 4, "cache": True,
}  # fmt: skip


def judge_at(port: int, shared: Path | None = None, alive: Any = lambda: None, **changes: Any) -> Judge:
    term = {**SETTINGS, "url": f"http://127.0.0.1:{port}/v1/", **changes}
    return Judge(Reward.model_validate({"terms": {"term": term}}), {}, alive, shared)


def told(scores: list[dict[str, Any]]) -> list[Any]:
    """Each reward, or why there is none."""
    return [score["reward"] if "failed" not in score else score["failed"]["term"] for score in scores]
