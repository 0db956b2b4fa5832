"""Does reinforcement learning learn: RLOO of the quickstart's model on instructions that a program can check.

python -m bench.verifiable: the quickstart's instruction rows, each with one more demand, `Use the word "river" in your
answer.` or `Answer in at most 8 words.`; RLOO from the start model, whose reward is whether the demand is met; then
both models on prompts that were not trained on. Writes docs/verifiable.json and the table of docs/online.md.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment.files import read_json, read_jsonl, write_json, write_jsonl
from bench.pages import fill, once_a_seed, over_seeds

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
MODELS = {
    "evaluate_start": "start model, one answer",
    "best_of_n": "start model, the best of 4",
    "evaluate_rloo": "after RLOO, one answer",
}
WORDS = (
    "river", "candle", "winter", "engine", "garden", "silver", "mountain", "window", "bread", "music", "paper",
    "shadow", "bridge", "ocean", "letter", "forest", "clock", "mirror", "stone", "honey",
)  # fmt: skip
LENGTHS = (6, 8, 10)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.verifiable", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="runs, each with a split of its own")
    parser.add_argument("--work", type=Path, help="folder for rows and the store; kept, and reused")
    parser.add_argument("settings", nargs="*", help="further settings of the runs, such as stage.rloo.max_steps=10")
    asked = parser.parse_args(arguments)
    work = asked.work or Path(tempfile.mkdtemp(prefix="verifiable-"))
    work.mkdir(parents=True, exist_ok=True)
    rows, store = work / "rows.jsonl", work / "store"
    write_jsonl(rows, demands(_instructions()))
    command = [sys.executable, "-m", "alignment.cli", "run", "-m", "--config-dir", str(HERE / "conf")]
    command += [
        "experiment=verifiable",
        f"data.instructions.source.path={work / 'rows.jsonl'}",
        f"store={work / 'store'}",
    ]
    command += [f"seed={','.join(map(str, range(asked.seeds)))}", *asked.settings]
    subprocess.run(command, check=True)
    found = gather(store)
    write_json(DOCS / "verifiable.json", found)
    fill(DOCS / "online.md", "verifiable", table(found))


def _instructions() -> list[dict[str, Any]]:
    from alignment.config.compose import compose
    from alignment.data.fetch import fetch

    return json.loads(fetch(compose(["experiment=quickstart"]).data["instructions"].source, what="data").read_text())


def demands(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each short instruction without a text to it one prompt, with a word to use or a length to keep by turns."""
    draw = random.Random(0)
    short = [row for row in rows if not row["input"] and len(row["instruction"]) <= 120]
    for number, row in enumerate(short):
        asked = row["instruction"].strip()
        asked += "" if asked[-1] in ".?!" else "."
        if number % 2:
            count = draw.choice(LENGTHS)
            demand, check = (
                f"Answer in at most {count} words.",
                {"kind": "words", "relation": "at_most", "count": count},
            )
        else:
            word = draw.choice(WORDS)
            demand = f'Use the word "{word}" in your answer.'
            check = {"kind": "include", "words": [word]}
        yield {"prompt": f"{asked} {demand}", "completion": row["output"], "checks": [check]}


def gather(store: Path) -> dict[str, list[dict[str, float]]]:
    """Of each model, a measurement a seed: shares of demands that are met, tokens an answer, KL to the start model."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    for path in sorted(store.glob("runs/*/run.json")):
        told = read_json(path)
        for node in told["nodes"]:
            if node["name"] not in MODELS:
                continue
            folder = store / "store" / node["key"][:16]
            met: dict[str, list[float]] = {"word": [], "length": []}
            for row in read_jsonl(folder / "answers.jsonl"):
                kind = "word" if "Use the word" in row["prompt"][-1]["content"] else "length"
                met[kind].append(row["reward"])
            metrics = read_json(folder / "evaluation.json")["metrics"]
            row = {"seed": told["config"]["seed"], "met": metrics["reward"], "prompts": sum(map(len, met.values()))}
            row |= {kind: sum(values) / len(values) for kind, values in met.items()}
            found[node["name"]].append(row | {name: metrics[name] for name in ("tokens", "kl", "repetition")})
    for rows in found.values():
        once_a_seed(rows, store)
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """A row a model: means over seeds, with the standard deviation where there are several."""
    rows = next(iter(found.values()))
    lines = [
        f"{len(rows)} {'seeds' if len(rows) > 1 else 'seed'}, {rows[0]['prompts']} held-out prompts each.",
        "",
        "| | demands met | a word to use | a length to keep | tokens an answer | KL to the start, nats an answer |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in MODELS.items():
        cells = []
        for metric in ("met", "word", "length", "tokens", "kl"):
            mean, off = over_seeds(found[name], metric)
            scale, digits, unit = (1, 1, "") if metric in ("tokens", "kl") else (100, 0, " %")
            apart = f" ± {off * scale:.{digits}f}" if len(rows) > 1 else ""
            cells.append(f"{mean * scale:.{digits}f}{apart}{unit}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
