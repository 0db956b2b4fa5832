"""relevance: cosine similarity of the prompt's last user turn and the answer under a sentence encoder, in [-1, 1].

A text's vector is the mean of its tokens' vectors, at unit length (Reimers & Gurevych 2019, arXiv:1908.10084).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment.rewards.term import Answer, Term, Value, worded

BATCH = 32  # texts encoded together


def relevance(folder: Path, alive: Callable[[], None]) -> Term:
    """folder: of the encoder. alive is called after each batch. Raises InputError if it does not load."""
    encoder = Encoder(folder)

    def values(answers: Sequence[Answer]) -> list[Value]:
        both = [(answer.asked, answer.text) for answer in answers]
        texts = sorted({text for pair in both for text in pair}, key=lambda text: (len(text), text))  # a prompt once
        vectors = dict(zip(texts, encoder(texts, alive), strict=True))
        return [float(vectors[asked] @ vectors[text]) for asked, text in both]

    return worded(values)


class Encoder:
    """A sentence encoder of a local Hugging Face folder. It reads the first `limit` tokens of a text."""

    def __init__(self, folder: Path):
        from transformers import AutoModel

        from alignment import loading

        model, self.tokenizer, _ = loading.load(AutoModel, folder, "sentence encoder")  # it may lack what is not used
        self.model = model.eval()
        self.limit = _trained_length(folder, self.model.config.max_position_embeddings)

    def __call__(self, texts: Sequence[str], alive: Callable[[], None] = lambda: None) -> list[Any]:
        """One unit vector [D] (torch, fp32) a text."""
        import torch

        vectors: list[Any] = []
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                batch = list(texts[start : start + BATCH])
                given = self.tokenizer(batch, padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
                hidden = self.model(**given).last_hidden_state  # [B, T, D]
                real = given["attention_mask"][..., None].to(hidden)
                mean = (hidden * real).sum(1) / real.sum(1)
                vectors.extend(torch.nn.functional.normalize(mean, dim=-1))
                alive()
        return vectors


def _trained_length(folder: Path, positions: int) -> int:
    """Tokens a text may have: what the encoder was trained on if its folder says so, else all its positions."""
    told = folder / "sentence_bert_config.json"
    length = json.loads(told.read_text()).get("max_seq_length") if told.is_file() else None
    return min(int(length or positions), positions)
