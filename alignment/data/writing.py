"""Prepared rows -> the files of the stage: token ids for training, rows as text, what was dropped, the report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from alignment.config.sources import HubSource, PackageSource, PathSource
from alignment.data import tokens
from alignment.data.chat import Chat
from alignment.data.examples import Example
from alignment.data.formats import kept
from alignment.data.preparation import Prepared, check_dropped
from alignment.errors import InputError
from alignment.files import write_json, write_jsonl


def write(prepared: Prepared, folder: Path, source: str, chat: Chat) -> dict[str, float]:
    """dropped.jsonl, train/ (columns of token ids), train.jsonl, prompts.jsonl, heldout.jsonl, data_report.json ->
    summary numbers; of pairs and of answers with a score also heldout/, as train/, for what measures reward models."""
    judged, tally = prepared.judged, prepared.judged.tally
    write_jsonl(folder / "dropped.jsonl", (one.told() for one in tally.dropped))
    check_dropped(judged, source)
    train, heldout = prepared.parts["train"], prepared.parts["heldout"]
    names = [name for name in train[0].columns if name != "margin"]
    without = [example.row.where for example in (*train, *heldout) if "margin" not in example.columns]
    if not without:  # of what some rows lack nothing can be made
        names.append("margin")
    mismatched = {}
    if judged.task == "unpaired":
        _check_labels(train)
        mismatched = {"mismatched_ids": _mismatched(train)}
    tokens.check_end_of_turn(_save(train, names, folder / "train", **mismatched), chat.eos_id)
    if heldout and judged.task in ("preference", "scored"):
        _save(heldout, names, folder / "heldout")
    write_jsonl(folder / "train.jsonl", (_training_row(example) for example in train))
    for name in ("prompts", "heldout"):
        write_jsonl(folder / f"{name}.jsonl", map(_asking_row, prepared.parts[name]))
    kept = {name: len(part) for name, part in prepared.parts.items()}
    report = {
        "source": source,
        "formats": judged.forms,
        "rows": judged.total,
        "fit": prepared.fit,
        "kept": kept,
        "dropped": tally.counts,
        "kept_with": tally.kept,
        "examples": tally.examples,
        "template_sha256": chat.template_sha256,
        "lengths": {
            "prompt_tokens": spread([example.prompt_tokens for example in train]),
            "row_tokens": spread([example.tokens for example in train]),
        },
    }
    if judged.task == "preference":
        count = len(train) + len(heldout) - len(without)
        one = {"one_without": without[0]} if without and count else {}
        report["margins"] = {"rows": count, "used": not without, **one}
    write_json(folder / "data_report.json", report)
    trained = sum(_trained(example) for example in train)
    dropped = len(tally.dropped)
    total = sum(example.tokens for example in train)
    return {"rows": judged.total, "dropped": dropped, **kept, "train_tokens": total, "trained_tokens": trained}


def _check_labels(train: Sequence[Example]) -> None:
    """Raises InputError if all are wanted, or none: such a loss only pushes the policy one way, whatever it says."""
    wanted = sum(example.columns["label"] for example in train)
    if wanted in (0, len(train)):
        what = f"of the answers to train on {wanted} are wanted and {len(train) - wanted} are not: KTO needs both"
        fix = "check the labels, or the judge's label_threshold; wanted answers alone are rows for SFT"
        raise InputError(what, where=train[0].row.file, fix=fix)


def _mismatched(train: Sequence[Example]) -> list[list[int]]:
    """For each row the answer of the next one that has another prompt, round in a circle: what KTO compares with.

    With it no row is longer than the longest that is trained on.
    """
    longest = max(example.tokens for example in train)
    found = []
    for number, example in enumerate(train):
        others = (train[(number + step) % len(train)] for step in range(1, len(train)))
        fitting = (one.columns["completion_ids"] for one in others if one.opening != example.opening)
        other = next((ids for ids in fitting if example.prompt_tokens + len(ids) <= longest), None)
        if other is None:
            what = "no answer to another prompt fits beside this one: KTO compares with such"
            raise InputError(what, where=example.row.where, fix="more rows, or a smaller max_prompt_length")
        found.append(other)
    return found


def _save(examples: Sequence[Example], names: Sequence[str], folder: Path, **more: Any) -> Any:
    """more: columns that no example has by itself."""
    import datasets

    datasets.disable_progress_bars()
    columns = {name: [example.columns[name] for example in examples] for name in names}
    made = datasets.Dataset.from_dict({**columns, **more})
    made.save_to_disk(folder)
    return made


def _training_row(example: Example) -> dict[str, Any]:
    for name in ("label", "score"):
        if name in example.columns:
            answer = {"completion": [example.answer], name: example.columns[name]}
            return {"id": example.id, "prompt": example.prompt, **answer}
    if example.rejected is None:
        return {"id": example.id, "messages": [*example.prompt, example.answer]}
    sides = {"chosen": [example.answer], "rejected": [example.rejected]}
    return {"id": example.id, "prompt": example.prompt, **sides}


def _asking_row(example: Example) -> dict[str, Any]:
    """What a model is asked, the answer that the data has, and what else a reward may look at."""
    return {"id": example.id, "prompt": example.prompt, "reference": example.answer["content"], **kept(example.row)}


def _trained(example: Example) -> int:
    """Tokens that carry a gradient."""
    answers = [ids for name, ids in example.columns.items() if name in tokens.TRAINED]
    return sum(label != tokens.IGNORED for ids in answers for label in ids)


def spread(lengths: Iterable[int]) -> dict[str, float]:
    """min, median, 95th percentile and max; of nothing, nothing."""
    if not (ordered := sorted(lengths)):
        return {}
    high = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    return {"min": ordered[0], "median": statistics.median(ordered), "p95": high, "max": ordered[-1]}


def describe(source: PackageSource | PathSource | HubSource) -> str:
    """A source in one line, for the report."""
    if isinstance(source, PathSource):
        return source.path
    if isinstance(source, HubSource):
        return f"{source.id}@{source.revision} ({source.split})"
    return f"{source.package} {source.version} ({source.archive}): {source.member}"
