"""A tokenizer in which every character is one token, so that expected labels can be written down by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.config.sources import Model

SPECIALS = ["<pad>", "<eos>", "<bos>", "<|user|>"]
# Q:question\nA:answer<eos>\n with S:system\n before: what the hand-derived labels are written for
PLAIN = (
    "{% for m in messages %}{{ {'system': 'S', 'user': 'Q', 'assistant': 'A'}[m['role']] }}:{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def make_tokenizer(template: str | None = PLAIN, *, merges: tuple[tuple[str, str], ...] = (), bos: bool = False) -> Any:
    """One token per byte, plus `merges` (in byte-level spelling: a newline is Ċ, a space Ġ); bos: adds <bos> itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        additional_special_tokens=["<|user|>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def model_settings(**changes: Any) -> Model:
    path = {"kind": "path", "path": "unused"}
    values = {
        "source": path,
        "adapter": None,
        "chat_template": "keep",
        "eos_token": None,
        "pad_token": None,
        "storage_precision": "fp32",
    }
    return Model(**{**values, **changes})


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a one-layer random Llama with the tokenizer of this file: model_folder(tokenizer=..., rows=...)."""

    def write(tokenizer: Any = None, rows: int | None = None) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = tmp_path_factory.mktemp("model")
        tokenizer = tokenizer or make_tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=rows or len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
            pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write
