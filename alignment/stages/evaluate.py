"""One model on the held-out prompts -> answers.jsonl (a row a prompt, all that is measured of it), evaluation.json.

The model and the reference are loaded one after the other. The model's log-probs of its own answers are those of the
decoding itself; only the reference has to read the answers. If the model is the reference, the KL is 0 without that.
With `best_of` above 1 so many answers are sampled to a prompt; the best by the reward counts, and to its KL comes the
bound of that choice.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment import generation
from alignment.config.stages.answering import Evaluate
from alignment.data.chat import Chat
from alignment.data.checks import Drop
from alignment.data.tokens import conversation
from alignment.errors import InputError
from alignment.evaluation import signals
from alignment.files import write_json, write_jsonl
from alignment.generation import Completion
from alignment.stages.context import StageContext
from alignment.stages.parts import Parts, judge_of, rows_of

CURVE = 12  # points of the running means in metrics.jsonl
REFERENCE = ("reference", "reference_message")  # the text of the data's answer; all of it, where that is more
Row = dict[str, Any]
Ids = tuple[list[int], list[int]]  # prompt, answer


def run(context: StageContext) -> dict[str, Any]:
    rows = rows_of(context.inputs["data"], "heldout.jsonl")
    folder, reference = (context.inputs[role] / "model" for role in ("model", "reference"))
    itself = folder.resolve() == reference.resolve()
    shares = {"loading": 5, "answering": 60, "held-out loss": 15, "judging": 5, "KL": 0 if itself else 15}
    parts = Parts(context, shares)
    asked = _ask(context.settings, rows, folder, parts)
    judged = _judge(context, rows, asked.answers, parts)
    precision = context.settings.precision
    distance = [0.0] * len(rows) if itself else _distance(reference, precision, asked, judged.best, parts)
    bound = signals.best_of_kl(context.settings.best_of)
    written = [
        {
            **{name: row[name] for name in ("id", "source", "prompt", *REFERENCE) if name in row},
            "answer": answer.text,
            "tokens": answer.tokens,
            "finished": answer.finished,
            **score,
            "kl": kl + bound,
            "repetition": signals.repetition(answer.text),
            "heldout_nll": loss,
        }
        for row, answer, score, kl, loss in zip(rows, judged.best, judged.scores, distance, asked.nll, strict=True)
    ]
    metrics = _publish(context, written)
    missing = {"heldout_nll_missing": float(asked.nll.count(None)), "reward_failed": float(judged.failed)}
    several = {"kl_bound": bound} if context.settings.best_of > 1 else {}
    return {**metrics, "prompts": float(len(rows)), **missing, **several}


@dataclass(frozen=True)
class Asked:
    """What is known once the model has been asked: one entry a row, except the vocabulary (token -> id)."""

    prompts: list[list[int]]  # token ids
    answers: list[list[Completion]]
    nll: list[float | None]  # of the reference answer, mean nats per token
    vocabulary: dict[str, int]


def _ask(settings: Evaluate, rows: list[Row], folder: Path, parts: Parts) -> Asked:
    parts("loading")
    model, tokenizer = generation.load(folder, settings.precision)
    prompts = [row["prompt"] for row in rows]
    answers = generation.generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=1.0,
        batch_size=settings.batch_size,
        seed=settings.seed,
        completions=settings.best_of,
        progress=parts("answering"),
    )
    nll = _heldout_nll(model, Chat(tokenizer, str(folder)), rows, parts)
    ids = [generation.encode_prompt(tokenizer, prompt) for prompt in prompts]
    return Asked(ids, answers, nll, tokenizer.get_vocab())


@dataclass(frozen=True)
class Judged:
    """One entry a row: the answer that counts, and its score. failed: how many of all answers have no reward."""

    best: list[Completion]
    scores: list[Row]
    failed: int


def _judge(context: StageContext, rows: list[Row], answers: list[list[Completion]], parts: Parts) -> Judged:
    """Of a prompt's answers the one with the highest reward, the first of equals; its score tells all `rewards`."""
    parts("judging")
    judge = judge_of(context)
    asked = [row for row, few in zip(rows, answers, strict=True) for _ in few]
    every = [answer for few in answers for answer in few]
    scores = judge.score(asked, [a.text for a in every], [a.tokens for a in every])
    failed, best, found = judge.failures(scores), [], []
    for few in answers:
        own, scores = scores[: len(few)], scores[len(few) :]
        rewards = [score["reward"] for score in own]
        number = max(range(len(few)), key=lambda i: -math.inf if rewards[i] is None else rewards[i])
        best.append(few[number])
        found.append({**own[number], **(_of_all(own) if len(few) > 1 else {})})
    return Judged(best, found, failed)


def _of_all(scores: list[Row]) -> Row:
    """What is told of all answers to a prompt beside the score of the best: why each without a reward has none."""
    told: Row = {"best_of": len(scores), "rewards": [score["reward"] for score in scores]}
    if None in told["rewards"]:
        told["rewards_failed"] = [score["failed"] if score["reward"] is None else None for score in scores]
    return told


def _heldout_nll(model: Any, chat: Chat, rows: list[Row], parts: Parts) -> list[float | None]:
    """Mean nats per token of each reference answer with its end-of-turn token; None if it does not render or fit."""
    encoded = [_encode(chat, row, generation.window(model)) for row in rows]
    known = [ids for ids in encoded if ids is not None]
    losses = iter(generation.sequence_log_probs(model, known, progress=parts("held-out loss")))
    return [None if ids is None else signals.mean_nll(next(losses).tolist()) for ids in encoded]


def _encode(chat: Chat, row: Row, limit: int) -> Ids | None:
    answer = row.get("reference_message") or {"role": "assistant", "content": row["reference"]}
    try:
        whole = conversation(chat, [*row["prompt"], answer], f"heldout.jsonl, id {row['id']}")
    except Drop:  # prepared with this template it was fit; with another it may not be
        return None
    end = whole.ids.index(chat.eos_id, whole.prompt) + 1
    return (whole.ids[: whole.prompt], whole.ids[whole.prompt : end]) if end <= limit else None


def _distance(reference: Path, precision: str, asked: Asked, answers: list[Completion], parts: Parts) -> list[float]:
    """log p_model - log p_reference of each answer, in nats."""
    gc.collect()  # the model is out of scope; its memory must be free before the reference takes as much
    model, tokenizer = generation.load(reference, precision)
    if tokenizer.get_vocab() != asked.vocabulary:
        raise InputError("the model and its reference do not share a tokenizer: there is no KL", where=str(reference))
    rows = [(ids, answer.token_ids) for ids, answer in zip(asked.prompts, answers, strict=True)]
    theirs = generation.sequence_log_probs(model, rows, progress=parts("KL"))
    return [signals.kl(a.log_prob, float(t.double().sum())) for a, t in zip(answers, theirs, strict=True)]


def _publish(context: StageContext, rows: list[Row]) -> dict[str, float]:
    """Write the artifacts; the running means go to metrics.jsonl, so that one can see whether they have settled."""
    points = sorted({round(len(rows) * point / CURVE) for point in range(1, CURVE + 1)} - {0})
    for seen in points:
        context.log(seen, signals.means(rows[:seen]))
    metrics = signals.means(rows)
    write_jsonl(context.folder / "answers.jsonl", rows)
    by_source = {"sources": sources} if (sources := signals.by_source(rows)) else {}
    write_json(context.folder / "evaluation.json", {"metrics": metrics, "prompts": signals.counts(rows), **by_source})
    context.progress(1000, 1000)
    return metrics
