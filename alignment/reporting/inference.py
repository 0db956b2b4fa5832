"""Means over few seeds, their intervals, and which differences are within noise. Standard library only.

Student's t is exact for normal values however few there are; with two or three seeds that is the case that counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

Row = dict[str, Any]
CONFIDENCE = 0.95
ROUNDING = 1e-9  # of the values' size: what spreads no more than that spreads by how floats are rounded


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the regularised incomplete beta function, for a, b > 0 and x in [0, 1].

    Continued fraction of DLMF 8.17.22, evaluated by Lentz's method; it converges fast for x < (a + 1) / (a + b + 2),
    and the other side is reached by I_x(a, b) = 1 - I_{1-x}(b, a) (DLMF 8.17.4).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(1000):
        m, odd = i // 2, i % 2
        if i == 0:
            step = 1.0
        elif odd:
            step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + step * d) or tiny)
        c = (1 + step / c) or tiny
        fraction *= c * d
        if i and abs(c * d - 1) < 1e-15:
            break
    return math.exp(front) / a * (fraction - 1)


def two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) of Student's t with df > 0 degrees of freedom: I_x(df/2, 1/2) at x = df / (df + t^2) (DLMF 8.17.18
    and Abramowitz & Stegun 26.7.1)."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, 0 < p < 1, by bisection to the last digits of a float."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    tail = 2 * (1 - p)
    low, high = 0.0, 1.0
    while two_sided(high, df) > tail:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, df) > tail else (low, middle)
    return (low + high) / 2


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def variance(values: Sequence[float], size: float | None = None) -> float:
    """Unbiased: divided by n - 1, so n >= 2. Exactly 0 of values that are equal but for rounding.

    size: of the numbers that they were worked out from, by which they are rounded; None: their own.
    """
    if max(values) - min(values) <= ROUNDING * (_size(values) if size is None else size):
        return 0.0
    centre = mean(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)


def _size(values: Sequence[float]) -> float:
    return max(abs(value) for value in values)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Row:
    """{"mean", "low", "high", "n"}: mean +- t_{n-1} s / sqrt(n). Without an interval for n = 1."""
    found: Row = {"mean": mean(values), "low": None, "high": None, "n": len(values)}
    if len(values) > 1:
        half = t_quantile((1 + confidence) / 2, len(values) - 1) * math.sqrt(variance(values) / len(values))
        found.update(low=found["mean"] - half, high=found["mean"] + half)
    return found


def paired(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Row | None:
    """Mean of the first minus mean of the second, n >= 2 pairs, each of one seed, by Student's paired t: {"mean",
    "low", "high", "p", "df"}.

    None if all differences are equal, but for rounding: then nothing is known of the noise between seeds.
    """
    differences = [one - other for one, other in zip(first, second, strict=True)]
    spread = variance(differences, _size([*first, *second]))
    return _by_t(mean(differences), spread / len(differences), len(differences) - 1, confidence)


def welch(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Row | None:
    """Mean of the first minus mean of the second, both of n >= 2, variances not assumed equal: as `paired`.

    df = (u + v)^2 / (u^2 / (n - 1) + v^2 / (m - 1)) with u = s1^2 / n, v = s2^2 / m (Welch 1947, Satterthwaite 1946).
    None if neither has any variance, but for rounding.
    """
    size = _size([*first, *second])
    u, v = variance(first, size) / len(first), variance(second, size) / len(second)
    if u + v <= 0:
        return None
    df = (u + v) ** 2 / (u**2 / (len(first) - 1) + v**2 / (len(second) - 1))
    return _by_t(mean(first) - mean(second), u + v, df, confidence)


def _by_t(difference: float, square_error: float, df: float, confidence: float) -> Row | None:
    if square_error <= 0:
        return None
    error = math.sqrt(square_error)
    half = t_quantile((1 + confidence) / 2, df) * error
    bounds = {"low": difference - half, "high": difference + half}
    return {"mean": difference, **bounds, "p": two_sided(difference / error, df), "df": df}


def normal_quantile(confidence: float) -> float:
    """1.96 for 0.95: how many standard errors the bounds of a two-sided interval lie from the mean."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def standard_error(interval: Row) -> float | None:
    """Half the width of a normal-like interval {"low", "high", "confidence"}, divided by its normal quantile."""
    low, high, confidence = (interval.get(name) for name in ("low", "high", "confidence"))
    if low is None or high is None or not confidence:
        return None
    return (high - low) / 2 / normal_quantile(confidence)


def normal_difference(first: Row, second: Row, confidence: float = CONFIDENCE) -> Row | None:
    """Of two means {"mean", "low", "high", "confidence"} with normal-like intervals: as `paired`, without "df".

    They are taken for independent; where both were measured on the same prompts the result is wider than need be.
    None without both intervals.
    """
    errors = standard_error(first), standard_error(second)
    if errors[0] is None or errors[1] is None or not errors[0] + errors[1]:
        return None
    error = math.hypot(errors[0], errors[1])
    difference = first["mean"] - second["mean"]
    half = normal_quantile(confidence) * error
    p = math.erfc(abs(difference) / error / math.sqrt(2))
    return {"mean": difference, "low": difference - half, "high": difference + half, "p": p}


def holm(ps: Sequence[float], family: int | None = None) -> list[float]:
    """Adjusted p-values in the order given (Holm 1979): p_(i) times (family - i + 1), never falling, at most 1.

    family: how many comparisons there are in all, of which these are given; those that are not are taken to be larger,
    which can only raise the result.
    """
    count = len(ps) if family is None else family
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (count - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted
