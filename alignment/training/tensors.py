"""One safetensors file, written in a stream: to the disk, with its digest, holding no second copy in memory.

The library's own `save_file` makes bytes of every tensor first, holding Python's lock, and leaves hashing to a second
reading. The format is 8 bytes with the header's length, the header in JSON, the values:
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float16: "F16"}
PIECE = 1 << 24  # bytes: the lock is given up between pieces, and a failing disk is noticed early
FLUSH = 1 << 27  # bytes after which they are sent to the disk: no single wait for it takes long


@dataclass(frozen=True)
class Later:
    """A tensor that is made when its turn comes, so that no two of a large file are there at once."""

    shape: Sequence[int]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def cpu(self) -> Tensor:
        return self.make()


class Cancelled(Exception):
    """Nobody wants the file any more."""


def write(
    path: Path, tensors: Mapping[str, Tensor | Later], facts: Any, go_on: Callable[[], bool] = lambda: True
) -> dict[str, Any]:
    """Write a new file durably. facts: JSON-able, kept as text under `facts` in the file's metadata.

    tensors: of the types in NAMES; one on a GPU is brought over when its turn comes. go_on: asked before each piece.
    Returns {"bytes", "sha256"}. Raises OSError; Cancelled where it must not go on.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "facts": json.dumps(facts)}}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as stream:
        for piece in _pieces(len(text).to_bytes(8, "little") + text, tensors):
            if not go_on():
                raise Cancelled(path)
            digest.update(piece)
            before, written = written, written + len(piece)
            while piece:
                piece = piece[stream.write(piece) :]
            if written // FLUSH > before // FLUSH:
                os.fsync(stream.fileno())
        os.fsync(stream.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def _pieces(head: bytes, tensors: Mapping[str, Tensor | Later]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors.values():
        if tensor.numel():
            whole = memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for at in range(0, len(whole), PIECE):
                yield whole[at : at + PIECE]


def facts(path: Path) -> Any:
    """What `write` was given as facts."""
    from safetensors import safe_open

    with safe_open(path, "pt") as stream:
        return json.loads(stream.metadata()["facts"])
