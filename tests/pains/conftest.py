from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.conftest import one_thread  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
