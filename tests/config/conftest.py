"""Tests of one module share what is kept for one environment, such as the templates of a sweep's points."""

from __future__ import annotations

import os


def pytest_pyfunc_call() -> None:
    """Without pytest's word for the test at work, in which the environment of each would differ."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)
