"""report.html: one file with everything in it, that opens without a network."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from alignment.config.stages.answering import NO_PAIR
from alignment.files import write_text
from alignment.reporting import charts, lineage, prepared, words
from alignment.reporting.gather import TRAINING, Model, Report, Row, Stage, changes, choose, collect, gather, read
from alignment.reporting.reward_models import reward_models
from alignment.reporting.rollouts import rollouts

HERE = Path(__file__).parent
ASKED = (  # of a stage that trains: its caption
    "loss", "beta", "reference_update", "learning_rate", "schedule", "global_batch_size", "epochs", "max_steps",
    "precision",
)  # fmt: skip
TILES = ("reward", "relevance", "stop_rate", "kl")


def write_report(run_folder: Path, store: Path, run: dict[str, Any] | None = None) -> Path:
    """Render <run folder>/report.html from run.json and the stage folders of the store, and return its path.

    run: what run.json would say if it were true at this moment, of a run whose stages are jobs of a cluster.

    What is missing is said in its section, so a report can be written of a run that failed or is still at work.
    Raises InputError when the folder has no run.json.
    """
    path = run_folder / "report.html"
    write_text(path, render(collect(run, store) if run else gather(run_folder, store)))
    return path


def template_of(name: str, **known: Any) -> Any:
    """A page's template: every text is escaped, and what is missing is empty. known: what it may call."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader  # slow to import

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words=words, **known)
    return environment.get_template(name)


def render(report: Report) -> str:
    """The page as text. Every text of models and data is escaped; scripts run only if their hash is the page's own."""
    from markupsafe import Markup

    script = (HERE / "report.js").read_text(encoding="utf-8")
    template = template_of("report.html.jinja", label=words.label)
    return template.render(
        report=report,
        run=report.run,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headline=headline(report),
        tiles=tiles(report),
        table=table(report),
        confidence=words.number(100 * (words.finite((report.verdict or {}).get("confidence")) or 0.95), 0),
        stages_with_curves=learning(report),
        reward_models=reward_models(report),
        reward_kl=charts.reward_against_kl(report.models, metric_rows(report)),
        lengths=charts.lengths(report.models),
        samples=samples(report),
        flows=flows(report),
        timing=timing(report),
        graph=lineage.graph(report),
        config=_config(report.run.get("config") or {}),
    )


def headline(report: Report) -> Row:
    """The verdict; without one, what became of the run: {"class", "word", "claim", "because", "gates"}."""
    failed = [stage for stage in report.stages if stage.state == "failed"]
    if failed:
        why = f": {failed[0].error}" if failed[0].error else "."
        return _headline("bad", "Failed", f"The stage {words.label(failed[0].name)} failed{why}")
    if report.verdict:
        verdict = str(report.verdict.get("verdict") or "")
        class_ = {"better": "good", "worse": "bad", "broken": "bad"}.get(verdict, "same")
        sentence = str(report.verdict.get("sentence") or verdict)
        word = words.BETTER.get(verdict, verdict.capitalize())
        return _headline(class_, word, sentence, report.verdict.get("reasons") or [])
    open_ = [stage for stage in report.stages if stage.state not in words.DONE]
    if open_:
        at_work = next((stage for stage in open_ if stage.state == "running"), open_[0])
        return _headline(
            "same", "Not finished", f"The run has not finished: {words.label(at_work.name)} is {at_work.state}."
        )
    return _headline("same", "Finished", "The run finished. Its pipeline compares no models, so there is no verdict.")


def _headline(class_: str, word: str, sentence: str, gates: list[Row] | None = None) -> Row:
    """The sentence's claim stands large; what follows its colon stands below, unless the gates say it all."""
    claim, _, because = sentence.partition(": ")
    left = because
    for gate in gates or []:
        left = left.replace(str(gate.get("detail")), "")
    if not left.replace(" and ", "").strip(" ,."):
        because = ""
    return {
        "class": class_,
        "word": word,
        "claim": words.with_acronyms(claim.rstrip(".")) + ".",
        "because": because[:1].upper() + because[1:],
        "gates": gates or [],
    }


def metric_rows(report: Report) -> dict[str, Row]:
    """Metric -> its row of the verdict's table; without a comparison the evaluations' means, without intervals."""
    if report.verdict and report.verdict.get("table"):
        return {row["metric"]: row for row in report.verdict["table"]}
    names = dict.fromkeys(name for model in report.models for name in model.metrics)
    return {
        name: {
            "metric": name,
            "higher_is_better": None,
            "values": {
                m.name: {"mean": m.metrics[name], "prompts": m.prompts.get(name)}
                for m in report.models
                if name in m.metrics
            },
            "difference": {},
        }
        for name in names
        if any(words.finite(model.metrics.get(name)) is not None for model in report.models)
    }


def table(report: Report) -> list[Row]:
    """Rows of the models' table: one metric with a cell per model and the small interval chart."""
    rows = []
    for name, row in metric_rows(report).items():
        kind = words.metric(name)
        cells = [_cell(name, row, model) for model in report.models]
        fewer = words.of_prompts(row, report.verdict.get("prompts")) if report.verdict else ""
        better = row.get("higher_is_better")
        arrow = "" if better is None else "↑ higher is better" if better else "↓ lower is better"
        rows.append(
            {
                "title": kind.title,
                "unit": kind.unit,
                "arrow": arrow,
                "fewer": fewer,
                "cells": cells,
                "chart": charts.intervals(row, report.models) if report.verdict else "",
            }
        )
    return rows


def _cell(name: str, row: Row, model: Model) -> Row:
    value = row["values"].get(model.name) or {}
    difference = (row.get("difference") or {}).get(model.name) or {}
    known = words.finite(difference.get("mean")) is not None
    return {
        "model": model,
        "mean": words.metric_value(name, value.get("mean")),
        "interval": words.interval(name, value) or words.of_prompts(value, len(model.answers)),
        "difference": words.metric_value(name, difference.get("mean"), sign=True) if known else "",
        "difference_interval": words.interval(name, difference, sign=True) if known else "",
        "class": words.change_class(difference, row.get("higher_is_better")),
    }


def tiles(report: Report) -> list[Row]:
    """The candidate's four numbers that matter most, each with the baseline's and the difference."""
    if not report.candidate or not report.baseline or report.candidate is report.baseline:
        return []
    found = []
    for name in TILES:
        if row := metric_rows(report).get(name):
            cell, base = _cell(name, row, report.candidate), _cell(name, row, report.baseline)
            if words.NOTHING in (cell["mean"], base["mean"]):
                continue
            found.append(
                {"title": words.metric(name).title, "unit": words.metric(name).unit, "cell": cell, "base": base}
            )
    return found


def learning(report: Report) -> list[Row]:
    """Training stages with their curves: {"stage", "colour", "panels", "facts", "rollouts"}."""
    found = []
    for stage in report.of(*TRAINING):
        colour = report.colours.get(stage.name, 0)
        panels = charts.curves(stage, colour)
        known = {name: stage.settings[name] for name in ASKED if stage.settings.get(name) is not None}
        facts = [(name.replace("_", " "), _in_words(value)) for name, value in known.items()]
        if failed := words.finite(stage.metrics.get("reward_failed")):
            of = words.finite(stage.metrics.get("answers"))  # which older results do not tell
            facts.append(("answers without a reward:", words.count(failed) + (f" of {words.count(of)}" if of else "")))
        seen = rollouts(stage)
        found.append({"stage": stage, "colour": colour, "panels": panels, "facts": facts, "rollouts": seen})
    return found


def _in_words(value: Any) -> Any:
    """A mix of losses, or another few settings in one: sigmoid 1, nll 0.2."""
    if not isinstance(value, dict):
        return value
    return ", ".join(f"{name.replace('_', ' ')} {one}" for name, one in value.items())


def samples(report: Report) -> Row:
    """The chosen prompts, from the biggest loss of reward to the biggest gain, with every model's answer."""
    change = changes(report)
    ids = choose(change)
    answers = {model.name: {str(row.get("id")): row for row in model.answers} for model in report.models}
    if not ids and report.models:
        ids = sorted(answers[report.models[0].name])[:10]
    cards = []
    for number, name in enumerate(ids, start=1):
        rows = [(model, answers[model.name].get(name)) for model in report.models]
        first = next(row for _, row in rows if row)
        given = [{"model": model, "row": row} for model, row in rows if row]
        cards.append({"number": number, "id": name, "first": first, "answers": given, "change": change.get(name)})
    shown = {name: number for number, name in enumerate(ids, start=1)}
    colour = report.candidate.colour if report.candidate else 0
    lost = sum(value < 0 for value in change.values())
    gained = sum(value > 0 for value in change.values())
    strip = charts.change_strip(change, shown, colour) if len(report.models) > 1 else None
    return {"cards": cards, "strip": strip, "lost": lost, "gained": gained, "prompts": len(change)}


def flows(report: Report) -> list[Row]:
    """What each prepare and judge stage took in, kept and dropped, with the reasons."""
    found = []
    for stage in report.of("prepare", "judge"):
        told = read(stage.folder / "data_report.json") if stage.folder else None
        if stage.kind == "judge":
            flow = _judged(stage)
        elif isinstance(told, dict):
            flow = _prepared(told)
        else:
            flow = None
        found.append({"stage": stage, "flow": flow})
    return found


def _prepared(told: Row) -> Row:
    drops, kept = told.get("dropped") or {}, told.get("kept") or {}
    spare = (words.finite(told.get("rows")) or 0) - sum(kept.values()) - sum(drops.values())
    return {
        "unit": "rows",
        "source": _source(told.get("source")),
        "rows": words.count(told.get("rows")),
        "parts": _parts(kept, drops, int(spare)),
        "drops": prepared.faults(drops, told.get("examples")),
        "faulty": prepared.faults(prepared.kept_with(told), told.get("examples_kept")),
        "lengths": _lengths(told.get("lengths") or {}),
        "facts": _flat(
            {
                "format": ", ".join(told.get("formats") or {}),
                "chat_template": (told.get("template_sha256") or "")[:16] or None,
            }
        )
        + prepared.facts(told),
    }


def _source(source: Any) -> str:
    """A source as one text: its own words, or its settings without the nulls."""
    if not isinstance(source, dict):
        return str(source or "")
    return ", ".join(f"{name} {value}" for name, value in source.items() if value is not None)


def _judged(stage: Stage) -> Row | None:
    told = {name: value for name, value in stage.metrics.items() if words.finite(value) is not None}
    unit, kept, drops = _made(told)
    if unit not in told:
        return None
    in_the_bar = {*kept, *(f"dropped_{reason}" for reason in drops)}
    return {
        "unit": unit,
        "source": f"answers of {words.label(stage.inputs.get('data', 'the model'))}",
        "rows": words.count(told[unit]),
        "parts": _parts(kept, drops),
        "drops": [{"reason": reason, "count": words.count(count), "examples": []} for reason, count in _sorted(drops)],
        "faulty": [],
        "lengths": None,
        "facts": _flat({name: value for name, value in told.items() if name not in in_the_bar}),
    }


def _made(told: Row) -> tuple[str, Row, Row]:
    """(what is counted, how many of them were kept for what, and dropped why), by a judge's metrics.

    Prompts, whether they gave pairs, of which one may give several; where no pairs were asked for whether they have a
    best answer; where neither was answers, by their labels.
    """
    prompts, answers = told.get("prompts", 0), told.get("answers", 0)
    if "pairs" in told:
        drops = {reason: told.get(f"dropped_{reason}", 0) for reason in NO_PAIR}
        return "prompts", {"with_pairs": prompts - sum(drops.values())}, drops
    if "best" in told:
        return "prompts", {"with_a_best_answer": told["best"]}, {"prompts_without_best": prompts - told["best"]}
    labelled = {name: told.get(name, 0) for name in ("labelled_good", "labelled_bad")}
    return "answers", labelled, {"not_usable": answers - sum(labelled.values())}


def _sorted(counts: Row) -> list[tuple[str, Any]]:
    return sorted(((k, v) for k, v in counts.items() if v), key=lambda item: (-item[1], item[0]))


def _lengths(lengths: Row) -> Row | None:
    """{"prompt_tokens": {"median": ...}, ...} as a table: {"columns", "rows": [(name, [text])]}."""
    rows = {name: value for name, value in lengths.items() if isinstance(value, dict)}
    columns = list(dict.fromkeys(column for value in rows.values() for column in value))
    cells = [(name.replace("_", " "), [words.number(v.get(c), 0) for c in columns]) for name, v in rows.items()]
    return {"columns": columns, "rows": cells} if cells else None


def _parts(kept: Row, drops: Row, spare: int = 0) -> list[Row]:
    """Pieces of the bar with their share of all rows in percent. spare: good rows that no split asked for."""
    dropped = sum(drops.values())
    total = (sum(kept.values()) + dropped + max(spare, 0)) or 1
    pieces = [(name, count, "kept") for name, count in kept.items() if count]
    pieces += [("not needed", spare, "spare")] if spare > 0 else []
    pieces += [("dropped", dropped, "dropped")] if dropped else []
    return [
        {"name": n.replace("_", " "), "count": words.count(c), "size": c, "class": k, "share": 100 * c / total}
        for n, c, k in pieces
    ]


def _flat(values: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text) pairs."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            text = words.count(value) if words.finite(value) is not None else str(value)
            found.append(((prefix + name).replace("_", " ").replace(".", " · "), text))
    return found


def timing(report: Report) -> Row:
    """Bars of the stages' times in percent of the longest; what the run spent and what reuse saved, in seconds."""
    known = [stage for stage in report.stages if stage.seconds is not None]
    longest = max((stage.seconds or 0 for stage in known), default=0) or 1
    bars = [
        {"stage": s, "share": 100 * (s.seconds or 0) / longest, "colour": report.colours.get(s.name)} for s in known
    ]
    spent = sum(stage.seconds or 0 for stage in known if stage.state != "reused")
    saved = sum(stage.seconds or 0 for stage in known if stage.state == "reused")
    return {"bars": bars, "spent": spent, "saved": saved}


def _config(config: Row) -> str:
    import yaml

    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110) if config else ""
