"""Prepared rows -> the files of the stage: token ids for training, rows as text, and the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignment.config.sources import HubSource, PackageSource, PathSource
from alignment.data import tokens
from alignment.data.batches import TOKENS
from alignment.data.chat import Chat
from alignment.data.checks import summed
from alignment.data.preparation import Judged
from alignment.data.splitting import Parts
from alignment.data.turns import REASONING
from alignment.errors import InputError
from alignment.files import write_json, write_lines

APART = 0.1
BATCH = 1000  # rows at once
SOURCE = "source"  # the key of a row's data set in files of rows; in train/, its number, as data_report.json lists them


def write(judged: Judged, parts: Parts, folder: Path, chat: Chat) -> dict[str, float]:
    """train/ (columns of token ids), train.jsonl, prompts.jsonl, heldout.jsonl, data_report.json -> summary numbers; of
    pairs and of answers with a score also heldout/, as train/, for what measures reward models."""
    train, heldout = parts["train"], parts["heldout"]
    without = _without_margin(judged, np.concatenate([train, heldout]))
    names = [name for name in TOKENS[judged.task] if name != "margin" or without is None]
    names += [SOURCE] if len(judged.sources) > 1 else []
    made = judged.table.take(train).select_columns(names)
    if judged.task == "unpaired":
        made = _with_mismatched(made, judged, train)
    from datasets import load_from_disk

    _save(made, folder / "train")
    tokens.check_end_of_turn(load_from_disk(str(folder / "train")), chat.eos_id)  # in order, which is quicker to read
    if len(heldout) and judged.task in ("preference", "scored"):
        _save(judged.table.take(heldout).select_columns(names), folder / "heldout")
    ids = _Ids(judged)
    write_lines(folder / "train.jsonl", _lines(judged, train, ids, _training_row))
    for name in ("prompts", "heldout"):
        write_lines(folder / f"{name}.jsonl", _lines(judged, parts[name], ids, _asking_row))
    lengths, prompts, trained = (judged.table.column(name)[train] for name in ("tokens", "prompt_tokens", "trained"))
    kept = {name: len(part) for name, part in parts.items()}
    report = _report(judged, kept, chat)
    report["lengths"] = {"prompt_tokens": spread(prompts), "row_tokens": spread(lengths)}
    if judged.task == "preference":
        report["margins"] = _margins(judged, np.concatenate([train, heldout]), without)
        for number, one in enumerate(report["sources"]):
            one["length_bias"] = length_bias(judged, train, number)
    write_json(folder / "data_report.json", report)
    dropped = sum(judged.tally.counts.values())
    counts = {"rows": judged.total, "dropped": dropped, **kept}
    return {**counts, "train_tokens": int(lengths.sum()), "trained_tokens": int(trained.sum())}


def _report(judged: Judged, kept: dict[str, int], chat: Chat) -> dict[str, Any]:
    """All data sets together, and each."""
    return {
        "source": ", ".join(source.described for source in judged.sources),
        "formats": summed(judged.forms),
        "rows": judged.total,
        "fit": len(judged.fit),
        "kept": kept,
        "dropped": judged.tally.counts,
        "examples": judged.tally.examples,
        "examples_kept": judged.tally.examples_kept,
        "evaluation_prompts": judged.compared,
        "sources": [
            {
                "name": source.name,
                "source": source.described,
                "rows": judged.read.get(source.name, 0),
                "formats": judged.forms.get(source.name, {}),
                "dropped": judged.tally.dropped.get(source.name, {}),
                "kept_with": judged.tally.kept.get(source.name, {}),
                "languages": judged.languages.get(source.name, {}),
                "personal": judged.personal.get(source.name, {}),
            }
            for source in judged.sources
        ],
        "template_sha256": chat.template_sha256,
    }


# --- columns ----------------------------------------------------------------------------------------------------------


def _save(rows: Any, folder: Path) -> None:
    rows.save_to_disk(folder, max_shard_size="2GB")


def _without_margin(judged: Judged, rows: np.ndarray) -> str | None:
    """Where the first row without one is; of what some rows lack nothing can be made. None: all have one."""
    if judged.task != "preference":
        return None
    missing = np.flatnonzero(np.isnan(judged.table.column("margin")[rows]))
    return judged.place(int(rows[missing[0]]))[1].where if len(missing) else None


def _margins(judged: Judged, rows: np.ndarray, without: str | None) -> dict[str, Any]:
    count = int(np.count_nonzero(~np.isnan(judged.table.column("margin")[rows])))
    return {"rows": count, "used": without is None, **({"one_without": without} if without and count else {})}


def _with_mismatched(made: Any, judged: Judged, train: np.ndarray) -> Any:
    """With a column `mismatched_ids`: of each row the answer of the next one with another prompt, round in a circle,
    with which no row is longer than the longest that is trained on: what KTO compares with. Raises InputError."""
    import datasets

    found = mismatched(judged, train)
    other = judged.table.take(train[found]).select_columns(["completion_ids"])
    return datasets.concatenate_datasets([made, other.rename_column("completion_ids", "mismatched_ids")], axis=1)


def mismatched(judged: Judged, train: np.ndarray) -> np.ndarray:
    """Of these unpaired rows the number among them, [rows], of the one whose answer is its mismatched one.

    Raises InputError where there is none; and if all answers are wanted, or none: such a loss only pushes the policy
    one way, whatever it says.
    """
    labels = judged.table.column("label")[train]
    wanted = int(np.count_nonzero(labels))
    if wanted in (0, len(train)):
        what = f"of the answers to train on {wanted} are wanted and {len(train) - wanted} are not: KTO needs both"
        fix = "check the labels, or the judge's label_threshold; wanted answers alone are rows for SFT"
        raise InputError(what, where=judged.place(int(train[0]))[1].file, fix=fix)
    opening, prompt, whole = (judged.table.column(name)[train] for name in ("opening", "prompt_tokens", "tokens"))
    answer, longest, found = whole - prompt, whole.max(), np.zeros(len(train), np.int64)
    for number in range(len(train)):
        found[number] = next(
            (
                other
                for step in range(1, len(train))
                if opening[other := (number + step) % len(train)] != opening[number]
                and prompt[number] + answer[other] <= longest
            ),
            -1,
        )
        if found[number] < 0:
            what = "no answer to another prompt fits beside this one: KTO compares with such"
            where = judged.place(int(train[number]))[1].where
            raise InputError(what, where=where, fix="more rows, or a smaller max_prompt_length")
    return found


# --- text -------------------------------------------------------------------------------------------------------------


class _Ids:
    """The rows' own `id` where each has a different one; else their numbers, with the data set's name, the file's
    number and the part where there are several."""

    def __init__(self, judged: Judged):
        self._own = judged.table.all_differ("id")
        self._names = [f"{source.name}-" if len(judged.sources) > 1 else "" for source in judged.sources]
        self._several_files = len(judged.files) > len(judged.sources)

    def of(self, row: dict[str, Any]) -> str:
        if self._own:
            return str(row["id"])
        file = f"{row['file'] + 1}-" if self._several_files else ""
        part = f"-{row['part']}" if row["part"] else ""
        return f"{self._names[row['source']]}{file}{row['number']}{part}"


def _lines(judged: Judged, rows: np.ndarray, ids: _Ids, made: Any) -> Iterator[str]:
    several = len(judged.sources) > 1
    columns = ["id", "source", "file", "number", "part", "text", "kept"]
    for batch in judged.table.take(rows).select_columns(columns).iter(BATCH):
        for values in zip(*(batch[name] for name in columns), strict=True):
            row = dict(zip(columns, values, strict=True))
            whose = {SOURCE: judged.sources[row["source"]].name} if several else {}
            yield json.dumps({"id": ids.of(row), **whose, **made(row)}, ensure_ascii=False) + "\n"


def _training_row(row: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(row["text"]))


def _asking_row(row: dict[str, Any]) -> dict[str, Any]:
    """What a model is asked, the answer that the data has, and what else a reward may look at. reference: the text of
    the answer, if it has one; reference_message: all of it, where it has reasoning or calls."""
    text, kept = json.loads(row["text"]), json.loads(row["kept"] or "{}")
    *prompt, answer = text.get("messages") or [*text["prompt"], *(text.get("completion") or text.get("chosen"))]
    reference = {"reference": answer["content"]} if answer["content"].strip() else {}
    whole = {"reference_message": answer} if {REASONING, "tool_calls"} & answer.keys() else {}
    return {"prompt": prompt, **reference, **whole, **kept}


def length_bias(judged: Judged, rows: np.ndarray, source: int) -> dict[str, float]:
    """Of these pairs those of a data set: the shares whose chosen, or rejected, answer is longer, and mean tokens of
    both; apart: pairs whose answers differ by more than APART of the longer, and the share of these whose chosen one is
    longer. Of nothing, nothing.
    """
    mine = rows[judged.table.column("source")[rows] == source]
    if judged.task != "preference" or not len(mine):
        return {}
    chosen, rejected = (judged.table.lengths(name)[mine] for name in ("chosen_ids", "rejected_ids"))
    apart = np.abs(chosen - rejected) > APART * np.maximum(chosen, rejected)
    return {
        "pairs": len(mine),
        "chosen_longer": float((chosen > rejected).mean()),
        "rejected_longer": float((rejected > chosen).mean()),
        "chosen_tokens": float(chosen.mean()),
        "rejected_tokens": float(rejected.mean()),
        "apart": int(apart.sum()),
        **({"chosen_longer_apart": float((chosen > rejected)[apart].mean())} if apart.any() else {}),
    }


def spread(lengths: Sequence[int] | np.ndarray) -> dict[str, float]:
    """min, median, 95th percentile and max; of nothing, nothing."""
    if not len(lengths):
        return {}
    ordered = np.sort(np.asarray(lengths))
    high = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    return {"min": int(ordered[0]), "median": float(np.median(ordered)), "p95": int(high), "max": int(ordered[-1])}


def describe(source: PackageSource | PathSource | HubSource) -> str:
    """A source in one line, for the report."""
    if isinstance(source, PathSource):
        return source.path
    if isinstance(source, HubSource):
        return f"{source.id}@{source.revision} ({source.split})"
    return f"{source.package} {source.version} ({source.archive}): {source.member}"
