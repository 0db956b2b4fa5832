"""The order of a look: the start model, adapters, rewards, rows, windows, memory and disk, one after the other."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from alignment.config.schema import Experiment
from alignment.config.sources import HubSource, PathSource
from alignment.config.stages.preparing import ImportModel, Prepare
from alignment.files import read_json, read_jsonl, remove, write_lines
from alignment.imports import kept

with kept():
    from alignment.data.adapters import check_adapter
    from alignment.data.chat import Chat
    from alignment.data.evaluated import prompts_of_result
    from alignment.data.fetch import fetch
    from alignment.data.gguf import opened
    from alignment.data.models import check_files, check_vocabulary, usable_tokenizer
    from alignment.estimating import windows
    from alignment.estimating.seen import Lengths, config_of
    from alignment.estimating.windows import Prompts
    from alignment.preflight.findings import Looked, Start, tell, told
    from alignment.preflight.rows import SOME, look, tell_unknown

DROPPED = "dropped.jsonl"


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and workers with it
    order = read_json(Path(arguments[0]))
    experiment = Experiment.model_validate(order["experiment"])
    with told("model"):
        start = _start(experiment, order["stored"])
        if order["fit"] == "look":
            with told("adapters", guess=True):
                _adapters(experiment, start, order)
            with told("reward"):
                _rewards(experiment, order["only"])
        seen: dict[str, Lengths] = {}
        heldout: dict[str, Mapping[str, list[Any]]] = {}
        room = Path(arguments[0]).parent
        for name in sorted(order["prepare"], key=lambda name: "heldout" in experiment.pipeline.nodes[name].inputs):
            with told(f"data {name}", folder=room), _folder(room / f"rows-{name}") as folder:
                keeps = experiment.pipeline.nodes[name].inputs.get("heldout", "")
                if keeps in order["stored"]:
                    heldout[keeps] = prompts_of_result(read_jsonl(Path(order["stored"][keeps]) / "heldout.jsonl"))
                looked = look(name, experiment, start, order, folder, heldout.get(keeps, {}))
                seen[name], heldout[name] = looked.lengths, looked.heldout
                _answers(experiment, start, {name: looked.prompts}, order)
        for name, folder in _prepared(experiment, order["stored"]).items():
            with told(f"data {name}", guess=True):
                looked = _stored(experiment, name, folder, start, order["rows"])
                seen[name] = looked.lengths
                _answers(experiment, start, {name: looked.prompts}, order)
        if order["dropped"]:
            with told("dropped"):
                _write_dropped([room / f"rows-{name}" for name in order["prepare"]], Path(order["dropped"]))
        unknown = experiment.pipeline.nodes.keys() - {*order["prepare"], *_prepared(experiment, order["stored"])}
        _answers(experiment, start, dict.fromkeys(unknown), order)
        if order["fit"]:
            with told("memory", guess=True):
                _fit(experiment, start.config, seen, order)
        if order["estimate"]:
            tell_unknown(experiment, order["prepare"])
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
    tell("dropped", "ok", f"{count} rows are in {path}", facts={"rows": count})


def _fit(experiment: Experiment, config: Any, seen: Mapping[str, Lengths], order: dict[str, Any]) -> None:
    """Whether memory and disk are enough."""
    with kept():  # seconds of imports, which other looks need not wait for
        from alignment.estimating import fitting
    if config is None or not fitting.is_estimated(config):
        tell("memory", "note", "is not estimated: the start model has no configuration of a decoder with attention")
        return
    how = order["fit"] == "suggest", order["only"]
    for finding in fitting.findings(experiment, config, seen, *how):
        tell(**finding)


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
        tokenizer = usable_tokenizer(place, settings, name, lambda text: tell("template", "warning", text))
        made = config_of(place)
    if settings.adapter is not None:
        check_adapter(fetch(settings.adapter))
    tell("template", "ok", f"renders turns once and for all, ends answers with {tokenizer.eos_token!r}")
    text = made.get_text_config()
    if rows := getattr(text, "vocab_size", None):
        check_vocabulary(tokenizer, int(rows), name)
        tell("vocabulary", "ok", f"{len(tokenizer)} tokens, {rows} rows of the embedding")
    window = _window(made)
    _windows(experiment, window)
    return Start(Chat(tokenizer, name), made, window)


def _windows(experiment: Experiment, window: int | None) -> None:
    for name, node in experiment.pipeline.nodes.items():
        settings = experiment.stage[node.stage]
        if window is not None and isinstance(settings, Prepare) and settings.max_length > window:
            what = f"max_length {settings.max_length} is more than the model's window of {window} tokens"
            tell("window", "failed", what, where=name, fix=f"stage.{node.stage}.max_length={window}", code=2)
            return
    tell("window", "ok", f"{window or 'no limit of'} tokens")


def _answers(
    experiment: Experiment, start: Start, prompts: Mapping[str, Prompts | None], order: dict[str, Any]
) -> None:
    """Whether answers have room in the window, in stages still to be made that ask what these nodes prepare."""
    if start.window is None or order["show"] or order["fit"] == "suggest":
        return
    for name in windows.asking(experiment):
        data = experiment.pipeline.nodes[name].inputs["data"]
        if data in prompts and (order["only"] is None or name in order["only"]):
            tell(**windows.finding(experiment, name, start.window, prompts[data]))


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
        tell("adapters", "ok", f"{folder} fits the start model")
    for finding in adapting.findings(experiment, start.config, order["only"]):
        tell(**finding)


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
            tell("reward", "ok", f"{name}: {folder}")
