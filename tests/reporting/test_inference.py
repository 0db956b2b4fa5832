"""Student's t, intervals and Holm's correction against printed tables and numbers worked out by hand."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest

from alignment.reporting import inference
from alignment.reporting.inference import holm, mean_interval, paired, t_quantile, two_sided, welch

# Upper quantiles of Student's t as printed in tables (e.g. NIST/SEMATECH e-Handbook, 1.3.6.7.2), three decimals.
TABLE = {
    1: (3.078, 6.314, 12.706, 63.657), 2: (1.886, 2.920, 4.303, 9.925), 3: (1.638, 2.353, 3.182, 5.841),
    4: (1.533, 2.132, 2.776, 4.604), 5: (1.476, 2.015, 2.571, 4.032), 9: (1.383, 1.833, 2.262, 3.250),
    20: (1.325, 1.725, 2.086, 2.845), 30: (1.310, 1.697, 2.042, 2.750), 100: (1.290, 1.660, 1.984, 2.626),
}  # fmt: skip


@pytest.mark.parametrize("df", TABLE)
def test_quantiles_are_those_of_the_tables(df: int) -> None:
    found = [t_quantile(p, df) for p in (0.90, 0.95, 0.975, 0.995)]
    assert found == pytest.approx(TABLE[df], abs=5.1e-4)


def test_quantiles_where_they_have_a_closed_form() -> None:
    """df = 1 is Cauchy's: tan(pi (p - 1/2)). df = 2: (2p - 1) / sqrt(2 p (1 - p)). Many: the normal one."""
    for p in (0.51, 0.6, 0.9, 0.975, 0.9995):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-10)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-10)
        assert t_quantile(p, 1e7) == pytest.approx(NormalDist().inv_cdf(p), rel=1e-5)
    assert t_quantile(0.025, 7) == -t_quantile(0.975, 7)
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-9)


def test_between_whole_degrees_of_freedom_quantile_and_tail_undo_each_other() -> None:
    for df in (0.7, 1.5, 2.94, 17.3, 411.8):
        assert two_sided(t_quantile(0.975, df), df) == pytest.approx(0.05, rel=1e-9)
    assert two_sided(0.0, 3) == 1
    assert two_sided(2.776445, 4) == pytest.approx(0.05, rel=1e-6)


def test_the_incomplete_beta_is_the_binomial_s_tail() -> None:
    """I_x(a, n - a + 1) = P(at least a of n succeed): 1 - 0.6^4 - 4 * 0.4 * 0.6^3 = 0.5248 for a = 2 of n = 4."""
    assert inference.incomplete_beta(2, 3, 0.4) == pytest.approx(0.5248, rel=1e-12)
    assert [inference.incomplete_beta(2, 3, x) for x in (0.0, 1.0)] == [0, 1]


def test_an_interval_over_three_seeds() -> None:
    """Mean 0.3, s = 0.1, so 0.3 +- 4.302653 * 0.1 / sqrt(3) = 0.3 +- 0.248414."""
    found = mean_interval([0.2, 0.3, 0.4])
    assert (found["mean"], found["n"]) == (pytest.approx(0.3), 3)
    assert (found["low"], found["high"]) == (pytest.approx(0.051586, abs=1e-6), pytest.approx(0.548414, abs=1e-6))


def test_one_seed_has_no_interval() -> None:
    assert mean_interval([0.3]) == {"mean": 0.3, "low": None, "high": None, "n": 1}


def test_paired_differences() -> None:
    """0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3); t = 2 sqrt(3) with 2 degrees of freedom, whose tail is
    1 - t / sqrt(2 + t^2) = 1 - sqrt(12 / 14)."""
    found = paired([0.3, 0.6, 0.8], [0.2, 0.4, 0.5])
    assert found
    assert (found["mean"], found["df"]) == (pytest.approx(0.2), 2)
    assert found["p"] == pytest.approx(1 - math.sqrt(12 / 14))
    assert (found["low"], found["high"]) == (pytest.approx(-0.048414, abs=1e-6), pytest.approx(0.448414, abs=1e-6))


def test_equal_differences_say_nothing_about_noise() -> None:
    assert paired([0.1, 0.1, 0.1], [0.0, 0.0, 0.0]) is None
    assert welch([0.3, 0.3], [0.1, 0.1]) is None


def test_what_differs_by_rounding_alone_is_equal_and_small_numbers_are_not_taken_for_it() -> None:
    """0.9 - 0.8 and 0.8 - 0.7 are not the same float; 0.1 + 0.2 is not 0.3. Beside 100 the last digits are larger."""
    assert paired([0.9, 0.8], [0.8, 0.7]) is None
    assert paired([100.4, 100.3], [100.3, 100.2]) is None
    assert welch([0.1 + 0.2, 0.3], [0.1, 0.1]) is None
    assert mean_interval([0.1 + 0.2, 0.3])["low"] == mean_interval([0.1 + 0.2, 0.3])["high"]
    small = paired([3e-12, 5e-12, 7e-12], [1e-12, 1e-12, 1e-12])
    assert small and small["p"] == pytest.approx(two_sided(2 * math.sqrt(3), 2))


def test_welch_by_hand() -> None:
    """1..5 (variance 2.5, n 5) against 2, 4, 6 (variance 4, n 3): u = 0.5, v = 4/3, so t = -1 / sqrt(11/6) and
    df = (11/6)^2 / (0.25 / 4 + (16/9) / 2) = 3.361111 / 0.951389 = 3.532847."""
    found = welch([1, 2, 3, 4, 5], [2, 4, 6])
    assert found
    assert found["mean"] == -1
    assert found["df"] == pytest.approx(3.532847, abs=1e-6)
    assert found["p"] == pytest.approx(two_sided(1 / math.sqrt(11 / 6), 3.532847), rel=1e-6)
    assert found["high"] - found["low"] == pytest.approx(2 * t_quantile(0.975, found["df"]) * math.sqrt(11 / 6))


def test_welch_with_equal_variances_and_sizes_is_student_s() -> None:
    """Snedecor & Cochran's rule: then df = 2 (n - 1) and the error is s sqrt(2 / n)."""
    found = welch([1, 2, 3], [4, 5, 6])
    assert found
    assert (found["mean"], found["df"]) == (-3, pytest.approx(4))
    assert found["high"] == pytest.approx(-3 + 2.776445 * math.sqrt(2 / 3), abs=1e-6)


def test_two_intervals_over_prompts() -> None:
    """0.5 +- 0.3 against 0.1 +- 0.4 at 95 %: 0.4 +- 0.5, as 3, 4 and 5 are; p of 1.96 * 0.8 = 1.568 errors."""
    first, second = ({"mean": m, "low": m - h, "high": m + h, "confidence": 0.95} for m, h in ((0.5, 0.3), (0.1, 0.4)))
    found = inference.normal_difference(first, second)
    assert found
    assert (found["low"], found["high"]) == (pytest.approx(-0.1), pytest.approx(0.9))
    assert found["p"] == pytest.approx(2 * (1 - NormalDist().cdf(1.959964 * 0.8)), abs=1e-6)
    assert inference.normal_difference(first, {**second, "low": None}) is None


def test_holm_by_hand() -> None:
    """Holm's own scheme for 0.01, 0.04, 0.03, 0.005 of four: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04 not below it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, 0.5], family=6) == pytest.approx([0.12, 1.0])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_equal_settings_are_seldom_called_worse_than_the_luckiest() -> None:
    """12 equal groups of known noise: with all 66 pairs counted at most 5 % of sweeps call one worse; with the 11
    comparisons to the best alone it is about 17 %, which is why all pairs count."""
    chance, wrong = random.Random(0), {11: 0, 66: 0}
    for _ in range(2000):
        results = sorted((chance.gauss(0, 1) for _ in range(12)), reverse=True)
        ps = [math.erfc((results[0] - one) / math.sqrt(2) / math.sqrt(2)) for one in results[1:]]
        for family in wrong:
            wrong[family] += min(holm(ps, family)) < 0.05
    assert wrong[66] / 2000 < 0.05
    assert wrong[11] / 2000 == pytest.approx(0.17, abs=0.03)
