"""What is measured of one answer, and over all answers of one model. A row is a line of answers.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.texts import repetition as repetition

Row = Mapping[str, Any]
Column = list[float | None]  # one value a prompt; None where the row has none


def kl(log_prob: float, reference_log_prob: float) -> float:
    """log p_model(answer) - log p_reference(answer) in nats, for an answer of the model itself.

    Its mean over answers sampled at temperature 1 estimates the KL divergence KL(model || reference) without bias; one
    answer's value may be negative. Over greedy answers it is the same log-ratio along the most probable path.
    """
    return log_prob - reference_log_prob


def best_of_kl(n: int) -> float:
    """log n - (n - 1) / n in nats: no less than the KL divergence of best-of-n from the model whose answers it chooses
    from, whatever the reward (Stiennon et al. 2020, arXiv:2009.01325; that it is a bound: Beirami et al. 2024,
    arXiv:2401.01879, theorem 1). KL(best-of-n || reference) is at most this and the mean of `kl` over the chosen."""
    return math.log(n) - (n - 1) / n


def mean_nll(log_probs: Sequence[float]) -> float | None:
    """Mean negative log-probability per token in nats; None without tokens."""
    return -sum(log_probs) / len(log_probs) if log_probs else None


def metrics(row: Row) -> dict[str, float | None]:
    """The row's metrics by name, as they stand in tables: reward, its terms, then the rest."""
    values = {
        "reward": row["reward"],
        **row["terms"],
        **{unscaled(name): value for name, value in row.get("unscaled", {}).items()},
        "stop_rate": float(row["finished"]),
        **{name: row[name] for name in ("tokens", "repetition", "kl", "heldout_nll")},
    }
    return {name: None if value is None else float(value) for name, value in values.items()}


def unscaled(name: str) -> str:
    """What a term is called before it is normalised."""
    return f"{name}/unscaled"


def columns(rows: Sequence[Row]) -> dict[str, Column]:
    """Metric -> its value for each row, in the order of the rows."""
    table = [metrics(row) for row in rows]
    return {name: [values[name] for values in table] for name in (table[0] if table else {})}


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Metric -> mean over the rows that have it; metrics that no row has are left out."""
    return {name: sum(values) / len(values) for name, values in _known(rows).items()}


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Metric -> over how many rows its mean is: fewer than all where answers could not be judged."""
    return {name: len(values) for name, values in _known(rows).items()}


def by_source(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Data set -> what `means` and `counts` are over its own rows; nothing where all are of one."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get("source", ""), []).append(row)
    if len(found) < 2:
        return {}
    return {name: {"metrics": means(some), "prompts": counts(some)} for name, some in sorted(found.items())}


def _known(rows: Sequence[Row]) -> dict[str, list[float]]:
    found = {name: [v for v in column if v is not None] for name, column in columns(rows).items()}
    return {name: values for name, values in found.items() if values}
