"""Reward models on held-out rows -> evaluation.json (metrics, calibration), rewards.jsonl (each member's rewards).

Of the rows that were prepared beside those trained on: pairs, or answers with a score. Several models are an ensemble.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_from_disk

from alignment.config.stages.reward_model import MEMBERS, EvaluateReward
from alignment.data.chat import Chat
from alignment.data.numbers import check_scores
from alignment.data.tokens import check_end_of_turn
from alignment.errors import InputError
from alignment.evaluation import reward_metrics
from alignment.files import read_json, write_json, write_jsonl
from alignment.rewards.model import Scorer
from alignment.stages.context import StageContext
from alignment.stages.parts import Parts, check_template, rows_of
from alignment.stages.reward_model import CHANCES, TOLD


def run(context: StageContext) -> dict[str, Any]:
    settings: EvaluateReward = context.settings
    data = context.inputs["data"]
    rows, ids = _heldout(data), [row["id"] for row in rows_of(data, "heldout.jsonl")]
    members = {role: context.inputs[role] for role in MEMBERS if role in context.inputs}
    loss, margin = _trained(members)
    if loss == "bce" and "completion_ids" in rows.column_names:  # else pairs
        check_scores(data, "heldout", CHANCES)
    for folder in members.values():
        _check_same_text(folder / "model", data, rows)
    sides = ("chosen", "rejected") if "chosen_ids" in rows.column_names else ("completion",)
    asked = [[*row["prompt_ids"], *row[f"{side}_ids"]] for side in sides for row in rows]
    parts, found = Parts(context, dict.fromkeys(members, 1.0)), []
    for role, folder in members.items():
        gc.collect()  # the one before is out of scope; its memory must be free
        found.append(_rewards(folder / "model", asked, settings, parts(role)))
    rewards = np.stack(found).reshape(len(members), len(sides), len(rows))  # [members, sides, rows]
    lengths = np.array([[len(row[f"{side}_ids"]) for row in rows] for side in sides])
    told = _measured(rewards, lengths, rows, loss, log_odds=loss == "bradley_terry" and not margin)
    _publish(context, told, rewards, lengths, sides, ids)
    return dict(told["metrics"])


def _rewards(
    folder: Path, rows: Sequence[Sequence[int]], settings: EvaluateReward, progress: Callable[..., None]
) -> np.ndarray:
    """float64 [rows], in their order. Rows of like length go together. Raises InputError for one that is not finite."""
    scorer, size = Scorer(folder, precision=settings.precision), settings.batch_size
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    found, done = np.zeros(len(rows)), 0
    for batch, rewards in scorer.rewards(rows, [order[start : start + size] for start in range(0, len(rows), size)]):
        found[list(batch)] = rewards
        done += len(batch)
        progress(done, len(rows))
    if wrong := int((~np.isfinite(found)).sum()):  # as NaN is above nothing, it would count as a wrong answer
        what = f"{wrong} of {len(rows)} rewards are NaN or infinite"
        raise InputError(what, where=str(folder), fix="train the reward model with a lower learning rate, or in fp32")
    return found


def _heldout(data: Path) -> Any:
    folder = data / "heldout"
    if not folder.is_dir():
        fix = "give splits.heldout rows; what was prepared before pairs were kept whole is made anew after deleting it"
        raise InputError("no whole pairs or scored answers are held out", where=str(folder), fix=fix)
    return load_from_disk(str(folder))


def _trained(members: dict[str, Path]) -> tuple[str, float]:
    """Loss and margin that all members were trained with. Raises InputError where they differ: their numbers mean
    different things."""
    told = {role: read_json(folder / TOLD) for role, folder in members.items()}
    for what, several in (("loss", "losses"), ("margin", "margins")):
        if len({one[what] for one in told.values()}) > 1:
            said = ", ".join(f"{role} {one[what]}" for role, one in told.items())
            fix = f"use one {what}"
            raise InputError(f"members of an ensemble were trained with different {several}: {said}", fix=fix)
    one = next(iter(told.values()))
    return str(one["loss"]), float(one["margin"])


def _check_same_text(model: Path, data: Path, rows: Any) -> None:
    """The rows are token ids: as this model would render and tokenise them. Raises InputError."""
    chat = Chat.load(model)
    check_template(chat, data)
    check_end_of_turn(rows, chat.eos_id)


def _measured(rewards: np.ndarray, lengths: np.ndarray, rows: Any, loss: str, log_odds: bool) -> dict[str, Any]:
    """{"metrics"}, and of pairs whose margins are log-odds {"calibration"}. Those of a model that was trained to keep
    pairs a margin apart are more than that."""
    if len(lengths) == 1:
        scores = np.array(rows["score"][:], dtype=np.float64)
        return {"metrics": reward_metrics.of_scores(rewards[:, 0], scores, lengths[0], loss)}
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    told: dict[str, Any] = {"metrics": reward_metrics.of_pairs(chosen, rejected, lengths, log_odds)}
    if log_odds:
        told["calibration"] = reward_metrics.calibration((chosen - rejected).mean(0))[1]
    return told


def _publish(
    context: StageContext,
    told: dict[str, Any],
    rewards: np.ndarray,
    lengths: np.ndarray,
    sides: tuple[str, ...],
    ids: list[str],
) -> None:
    """rewards: [members, sides, rows]."""
    write_jsonl(
        context.folder / "rewards.jsonl",
        (
            {"id": name, **{side: rewards[:, number, row].tolist() for number, side in enumerate(sides)},
             "tokens": lengths[:, row].tolist()}
            for row, name in enumerate(ids)
        ),
    )  # fmt: skip
    write_json(context.folder / "evaluation.json", told)
    context.log(len(ids), told["metrics"])
