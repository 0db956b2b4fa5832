"""The rows of a stage that prepares them, looked at as the stage will: faults, languages, lengths, splits, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignment.config.data_checks import FAULTS
from alignment.config.schema import Experiment
from alignment.config.stages.preparing import Prepare
from alignment.cores import usable
from alignment.data.chat import Chat
from alignment.data.checks import opening
from alignment.data.evaluated import asked, prompts_of_rows
from alignment.data.named import prompts_of, share_of, source_of
from alignment.data.preparation import Judged, judge
from alignment.data.showing import histogram, shown
from alignment.data.splitting import Parts, check_dropped, divide
from alignment.data.writing import describe, length_bias, mismatched, spread
from alignment.errors import InputError
from alignment.estimating.seen import Lengths
from alignment.estimating.windows import Prompts
from alignment.files import program
from alignment.imports import kept
from alignment.preflight.findings import Looked, Start, tell, told

SOME = 8  # rows that a loss is computed of
LANGUAGES = 5  # named
WORKERS = 2  # at most: the login node that looks is everybody's
BIASED = 0.7  # share of pairs whose chosen answer is the longer one, above which it is a warning


def look(
    name: str,
    experiment: Experiment,
    start: Start,
    order: dict[str, Any],
    folder: Path,
    heldout: Mapping[str, list[Any]],
) -> Looked:
    """The first rows through the whole path: read, recognised, checked, rendered, tokenised; all of them if they are no
    more than `rows` of any data set, and then split too. heldout: prompts that another node keeps for evaluation, and
    where each stands. Returns how long they are. Raises AlignmentError."""
    settings = experiment.stage[experiment.pipeline.nodes[name].stage]
    assert isinstance(settings, Prepare)  # of whom the order is
    chat, data, checks, most = start.chat, experiment.data, experiment.checks, order["rows"]
    sources = [source_of(one, data[one], settings, checks, chat, most) for one in settings.datasets]
    openings = {opening(prompt) for prompt in heldout.values()}
    judged = judge(sources, folder, lambda *a, **k: None, min(WORKERS, settings.workers or usable()), openings)
    for one in settings.datasets:
        if not judged.read.get(one):
            raise InputError("has no rows", where=describe(data[one].source))
    whole = all(judged.read[one] < most or judged.read[one] == data[one].limit for one in settings.datasets)
    rows, splits = judged.fit, None
    if whole:
        shares = [share_of(data[one]) for one in settings.datasets]
        elsewhere = [(where, asked(prompt)) for where, prompt in heldout.items()]
        elsewhere += [prompt for one in settings.against for prompt in prompts_of(data[one])]
        try:
            splits = divide(judged, settings.splits, settings.seed, shares, elsewhere)
            rows = splits["train"]
        except InputError:
            if order["show"]:  # the rows may say why
                _show(f"data {name}", judged, judged.fit[: order["show"]], judged.fit, chat)
            raise
    judged.tally.close()
    try:
        check_dropped(judged, _each(order["dropped"]))
        if settings.task == "unpaired" and len(rows):
            mismatched(judged, rows)
    except InputError as error:
        if whole:
            raise
        what = f"of the first rows, and so perhaps of all: {error.what}"  # those that come may be better
        tell(f"data {name}", "warning", what, where=error.where, fix=error.fix)
    _tell_all(name, judged, [describe(data[one].source) for one in settings.datasets], rows, splits)
    if order["show"]:
        _show(f"data {name}", judged, rows[: order["show"]], rows, chat)
    if order["estimate"] and start.config is not None and len(rows):
        with told(f"time {name}", guess=True):
            _estimate(name, experiment, (judged, rows, whole, most), start.config, order["timed"])
    return _looked(judged, rows, splits)


def _looked(judged: Judged, rows: np.ndarray, splits: Parts | None) -> Looked:
    """What later looks want of them. rows: that would be trained on; splits: None where not all are known."""
    prompt, whole_row, trained = (
        judged.table.column(one)[rows].astype(np.int64) for one in ("prompt_tokens", "tokens", "trained")
    )
    lengths = Lengths(judged.task, prompt, whole_row, trained, judged.table.take(rows[:SOME]).to_list())
    tokens_of = judged.table.column("prompt_tokens")
    prompts = Prompts(tokens_of, judged.fit, splits, lambda row: judged.place(row)[1].where)
    kept = {} if splits is None else prompts_of_rows(judged, splits["heldout"])
    return Looked(lengths, prompts, kept)


def _each(dropped: str | None) -> str:
    return f"{dropped} has each" if dropped else f"`{program('alignment')} data check --dropped FILE ...` writes each"


def _estimate(name: str, experiment: Experiment, seen: tuple[Any, ...], config: Any, timed: dict[str, Any]) -> None:
    """Of the stages that train on what `name` prepares."""
    with kept():  # seconds of imports, which other looks need not wait for
        from alignment.estimating import samples, sizes, telling
    if not sizes.is_estimated(config):
        return
    settings = experiment.stage[experiment.pipeline.nodes[name].stage]
    assert isinstance(settings, Prepare)
    for finding in telling.findings(experiment, name, samples.known_rows(experiment, settings, *seen), config, timed):
        tell(**finding)


def tell_unknown(experiment: Experiment, prepared: list[str]) -> None:
    from alignment.estimating import telling

    for finding in telling.unknown(experiment, prepared):
        tell(**finding)


def _show(check: str, judged: Judged, some: Any, rows: Any, chat: Chat) -> None:
    """Lengths of the rows, and some of them token by token."""
    columns = {"prompt": "prompt_tokens", "row": "tokens"}
    bins = {one: histogram(judged.table.column(column)[rows]) for one, column in columns.items()}
    tell(check, "lengths", "tokens", histograms=bins)
    for number in some:
        tell(check, "row", "a row", row=shown(judged, int(number), chat))


def _tell_all(name: str, judged: Judged, places: Sequence[str], rows: np.ndarray, splits: Parts | None) -> None:
    """places: of each data set. rows, splits: as of `_looked`."""
    tokens = spread(judged.table.column("tokens")[rows])
    for number, (one, where) in enumerate(zip(judged.sources, places, strict=True)):
        _tell_of(f"data {name}", judged, one.name, where, splits is not None, tokens)
        _tell_of_texts(f"data {name}", judged, one.name, where)
        _tell_of_lengths(f"length {name}", where, length_bias(judged, rows, number))
    if splits is not None:
        sizes = {split: len(part) for split, part in splits.items()}
        what = ", ".join(f"{count} {split}" for split, count in sizes.items() if count)
        tell(f"data {name}", "note", f"splits: {what}", facts={"splits": sizes})
    if judged.compared:
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in judged.compared.items())
        tell(f"data {name}", "note", f"evaluation prompts compared with: {counts}", facts=judged.compared)
    for fault, (first, *_) in [*judged.tally.first.items(), *judged.tally.first_kept.items()]:
        tell(f"data {name}", "note", f"{fault}, for instance: {first.why or FAULTS[fault]}", where=first.row.where)


def _tell_of(check: str, judged: Judged, name: str, where: str, whole: bool, tokens: dict[str, float]) -> None:
    """Of one data set."""
    read, forms = judged.read[name], judged.forms.get(name, {})
    dropped, kept = judged.tally.dropped.get(name, {}), judged.tally.kept.get(name, {})
    words = ", ".join(f"{count} {form}" for form, count in forms.items())
    words += " fit by themselves" if sum(forms.values()) < read else ""  # not yet beside the others
    faults = ", ".join(f"{count} {fault}" for fault, count in dropped.items())
    with_faults = "".join(f", {count} {fault}" for fault, count in kept.items())
    what = (
        f"{'all' if whole else 'the first'} {read} rows: {words}; {f'dropped: {faults}' if faults else 'none dropped'}"
        f"{f'; kept: {with_faults[2:]}' if kept else ''}"
    )
    facts = {"read": read, "all": whole, "formats": forms, "dropped": dropped, "kept_with": kept, "tokens": tokens}
    tell(check, "warning" if dropped or kept else "ok", what, where=where, facts=facts)


def _tell_of_texts(check: str, judged: Judged, name: str, where: str) -> None:
    """Languages of the answers and personal data of one data set's rows."""
    languages, personal = judged.languages.get(name, {}), judged.personal.get(name, {})
    if languages:
        by_count = sorted(languages.items(), key=lambda item: (-item[1], item[0]))
        total, first = sum(languages.values()), by_count[:LANGUAGES]
        what = ", ".join(f"{count / total:.1%} {language}" for language, count in first)
        more = f", {len(by_count) - len(first)} more" if len(by_count) > len(first) else ""
        tell(check, "note", f"languages of the answers: {what}{more}", where=where, facts={"languages": languages})
    if personal:
        what = ", ".join(f"{count} {kind}" for kind, count in personal.items())
        tell(check, "note", f"personal data and secrets: {what}", where=where, facts={"personal": personal})


def _tell_of_lengths(check: str, where: str, bias: dict[str, float]) -> None:
    """How much longer chosen answers are than rejected ones."""
    if not bias:
        return
    share, chosen, rejected = bias["chosen_longer"], bias["chosen_tokens"], bias["rejected_tokens"]
    what = f"chosen longer in {share:.0%} of pairs ({chosen:.0f} against {rejected:.0f} tokens)"
    fix = "models learn length from such pairs: pairs of like lengths, or loss=sigmoid_norm, which counts by the token"
    more = {"fix": fix} if share > BIASED else {}
    tell(check, "warning" if more else "note", what, where=where, facts={"length_bias": bias}, **more)
