"""What an answer is worth: a weighted sum of terms, each a number in [-1, 1]. Terms are chosen by name from one table.

sentiment: the compound score of the VADER lexicon (Hutto & Gilbert 2014) of the answer, in [-1, 1].
relevance: cosine similarity of the prompt's last user turn and the answer under a sentence encoder (mean of the token
vectors, unit length; Reimers & Gurevych 2019, arXiv:1908.10084), in [-1, 1].
An answer without a word is worth 0 in every term: neither liked nor disliked, and about nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment.config.rewards import Reward
from alignment.errors import InputError, MachineError

Message = dict[str, str]
Term = Callable[[Sequence[str], Sequence[str]], list[float]]  # (prompts, answers), of one length -> one number each
BATCH = 32  # texts encoded together


class Judge:
    """Scores answers by a reward of the configuration. folders: term name -> folder of its model, if it has one."""

    def __init__(self, reward: Reward, folders: dict[str, Path]):
        self.weights = {name: term.weight for name, term in reward.terms.items()}
        self.terms = {name: TERMS[term.kind](name, folders.get(name)) for name, term in reward.terms.items()}

    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[dict[str, Any]]:
        """One {"reward": float, "terms": {name: float}} an answer, in their order. answers[i] answers prompts[i]."""
        asked = [_last_user_turn(prompt) for prompt in prompts]
        worded = [i for i, answer in enumerate(answers) if answer.strip()]
        scores: list[dict[str, float]] = [dict.fromkeys(self.terms, 0.0) for _ in answers]
        for name, term in self.terms.items():
            values = term([asked[i] for i in worded], [answers[i] for i in worded])
            for i, value in zip(worded, values, strict=True):
                scores[i][name] = value
        return [{"reward": sum(self.weights[n] * v for n, v in terms.items()), "terms": terms} for terms in scores]


def _last_user_turn(prompt: Sequence[Message]) -> str:
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")


def _sentiment(name: str, folder: Path | None) -> Term:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        fix = "pip install 'alignment[sentiment]'"
        raise MachineError("the package vaderSentiment is missing", where=f"reward.terms.{name}", fix=fix) from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda prompts, answers: [float(analyzer.polarity_scores(answer)["compound"]) for answer in answers]


def _relevance(name: str, folder: Path | None) -> Term:
    assert folder is not None, name  # config/checks.py refuses a relevance term without a source
    encoder = Encoder(folder)

    def relevance(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        texts = sorted({*prompts, *answers}, key=lambda text: (len(text), text))  # a prompt once for all its answers
        vectors = dict(zip(texts, encoder(texts), strict=True))
        return [float(vectors[prompt] @ vectors[answer]) for prompt, answer in zip(prompts, answers, strict=True)]

    return relevance


TERMS: dict[str, Callable[[str, Path | None], Term]] = {"sentiment": _sentiment, "relevance": _relevance}


class Encoder:
    """A sentence encoder of a local Hugging Face folder. It reads the first `limit` tokens of a text."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        only_here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **only_here)
            self.model = AutoModel.from_pretrained(folder, use_safetensors=True, **only_here).eval()
        except (OSError, ValueError, SafetensorError) as error:
            cause = str(error).strip().splitlines()[0]
            raise InputError(f"the sentence encoder does not load: {cause}", where=str(folder)) from error
        self.limit = _trained_length(folder, self.model.config.max_position_embeddings)

    def __call__(self, texts: Sequence[str]) -> list[Any]:
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
        return vectors


def _trained_length(folder: Path, positions: int) -> int:
    """Tokens a text may have: what the encoder was trained on if its folder says so, else all its positions."""
    told = folder / "sentence_bert_config.json"
    length = json.loads(told.read_text()).get("max_seq_length") if told.is_file() else None
    return min(int(length or positions), positions)
