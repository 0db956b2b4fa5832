"""What a run would meet, looked at before it begins: `python -m alignment.preflight <order.json>`.

No weights are read and nothing is trained: a login node can do it. Each finding is a line of JSON on stdout, as soon as
it is known: check, state (ok, warning, failed), what, where, fix. The command line shows them (alignment/checking.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from alignment.config.data_checks import FAULTS
from alignment.config.schema import Experiment
from alignment.config.sources import Dataset
from alignment.config.stages.preparing import Prepare
from alignment.errors import AlignmentError, InputError, unusable
from alignment.files import read_json
from alignment.imports import kept

with kept():
    from alignment.data.chat import Chat
    from alignment.data.examples import Reading
    from alignment.data.fetch import fetch
    from alignment.data.gguf import opened
    from alignment.data.models import check_files, check_vocabulary, context_window, usable_tokenizer
    from alignment.data.preparation import check_dropped, divide, judge
    from alignment.data.sources import read_rows
    from alignment.data.writing import describe, spread


def main(arguments: list[str]) -> int:
    order = read_json(Path(arguments[0]))
    experiment = Experiment.model_validate(order["experiment"])
    with _told("model"):
        chat = _model(experiment)
        for name in order["prepare"]:
            with _told(f"data {name}"):
                settings = experiment.stage[experiment.pipeline.nodes[name].stage]
                assert isinstance(settings, Prepare)  # of whom the order is
                _data(name, experiment, settings, chat, order["rows"])
    return 0


def _tell(check: str, state: str, what: str, **more: Any) -> None:
    print(json.dumps({"check": check, "state": state, "what": what, **more}), flush=True)


@contextmanager
def _told(check: str) -> Iterator[None]:
    """What goes wrong in here is a finding; what is inside depends on it, and is left out."""
    try:
        yield
    except AlignmentError as error:
        _tell(check, "failed", error.what, where=error.where, fix=error.fix, code=error.exit_code)
    except OSError as error:
        told = unusable(error)
        _tell(check, "failed", told.what, where=told.where, fix=told.fix, code=told.exit_code)


def _model(experiment: Experiment) -> Chat:
    """Files, tokenizer, tokens, template, vocabulary and window of the start model. Raises AlignmentError."""
    settings = experiment.model
    source = fetch(settings.source)
    name = str(source)
    check_files(source)
    with opened(source) if source.is_file() else nullcontext(source) as place:
        tokenizer = usable_tokenizer(place, settings, name, lambda text: _tell("template", "warning", text))
    _tell("template", "ok", f"renders turns once and for all, ends answers with {tokenizer.eos_token!r}")
    if source.is_dir():
        config = read_json(source / "config.json")
        rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        if rows:
            check_vocabulary(tokenizer, int(rows), name)
            _tell("vocabulary", "ok", f"{len(tokenizer)} tokens, {rows} rows of the embedding")
        _windows(experiment, context_window(source))
    return Chat(tokenizer, name)


def _windows(experiment: Experiment, window: int | None) -> None:
    for name, node in experiment.pipeline.nodes.items():
        settings = experiment.stage[node.stage]
        if window is not None and isinstance(settings, Prepare) and settings.max_length > window:
            what = f"max_length {settings.max_length} is more than the model's window of {window} tokens"
            _tell("window", "failed", what, where=name, fix=f"stage.{node.stage}.max_length={window}", code=2)
            return
    _tell("window", "ok", f"{window or 'no limit of'} tokens")


def _data(name: str, experiment: Experiment, settings: Prepare, chat: Chat, most: int) -> None:
    """The first rows through the whole path: read, recognised, checked, rendered, tokenised; all of them if they are no
    more than `most`, and then split too. Raises AlignmentError."""
    dataset = experiment.data[settings.dataset or ""]
    rows = list(islice(read_rows(fetch(dataset.source, what="data")), _count(dataset, most)))
    if not rows:
        raise InputError("has no rows", where=describe(dataset.source))
    reading = Reading(dataset.format, dataset.columns, settings.task, experiment.checks, chat)
    judged = judge(rows, reading, settings, lambda *a, **k: None)
    whole = len(rows) < most or len(rows) == dataset.limit
    check_dropped(judged, rows[0].file)
    if whole:
        fit, lengths = judged.fit, divide(judged, settings, rows[0].file).parts["train"]
    else:
        fit = lengths = judged.fit
    forms = ", ".join(f"{count} {form}" for form, count in judged.forms.items())
    facts = {
        "read": len(rows), "all": whole, "formats": judged.forms, "fit": len(fit), "dropped": judged.tally.counts,
        "kept_with": judged.tally.kept, "tokens": spread(example.tokens for example in lengths),
    }  # fmt: skip
    dropped = f"dropped: {judged.tally}" if judged.tally.dropped else "none dropped"
    what = f"{'all' if whole else 'the first'} {len(rows)} rows: {forms}; {dropped}"
    state = "warning" if judged.tally.dropped or judged.tally.kept else "ok"
    _tell(f"data {name}", state, what, where=describe(dataset.source), facts=facts)
    first = {one.fault: one for one in reversed(judged.tally.dropped)}
    for fault, one in first.items():
        _tell(f"data {name}", "note", f"{fault}, for instance: {one.why or FAULTS[fault]}", where=one.row.where)


def _count(dataset: Dataset, most: int) -> int:
    return min(most, dataset.limit or most)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
