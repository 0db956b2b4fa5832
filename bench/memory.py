"""Memory estimated and measured: python -m bench.memory [--only 3 5] [--predict] [--write].

Each case is a stage as a run makes it, in a process of its own for each rank, on this machine's CPU: one optimiser step
of two full micro-batches a process, of a random model. Measured is VmHWM of the process that took most.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.pages import fill

SEED = 0
DOCS = Path(__file__).parent.parent / "docs"
OUT, PAGE = DOCS / "memory.json", DOCS / "preflight.md"


def llama(hidden: int, layers: int, vocabulary: int, tied: bool = False) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, vocab_size=vocabulary,
        max_position_embeddings=2048, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


def qwen(hidden: int, layers: int, vocabulary: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=hidden, intermediate_size=hidden * 4, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


def gpt2(hidden: int, layers: int, vocabulary: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=hidden, n_layer=layers, n_head=hidden // 64, vocab_size=vocabulary, n_positions=2048, attn_pdrop=0.0,
        resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "llama 17M": lambda: llama(384, 6, 8000),
    "llama 34M": lambda: llama(512, 8, 8000),
    "qwen2 41M": lambda: qwen(512, 8, 16000),
    "gpt2 38M": lambda: gpt2(512, 8, 24000),
}
SFT, DPO = {"stage": "sft", "model": "llama 34M"}, {"stage": "dpo", "model": "llama 34M"}
TWO = {"tokens": 512, "processes": 2}
CASES: list[dict[str, Any]] = [
    {**SFT, "tokens": 1024},
    {**SFT, "tokens": 2048},
    {**SFT, "tokens": 2048, "gradient_checkpointing": True},
    {**SFT, "tokens": 1024, "lora": True},
    {**SFT, "model": "gpt2 38M", "tokens": 1024},
    {**SFT, "model": "llama 17M", "tokens": 512, "precision": "bf16"},
    {**DPO, "tokens": 1024},
    {**DPO, "model": "qwen2 41M", "tokens": 1024},
    {**DPO, "tokens": 1024, "lora": True},
    {**DPO, "model": "llama 17M", "tokens": 512, "precision": "bf16", "gradient_checkpointing": True},
    {"stage": "kto", "model": "llama 34M", "tokens": 1024},
    {"stage": "reward_model", "model": "llama 34M", "tokens": 1024},
    {**SFT, **TWO, "strategy": "ddp"},
    {**SFT, **TWO, "strategy": "zero1"},
    {**SFT, **TWO, "strategy": "zero2"},
    {**SFT, **TWO, "strategy": "zero3"},
    {**DPO, **TWO, "strategy": "zero2", "model": "llama 17M", "precision": "bf16"},
    {**DPO, **TWO, "strategy": "zero3", "model": "llama 17M", "precision": "bf16"},
]
FITTED = len(CASES)  # by these the formulas were mended; those that follow were measured afterwards
CASES += [
    {"stage": "sft", "model": "qwen2 41M", "tokens": 2048, "lora": True},
    {"stage": "kto", "model": "gpt2 38M", "tokens": 1024},
    {"stage": "reward_model", "model": "qwen2 41M", "tokens": 1024, "lora": True},
    {**DPO, "model": "qwen2 41M", "tokens": 1024, "gradient_checkpointing": True},
    {**DPO, **TWO, "strategy": "zero3"},
    {**DPO, **TWO, "strategy": "ddp", "model": "llama 17M"},
]
STEPS = 1  # the moments are made before the first
LENGTH = {"sft": 160, "kto": 280, "dpo": 280, "reward_model": 280}  # tokens of a record, in the mean


def name_of(case: dict[str, Any]) -> str:
    """As in "dpo, llama 34M, 512 tokens, 2 processes, zero3"."""
    unit = {"tokens": " tokens", "processes": " processes"}
    names = (key if value is True else f"{value}{unit.get(key, '')}" for key, value in case.items())
    return ", ".join(names).replace("gradient_checkpointing", "checkpointing")


def write_model(folder: Path, config: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from bench.arms import tokenizer

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_rows(folder: Path, stage: str, count: int = 64) -> None:
    if folder.exists():
        return
    import numpy as np
    from datasets import Dataset

    random = np.random.default_rng(SEED)

    def tokens(low: int, high: int) -> list[int]:
        return random.integers(5, 7000, random.integers(low, high)).tolist()

    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt, first, second = tokens(20, 60), [*tokens(80, 160), 1], [*tokens(80, 160), 1]
        if stage == "sft":
            rows.append({"input_ids": prompt + first, "labels": [-100] * len(prompt) + first})
        elif stage == "kto":
            own = {"completion_ids": first, "label": number % 2 == 0, "mismatched_ids": second}
            rows.append({"prompt_ids": prompt, **own})
        else:
            rows.append({"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second})
    Dataset.from_list(rows).save_to_disk(folder / "train")


def experiment(case: dict[str, Any]) -> Any:
    from alignment.config.compose import compose

    stage = case["stage"]
    pipeline = {"sft": "sft", "dpo": "dpo", "kto": "kto", "reward_model": "sft_reward_model"}[stage]
    lora = "{rank: 16}" if case.get("lora") else "null"
    overrides = [
        f"pipeline={pipeline}", f"engine={case.get('strategy', 'single')}", "tracking=none",
        f"engine.tokens_per_micro_batch={case['tokens']}",
        f"engine.gradient_checkpointing={case.get('gradient_checkpointing', False)}",
        f"stage.{stage}.precision={case.get('precision', 'fp32')}", f"stage.{stage}.lora={lora}",
        f"stage.{stage}.global_batch_size={_records(case)}", f"stage.{stage}.max_steps={STEPS}",
        f"stage.{stage}.learning_rate=1e-5", "checkpoint.every_minutes=null",
    ]  # fmt: skip
    if case.get("processes", 1) > 1:
        overrides += ["launcher=torchrun", f"launcher.processes={case['processes']}"]
    return compose(overrides)


def _records(case: dict[str, Any]) -> int:
    """Of a step: two full micro-batches on each process, so that the second meets the gradients of the first."""
    return int(1.9 * case["tokens"] / LENGTH[case["stage"]]) * int(case.get("processes", 1))


def measure(case: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Of each process."""
    inputs = folder / "inputs"
    model, data = inputs / case["model"].replace(" ", "_"), inputs / case["stage"]
    if not model.exists():
        write_model(model / "model", MODELS[case["model"]]())
    write_rows(data, case["stage"])
    work = Path(tempfile.mkdtemp(dir=folder))
    order = {"experiment": experiment(case).model_dump(), "stage": case["stage"], "folder": str(work)}
    order["inputs"] = {"model": str(model), "data": str(data)}
    (work / "case.json").write_text(json.dumps(order))
    processes, command = [], [sys.executable, "-m", "bench.memory_worker", str(work / "case.json")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = case.get("processes", 1)
    for rank in range(world):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in told.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment = environment if world > 1 else dict(os.environ)
        with open(work / f"said-{rank}.txt", "w") as said:
            processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT))
    codes = [process.wait(900) for process in processes]
    texts = [(work / f"said-{rank}.txt").read_text() for rank in range(world)]
    if any(codes):
        raise RuntimeError(f"{name_of(case)}: {texts[0][-3000:]}")
    lines = [line for text in texts for line in text.splitlines() if line.startswith("FOUND ")]
    return [json.loads(line[6:]) for line in lines]


def predict(case: dict[str, Any], folder: Path) -> Any:
    """The estimate of the process that takes most, from the rows themselves."""
    import numpy as np
    from datasets import load_from_disk

    from alignment.estimating.machine import Machine
    from alignment.estimating.memory import of_stage
    from alignment.estimating.seen import Lengths
    from alignment.estimating.sizes import footprints_of

    rows, task = load_from_disk(str(folder / "inputs" / case["stage"] / "train")), case["stage"]
    columns = {
        name: np.array([len(value) for value in rows[name]]) for name in rows.column_names if name.endswith("_ids")
    }
    made = experiment(case)
    if task == "sft":
        trained = np.array([sum(label != -100 for label in labels) for labels in rows["labels"]])
        found = Lengths("sft", columns["input_ids"] - trained, columns["input_ids"], trained)
    elif task == "kto":
        answers = columns["completion_ids"]
        found = Lengths("unpaired", columns["prompt_ids"], columns["prompt_ids"] + answers, answers)
    else:
        prompt, both = columns["prompt_ids"], (columns["chosen_ids"], columns["rejected_ids"])
        found = Lengths("preference", prompt, prompt + np.maximum(*both), sum(both))
    node = next(name for name, node in made.pipeline.nodes.items() if node.stage == task)
    sample = footprints_of(made, node, {made.pipeline.nodes[node].inputs["data"]: found})
    return of_stage(made, node, MODELS[case["model"]](), sample, Machine("cpu", None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    parser.add_argument("--out", type=Path, default=OUT, help="what was measured; cases are replaced one by one")
    parser.add_argument("--predict", action="store_true", help="measure nothing: estimate again what was measured")
    parser.add_argument("--write", action="store_true", help="the table into docs/preflight.md")
    given = parser.parse_args()
    kept = json.loads(given.out.read_text()) if given.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for number in given.only or range(len(CASES)):
            case, place = CASES[number], Path(folder)
            name = name_of(case)
            if given.predict and name not in kept:
                continue
            write_rows(place / "inputs" / case["stage"], case["stage"])
            measured = kept[name]["measured"] if given.predict else peak(case, place)
            parts = predict(case, place).parts
            kept[name] = {"measured": measured, "predicted": parts.total, "parts": parts._asdict()}
            given.out.write_text(json.dumps(kept, indent=1) + "\n")
            print(row(name, kept[name]), flush=True)
    if given.write:
        fill(PAGE, "memory", table(kept))


def peak(case: dict[str, Any], folder: Path) -> int:
    """Bytes of the process that took most."""
    return max(int(found["peak"]) for found in measure(case, folder))


def table(kept: dict[str, Any]) -> str:
    """As docs/preflight.md has it."""
    head = ["| configuration | estimated, MB | measured, MB | off by | parts, MB |", "|---|---|---|---|---|"]
    lines = [
        row(name, kept[name]) if number < FITTED else row(f"*{name}*", kept[name])
        for number, name in enumerate(map(name_of, CASES))
        if name in kept
    ]
    return "\n".join([*head, *lines])


def row(name: str, found: dict[str, Any]) -> str:
    largest = sorted(((value, part) for part, value in found["parts"].items() if value), reverse=True)
    parts = ", ".join(f"{part} {value / 1e6:.0f}" for value, part in largest)
    off = found["predicted"] / found["measured"] - 1
    return f"| {name} | {found['predicted'] / 1e6:.0f} | {found['measured'] / 1e6:.0f} | {off:+.1%} | {parts} |"


if __name__ == "__main__":
    main()
