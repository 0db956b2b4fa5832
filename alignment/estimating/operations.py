"""Floating-point operations of a step, counted by the matrix products and by attention: two a multiplication and
addition.

By Kaplan et al. 2020, Scaling Laws for Neural Language Models (arXiv:2001.08361), section 2.1, and Hoffmann et al.
2022, Training Compute-Optimal Large Language Models (arXiv:2203.15556), appendix F: a forward is 2 operations a weight
and token, beside those of attention, a backward pass twice that. Where this project computes less, less is counted: a
shared prompt once (training/packing.py), the head for scored tokens alone, the last layer for tokens of which an answer
is made (training/last_layer.py), attention for tokens that are seen. Norms, activations, rotations, softmax are not
counted, nor are experts beyond one MLP.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from alignment.training.shape import Shape

ATTENTION_BACKWARD = 2.5  # of its forward: a fused kernel computes the scores again, and has four more products


class Counts(NamedTuple):
    """What a forward computes, of each of R records: arrays [R], or their sums.

    tokens: packed. scored: those whose log-probability is computed. read: those of which any answer is made. seen:
    pairs of a token and one that it attends to, itself among them."""

    tokens: np.ndarray
    scored: np.ndarray
    read: np.ndarray
    seen: np.ndarray

    def sum(self, records: np.ndarray | slice = slice(None)) -> Counts:
        return Counts(*(column[records].sum() for column in self))


def of_rows(lengths: np.ndarray, scored: np.ndarray) -> Counts:
    """Of rows by themselves."""
    return Counts(lengths, scored, scored + 1, triangle(lengths))


def of_branches(prompt: np.ndarray, answers: np.ndarray, scored: bool = True) -> Counts:
    """Of records whose answers share a prompt, which is computed once. prompt: [R]; answers: [R, branches], tokens of
    each; the first is computed with the prompt. scored: False for a classifier, which reads each last token."""
    branches, tokens = answers.shape[1], answers.sum(1)
    first, others = answers[:, 0], answers[:, 1:]
    seen = triangle(prompt + first) + (prompt[:, None] * others + triangle(others)).sum(1)
    counted = tokens if scored else np.zeros_like(tokens)
    return Counts(prompt + tokens, counted, counted + branches, seen)


def triangle(lengths: np.ndarray) -> np.ndarray:
    """Tokens that causal attention sees in all, itself among them."""
    return lengths * (lengths + 1) // 2


class Trained(NamedTuple):
    """What has gradients. whole: all weights. adapters: weights of adapters a layer. checkpointing: activations are
    computed again in the backward pass. scores_again: so are the head's logits, by TRL's kernel on a GPU. outputs: of
    the head; 1: a reward model's, None: a vocabulary."""

    whole: bool = True
    adapters: float = 0.0
    checkpointing: bool = False
    scores_again: bool = False
    outputs: int | None = None


def layers_forward(shape: Shape, work: Counts, adapters: float = 0.0) -> np.ndarray:
    """[R]: of the decoder's layers. In the last one the MLP is that of read tokens alone, and so are queries and output
    projection where they are modules of their own, which GPT-2's are not."""
    attention, mlp = (
        shape.hidden * 2 * (shape.query + shape.key),
        (3 if shape.gated else 2) * shape.hidden * shape.inner,
    )
    of_all = shape.hidden * 2 * shape.key if shape.gated else attention
    last = work.tokens * of_all + work.read * (attention + mlp - of_all)
    linear = (shape.layers - 1) * work.tokens * (attention + mlp) + last
    return 2.0 * linear + adapters_forward(shape, work, adapters) + attention_forward(shape, work)


def adapters_forward(shape: Shape, work: Counts, adapters: float) -> np.ndarray:
    """[R]: of low-rank adapters, most of which are on what the last layer computes for read tokens alone."""
    return 2.0 * adapters * ((shape.layers - 1) * work.tokens + work.read)


def attention_forward(shape: Shape, work: Counts) -> np.ndarray:
    """[R]: queries times keys, scores times values."""
    return 4.0 * shape.layers * shape.query * work.seen


def head_forward(shape: Shape, work: Counts, outputs: int | None = None) -> np.ndarray:
    """[R]: logits of scored tokens; of a reward model none worth counting."""
    return 2.0 * shape.hidden * (shape.vocabulary if outputs is None else 0) * work.scored


def forward(shape: Shape, work: Counts, adapters: float = 0.0, outputs: int | None = None) -> np.ndarray:
    """[R]: of a forward without gradients."""
    return layers_forward(shape, work, adapters) + head_forward(shape, work, outputs)


def update(shape: Shape, work: Counts, trained: Trained) -> np.ndarray:
    """[R]: forward and backward. A weight has a gradient of its own and one of its input, each as dear as its forward;
    one that is frozen has the latter alone, and in the first layer not even that where nothing comes from before it."""
    layers, head = layers_forward(shape, work, trained.adapters), head_forward(shape, work, trained.outputs)
    attention, adapters = attention_forward(shape, work), adapters_forward(shape, work, trained.adapters)
    frozen = layers - attention - adapters
    first = 0.0 if trained.whole else 2.0 * shape.hidden * (shape.query + 2 * shape.key) * work.tokens
    backward = (2 if trained.whole else 1) * (frozen + head) - first + 2 * adapters + ATTENTION_BACKWARD * attention
    again = (layers if trained.checkpointing else 0.0) + (head if trained.scores_again else 0.0)
    if trained.checkpointing and trained.whole:  # PyTorch stops at the last input that is needed: the last product's
        again = again - 2.0 * shape.hidden * shape.inner * ((shape.layers - 1) * work.tokens + work.read)
    return layers + head + backward + again


def decoding(shape: Shape, prompt: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """[R]: of answers to prompts, [R, branches] tokens each, token by token with keys and values kept; the prompt is
    read once."""
    work = of_branches(prompt, answers)
    return forward(shape, work._replace(read=work.tokens))
