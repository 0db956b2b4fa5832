"""What a run would meet, looked at before it begins: `python -m alignment.preflight <folder>/order.json`.

No weights are read and nothing is trained: a login node can do it. Each finding is a line of JSON on stdout, as soon as
it is known: check, state (ok, warning, failed), what, where, fix. The command line shows them (alignment/checking.py).
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignment.config.data_checks import FAULTS
from alignment.config.schema import Experiment
from alignment.config.sources import HubSource, PathSource
from alignment.config.stages.preparing import ImportModel, Prepare
from alignment.cores import usable
from alignment.errors import AlignmentError, InputError, unusable
from alignment.files import program, read_json, remove, write_lines
from alignment.imports import kept

with kept():
    from alignment.data.adapters import check_adapter
    from alignment.data.chat import Chat
    from alignment.data.fetch import fetch
    from alignment.data.gguf import opened
    from alignment.data.models import check_files, check_vocabulary, usable_tokenizer
    from alignment.data.named import prompts_of, share_of, source_of
    from alignment.data.preparation import Judged, judge
    from alignment.data.showing import histogram, shown
    from alignment.data.splitting import check_dropped, divide
    from alignment.data.writing import describe, length_bias, mismatched, spread
    from alignment.estimating import windows
    from alignment.estimating.seen import Lengths, config_of
    from alignment.estimating.windows import Prompts

DROPPED = "dropped.jsonl"
SOME = 8  # rows that a loss is computed of
LANGUAGES = 5  # named
WORKERS = 2  # at most: the login node that looks is everybody's
BIASED = 0.7  # share of pairs whose chosen answer is the longer one, above which it is a warning


class Start(NamedTuple):
    """The start model. config: of transformers; None if it has none. window: in tokens; None where it has no limit."""

    chat: Chat
    config: Any
    window: int | None


class Looked(NamedTuple):
    """At the rows of a node that prepares them."""

    lengths: Lengths
    prompts: Prompts


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and workers with it
    order = read_json(Path(arguments[0]))
    experiment = Experiment.model_validate(order["experiment"])
    with _told("model"):
        start = _start(experiment, order["stored"])
        if order["fit"] == "look":
            with _told("adapters", guess=True):
                _adapters(experiment, start, order)
            with _told("reward"):
                _rewards(experiment, order["only"])
        seen: dict[str, Lengths] = {}
        room = Path(arguments[0]).parent
        for name in order["prepare"]:
            with _told(f"data {name}"), _folder(room / f"rows-{name}") as folder:
                looked = _data(name, experiment, start, order, folder)
                seen[name] = looked.lengths
                _answers(experiment, start, {name: looked.prompts}, order)
        for name, folder in _prepared(experiment, order["stored"]).items():
            with _told(f"data {name}", guess=True):
                looked = _stored(experiment, name, folder, start, order["rows"])
                seen[name] = looked.lengths
                _answers(experiment, start, {name: looked.prompts}, order)
        if order["dropped"]:
            with _told("dropped"):
                _write_dropped([room / f"rows-{name}" for name in order["prepare"]], Path(order["dropped"]))
        unknown = experiment.pipeline.nodes.keys() - {*order["prepare"], *_prepared(experiment, order["stored"])}
        _answers(experiment, start, dict.fromkeys(unknown), order)
        if order["fit"]:
            with _told("memory", guess=True):
                _fit(experiment, start.config, seen, order)
        if order["estimate"]:
            _unknown(experiment, order["prepare"])
    return 0


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """Of which but the rows that were dropped stay, whatever happens in here."""
    path.mkdir()
    try:
        yield path
    finally:
        for file in path.iterdir():
            if file.name != DROPPED:
                remove(file)


def _write_dropped(folders: Sequence[Path], path: Path) -> None:
    def lines() -> Iterator[str]:
        for folder in folders:
            if (folder / DROPPED).is_file():
                with open(folder / DROPPED, encoding="utf-8") as stream:
                    yield from stream

    count = write_lines(path, lines())
    _tell("dropped", "ok", f"{count} rows are in {path}", facts={"rows": count})


def _fit(experiment: Experiment, config: Any, seen: Mapping[str, Lengths], order: dict[str, Any]) -> None:
    """Whether memory and disk are enough."""
    with kept():  # seconds of imports, which other looks need not wait for
        from alignment.estimating import fitting
    if config is None or not fitting.is_estimated(config):
        _tell("memory", "note", "is not estimated: the start model has no configuration of a decoder with attention")
        return
    how = order["fit"] == "suggest", order["only"]
    for finding in fitting.findings(experiment, config, seen, *how):
        _tell(**finding)


def _tell(check: str, state: str, what: str, **more: Any) -> None:
    print(json.dumps({"check": check, "state": state, "what": what, **more}), flush=True)


@contextmanager
def _told(check: str, guess: bool = False) -> Iterator[None]:
    """What goes wrong in here is a finding; what is inside depends on it, and is left out. guess: of an estimate, whose
    own errors stop no run."""
    try:
        yield
    except AlignmentError as error:
        _tell(check, "failed", error.what, where=error.where, fix=error.fix, code=error.exit_code)
    except OSError as error:
        told = unusable(error)
        _tell(check, "failed", told.what, where=told.where, fix=told.fix, code=told.exit_code)
    except Exception as error:
        if not guess:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        _tell(check, "note", f"is not estimated: {type(error).__name__}: {first}")


def _start(experiment: Experiment, stored: Mapping[str, str]) -> Start:
    """The start model; of one that the store has, as it was imported, nothing is told. Raises AlignmentError."""
    if (folder := _imported(experiment, stored)) is None:
        return _model(experiment)
    config = config_of(folder)
    return Start(Chat.load(folder), config, _window(config))


def _imported(experiment: Experiment, stored: Mapping[str, str]) -> Path | None:
    """The start model in the store."""
    kinds = {name: experiment.stage[experiment.pipeline.nodes[name].stage] for name in stored}
    return next((Path(stored[name]) / "model" for name in kinds if isinstance(kinds[name], ImportModel)), None)


def _window(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def _prepared(experiment: Experiment, stored: Mapping[str, str]) -> dict[str, Path]:
    """Nodes whose rows the store has, with their folders."""
    stages = {name: experiment.stage[experiment.pipeline.nodes[name].stage] for name in stored}
    return {name: Path(stored[name]) for name, settings in stages.items() if isinstance(settings, Prepare)}


def _stored(experiment: Experiment, name: str, folder: Path, start: Start, most: int) -> Looked:
    with kept():
        from alignment.estimating import stored
    settings = experiment.stage[experiment.pipeline.nodes[name].stage]
    assert isinstance(settings, Prepare)
    lengths = stored.lengths_of(folder, settings.task, most, SOME)
    return Looked(lengths, stored.prompts_of(folder, start.chat.tokenizer, most))


def _model(experiment: Experiment) -> Start:
    """Files, tokenizer, tokens, template, vocabulary and window of the start model. Raises AlignmentError."""
    settings = experiment.model
    source = fetch(settings.source, weights=False)
    name = str(source)
    check_files(source, weights=not isinstance(settings.source, HubSource))
    with opened(source) if source.is_file() else nullcontext(source) as place:
        tokenizer = usable_tokenizer(place, settings, name, lambda text: _tell("template", "warning", text))
        made = config_of(place)
    if settings.adapter is not None:
        check_adapter(fetch(settings.adapter))
    _tell("template", "ok", f"renders turns once and for all, ends answers with {tokenizer.eos_token!r}")
    text = made.get_text_config()
    if rows := getattr(text, "vocab_size", None):
        check_vocabulary(tokenizer, int(rows), name)
        _tell("vocabulary", "ok", f"{len(tokenizer)} tokens, {rows} rows of the embedding")
    window = _window(made)
    _windows(experiment, window)
    return Start(Chat(tokenizer, name), made, window)


def _windows(experiment: Experiment, window: int | None) -> None:
    for name, node in experiment.pipeline.nodes.items():
        settings = experiment.stage[node.stage]
        if window is not None and isinstance(settings, Prepare) and settings.max_length > window:
            what = f"max_length {settings.max_length} is more than the model's window of {window} tokens"
            _tell("window", "failed", what, where=name, fix=f"stage.{node.stage}.max_length={window}", code=2)
            return
    _tell("window", "ok", f"{window or 'no limit of'} tokens")


def _answers(
    experiment: Experiment, start: Start, prompts: Mapping[str, Prompts | None], order: dict[str, Any]
) -> None:
    """Whether answers have room in the window, in stages still to be made that ask what these nodes prepare."""
    if start.window is None or order["show"] or order["fit"] == "suggest":
        return
    for name in windows.asking(experiment):
        data = experiment.pipeline.nodes[name].inputs["data"]
        if data in prompts and (order["only"] is None or name in order["only"]):
            _tell(**windows.finding(experiment, name, start.window, prompts[data]))


def _adapters(experiment: Experiment, start: Start, order: dict[str, Any]) -> None:
    """Whether the start model has the modules that adapters are put on: its own adapter's, and those of stages still to
    be made. Raises AlignmentError."""
    own = None if _imported(experiment, order["stored"]) else experiment.model.adapter
    if own is None and not any(getattr(settings, "lora", None) for settings in experiment.stage.values()):
        return
    with kept():  # a second of imports, which other looks need not wait for
        from alignment.estimating import adapting
    if own is not None:
        folder = fetch(own)
        adapting.check_start_adapter(start.config, folder)
        _tell("adapters", "ok", f"{folder} fits the start model")
    for finding in adapting.findings(experiment, start.config, order["only"]):
        _tell(**finding)


def _rewards(experiment: Experiment, only: Sequence[str] | None) -> None:
    """Models of local folders that judge, in stages still to be made. only: these; None: all. Raises InputError."""
    from alignment.rewards.model import check_outputs

    terms: dict[str, Any] = {}
    for name, node in experiment.pipeline.nodes.items():
        settings = experiment.stage[node.stage]
        if "reward" in settings.groups and (only is None or name in only):
            terms |= experiment.reward.read(settings.compares).terms
    for name, term in terms.items():
        for source in term.sources():
            if not isinstance(source, PathSource):
                continue
            folder = fetch(source)
            if term.kind == "model":
                check_outputs(config_of(folder), folder)
            _tell("reward", "ok", f"{name}: {folder}")


def _data(name: str, experiment: Experiment, start: Start, order: dict[str, Any], folder: Path) -> Looked:
    """The first rows through the whole path: read, recognised, checked, rendered, tokenised; all of them if they are no
    more than `rows` of any data set, and then split too. Returns how long they are. Raises AlignmentError."""
    settings = experiment.stage[experiment.pipeline.nodes[name].stage]
    assert isinstance(settings, Prepare)  # of whom the order is
    chat, data, checks, most = start.chat, experiment.data, experiment.checks, order["rows"]
    sources = [source_of(one, data[one], settings, checks, chat, most) for one in settings.datasets]
    judged = judge(sources, folder, lambda *a, **k: None, min(WORKERS, settings.workers or usable()))
    for one in settings.datasets:
        if not judged.read.get(one):
            raise InputError("has no rows", where=describe(data[one].source))
    whole = all(judged.read[one] < most or judged.read[one] == data[one].limit for one in settings.datasets)
    rows, splits = judged.fit, None
    if whole:
        shares = [share_of(data[one]) for one in settings.datasets]
        elsewhere = [prompt for one in settings.against for prompt in prompts_of(data[one])]
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
        _tell(f"data {name}", "warning", what, where=error.where, fix=error.fix)
    tokens = spread(judged.table.column("tokens")[rows])
    for number, one in enumerate(settings.datasets):
        where = describe(data[one].source)
        _tell_of(f"data {name}", judged, one, where, whole, tokens)
        _tell_of_texts(f"data {name}", judged, one, where)
        _tell_of_lengths(f"length {name}", where, length_bias(judged, rows, number))
    if judged.compared:
        told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in judged.compared.items())
        _tell(f"data {name}", "note", f"evaluation prompts compared with: {told}", facts=judged.compared)
    for fault, (first, *_) in [*judged.tally.first.items(), *judged.tally.first_kept.items()]:
        _tell(f"data {name}", "note", f"{fault}, for instance: {first.why or FAULTS[fault]}", where=first.row.where)
    if order["show"]:
        _show(f"data {name}", judged, rows[: order["show"]], rows, chat)
    if order["estimate"] and start.config is not None and len(rows):
        with _told(f"time {name}", guess=True):
            _estimate(name, experiment, (judged, rows, whole, most), start.config, order["timed"])
    prompt, whole_row, trained = (
        judged.table.column(one)[rows].astype(np.int64) for one in ("prompt_tokens", "tokens", "trained")
    )
    lengths = Lengths(settings.task, prompt, whole_row, trained, judged.table.take(rows[:SOME]).to_list())
    asked = judged.table.column("prompt_tokens")
    return Looked(lengths, Prompts(asked, judged.fit, splits, lambda row: judged.place(row)[1].where))


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
        _tell(**finding)


def _unknown(experiment: Experiment, prepared: list[str]) -> None:
    from alignment.estimating import telling

    for finding in telling.unknown(experiment, prepared):
        _tell(**finding)


def _show(check: str, judged: Judged, some: Any, rows: Any, chat: Chat) -> None:
    """Lengths of the rows, and some of them token by token."""
    columns = {"prompt": "prompt_tokens", "row": "tokens"}
    bins = {one: histogram(judged.table.column(column)[rows]) for one, column in columns.items()}
    _tell(check, "lengths", "tokens", histograms=bins)
    for number in some:
        _tell(check, "row", "a row", row=shown(judged, int(number), chat))


def _tell_of(check: str, judged: Judged, name: str, where: str, whole: bool, tokens: dict[str, float]) -> None:
    """Of one data set."""
    read, forms = judged.read[name], judged.forms.get(name, {})
    dropped, kept = judged.tally.dropped.get(name, {}), judged.tally.kept.get(name, {})
    words = ", ".join(f"{count} {form}" for form, count in forms.items())
    faults = ", ".join(f"{count} {fault}" for fault, count in dropped.items())
    with_faults = "".join(f", {count} {fault}" for fault, count in kept.items())
    what = (
        f"{'all' if whole else 'the first'} {read} rows: {words}; {f'dropped: {faults}' if faults else 'none dropped'}"
        f"{f'; kept: {with_faults[2:]}' if kept else ''}"
    )
    facts = {"read": read, "all": whole, "formats": forms, "dropped": dropped, "kept_with": kept, "tokens": tokens}
    _tell(check, "warning" if dropped or kept else "ok", what, where=where, facts=facts)


def _tell_of_texts(check: str, judged: Judged, name: str, where: str) -> None:
    """Languages of the answers and personal data of one data set's rows."""
    languages, personal = judged.languages.get(name, {}), judged.personal.get(name, {})
    if languages:
        by_count = sorted(languages.items(), key=lambda item: (-item[1], item[0]))
        total, first = sum(languages.values()), by_count[:LANGUAGES]
        what = ", ".join(f"{count / total:.1%} {language}" for language, count in first)
        more = f", {len(by_count) - len(first)} more" if len(by_count) > len(first) else ""
        _tell(check, "note", f"languages of the answers: {what}{more}", where=where, facts={"languages": languages})
    if personal:
        what = ", ".join(f"{count} {kind}" for kind, count in personal.items())
        _tell(check, "note", f"personal data and secrets: {what}", where=where, facts={"personal": personal})


def _tell_of_lengths(check: str, where: str, bias: dict[str, float]) -> None:
    """How much longer chosen answers are than rejected ones."""
    if not bias:
        return
    share, chosen, rejected = bias["chosen_longer"], bias["chosen_tokens"], bias["rejected_tokens"]
    what = f"chosen longer in {share:.0%} of pairs ({chosen:.0f} against {rejected:.0f} tokens)"
    fix = "models learn length from such pairs: pairs of like lengths, or loss=sigmoid_norm, which counts by the token"
    more = {"fix": fix} if share > BIASED else {}
    _tell(check, "warning" if more else "note", what, where=where, facts={"length_bias": bias}, **more)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
