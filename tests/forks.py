"""Processes that are forks of one that has imported what runs import: it takes ten seconds, what they do one or two."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.warm"])


def say_into(path: Path, errors: Path | None = None) -> None:
    """All that this process prints from now on, behind what the files have."""
    for stream, file in ((sys.stdout, path), (sys.stderr, errors or path)):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, stream.fileno())
        os.close(handle)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    return {name: str(value) for name, value in told.items()} | rendezvous
