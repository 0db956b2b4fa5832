"""Sweeps on disk: sweep.json, and of each point a run with one training stage, an evaluation and a verdict."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

CREATED = 1_795_395_600.0
BETA, RATE = "stage.dpo.beta", "stage.dpo.learning_rate"


def key(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value if path.suffix == ".jsonl" else [value]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def curve(settings: dict[str, Any], steps: int = 12) -> list[dict[str, float]]:
    slope = float(settings.get(BETA, 0.1)) + 0.02 * float(settings.get("seed", 0))
    return [
        {"step": step, "loss": math.log1p(math.exp(-slope * step)), "rewards/margins": slope * step, "grad_norm": 1.0}
        for step in range(1, steps + 1)
    ]


def write_run(
    store: Path,
    run: str,
    settings: dict[str, Any],
    metrics: dict[str, float] | None,
    *,
    interval: float | None = 0.1,
    states: dict[str, str] | None = None,
    error: str | None = None,
    steps: int = 12,
    verdict: str = "better",
    evaluation: str | None = None,
    terms: dict[str, Any] | None = None,
    reward_model: str | None = None,
) -> None:
    """metrics: of the final model; None: nothing was evaluated. interval: half the width of the verdict's, for every
    metric; None: the pipeline compares nothing. states: node -> state, done where not given; nodes that are not done
    have no result. evaluation: key of the evaluation, where two runs share it. terms: of the reward, and reward_model:
    the key of one that judges, as the evaluation's record has them."""
    shape = {
        "start": ("import_model", {}),
        "dpo": ("dpo", {"model": "start"}),
        "evaluate_dpo": ("evaluate", {"model": "dpo"}),
        "verdict": ("compare", {"start": "evaluate_start", "dpo": "evaluate_dpo"}),
    }
    if metrics is None:
        shape = {name: shape[name] for name in ("start", "dpo")}
    if interval is None:
        shape.pop("verdict", None)
    nodes = []
    for name, (kind, inputs) in shape.items():
        state = (states or {}).get(name, "done")
        mine = evaluation if evaluation and name == "evaluate_dpo" else key(run, name)
        nodes.append({"name": name, "kind": kind, "stage": kind, "key": mine, "inputs": inputs, "state": state,
                      "seconds": 1.0, "error": error if state == "failed" else None})  # fmt: skip
        if state in ("done", "reused"):
            folder = store / "store" / mine[:16]
            asked = {"candidate": "dpo", "baseline": "start"} if kind == "compare" else {}
            record = {"key": mine, "kind": kind, "settings": {"kind": kind, **asked}, "metrics": {}, "files": {}}
            if kind == "evaluate":
                parents = {"model": key(run, "dpo"), **({"reward_model": reward_model} if reward_model else {})}
                record["identity"] = {"groups": {"reward": {"terms": terms or {}}}, "parents": parents}
            write(folder / "record.json", record)
            if kind == "dpo":
                write(folder / "metrics.jsonl", curve(settings, steps))
            if kind == "evaluate":
                write(folder / "evaluation.json", {"metrics": metrics})
            if kind == "compare":
                table = [_row(name, value, interval or 0.0) for name, value in (metrics or {}).items()]
                told = {"verdict": verdict, "sentence": "", "models": ["start", "dpo"], "table": table}
                write(folder / "verdict.json", {**told, "confidence": 0.95, "prompts": 60})
    config: dict[str, Any] = {"name": "fake", "seed": settings.get("seed", 0), "stage": {"dpo": {"kind": "dpo"}}}
    for name, value in settings.items():
        place = config
        for part in name.split(".")[:-1]:
            place = place.setdefault(part, {})
        place[name.split(".")[-1]] = value
    told = {"run": run, "name": "fake", "created": CREATED, "updated": CREATED, "command": "", "config": config}
    write(store / "runs" / run / "run.json", {**told, "final": "dpo", "nodes": nodes})


def _row(metric: str, mean: float, half: float) -> dict[str, Any]:
    values = {
        "dpo": {"mean": mean, "low": mean - half, "high": mean + half},
        "start": {"mean": 0.0, "low": 0, "high": 0},
    }
    return {"metric": metric, "higher_is_better": True, "values": values, "difference": {}}


def write_sweep(store: Path, points: list[dict[str, Any]], name: str = "beta", **facts: Any) -> Path:
    """points: {"run", "settings", ...} as in sweep.json. Returns the sweep's folder."""
    folder = store / "sweeps" / f"{name}-0a1b2c3d"
    told = {
        "sweep": folder.name, "name": name, "created": CREATED, "command": f"alignment run -m name={name}",
        "launcher": "local", "objective": [{"metric": "reward", "direction": "maximize"}],
    }  # fmt: skip
    write(folder / "sweep.json", {**told, "points": points, **facts})
    return folder


def grid(store: Path, rewards: dict[float, list[float]], **facts: Any) -> list[dict[str, Any]]:
    """A point of each beta and seed: beta -> reward of seed 0, 1, ...; KL grows with beta's inverse."""
    points = []
    for beta, few in rewards.items():
        for seed, reward in enumerate(few):
            run, settings = f"run-{beta}-{seed}", {BETA: beta, "seed": seed}
            metrics = {"reward": reward, "kl": 1 / beta + 0.1 * seed, "stop_rate": 0.98, "tokens": 20.0 + seed}
            write_run(store, run, settings, metrics, **facts)
            points.append({"run": run, "overrides": [f"{k}={v}" for k, v in settings.items()], "settings": settings})
    return points
