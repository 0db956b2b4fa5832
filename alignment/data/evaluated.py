"""Rows to train on beside what models are evaluated on: held-out rows that are nearly the same, and prompts that share
n-grams with theirs.

N-grams that many prompts of the data hold are not the evaluation's own but a template's, or a phrase of the language,
and are left out, as NeMo Curator's `max_matches` does, by the same number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from alignment.data.contamination import SIZE, Index
from alignment.data.near import WORDLESS, nearest
from alignment.data.preparation import Judged
from alignment.data.turns import Message

COMMON = 10  # different first prompts of the data: an n-gram that more of them hold is nobody's own
Prompts = Iterable[tuple[str, str]]  # where a prompt stands, and what the user says there
Found = dict[int, str]  # row of the table -> why


def asked(messages: Iterable[Message]) -> str:
    """What the user says in them."""
    return "\n".join(turn["content"] for turn in messages if turn["role"] == "user")


def near_heldout(judged: Judged, rows: np.ndarray, heldout: np.ndarray) -> Found:
    """Which of these rows are nearly a held-out row with another first prompt; with the same it is a leak anyway."""
    threshold = judged.policy.checks.near_threshold
    if threshold is None or not len(heldout):
        return {}
    signatures, opening = judged.table.signatures(), judged.table.column("opening")
    heldout = heldout[signatures[heldout, 0] != WORDLESS[0]]
    found = nearest(signatures, rows, heldout, threshold)
    near = np.flatnonzero(found >= 0)
    pairs = zip(rows[near].tolist(), heldout[found[near]].tolist(), strict=True)
    return {
        row: f"is nearly {judged.place(other)[1].where}, which is held out"
        for row, other in pairs
        if opening[row] != opening[other]
    }


def contaminated(judged: Judged, rows: np.ndarray, heldout: np.ndarray, elsewhere: Prompts) -> Found:
    """Which of these rows ask what shares n-grams with the prompt of a held-out row, or of one elsewhere.

    Notes in `judged.compared` how many prompts were compared, how many were too short for an n-gram, and how many have
    none of their own.
    """
    share = judged.policy.checks.contamination_share
    if share is None:
        return {}
    index = Index([*_of_rows(judged, heldout), *elsewhere], share=share)
    hits, common = _hits(judged, rows, index)
    generic = index.leave_out(common)
    judged.compared = {"prompts": len(index.ids) - generic, "too_short": index.too_short, "generic": generic}
    found = ((number, index.find(asked(_messages(judged, number)))) for number in rows[hits[rows]].tolist())
    return {
        number: f"shares {SIZE}-grams with the evaluation prompt {where}"
        for number, where in found
        if where is not None
    }


def _of_rows(judged: Judged, rows: np.ndarray) -> Iterator[tuple[str, str]]:
    for number in rows.tolist():
        yield judged.place(number)[1].where, asked(_messages(judged, number))


def _messages(judged: Judged, number: int) -> list[Any]:
    row = json.loads(judged.table.row(number, ["text"])["text"])
    if "text" in row:
        return [{"role": "user", "content": row["text"]}]
    return list(row.get("messages") or row["prompt"])


def _hits(judged: Judged, rows: np.ndarray, index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row of the table holds an n-gram of the index, and those n-grams that more than COMMON first prompts
    among these rows hold."""
    opening, grams = judged.table.column("opening"), index.grams
    counted = np.zeros(len(opening), bool)
    counted[rows[np.unique(opening[rows], return_index=True)[1]]] = True
    hits, held = np.zeros(len(opening), bool), np.zeros(len(grams), np.int64)
    for start, lengths, values in judged.table.lists("grams"):
        if not len(grams) or not len(values):
            continue
        places = np.minimum(np.searchsorted(grams, values), len(grams) - 1)
        shared = grams[places] == values
        owner = start + np.repeat(np.arange(len(lengths)), lengths)
        hits[owner[shared]] = True
        np.add.at(held, places[shared & counted[owner]], 1)
    return hits, grams[held > COMMON]
