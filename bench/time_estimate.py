"""The estimate of time against the time taken, on this CPU.

    python -m bench.time_estimate cpu|clock [--repeats 3] [--steps 20] [--only 0,2,...] [--docs docs]

Of each case: what is estimated without a calibration (by a measured product of matrices), what is estimated after five
timed steps, and what the steps of a real run take after its first one. Cases take turns; the table has medians.

clock: `alignment check --calibrate`, then `alignment run`, each repeat with a store of its own: what a person sees,
with whatever else the machine does. cpu: the same stages in this process, in seconds of its CPU, which beside other
programs say more than the clock; cases of one process alone. Writes time_estimate.json and a table of estimate.md."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_from_disk

from bench.pages import fill

VOCABULARY = 4000  # rows of the embedding: the tokenizer has fewer
SIZES = {"S": (192, 512, 4), "M": (320, 896, 5)}  # hidden, MLP, layers
ROWS = 400
GOAL = 0.30
PREPARED = {"sft": "prepare_sft", "dpo": "prepare_preference", "kto": "prepare_unpaired"}
PIPELINE = """# @package _global_
defaults:
  - /stage@stage.import_model: import_model
  - /stage@stage.rows: {prepare}
  - /stage@stage.{kind}: {kind}
  - _self_
pipeline:
  nodes:
    start: {{stage: import_model, inputs: {{}}}}
    rows: {{stage: rows, inputs: {{model: start}}}}
    {kind}: {{stage: {kind}, inputs: {{model: start, data: rows}}}}
  final: {kind}
"""


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    size: str
    settings: tuple[str, ...] = ()
    processes: int = 1


FULL = "stage.{kind}.lora=null"
CASES = (
    Case("SFT", "sft", "S", (FULL, "engine.tokens_per_micro_batch=512")),
    Case("SFT, micro-batches of 128", "sft", "S", (FULL, "engine.tokens_per_micro_batch=128")),
    Case("SFT", "sft", "M", (FULL,)),
    Case("SFT, checkpointing", "sft", "M", (FULL, "engine.gradient_checkpointing=true")),
    Case("DPO, LoRA", "dpo", "M"),
    Case("DPO", "dpo", "S", (FULL,)),
    Case("KTO", "kto", "S", (FULL,)),
    Case("SFT, DDP x 2", "sft", "M", (FULL,), processes=2),
    Case("DPO, ZeRO-2 x 2", "dpo", "S", (FULL, "engine=zero2"), processes=2),
)


def write_inputs(folder: Path) -> None:
    """Two start models, rows of very unlike lengths, and pipelines of one stage that trains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import write_tiny_model

    for name, (hidden, inner, layers) in SIZES.items():
        place = write_tiny_model(folder / name)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=2048,
            tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(place)
    random = np.random.default_rng(0)

    def text(median: float) -> str:
        return "".join(random.choice(list("abcdefgh "), int(np.clip(random.lognormal(np.log(median), 0.7), 4, 500))))

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in PREPARED}
    for number in range(ROWS):
        asked, one, other = f"{number} {text(40)}", text(80), text(80)
        rows["sft"].append({"prompt": asked, "completion": one})
        rows["dpo"].append({"prompt": asked, "chosen": one, "rejected": other})
        rows["kto"].append({"prompt": asked, "completion": one, "label": number % 2 == 0})
    (folder / "pipeline").mkdir()
    for kind, prepare in PREPARED.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
        (folder / "pipeline" / f"only_{kind}.yaml").write_text(PIPELINE.format(kind=kind, prepare=prepare))


def settings_of(case: Case, folder: Path, store: Path, steps: int) -> list[str]:
    spread = ["launcher=torchrun", f"launcher.processes={case.processes}"] if case.processes > 1 else []
    if spread and not any(one.startswith("engine=") for one in case.settings):
        spread.append("engine=ddp")
    source = f"{{kind: path, path: {folder / f'{case.kind}.jsonl'}}}"
    data = "instructions" if case.kind == "sft" else "preferences"
    return [
        f"pipeline=only_{case.kind}", "model=path", f"model.source.path={folder / case.size}", "data=path",
        f"data.{data}.source={source}", f"store={store}", "tracking=none", "min_free_gb=0", "engine.threads=1",
        f"stage.rows.dataset={data}", "stage.rows.splits.heldout=0", "stage.rows.splits.prompts=0",
        "stage.rows.max_length=1200", "stage.rows.max_prompt_length=600",
        f"stage.{case.kind}.global_batch_size=8", f"stage.{case.kind}.max_steps={steps + 1}",
        f"stage.{case.kind}.log_every=1", *(one.format(kind=case.kind) for one in case.settings), *spread,
    ]  # fmt: skip


def alignment(*arguments: str, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alignment.cli", *arguments],
        env={**os.environ, "ALIGNMENT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"alignment {' '.join(arguments[:2])}: {done.stdout[-600:]}{done.stderr[-600:]}")
    return done.stdout


def said(case: Case, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    flags = "--json", "--calibrate"
    told = json.loads(alignment("check", "--config-dir", str(folder), *settings, *flags, cache=folder / "cache"))
    return next(one["facts"] for one in told["findings"] if one["check"] == f"time {case.kind}")


def taken(case: Case, settings: Sequence[str], folder: Path) -> list[float]:
    """Seconds of each step of the real run, but for its first."""
    from alignment.config.compose import compose
    from alignment.files import read_jsonl
    from alignment.pipeline.runner import Run

    alignment("run", "--config-dir", str(folder), *settings, cache=folder / "cache")
    os.environ["ALIGNMENT_CACHE"] = str(folder / "cache")
    run = Run(compose(list(settings), (folder,)), "")
    moments = [row["time"] for row in read_jsonl(run.store.result(run.node(case.kind).key) / "metrics.jsonl")]
    return [after - before for before, after in pairwise(moments)]


def by_clock(case: Case, folder: Path, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-store-") as store:
        settings = settings_of(case, folder, Path(store), steps)
        told = said(case, settings, folder)
        seconds = taken(case, settings, folder)
    each = sum(seconds) / len(seconds)
    return {
        "by_figures_s": told["step_s"] / told["scale"], "calibrated_s": told["step_s"], "taken_s": each,
        "steps": len(seconds), "tokens": told["tokens"] / told["steps"], "operations": told["operations"],
    }  # fmt: skip


def by_cpu(case: Case, folder: Path, steps: int) -> dict[str, float]:
    from transformers import AutoConfig

    from alignment.config.compose import compose
    from alignment.estimating import calibration, hardware
    from alignment.estimating.layout import layout_of
    from alignment.estimating.machine import machine_of
    from alignment.estimating.time import Stage, estimate
    from alignment.estimating.work import records_of

    experiment = compose(settings_of(case, folder, folder / "kept", steps), (folder,))
    inputs, settings = prepared(case, experiment, folder), experiment.stage[case.kind]
    start = inputs["model"] / "model"
    device = hardware.device(experiment.hardware, "fp32", here=True, threads=1)
    records = records_of(settings, load_from_disk(str(inputs["data"] / "train")))
    config, where = AutoConfig.from_pretrained(start), (machine_of(experiment, case.kind), (1, 1))
    layout = layout_of(settings, experiment.engine, config, records, *where)
    stage = Stage(settings, config, records, layout)
    few = replace(stage, settings=settings.model_copy(update={"max_steps": 6}))
    made = calibration.calibrated(few, cpu_seconds(case, experiment, few.settings, inputs), device)
    assert made is not None
    seconds = cpu_seconds(case, experiment, settings, inputs)
    found = estimate(stage, len(records), len(seconds), device, made.scale)
    return {
        "by_figures_s": found.step_s / made.scale, "calibrated_s": found.step_s,
        "taken_s": sum(seconds) / len(seconds), "steps": len(seconds), "tokens": found.tokens / found.steps,
        "operations": found.operations,
    }  # fmt: skip


def prepared(case: Case, experiment: Any, folder: Path) -> dict[str, Path]:
    """The results of the stages before, made once."""
    from alignment.calibrating import Silent
    from alignment.pipeline.runner import Run, bring
    from alignment.signals import Listener

    os.environ["ALIGNMENT_CACHE"] = str(folder / "cache")
    run = Run(experiment, "")
    for name in ("start", "rows"):
        bring(run, run.node(name), Silent(), Listener())
    return {role: run.store.result(run.node(name).key) for role, name in (("model", "start"), ("data", "rows"))}


def cpu_seconds(case: Case, experiment: Any, settings: Any, inputs: dict[str, Path]) -> list[float]:
    """Of each step of the stage, but for its first, run in this process."""
    from alignment.stages.context import StageContext

    moments: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-stage-") as folder:
        context = StageContext(
            name=case.kind, run="bench", key="0" * 64, folder=Path(folder), settings=settings, experiment=experiment,
            inputs=inputs, listeners=[lambda step, metrics: moments.append(time.process_time())],
        )  # fmt: skip
        with redirect_stdout(StringIO()):
            importlib.import_module(f"alignment.stages.{case.kind}").run(context)
    return [after - before for before, after in pairwise(moments)]


def summed(case: Case, found: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over repeats. error: of each repeat the calibrated estimate over the time taken, less 1."""
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    errors = [one["calibrated_s"] / one["taken_s"] - 1 for one in found]
    figures = [one["by_figures_s"] / one["taken_s"] - 1 for one in found]
    return {
        "case": case.name, "kind": case.kind, "size": case.size, "processes": case.processes, **middle,
        "errors": errors, "error": statistics.median(errors), "error_by_figures": statistics.median(figures),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "stage",
        "model",
        "tokens a step",
        "taken, s a step",
        "after 5 steps",
        "off by",
        "by figures alone",
        "off by",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        spread = f"{row['error']:+.0%} ({min(row['errors']):+.0%} to {max(row['errors']):+.0%})"
        cells = [
            row["case"],
            row["size"],
            f"{row['tokens']:.0f}",
            f"{row['taken_s']:.3f}",
            f"{row['calibrated_s']:.3f}",
        ]
        cells += [spread, f"{row['by_figures_s']:.3f}", f"{row['error_by_figures']:+.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("by", choices=["cpu", "clock"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of the real run that are timed")
    parser.add_argument("--only", default="", help="numbers of cases, from 0")
    parser.add_argument("--docs", type=Path, default=None, help="folder of the pages; none = print alone")
    given = parser.parse_args()
    measure = by_cpu if given.by == "cpu" else by_clock
    cases = [CASES[int(one)] for one in given.only.split(",") if one] or list(CASES)
    cases = [case for case in cases if case.processes == 1 or given.by == "clock"]
    found: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="bench-time-") as name:
        write_inputs(Path(name))
        for _ in range(given.repeats):
            for case in cases:
                try:
                    found[case].append(measure(case, Path(name), given.steps))
                except RuntimeError as error:  # of the other cases the hour is not lost
                    print(f"{case.name} failed: {error}", file=sys.stderr, flush=True)
                    continue
                print(json.dumps(summed(case, found[case])), flush=True)
    rows = [summed(case, some) for case, some in found.items() if some]
    print(table(rows))
    if given.docs is not None:
        place = given.docs / "time_estimate.json"
        told = json.loads(place.read_text()) if place.is_file() else {"goal": GOAL}
        place.write_text(json.dumps({**told, given.by: {"repeats": given.repeats, "cases": rows}}, indent=1) + "\n")
        fill(given.docs / "estimate.md", f"time-{given.by}", table(rows))


if __name__ == "__main__":
    main()
