"""GGUF files (llama.cpp's format) -> an ordinary tokenizer and model, with what transformers leaves undone."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignment.errors import InputError

# How text is cut before byte-pair merging, by the file's name for it (llama.cpp, src/llama-vocab.cpp). transformers
# takes the plain GPT-2 pattern for every name it does not know, which silently cuts text otherwise than in training.
GPT2 = ("gpt-2", "mpt", "olmo", "jais", "default")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
STRING = 8  # the GGUF type of a string: u64 length, then UTF-8; a key is a string followed by its u32 type


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The file alone in a folder of its own, and read only once while it is open.

    Alone: transformers would take a tokenizer, config or template that lies beside it for the file's own. Once:
    transformers opens it for the tokenizer, the config and the weights, each time gguf decodes the whole vocabulary in
    Python; and it asks for the table of names at every module. That was half the time of the quickstart's import.
    """
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    with TemporaryDirectory(prefix="alignment-") as folder:
        alone = Path(folder) / path.name
        alone.symlink_to(path.resolve())
        try:
            for name, made in slow.items():
                setattr(gguf, name, cache(made))
            yield alone
        finally:
            for name, made in slow.items():
                setattr(gguf, name, made)


def read_tokenizer(path: Path, where: str) -> Any:
    """The tokenizer inside a GGUF file. Raises InputError if its way of cutting text is unknown."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = _own_tokens(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False))
    name, cut = read_string(path, "tokenizer.ggml.pre"), tokenizer.backend_tokenizer.pre_tokenizer
    if name is None or not isinstance(cut, pre_tokenizers.ByteLevel):  # not byte-level, or transformers knew the name
        return tokenizer
    if name in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
    elif name not in GPT2:
        what = f"cuts text into words in a way that cannot be reproduced ({name!r})"
        raise InputError(what, where=where, fix="give the model as a Hugging Face folder")
    return tokenizer


def _own_tokens(tokenizer: Any) -> Any:
    """Without GPT-2's <|endoftext|>, which transformers adds beyond the embedding's last row where a file has none."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in backend["added_tokens"] if token["id"] >= len(backend["model"]["vocab"])}
    if not added:
        return tokenizer
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] not in added]
    if backend["model"].get("unk_token") in added:
        backend["model"]["unk_token"] = None
    named = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    named = {key: token for key, token in named.items() if token and token not in added}
    kept = Tokenizer.from_str(json.dumps(backend))
    return PreTrainedTokenizerFast(tokenizer_object=kept, chat_template=tokenizer.chat_template, **named)


def read_string(path: Path, key: str) -> str | None:
    """One string of the file's metadata (gguf's own reader takes seconds, as it decodes the whole vocabulary)."""
    mark = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", STRING)
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(mark)
        if start < 0:
            return None
        (length,) = struct.unpack_from("<Q", content, start + len(mark))
        begin = start + len(mark) + 8
        return bytes(content[begin : begin + length]).decode()


def plain_model(model: Any, dtype: Any) -> Any:
    """A dequantised GGUF still calls itself quantised and cannot be saved: the same weights in one that does not."""
    from transformers import AutoModelForCausalLM

    config = model.config
    del config.quantization_config
    auto: Any = AutoModelForCausalLM
    plain = auto.from_config(config, dtype=dtype)
    plain.load_state_dict(model.state_dict())
    return plain
