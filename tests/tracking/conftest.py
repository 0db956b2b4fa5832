"""A real training process with a real wandb, a reader of its log file, and servers on loopback that work or fail."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

LOOP = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from alignment.config.execution import Tracking
from alignment.tracking import Tracker, run as run_module, upload as upload_module

spec = json.loads(sys.argv[1])
folder = Path(spec["folder"])
folder.mkdir(parents=True, exist_ok=True)
for module, name in ((run_module, "CLOSE_SECONDS"), (upload_module, "DRAIN_SECONDS")):
    setattr(module, name, spec.get(name.lower(), getattr(module, name)))
warnings, times = [], {}

def clock(label, function, /, *args, **kwargs):
    began = time.monotonic()
    result = function(*args, **kwargs)
    times[label] = max(times.get(label, 0.0), time.monotonic() - began)
    return result

def helper(signal_number):
    pids = subprocess.check_output(["pgrep", "-P", str(os.getpid()), "wandb-core"], text=True).split()
    os.kill(int(pids[0]), signal_number)
    time.sleep(0.3)

tracking = Tracking(kind=spec.get("kind", "wandb"), mode=spec["mode"], project="alignment", entity=None)
tracker = clock("start", Tracker.start, None if spec.get("other_rank") else tracking,
    folder=folder, group="quickstart-1a2b", name="dpo", kind="dpo",
    config=spec.get("config", {}), parents=spec.get("parents", {}), on_warning=warnings.append,
    final_folder=Path(spec["final_folder"]) if "final_folder" in spec else None)
for step in range(spec.get("first", 1), spec.get("last", 6) + 1):
    row = {"loss": 1 / step, "margin": step / 2}
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": step, "time": 1000.0 + step, **row}) + "\\n")
    clock("log", tracker.log, step, row)
    time.sleep(spec.get("pause", 0.0))
    if step == spec.get("killed_at"):
        os.kill(os.getpid(), signal.SIGKILL)
    if step == spec.get("helper_at"):
        helper(spec["helper_signal"])
    if Path(spec.get("until", "-")).exists() or (spec.get("until_warned") and warnings):
        break
clock("result", tracker.result, "dpo", "c" * 64, {"reward_accuracy": 0.75})
clock("finish", tracker.finish, spec.get("ok", True))
print(json.dumps({"last": step, "warnings": warnings, "times": times, "run_id": tracker.run_id,
    "command": tracker.sync_command, "imported": "wandb" in sys.modules}))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user with an empty home folder and an API key."""
    home = tmp_path / "home"
    home.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_"))}
    root = str(Path(__file__).parents[2])
    paths = {"PYTHONPATH": root, "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}"}
    wandb = {"WANDB_API_KEY": "0f" * 20, "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.5"}
    return clean | paths | wandb | {"HOME": str(home)}


@pytest.fixture
def start_loop(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Start a training process; `base_url` names its W&B server. It ends early once the file `until` is there."""

    def start(base_url: str = "http://127.0.0.1:9", **spec: Any) -> subprocess.Popen[str]:
        spec = {"folder": str(tmp_path / "stage"), "mode": "offline"} | spec
        return subprocess.Popen(
            [sys.executable, "-c", LOOP, json.dumps(spec)],
            env=environment | {"WANDB_BASE_URL": base_url},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run_loop(start_loop: Callable[..., subprocess.Popen[str]]) -> Callable[..., dict[str, Any]]:
    """Run a training process to its end and give what it reports; it must print nothing else."""

    def run(**spec: Any) -> dict[str, Any]:
        began = time.monotonic()
        out, err = start_loop(**spec).communicate(timeout=120)
        assert err == ""
        (line,) = out.splitlines()
        return json.loads(line) | {"seconds": time.monotonic() - began}

    return run


@pytest.fixture
def read_log() -> Callable[[Path], dict[str, Any]]:
    """Records of a .wandb file: the framing of LevelDB's log behind a header of 7 bytes, protobuf inside."""
    return _read_log


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full record, or its last piece
            yield whole
            whole = b""


def _read_log(path: Path) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    log: dict[str, Any] = {"history": [], "summary": {}, "made": [], "used": [], "exit": None, "run": None}
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)
        which = record.WhichOneof("record_type")
        if which == "run" and log["run"] is None:
            log["run"] = record.run
            log["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif which == "history":
            items = record.history.item
            log["history"].append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
        elif which == "summary":
            log["summary"] |= {(i.key or "/".join(i.nested_key)): i.value_json for i in record.summary.update}
        elif which == "artifact":
            log["used" if record.artifact.use_after_commit else "made"].append(record.artifact)
        elif which == "exit":
            log["exit"] = record.exit.exit_code
    return log


# --- servers ---------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """As much of W&B's server as an upload needs."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # a client that went away
            pass

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status != 200:
            self._answer(self.server.status, {"errors": [{"message": "user is not logged in"}]})
            return
        if self.path.startswith("/otel") or not self.path.startswith(("/graphql", "/files/")):
            self._answer(200, {})
            return
        body = json.loads(gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data)
        if self.path == "/graphql":
            self._answer(200, {"data": self.server.graphql(body)})
        else:
            self.server.take(body)
            self._answer(200, {})


class WandbServer(ThreadingHTTPServer):
    """Keeps what it is sent. rows: the history as the server holds it, by line number: later lines replace earlier."""

    daemon_threads = True

    def __init__(self, status: int = 200):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.rows: dict[int, dict[str, Any]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.complete = threading.Event()
        self.connections: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def history(self) -> list[dict[str, Any]]:
        return [self.rows[line] for line in sorted(self.rows)]

    def called(self, operation: str) -> list[dict[str, Any]]:
        return [variables for name, variables in self.calls if name == operation]

    def graphql(self, body: dict[str, Any]) -> dict[str, Any]:
        operation, variables = body["operationName"], body.get("variables") or {}
        self.calls.append((operation, variables))
        project = {"id": "cA==", "name": "alignment", "entity": {"id": "ZQ==", "name": "me"}}
        bucket = {"id": "cg==", "name": variables.get("name"), "displayName": "dpo", "project": project}
        names = variables.get("files") or []
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in names]
        artifact = {"id": "YQ==", "state": "COMMITTED", "artifactSequence": {"id": "cw==", "latestArtifact": None}}
        answers: dict[str, Any] = {
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "CreateRunFiles": {"createRunFiles": {"runID": "cg==", "uploadHeaders": [], "files": files}},
            "CreateArtifact": {"createArtifact": {"artifact": artifact}},
            "UseArtifact": {"useArtifact": {"artifact": {"id": "YQ=="}}},
        }
        return answers.get(operation, {})

    def take(self, body: dict[str, Any]) -> None:
        chunk = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for line, row in enumerate(chunk["content"], start=chunk["offset"]):
            self.rows[line] = json.loads(row)
        if body.get("complete"):
            self.complete.set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def die(self) -> None:
        self.shutdown()
        self.socket.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    serving = WandbServer()
    yield serving
    serving.die()


@pytest.fixture
def refusing_server() -> Iterator[WandbServer]:
    serving = WandbServer(status=401)
    yield serving
    serving.die()


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A server that takes the connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def closed_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    return f"http://127.0.0.1:{port}"
