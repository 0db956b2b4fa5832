"""The report's section about reward models: what each evaluation of one, or of several together, has found."""

from __future__ import annotations

from typing import Any

from alignment.reporting import words
from alignment.reporting.gather import Report, Row, Stage, read

# name -> title, what to know of it, whether it is a share. In this order; others of evaluation.json are left to it.
SHOWN: dict[str, tuple[str, str, bool]] = {
    "accuracy": ("Accuracy", "pairs whose chosen answer has the higher reward", True),
    "margin": ("Margin", "mean of chosen minus rejected reward", False),
    "heldout_loss": ("Held-out loss", "nats per pair; ln 2 knows nothing", False),
    "ece": ("Calibration error", "how far its chances are from what happens, in the mean", True),
    "mse": ("Squared error", "of the score", False),
    "mse_of_the_mean_score": ("Squared error of the mean score", "who always says that", False),
    "pearson": ("Correlation with the score", f"Pearson, {words.MINUS}1 to 1", False),
    "spearman": ("Rank correlation with the score", f"Spearman, {words.MINUS}1 to 1", False),
    "length_correlation": ("Correlation of reward and length", "all answers", False),
    "score_length_correlation": ("Correlation of score and length", "what the data has", False),
    "length_margin_correlation": ("Correlation of margin and difference in length", "within pairs", False),
    "longer_preferred": ("Prefers the longer answer", "of pairs of unequal lengths", True),
    "longer_chosen": ("Longer answer was chosen", "the same in the data", True),
    "member_accuracy_mean": ("Members' accuracy", "mean of each by itself", True),
    "member_accuracy_min": ("Weakest member's accuracy", "", True),
    "uncertainty": ("Uncertainty", "deviation between members, in the mean", False),
    "uncertainty_right": ("Uncertainty where it is right", "", False),
    "uncertainty_wrong": ("Uncertainty where it is wrong", "", False),
    "uncertainty_auroc": ("Uncertainty tells errors", "chance that a wrong pair has more than a right one", True),
    "uncertainty_error_correlation": ("Rank correlation of uncertainty and error", "", False),
}


def reward_models(report: Report) -> list[Row]:
    """[{"stage", "told": {"rows", "table", "calibration"} or None}], a part for each evaluation."""
    return [{"stage": stage, "told": _told(stage)} for stage in report.of("evaluate_reward")]


def _told(stage: Stage) -> Row | None:
    found = read(stage.folder / "evaluation.json") if stage.folder else None
    metrics = found.get("metrics") if isinstance(found, dict) else None
    if not isinstance(metrics, dict) or not isinstance(found, dict):
        return None
    table = []
    for name, (title, hint, share) in SHOWN.items():
        if words.finite(metrics.get(name)) is not None:
            table.append({"title": title, "hint": hint, "value": _value(metrics[name], share)})
            if name == "accuracy":
                ends = (_value(metrics.get(f"accuracy_{end}"), True) for end in ("low", "high"))
                table[-1]["interval"] = f"[{' to '.join(ends)}]"
    bins = [row for row in found.get("calibration") or [] if isinstance(row, dict)]
    rows, members = (words.finite(metrics.get(name)) for name in ("pairs", "members"))
    return {
        "rows": words.count(rows if rows is not None else metrics.get("rows")),
        "unit": "pairs" if rows is not None else "answers",
        "members": words.count(members) if members else None,
        "table": table,
        "calibration": [{name: _value(row.get(name), True) for name in ("confidence", "accuracy")}
                        | {"pairs": words.count(row.get("pairs"))} for row in bins],
    }  # fmt: skip


def _value(value: Any, share: bool) -> str:
    given = words.finite(value)
    return f"{words.number(100 * given, 1)} %" if share and given is not None else words.number(value)
