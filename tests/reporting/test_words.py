from __future__ import annotations

import pytest

from alignment.reporting import words


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.23456, 3, "1.235"),
        (-0.5, 2, "−0.50"),
        (0.00042, 3, "4.20e−4"),
        (12_345_678.0, 3, "1.23e7"),
        (12_345.6, 0, "12,346"),
        (-0.0004, 2, "−4.0e−4"),
        (0.0, 3, "0"),
        (float("nan"), 3, "—"),
        (None, 3, "—"),
        (True, 3, "—"),
    ],
)
def test_numbers_have_a_true_minus_and_no_number_is_a_dash(value: object, digits: int, text: str) -> None:
    assert words.number(value, digits) == text


def test_a_share_is_a_percentage_and_its_difference_is_in_points() -> None:
    assert words.metric_value("stop_rate", 0.983) == "98.3 %"
    assert words.metric_value("stop_rate", 0.25, sign=True) == "+25.0 pts"
    assert words.interval("stop_rate", {"low": 0.1, "high": 0.2}) == "[10.0, 20.0]"
    assert words.metric_value("reward", -0.0001, sign=True) == "0.000", "what rounds to zero has no sign"


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "kind"),
    [
        (0.1, 0.4, True, "good"),
        (0.1, 0.4, False, "bad"),
        (-0.4, -0.1, True, "bad"),
        (-0.4, -0.1, False, "good"),
        (-0.1, 0.4, True, "same"),
        (0.0, 0.4, True, "same"),
        (0.1, 0.4, None, "moved"),
        (None, None, True, "same"),
    ],
)
def test_a_difference_is_marked_only_when_its_interval_excludes_zero(
    low: float | None, high: float | None, higher_is_better: bool | None, kind: str
) -> None:
    assert words.change_class({"mean": 0.2, "low": low, "high": high}, higher_is_better) == kind


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.04, "4.0 s"),
        (59.97, "1 min 00 s"),
        (245, "4 min 05 s"),
        (7_380, "2 h 03 min"),
        (273_600, "3 d 04 h"),
        (None, "—"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


def test_clocks_moments_and_sizes() -> None:
    assert [words.clock(s) for s in (7, 725, 3725, None)] == ["0:07", "12:05", "1:02:05", "-:--"]
    assert words.moment(1_795_395_600) == words.moment("2026-11-23T01:00:00+00:00") == "2026-11-23 01:00 UTC"
    assert [words.size(b) for b in (12, 2_400, 538_000_000)] == ["12 B", "2.4 kB", "538 MB"]
