"""The table of docs/reliability.md, from what the last `make faults` came to: python -m tests.faults.report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faults.runs import ENGINES

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"
BEGIN, END = "<!-- made by make faults -->", "<!-- end of what make faults makes -->"


def cell(told: list[dict[str, Any]]) -> str:
    """Kinds that were tried, and those of them that did not end as promised."""
    failed = sorted({row["kind"] for row in told if row["outcome"] == "failed"})
    passed = sorted({row["kind"] for row in told if row["outcome"] == "passed"} - set(failed))
    return ", ".join([*(kind.upper() for kind in reversed(passed)), *(f"**{kind.upper()} fails**" for kind in failed)])


def table(results: list[dict[str, Any]]) -> str:
    skipped = sorted({row["fault"] for row in results if row["outcome"] == "skipped"})
    results = [row for row in results if row["outcome"] != "skipped"]
    failed = sum(row["outcome"] == "failed" for row in results)
    minutes = sum(row["seconds"] for row in results) / 60
    cases = f"{len(results)} cases, {failed or 'none'} of which ended otherwise than promised"
    lines = [
        f"{cases}; {minutes:.0f} minutes of runs.",
        "",
        f"| fault | {' | '.join(ENGINES)} |",
        f"|---|{'---|' * len(ENGINES)}",
    ]
    for fault in dict.fromkeys(sorted(row["fault"] for row in results)):
        told = [row for row in results if row["fault"] == fault]
        cells = [cell([row for row in told if row["engine"] == engine]) for engine in ENGINES]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    if skipped:
        lines += ["", f"Not tried, because the machine could not: {'; '.join(skipped)}."]
    return "\n".join(lines)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    made = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
