"""What README and docs tell people to type can be typed."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from alignment.config.compose import compose

SHOWN = re.compile(r"^    alignment (?:run|plan) (?!-m )((?:[^\n\\]|\\\n|\\.)+)", re.MULTILINE)  # -m: values are lists
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = ("experiment=mine", "...", "--config-dir", "$")  # the reader's


def test_every_run_of_the_documentation_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is written, sweeps aside; of the files that it names the code must be there."""
    shutil.copy(ROOT / "tests" / "rewards" / "own_reward.py", tmp_path / "my_reward.py")
    monkeypatch.chdir(tmp_path)
    count = 0
    for page in PAGES:
        for written in SHOWN.findall(page.read_text()):
            words = shlex.split(written.replace("\\\n", " "), comments=True)
            settings = [word for word in words if not word.startswith("--")]
            if not any(own in written for own in OWN):
                compose(settings)
                count += 1
    assert count > 20


ROW = re.compile(r"^\| (\d+) \|.*\[`(test_\w+)`\]\(\.\./(tests/pains/\w+\.py)\) \|$", re.MULTILINE)


def test_every_pain_has_a_test_of_its_name_and_every_such_test_a_row() -> None:
    rows = ROW.findall((ROOT / "docs" / "pains.md").read_text())
    assert sorted(int(number) for number, _, _ in rows) == [*range(1, 26)]
    named = {(test, file) for _, test, file in rows}
    found = {
        (test, str(path.relative_to(ROOT)))
        for path in (ROOT / "tests" / "pains").glob("test_*.py")
        for test in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert named == found


def test_documents_link_to_what_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
