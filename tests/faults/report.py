"""The table of docs/reliability.md, from what the last `make faults` came to: python -m tests.faults.report.

With files of results of parts of the matrix as arguments, these take the place of those of the same fault, kind and
engine in docs/reliability.json before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.faults.runs import ENGINES

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"
BEGIN, END = "<!-- made by make faults -->", "<!-- end of what make faults makes -->"
# The kinds of stages, in the order of a cell.
NAMES = {
    "sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward_model": "reward model", "rloo": "RLOO", "grpo": "GRPO",
    "online_dpo": "online DPO", "ppo": "PPO",
}  # fmt: skip


def cell(told: list[dict[str, Any]]) -> str:
    """Kinds that were tried, and those of them that did not end as promised."""
    failed = {row["kind"] for row in told if row["outcome"] == "failed"}
    passed = {row["kind"] for row in told if row["outcome"] == "passed"} - failed
    names = [name for kind, name in NAMES.items() if kind in passed]
    return ", ".join([*names, *(f"**{name} fails**" for kind, name in NAMES.items() if kind in failed)])


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


def put_in(results: list[dict[str, Any]], newer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """results, but of what newer has it is newer's."""
    cells = {(row["fault"], row["kind"], row["engine"]) for row in newer}
    return [row for row in results if (row["fault"], row["kind"], row["engine"]) not in cells] + newer


def main(parts: list[str]) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for part in parts:
        results = put_in(results, json.loads(Path(part).read_text(encoding="utf-8")))
    if parts:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
