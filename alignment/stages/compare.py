"""Evaluations of several models on the same prompts -> verdict.json: the table with its intervals, and the verdict."""

from __future__ import annotations

from typing import Any

from alignment.config.stages.answering import Compare
from alignment.errors import InputError
from alignment.evaluation import gates, signals
from alignment.evaluation.statistics import Comparison
from alignment.files import write_json
from alignment.stages.context import StageContext
from alignment.stages.parts import rows_of


def run(context: StageContext) -> dict[str, Any]:
    settings: Compare = context.settings
    answers = {role: rows_of(folder, "answers.jsonl") for role, folder in context.inputs.items()}
    prompts = _check_prompts(answers, settings.baseline)
    columns = {role: signals.columns(rows) for role, rows in answers.items()}
    comparison = Comparison(
        columns, context.experiment.reward.better, settings.confidence, settings.resamples, settings.seed
    )
    if "reward" not in comparison.metrics:
        what = "no prompt has an answer with a reward of every model: there is nothing to compare"
        raise InputError(what, where=context.name, fix="mend the reward: reward_failed of the evaluations counts them")
    context.progress(1, 3, note="intervals", force=True)
    table = comparison.table(settings.baseline)
    context.progress(2, 3, note="verdict")
    relevant = [name for name, term in context.experiment.reward.terms.items() if term.kind == "relevance"]
    cosines = [signals.unscaled(name) if context.experiment.reward.terms[name].normalise else name for name in relevant]
    best_of = {role: rows[0]["best_of"] for role, rows in answers.items() if "best_of" in rows[0]}
    found = gates.verdict(
        comparison,
        candidate=settings.candidate,
        baseline=settings.baseline,
        limits=gates.Limits(settings.max_relevance_drop, settings.min_stop_rate),
        relevance=[name for name in cosines if name in comparison.metrics],
        prompts=comparison.prompts("reward"),  # its interval is of these: an answer may have no reward
        shown=best_of,
    )
    models = sorted(answers, key=lambda role: role != settings.baseline)  # first the baseline, the others as declared
    whole = {**found, "models": models, "table": table, "confidence": settings.confidence, "prompts": prompts}
    write_json(context.folder / "verdict.json", whole | ({"best_of": best_of} if best_of else {}))
    metrics = {f"{r['metric']}_difference": r["difference"][settings.candidate]["mean"] for r in table}
    context.log(prompts, metrics)
    context.progress(3, 3)
    return {**metrics, "prompts": float(prompts), "better": float(found["verdict"] == "better")}


def _check_prompts(answers: dict[str, list[dict[str, Any]]], baseline: str) -> int:
    """Their number. Raises InputError unless all models answered the same prompts in the same order."""
    asked = [(row["id"], row["prompt"]) for row in answers[baseline]]
    for role, rows in answers.items():
        if [(row["id"], row["prompt"]) for row in rows] != asked:  # ids may be row numbers, equal in every data set
            what = f"{role} and {baseline} did not answer the same prompts"
            raise InputError(what, fix="evaluate both on one data set")
    return len(asked)
