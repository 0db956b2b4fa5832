"""The reward-KL frontier of every method on one task, in the spirit of Rafailov et al. 2023, fig. 2.

python -m bench.frontier: one sweep of our own command, three strengths of the pull towards the start times some seeds;
every point is a whole chain from a random model. Writes docs/frontier.json, docs/frontier.svg and the table of
docs/algorithms.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from alignment.files import read_json, write_json, write_text
from bench.frontier import task
from bench.frontier.plot import svg
from bench.pages import fill, once_a_seed, over_seeds

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
PULLS = ("strong", "medium", "weak")
METHODS = {
    "best_of": "best-of-n of the start (n = 2, 4, 16)",
    "sft_chosen": "SFT on the chosen answers",
    "dpo": "DPO", "ipo": "IPO (`ipo_mean`)", "kto": "KTO", "simpo": "SimPO", "rloo": "RLOO", "grpo": "GRPO",
}  # fmt: skip
Points = dict[str, dict[str, list[dict[str, float]]]]  # method -> pull -> a measurement a seed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.frontier", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="whole chains a strength")
    parser.add_argument("--work", type=Path, help="folder for models, rows and the store; kept, and reused")
    asked = parser.parse_args(arguments)
    work = asked.work or Path(tempfile.mkdtemp(prefix="frontier-"))
    run(work, asked.seeds)
    points = gather(work / "store")
    write_json(DOCS / "frontier.json", points)
    write_text(DOCS / "frontier.svg", svg(points, METHODS))
    fill(DOCS / "algorithms.md", "frontier", table(points))


def run(work: Path, seeds: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model").exists():
        task.write_model(work / "model")
    task.write_rows(work / "rows.jsonl", 7600)
    sources = {
        "model.source.path": work / "model", "data.instructions.source.path": work / "rows.jsonl",
        "reward.terms.own.source.path": HERE / "reward.py", "store": work / "store",
    }  # fmt: skip
    command = [sys.executable, "-m", "alignment.cli", "run", "-m", "--config-dir", str(HERE / "conf")]
    command += ["experiment=frontier", f"+pull={','.join(PULLS)}", f"seed={','.join(map(str, range(seeds)))}"]
    subprocess.run([*command, *(f"{key}={value}" for key, value in sources.items())], check=True)


def gather(store: Path) -> Points:
    """Of all runs in the store, the start's under its own name."""
    found: Any = defaultdict(lambda: defaultdict(list))
    for path in sorted(store.glob("runs/*/run.json")):
        told = read_json(path)
        pull = next(word.removeprefix("+pull=") for word in told["command"].split() if word.startswith("+pull="))
        for node in told["nodes"]:
            measured = store / "store" / node["key"][:16] / "evaluation.json"
            if node["name"].startswith("at_") and measured.is_file():
                metrics = read_json(measured)["metrics"]
                kept = {name: metrics[name] for name in ("reward", "kl", "tokens")}
                found[node["name"].removeprefix("at_")][pull].append({"seed": told["config"]["seed"], **kept})
    for rows in (rows for name, pulls in found.items() if name != "start" for rows in pulls.values()):
        once_a_seed(rows, store)
    return json.loads(json.dumps(found))


def at(curve: list[tuple[float, float]], kl: float) -> float:
    """The reward of a method at this KL: straight along the root of KL between its points, as a small tilt of the start
    rises; beyond them that of the last. curve: (kl, reward)."""
    kl = max(kl, 0.0)  # which is estimated from samples
    for (low, first), (high, second) in pairwise(curve):
        if kl <= high:
            return first + (second - first) * (kl**0.5 - low**0.5) / max(high**0.5 - low**0.5, 1e-9)
    return curve[-1][1]


def above(points: Points, method: str, other: str) -> list[float]:
    """By how much a method is above each point of another one of its seed, at that point's KL."""
    seeds = sorted({row["seed"] for rows in points[other].values() for row in rows})
    found = []
    for seed in seeds:
        own = {
            name: [row for rows in points[name].values() for row in rows if row["seed"] == seed]
            for name in (method, other, "start")
        }
        curve = [(0.0, own["start"][0]["reward"]), *sorted((max(row["kl"], 0.0), row["reward"]) for row in own[method])]
        found += [at(curve, row["kl"]) - row["reward"] for row in own[other]]
    return found


def curves(points: Points) -> dict[str, list[tuple[float, float]]]:
    """method -> (mean KL, mean reward) from the start on, by rising KL."""
    start = [row for rows in points["start"].values() for row in rows]
    origin = (0.0, over_seeds(start, "reward")[0])
    return {
        method: [
            origin,
            *sorted(
                (max(over_seeds(rows, "kl")[0], 0.0), over_seeds(rows, "reward")[0]) for rows in points[method].values()
            ),
        ]
        for method in METHODS
    }


def table(points: Points) -> str:
    """Means over seeds, with the standard deviation; and the order at one KL that all reach."""
    seeds = len(points["dpo"][PULLS[0]])
    lines = [
        f"Means and standard deviations over {seeds} seeds; reward / KL to the start in nats an answer. The reward of "
        f"the start is {_mean_of(points['start']):.3f}, and the least of all points below {_least(points):.3f}.",
        "",
        "| method | strong pull | medium | weak |",
        "|---|---|---|---|",
    ]
    for method, label in METHODS.items():
        cells = []
        for pull in PULLS:
            (reward, off), (kl, apart) = (over_seeds(points[method][pull], name) for name in ("reward", "kl"))
            cells.append(f"{reward:.3f} ± {off:.3f} / {kl:.2f} ± {apart:.2f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines_of = curves(points)
    common = min(curve[-1][0] for curve in lines_of.values())
    order = sorted(((at(curve, common), METHODS[method]) for method, curve in lines_of.items()), reverse=True)
    told = ", ".join(f"{label} {reward:.3f}" for reward, label in order)
    ahead = above(points, "dpo", "sft_chosen")
    lines += ["", f"At a KL of {common:.2f} nats, which all reach: {told}.", ""]
    lines.append(
        f"DPO less SFT at the KL of each of SFT's {len(ahead)} points, seed by seed: {min(ahead):+.3f} to "
        f"{max(ahead):+.3f}, above it at {sum(one > 0 for one in ahead)}. At its own farthest point SFT's reward is "
        f"{_farthest(points, 'sft_chosen'):.3f}, DPO's {_farthest(points, 'dpo'):.3f}."
    )
    return "\n".join(lines)


def _mean_of(pulls: dict[str, list[dict[str, float]]]) -> float:
    return over_seeds([row for rows in pulls.values() for row in rows], "reward")[0]


def _least(points: Points) -> float:
    return min(row["reward"] for method in METHODS for rows in points[method].values() for row in rows)


def _farthest(points: Points, method: str) -> float:
    return curves(points)[method][-1][1]


if __name__ == "__main__":
    main()
