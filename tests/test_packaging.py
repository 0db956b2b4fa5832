"""A wheel carries conf and launchers, and an installed copy plans from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_wheel_runs_from_any_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {str(f.relative_to(ROOT)) for f in (ROOT / "conf").rglob("*.*")} | {"launchers/local.py"}
    assert {f"alignment/{name}" for name in here} <= names
    pages = ("report.html.jinja", "report.css", "compare.html.jinja", "compare.css")
    assert {f"alignment/reporting/{name}" for name in pages} <= names
    assert not [name for name in names if name.startswith(("tests/", "launchers/", "conf/"))]

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from alignment.cli import main; sys.exit(main())"
    environment = {**os.environ, "ALIGNMENT_CACHE": str(tmp_path / "cache"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(site), "plan", "--json", "experiment=quickstart"],
        cwd=elsewhere, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["nodes"]) == 13
