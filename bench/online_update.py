"""The update of GRPO and RLOO, ours against TRL's: the same answers with the same advantages, G to a prompt.

    python -m bench.online_update [--answers 8] [--tokens 128,256] [--repeats 5] [--docs docs]

Sampling and judging are left out on both sides: what is timed is from the answers to the moved weights, with the pass
over the answers that TRL's RLOO makes before each update, for the log-probs that its ratio starts from. Prompts and
answers are random tokens, as long as each other; the arms take turns, each repeat a new trainer from the same weights.
Losses of all steps must be equal to 1e-4, and gradients' norms to 1e-4 of them: where nothing has moved yet, losses
are about 0 whatever the model. Writes online_update.json and the table of online.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.base_config import _BaseConfig

from alignment.config.execution import Engine
from alignment.config.stages.online import Grpo, Kl, Rloo
from alignment.training import engine
from alignment.training.batching import GlobalBatches
from alignment.training.policy_gradient import PolicyGradientTrainer
from alignment.training.rollouts import Answer
from alignment.training.shape import attention_share
from bench.arms import tokenizer
from bench.pages import fill
from bench.workloads import EOS, FIRST_WORD, PAD, SIZES

TOLERANCE = 1e-4
AS_IT_COMES = "TRL as it comes, 8 rows"
RATE = 1e-4


@dataclass(frozen=True)
class Work:
    kind: str  # grpo | rloo
    tokens: int  # of a prompt, and of an answer
    answers: int  # to a prompt
    prompts: int  # a step
    steps: int
    size: str


class Ticks(transformers.TrainerCallback):
    """When each step ended; the first is the warm-up."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, *given: Any, **kwargs: Any) -> None:
        self.at.append(time.process_time())

    def seconds(self) -> float:
        """Of the CPU, a step after the first: beside other programs it says more than the clock."""
        return (self.at[-1] - self.at[0]) / (len(self.at) - 1)


def start_model(work: Work) -> Any:
    size = SIZES[work.size]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
            max_position_embeddings=size.positions, tie_word_embeddings=False, pad_token_id=PAD, eos_token_id=EOS,
            bos_token_id=None, attn_implementation="sdpa",
        )
    )  # fmt: skip


def texts(work: Work) -> tuple[list[list[int]], dict[int, list[tuple[list[int], float]]]]:
    """Prompts, and the answers to each with their rewards."""
    random, words = np.random.default_rng(1), SIZES[work.size].vocabulary
    draw = lambda: random.integers(FIRST_WORD, words, work.tokens).tolist()  # noqa: E731
    prompts = [draw() for _ in range(work.prompts * work.steps)]
    return prompts, {i: [(draw(), float(random.normal())) for _ in range(work.answers)] for i in range(len(prompts))}


def ours(work: Work, folder: Path, ticks: Ticks) -> Any:
    prompts, answers = texts(work)
    number = {tuple(prompt): at for at, prompt in enumerate(prompts)}
    settings = _settings(work)
    setup = Engine(
        strategy="single", tokens_per_micro_batch=engine.CPU_TOKENS, gradient_checkpointing=False, compile=False,
        offload="none", nvme_path=None, param_persistence_threshold=None, hpz=1, quantized_weights=False,
        quantized_gradients=False, sequence_parallel=1, threads=None, adapt=False, watchdog_s=600.0,
    )  # fmt: skip
    arguments = engine.training_arguments(settings, setup, work.steps, folder)
    arguments.pop("max_length")
    model = start_model(work)
    length = work.tokens * (1 + work.answers)
    batches = GlobalBatches(
        [length] * len(prompts), [1] * len(prompts), work.prompts, work.steps, seed=0,
        tokens_per_micro_batch=engine.CPU_TOKENS, quadratic=attention_share(model.config),
    )  # fmt: skip

    def sample(model: Any, given: Any, noise: Any, alive: Any) -> list[list[Answer]]:
        few = ([ids for ids, _ in answers[number[tuple(prompt)]]] for prompt in given)
        return [[Answer(ids, [0.0] * len(ids), True) for ids in each] for each in few]

    def judge(numbers: Sequence[int], given: Sequence[Answer], alive: Any) -> None:
        for at, (row, answer) in enumerate(zip(numbers, given, strict=True)):
            answer.reward = answers[row][at % work.answers][1]

    trainer = PolicyGradientTrainer(
        settings=settings, model=model, sample=sample, judge=judge, args=_BaseConfig(**arguments), batches=batches,
        widths=[2 * work.tokens * work.answers] * len(prompts), processing_class=tokenizer(),
        on_step=lambda *given: None, train_dataset=[{"prompt_ids": prompt} for prompt in prompts],
        say=lambda line: None,
    )  # fmt: skip
    trainer.add_callback(ticks)
    return trainer


def _settings(work: Work) -> Any:
    common: dict[str, Any] = {
        "global_batch_size": work.prompts, "epochs": 1.0, "max_steps": work.steps, "learning_rate": RATE,
        "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "precision": "fp32", "lora": None, "nonfinite": "halt",
        "max_nonfinite": 1, "seed": 0, "log_every": 1, "spike_alarm": None, "completions_per_prompt": work.answers,
        "max_new_tokens": work.tokens, "sampling_batch_size": 64, "batches_per_rollout": 1, "epochs_per_rollout": 1,
        "truncated": "keep", "truncation_penalty": 1.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "whiten": False,
        "kl": Kl(coefficient=0.0, estimator="k3", place="loss", target=None, gain=0.1, corrected=True),
        "aggregate": "sequence", "resamples": 0,
    }  # fmt: skip
    if work.kind == "grpo":
        return Grpo(kind="grpo", ratio="token", scale_by_std=True, **common)
    return Rloo(kind="rloo", ratio="sequence", **common)


class _Given:
    """Before a TRL trainer: the answers and advantages of ours, cut into its micro-batches."""

    def _send_telemetry(self) -> None:
        pass

    def _prepare_inputs(self: Any, batch: Any) -> dict[str, Any]:
        step, part = divmod(self.seen, self.args.gradient_accumulation_steps)
        self.seen += 1
        size = self.args.per_device_train_batch_size
        if part == 0:
            self.whole = dict(self.given[step])
            if isinstance(self, trl.RLOOTrainer):
                self.whole["old_logps"] = self._whole_logps(self.whole, size)
        return {name: value[part * size : (part + 1) * size] for name, value in self.whole.items()}

    @torch.no_grad()
    def _whole_logps(self: Any, whole: dict[str, Any], size: int) -> Any:
        """Of each answer under the policy as it is, as TRL computes them between sampling and the update."""
        ids, masks = (torch.cat([whole[f"prompt_{part}"], whole[f"completion_{part}"]], 1) for part in ("ids", "mask"))
        kept = whole["completion_ids"].shape[1]
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return self._get_per_token_logps_and_entropies(self.model, ids, masks, kept, size)[0].sum(1)


class TrlGRPO(_Given, trl.GRPOTrainer):
    pass


class TrlRLOO(_Given, trl.RLOOTrainer):
    pass


def theirs(work: Work, folder: Path, ticks: Ticks, given: list[dict[str, Any]], rows: int, checkpointing: bool) -> Any:
    """rows: of a micro-batch."""
    kind, config = {"grpo": (TrlGRPO, trl.GRPOConfig), "rloo": (TrlRLOO, trl.RLOOConfig)}[work.kind]
    whole = work.prompts * work.answers
    args = config(
        output_dir=str(folder), max_steps=work.steps, per_device_train_batch_size=rows, use_cpu=True, bf16=False,
        gradient_accumulation_steps=whole // rows, learning_rate=RATE, lr_scheduler_type="constant",
        num_generations=work.answers, max_completion_length=work.tokens, logging_steps=1, report_to="none",
        disable_tqdm=True, save_strategy="no", weight_decay=0.0, beta=0.0, activation_checkpointing=checkpointing,
        **({"loss_type": "grpo"} if work.kind == "grpo" else {}),
    )  # fmt: skip
    trainer = kind(
        start_model(work), lambda completions, **more: [0.0] * len(completions), args,
        Dataset.from_list([{"prompt": "a"}] * whole), processing_class=tokenizer(), callbacks=[ticks],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.given, trainer.seen = given, 0
    return trainer


def as_given(work: Work, folder: Path) -> tuple[list[dict[str, Any]], list[tuple[float, float]]]:
    """What TRL's losses take, of the rollouts that a run of ours makes; and what that run told."""
    trainer, steps = ours(work, folder, Ticks()), []
    inner = trainer.training_step

    def noted(*given: Any) -> Any:
        loss = inner(*given)
        steps.append(trainer._rollout.groups)
        return loss

    trainer.training_step = noted
    trainer.train()
    prompts, made = texts(work)[0], []
    for groups in steps:
        answers = [answer for group in groups for answer in group.answers]
        ids = torch.tensor([answer.ids for answer in answers])
        asked = torch.tensor([prompts[group.number] for group in groups for _ in group.answers])
        worth = torch.tensor([answer.advantages[0] for answer in answers], dtype=torch.float32)
        made.append(
            {
                "prompt_ids": asked, "prompt_mask": torch.ones_like(asked), "completion_ids": ids,
                "completion_mask": torch.ones_like(ids), "advantages": worth,
            }
        )  # fmt: skip
    return made, told(trainer)


def told(trainer: Any) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each step."""
    return [(row["loss"], float(row["grad_norm"])) for row in trainer.state.log_history if "loss" in row]


def measure(work: Work, repeats: int) -> dict[str, Any]:
    whole = work.prompts * work.answers
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        given, wanted = as_given(work, folder)
        arms: dict[str, Any] = {"ours": lambda ticks: ours(work, folder, ticks)}
        for rows in sorted({1, 2, 4, 8, 16, whole} & set(range(1, whole + 1))):
            arms[f"TRL, {rows} rows"] = lambda ticks, rows=rows: theirs(work, folder, ticks, given, rows, False)
        arms[AS_IT_COMES] = lambda ticks: theirs(work, folder, ticks, given, 8, True)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        apart, norms = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0)
        for _ in range(repeats):
            for arm, make in arms.items():
                ticks = Ticks()
                trainer = make(ticks)
                trainer.train()
                seconds[arm].append(ticks.seconds())
                for (loss, norm), (other, wanted_norm) in zip(told(trainer), wanted, strict=True):
                    apart[arm] = max(apart[arm], abs(loss - other))
                    norms[arm] = max(norms[arm], abs(norm / wanted_norm - 1))
                del trainer
                gc.collect()
    rows = {arm: spread(taken) | {"apart": apart[arm], "norms": norms[arm]} for arm, taken in seconds.items()}
    best = min((row["median"], arm) for arm, row in rows.items() if arm not in ("ours", AS_IT_COMES))[1]
    times = {
        arm: spread([slow / fast for slow, fast in zip(seconds[arm], seconds["ours"], strict=True)])
        for arm in seconds
        if arm != "ours"
    }
    return {"work": vars(work), "arms": rows, "best": best, "times": times}


def spread(taken: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(taken), "low": min(taken), "high": max(taken)}


def cell(row: dict[str, float], unit: str = "") -> str:
    return f"{row['median']:.2f}{unit} ({row['low']:.2f} to {row['high']:.2f})"


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| update | tokens | ours | TRL as it comes | times | TRL at its fastest | times | losses, gradients apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        work, arms = one["work"], one["arms"]
        first, default, best = (cell(arms[name]) for name in ("ours", AS_IT_COMES, one["best"]))
        times = [cell(one["times"][name], "x") for name in (AS_IT_COMES, one["best"])]
        rows = one["best"].removeprefix("TRL, ").replace("1 rows", "1 row")
        apart, norms = (max(row[name] for row in arms.values()) for name in ("apart", "norms"))
        cells = [work["kind"].upper(), f"{work['tokens']} + {work['tokens']}", first, default, times[0]]
        cells += [f"{best}, {rows}", times[1], f"{apart:.0e}, {norms:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kinds", default="rloo,grpo")
    options.add_argument("--tokens", default="128,256")
    options.add_argument("--answers", type=int, default=8)
    options.add_argument("--prompts", type=int, default=1, help="a step")
    options.add_argument("--steps", type=int, default=3, help="a run, of which the first is the warm-up")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--size", default="cpu", choices=sorted(SIZES))
    options.add_argument("--docs", type=Path, default=None, help="folder of online.md; without it nothing is written")
    asked, results = options.parse_args(), []
    torch.set_num_threads(asked.threads)
    for kind in asked.kinds.split(","):
        for tokens in map(int, asked.tokens.split(",")):
            work = Work(kind, tokens, asked.answers, asked.prompts, asked.steps, asked.size)
            results.append(measure(work, asked.repeats))
            print(table(results[-1:]), flush=True)
    if asked.docs is not None:
        asked.docs.mkdir(exist_ok=True)
        (asked.docs / "online_update.json").write_text(json.dumps(results, indent=1) + "\n")
        fill(asked.docs / "online.md", "online_update", table(results))
    every = [row for one in results for row in one["arms"].values()]
    return 0 if all(max(row["apart"], row["norms"]) <= TOLERANCE for row in every) else 1


if __name__ == "__main__":
    raise SystemExit(main())
